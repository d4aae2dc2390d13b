"""Real Chinese text in the files that three systems had: from packages of Debian, downloaded once.

    make_corpus.py macrogpt OUTDIR        shard-1.json, shard-2.json: pretty-printed arrays of {"i", "a"}
    make_corpus.py gpt-from-zero OUTDIR   news.jsonl {"ID", "Content"}, zhihu.jsonl {"问", "答"},
                                          crawler.jsonl {"文件名", "段落": [{"内容"}]}
    make_corpus.py baby-llama OUTDIR      wiki.json [{"completion", "source"}], baike.jsonl {"title", "summary",
                                          "sections"}, alpaca.json [{"instruction", "input", "output"}],
                                          held_out.jsonl {"text"}, ceval/dev and ceval/val

Which packages, and under which licences: examples/chinese/README.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.chinese.packages import PACKAGES, fetch, read_package
from examples.chinese.prose import Section, handbook_sections, page_sections
from examples.chinese.questions import commands_of, exam_rows, question_about
from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.storage.disk import Disk, write_atomically

_LARGEST = 1 << 26  # bytes of an unpacked text


class Texts:
    """The sections of all packages, each text once: of handbooks, and of manual pages by page."""

    def __init__(self) -> None:
        self.handbooks: list[Section] = []
        self.pages: list[tuple[str, list[Section]]] = []
        self._seen: set[str] = set()

    def add(self, name: str, content: bytes) -> None:
        """A file of a package, if it is a Chinese text."""
        if name.endswith(".zh-cn.txt.gz"):
            self.handbooks += self._new(handbook_sections(unpacked(name, content)))
        elif "/man/zh_CN/" in name and name.endswith(".gz"):
            sections = self._new(page_sections(unpacked(name, content)))
            if sections:
                self.pages.append((Path(name).name.removesuffix(".gz"), sections))

    def _new(self, sections: Iterator[Section]) -> list[Section]:
        found = []
        for section in sections:
            if section.text not in self._seen:
                self._seen.add(section.text)
                found.append(section)
        return found

    def sections(self) -> Iterator[Section]:
        """All of them."""
        yield from self.handbooks
        for _, sections in self.pages:
            yield from sections


def unpacked(name: str, content: bytes) -> str:
    """The text of a .gz file, of at most _LARGEST bytes."""
    try:
        with gzip.GzipFile(fileobj=BytesIO(content)) as stream:
            text = stream.read(_LARGEST)
    except (OSError, EOFError) as error:
        raise DataError(f"{name} is damaged: {error}") from error
    return text.decode("utf-8", errors="replace").replace("\xa0", " ")


def mixed(texts: Iterable[str]) -> list[str]:
    """The same texts in an order that mixes the packages, on every machine the same."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def macrogpt(texts: Texts) -> dict[str, bytes]:
    """Two shards, as one of the system's downloads would be cut."""
    found = mixed(section.text for section in texts.sections())
    half = len(found) // 2
    shards = {"shard-1.json": found[:half], "shard-2.json": found[half:]}
    return {
        name: json.dumps(
            [{"i": number, "a": text} for number, text in enumerate(shard)],
            ensure_ascii=False, indent=4,
        ).encode()
        for name, shard in shards.items()
    }  # fmt: skip


def gpt_from_zero(texts: Texts) -> dict[str, bytes]:
    """News, crawler and questions; the English corpus is tools/demo_corpus.py's."""
    articles = [section for section in texts.handbooks if not section.asks]
    asked = [section for section in texts.sections() if section.asks]
    pages = [
        (name, [section for section in sections if not section.asks])
        for name, sections in texts.pages
    ]
    return {
        "news.jsonl": lines(
            {"ID": number, "Content": section.text} for number, section in enumerate(articles)
        ),
        "crawler.jsonl": lines(
            {"文件名": name, "段落": [{"行号": n, "内容": s.text} for n, s in enumerate(sections)]}
            for name, sections in pages
            if sections
        ),
        "zhihu.jsonl": lines(
            {"问": section.heading, "答": "\n".join(section.paragraphs)} for section in asked
        ),
    }


HELD_OUT, EXAM, EXAMPLES = 20, 40, 5
"""Every so many-th section of a handbook is kept back; questions of the exam, and its examples."""


def baby_llama(texts: Texts) -> dict[str, bytes]:
    """Wiki, encyclopedia and instructions; what is kept back, and an exam about what commands are for."""
    articles = mixed(section.text for section in texts.handbooks if not section.asks)
    commands = commands_of(texts.pages)
    names = mixed(commands)
    asked = [section for section in texts.sections() if section.asks]
    pairs = [(s.heading, "\n".join(s.paragraphs)) for s in asked]
    pairs += [(question_about(name), f"{commands[name]}。") for name in names]
    return {
        "wiki.json": whole(
            {"completion": text, "source": "handbook"}
            for number, text in enumerate(articles)
            if number % HELD_OUT
        ),
        "held_out.jsonl": lines({"text": text} for text in articles[::HELD_OUT]),
        "baike.jsonl": lines(
            {
                "title": name,
                "summary": "\n".join(sections[0].paragraphs),
                "sections": [{"title": s.heading, "content": "\n".join(s.paragraphs)} for s in sections[1:]],
            }
            for name, sections in texts.pages
        ),
        "alpaca.json": whole(
            {"instruction": question, "input": "", "output": answer} for question, answer in pairs
        ),
        "ceval/dev/commands_dev.csv": exam_rows(commands, names[:EXAMPLES]),
        "ceval/val/commands_val.csv": exam_rows(commands, names[EXAMPLES : EXAMPLES + EXAM]),
        "ceval/subject_mapping.json": b'{"commands": ["Commands", "\\u547d\\u4ee4", "Other"]}\n',
    }  # fmt: skip


def whole(records: Iterable[dict[str, Any]]) -> bytes:
    """One JSON array."""
    return json.dumps(list(records), ensure_ascii=False, indent=1).encode()


def lines(records: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


SHAPES: dict[str, Callable[[Texts], dict[str, bytes]]] = {
    "macrogpt": macrogpt,
    "gpt-from-zero": gpt_from_zero,
    "baby-llama": baby_llama,
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(
        prog="make_corpus.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("outdir", metavar="OUTDIR")
    parser.add_argument("--cache", required=True, help="folder that keeps what was downloaded")
    return parser.parse_args(argv)


def main() -> int:
    """Fetch, read, write."""
    arguments = parse_arguments(sys.argv[1:])
    texts, disk, folder = Texts(), Disk(), Path(arguments.outdir)
    for package in PACKAGES:
        print(f"{package.name} {package.version} ({package.licence}): {package.texts}")
        for name, content in read_package(fetch(package, Path(arguments.cache))):
            texts.add(name, content)
    disk.make_folder(folder)
    for name, content in SHAPES[arguments.shape](texts).items():
        disk.make_folder((folder / name).parent)
        write_atomically(folder / name, content, disk)
        print(f"{folder / name}: {len(content) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))
