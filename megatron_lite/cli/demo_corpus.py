"""Two real corpora from what every Python brings: its documentation and its library's source.

OUTDIR/docs.json: docstrings of the standard library and the topics of `help()`;
OUTDIR/code.json: the source itself.  JSON lines with a `text` key, the same order on every run.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import NoReturn

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.storage.outputs import check_outputs

LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3",
            "encodings"}  # fmt: skip  # tables of characters read like noise
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_PIECE = 4000  # characters
_SHORTEST = 100  # characters; a shorter document says nothing


def source_files() -> Iterator[tuple[str, str]]:
    """Module path and text of every source file of the standard library, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts):
            continue
        try:
            with tokenize.open(path) as file:
                yield name.as_posix(), file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a deliberately broken or unreadable file is no text


def code_documents() -> Iterator[str]:
    """Source files, cut between top-level statements into documents of some 4,000 characters."""
    for path, text in source_files():
        tree = parsed(text)
        lines = [line + "\n" for line in text.split("\n")]
        starts = [first_line(node) for node in tree.body[1:]] if tree is not None else []
        begin = 0
        for end in [*starts, len(lines)]:
            piece = "".join(lines[begin:end])
            if len(piece) >= _PIECE or end == len(lines):
                yield f"# {path}\n{piece}"
                begin = end


def first_line(node: ast.stmt) -> int:
    """Index of the line a statement begins on, decorators included."""
    decorators = node.decorator_list if isinstance(node, DEFINITIONS) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def parsed(text: str) -> ast.Module | None:
    """The syntax tree, or None for a file that is broken on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old files
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def docs_documents() -> Iterator[str]:
    """One document per help topic, per module docstring and per top-level definition's."""
    for name in sorted(topics.topics):
        yield topics.topics[name]
    for path, text in source_files():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        tree = parsed(text)
        if tree is None:
            continue
        yield f"{module}\n\n{ast.get_docstring(tree) or ''}"
        for node in tree.body:
            if isinstance(node, DEFINITIONS):
                yield "\n\n".join(docstrings(node, f"{module}.{node.name}"))


def docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """The docstrings of a definition and all within it, each after its full name."""
    assert isinstance(node, DEFINITIONS)
    found = ast.get_docstring(node)
    if found:
        arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
        yield f"{name}{arguments}\n{found}"
    for child in node.body:
        if isinstance(child, DEFINITIONS):
            yield from docstrings(child, f"{name}.{child.name}")


def write(path: Path, documents: Iterator[str], megabytes: float | None) -> str:
    """Write up to so many megabytes in an order that mixes the modules; returns a line about it."""
    texts = {text for text in documents if len(text) >= _SHORTEST}
    mixed = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    lines, size = [], 0
    for text in mixed:
        line = json.dumps({"text": text}).encode() + b"\n"
        if megabytes is not None and size + len(line) > megabytes * 1e6:
            break
        lines.append(line)
        size += len(line)
    if not lines:
        raise DataError(f"{path}: no text found - does this Python have its library's source?")
    write_atomically(path, b"".join(lines), Disk())
    return f"{path}: {len(lines)} documents, {size / 1e6:.1f} MB"


def parse_arguments() -> argparse.Namespace:
    """The command line; ConfigError for a size that is not positive."""
    parser = ToolParser(prog="demo_corpus.py", description=__doc__)
    parser.add_argument("outdir", metavar="OUTDIR")
    parser.add_argument("--megabytes", type=float, help="at most so much per corpus (all)")
    arguments = parser.parse_args()
    if arguments.megabytes is not None and not arguments.megabytes > 0:
        raise ConfigError(f"--megabytes {arguments.megabytes} must be positive")
    return arguments


def main() -> int:
    """Write both corpora."""
    arguments = parse_arguments()
    folder = Path(arguments.outdir)
    check_outputs("OUTDIR", [folder / "docs.json", folder / "code.json"], Disk())
    Disk().make_folder(folder)
    print(write(folder / "docs.json", docs_documents(), arguments.megabytes))
    print(write(folder / "code.json", code_documents(), arguments.megabytes))
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
