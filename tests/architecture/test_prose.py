"""Docstrings, comments, messages and documents use the field's words, each spelled in one way."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_lite.config.flags.legacy import LEGACY
from megatron_lite.config.flags.parser import spellings
from tests.architecture.source import SOURCES
from tests.support.places import PACKAGE, ROOT

DOCUMENTS = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])

WORDS = {
    r"(?<![\w.])[Mm]icro-?batch(es)?\b(?![\w=(])": "micro batch (in backticks if it is a name)",
    r"\bunder way\b": "in flight, or current",
    r"\b(comput|calculat)\w* (again|once more)\b": "recomputed",
    r"\b(go|goes|going|went|gone) on (with|from|where|after|at|behind)\b": "resume or continue",
    r"\b(take|takes|taking|taken|took) up\b": "resume",
    r"\bgoes on\b|\bwent on\b": "continues, resumes",
    r"\b[Tt]heirs\b": "Hugging Face's, or whose it is",
    r"[Rr]andomness is counters": "the random generator is counter-based",
    r"\b[Nn]obody (waits|follows|measures|listens|watches|speaks|asks)\b": (
        "the fact itself; of a default callback: Default: no callback."
    ),
}
"""What is not written -> what is."""

HEARTBEATS = {r"\b[Bb]eats?\b": "heartbeat"}


def of_source(text: str) -> Iterator[tuple[int, str]]:
    """(line, prose) of every comment, and of every string in which words follow one another."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for line in node.value.splitlines():
                yield node.lineno, line
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def of_document(text: str) -> Iterator[tuple[int, str]]:
    """(line, prose): all but blocks of code."""
    code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            yield number, line


def without_code(line: str) -> str:
    """The line without what stands in backticks, and without flags."""
    return re.sub(r"`[^`]*`|--[\w-]+", "", line)


def prose(path: Path, words: dict[str, str]) -> list[tuple[int, str]]:
    """Of a file in which one of the words occurs at all: most need no parsing."""
    text = path.read_text(encoding="utf-8")
    if not any(re.search(pattern, text) for pattern in words):
        return []
    found = of_source(text) if path.suffix == ".py" else of_document(text)
    return [(number, without_code(line)) for number, line in found]


def found_in(paths: list[Path], words: dict[str, str]) -> list[str]:
    """Each place where a word stands that is not written, with the one to write."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r} - write: {better}"
        for path in paths
        for number, line in prose(path, words)
        for pattern, better in words.items()
        for match in [re.search(pattern, line)]
        if match
    ]


@pytest.mark.parametrize("paths", [SOURCES, DOCUMENTS], ids=["sources", "documents"])
def test_the_fields_words_are_used(paths: list[Path]) -> None:
    assert found_in(paths, WORDS) == []


def test_a_rank_sends_heartbeats() -> None:
    paths = [path for path in SOURCES if path.parent.name == "rendezvous"]
    assert len(paths) > 3
    assert found_in(paths, HEARTBEATS) == []


@cache
def sources() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


def test_a_micro_batch_has_one_name() -> None:
    """`microbatch`, but for the field that is Megatron's flag, and classes in capitals."""
    names = set(re.findall(r"\w*(?:micro_batch|MicroBatches|Microbatch)\w*", sources()))
    of_deepspeed = "train_micro_batch_size_per_gpu"
    assert names <= {"micro_batch_size", "Microbatches", of_deepspeed}


def test_the_glossarys_code_exists() -> None:
    """Names in backticks are defined in the package, flags known, paths there or written in it."""
    text = (ROOT / "docs/GLOSSARY.md").read_text(encoding="utf-8")
    terms = set(re.findall(r"`([^`]+)`", text))
    assert len(terms) > 40
    flags = set(spellings()) | set(LEGACY)
    defined = {
        name
        for found in re.findall(r"\b(?:class|def) (\w+)|\b(\w+): ", sources())
        for name in found
    }

    def exists(term: str) -> bool:
        if term.startswith("--"):
            return term in flags
        if term.isidentifier():
            return term in defined
        return (ROOT / term).exists() or (PACKAGE / term).exists() or term in sources()

    assert sorted(term for term in terms if not exists(term)) == []


def test_the_glossary_explains_a_term_once() -> None:
    text = (ROOT / "docs/GLOSSARY.md").read_text(encoding="utf-8")
    terms = re.findall(r"^- \*\*([^*]+)\*\*", text, re.MULTILINE)
    assert len(terms) > 40
    assert sorted(term for term in set(terms) if terms.count(term) > 1) == []


def test_a_word_that_is_not_written_is_found() -> None:
    source = (
        '"""Goes `under way`\n\nis under way."""\nx = 1  # micro-batch m\ny = "computed again"\n'
    )
    lines = [(number, without_code(line)) for number, line in of_source(source)]
    hits = {
        line for _, line in lines for pattern in WORDS if re.search(pattern, line)
    }  # a name in backticks is not one
    assert hits == {"is under way.", "# micro-batch m", "computed again"}
