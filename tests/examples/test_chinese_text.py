"""The examples' Chinese text: fetched once and verified, read without writing, in the systems' shapes."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
import shlex
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

from examples.chinese import make_corpus, packages
from examples.chinese.packages import Package, fetch, read_package
from examples.chinese.prose import Section, handbook_sections, join_lines, page_sections
from examples.chinese.questions import commands_of, exam_rows
from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import run_tool
from megatron_lite.data.preparing.reading import corpus_texts
from tests.support.places import ROOT

HANDBOOK = """\
第 1 章 系统基础

    本章介绍系统的基础知识，以及如何使用它们的
    各种工具。

    $ ls -l /etc/passwd

1.1. 什么是
外壳？

    外壳是用户与系统之间的一个程序，比如 bash
    和 zsh 都是。

1.2. Nothing translated

    This section is still in English.
"""
PAGE = r""".\" a comment
.TH LS 1
.SH 名称
ls \- 列出目录内容的程序
.SH "DESCRIPTION 描述"
列出\fB指定文件\fP的信息，
默认是当前目录。
.PP
.nf
ls 这不是文章，只是一段代码而已
.fi
.BR 参见手册中的其它部分 (1)
.SH OPTIONS
only English here
.SH "如何列出所有的文件？"
使用选项 \-a 就可以列出所有文件。
"""


def deb(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    """A package of Debian with these files, and other members."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for entry in others:
            tar.addfile(entry)
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": archive.getvalue(),
    }
    whole = b"!<arch>\n"
    for name, content in members.items():
        whole += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        whole += content + b"\n" * (len(content) % 2)
    return whole


CONTENT = deb({
    "./usr/share/man/zh_CN/man1/ls.1.gz": gzip.compress(PAGE.encode()),
    "./usr/share/man/zh_TW/man1/ls.1.gz": gzip.compress(PAGE.replace("文件", "檔案").encode()),
    "./usr/share/doc/handbook.zh-cn.txt.gz": gzip.compress(HANDBOOK.encode()),
})  # fmt: skip
PACKAGE = Package("texts-zh", "1.0", sha256(CONTENT).hexdigest(), "GPL-2+", "two texts")


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An apt-get of its own, which writes down how it was called."""
    folder.mkdir()
    program = folder / "apt-get"
    program.write_text(f'#!/bin/sh\necho "$@" >>"{folder}/called"\n{script}')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return folder / "called"


def test_a_package_is_downloaded_once_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").write_bytes(CONTENT)
    called = stand_in(tmp_path / "bin", f'cp "{tmp_path}/served" {PACKAGE.file}\n', monkeypatch)
    for _ in range(2):
        assert fetch(PACKAGE, tmp_path / "cache").read_bytes() == CONTENT
    assert called.read_text() == "-qq download texts-zh=1.0\n"
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [PACKAGE.file]
    (tmp_path / "cache" / PACKAGE.file).write_bytes(CONTENT + b"x")
    with pytest.raises(DataError, match=r"not .* remove it and start again"):
        fetch(PACKAGE, tmp_path / "cache")


def test_lists_of_its_own_where_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").write_bytes(CONTENT)
    script = f"""case "$*" in
*lists*download*) cp "{tmp_path}/served" {PACKAGE.file} ;;
*download*) echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""
    called = stand_in(tmp_path / "bin", script, monkeypatch)
    fetch(PACKAGE, tmp_path / "cache")
    assert [line.split()[-1] for line in called.read_text().splitlines()] == [
        "texts-zh=1.0", "update", "texts-zh=1.0",
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["no apt-get", "no network"])
def test_what_cannot_be_had_names_the_package_and_the_way_without_it(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "no apt-get":
        monkeypatch.setenv("PATH", str(tmp_path))
        said = "there is no apt-get"
    else:
        stand_in(tmp_path / "bin", 'echo "E: Failed to fetch it" >&2; exit 100\n', monkeypatch)
        said = "E: Failed to fetch it"
    with pytest.raises(ConfigError) as caught:
        fetch(PACKAGE, tmp_path / "cache")
    assert caught.value.exit_code == 2
    for part in ("texts-zh 1.0", said, str(tmp_path / "cache"), "TEXT=FOLDER"):
        assert part in str(caught.value)


def test_a_package_is_read_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, device, hard = (tarfile.TarInfo(name) for name in ("./link", "./device", "./hard"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../up"
    path = tmp_path / "a.deb"
    path.write_bytes(deb({"../../up": b"text", "/etc/away": b"more"}, link, device, hard))
    monkeypatch.chdir(tmp_path)
    assert dict(read_package(path)) == {"../../up": b"text", "/etc/away": b"more"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.deb"]
    path.write_bytes(deb({"large": bytes(1000)}))
    monkeypatch.setattr(packages, "_MOST", 999)
    with pytest.raises(DataError, match="more than a text of a package"):
        dict(read_package(path))


@pytest.mark.parametrize(
    "content", [b"", b"no package at all", CONTENT[:-100], CONTENT[:200], b"!<arch>\n" + b"x" * 80],
    ids=["empty", "another file", "cut off", "cut early", "no header"],
)  # fmt: skip
def test_a_damaged_package_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.deb is (no package|damaged)"):
        dict(read_package(tmp_path / "a.deb"))


def test_prose_is_what_stays_of_a_handbook_and_of_a_page() -> None:
    found = [(section.heading, section.paragraphs) for section in handbook_sections(HANDBOOK)]
    assert found == [
        ("系统基础", ("本章介绍系统的基础知识，以及如何使用它们的各种工具。",)),
        ("什么是外壳？", ("外壳是用户与系统之间的一个程序，比如 bash和 zsh 都是。",)),
    ]
    assert [(section.heading, section.paragraphs) for section in page_sections(PAGE)] == [
        ("名称", ("ls - 列出目录内容的程序",)),
        ("DESCRIPTION 描述", ("列出指定文件的信息，默认是当前目录。", "参见手册中的其它部分 (1)")),
        ("如何列出所有的文件？", ("使用选项 -a 就可以列出所有文件。",)),
    ]
    assert join_lines(["two", "words", "和字"]) == "two words和字"


def texts(path: Path, keys: list[str] | None, template: str | None = None) -> list[str]:
    asked = argparse.Namespace(
        input=[str(path)], json_keys=keys or ["text"], template=template, text_unit=None,
        max_line_mb=1, on_bad_line="error",
    )  # fmt: skip
    return list(corpus_texts(asked))


def test_the_guide_s_commands_make_the_files_that_the_systems_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").write_bytes(CONTENT)
    stand_in(tmp_path / "bin", f'cp "{tmp_path}/served" {PACKAGE.file}\n', monkeypatch)
    monkeypatch.setattr(make_corpus, "PACKAGES", (PACKAGE,))
    monkeypatch.chdir(tmp_path)
    guides = [ROOT / "examples/chinese" / name for name in ("README.md", "README.zh-CN.md")]
    blocks = [re.findall(r"^python .*$", guide.read_text("utf-8"), re.M) for guide in guides]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 3
    for line in blocks[0]:
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        assert run_tool(make_corpus.main) == 0
    folder = tmp_path / "corpus"
    whole = (folder / "shard-1.json").read_text("utf-8")
    assert re.match(r'\[\n {4}\{\n {8}"i": 0,\n {8}"a": "', whole), (
        "pretty-printed, Chinese as it is"
    )
    shards = [texts(folder / f"shard-{n}.json", ["a"]) for n in (1, 2)]
    assert [len(shard) for shard in shards] == [2, 3]
    assert "名称\nls - 列出目录内容的程序" in {*shards[0], *shards[1]}

    assert texts(folder / "news.jsonl", ["Content"]) == [
        "系统基础\n本章介绍系统的基础知识，以及如何使用它们的各种工具。"
    ]
    (page,) = texts(folder / "crawler.jsonl", None, "{段落[].内容}")
    assert page.startswith("名称\nls") and page.count("\n") == 4 and "如何" not in page
    assert texts(folder / "zhihu.jsonl", None, "问：{问}答：{答}") == [
        "问：什么是外壳？答：外壳是用户与系统之间的一个程序，比如 bash和 zsh 都是。",
        "问：如何列出所有的文件？答：使用选项 -a 就可以列出所有文件。",
    ]
    every = "{Content?}\n{段落[].内容?}\n{问?}\n{答?}\n{text?}"  # one pass over all of them
    assert texts(folder / "zhihu.jsonl", None, every)[1].split("\n")[0] == "如何列出所有的文件？"
    assert len(texts(folder / "news.jsonl", None, every)) == 1

    asked = json.loads((folder / "alpaca.json").read_text("utf-8"))
    assert [(one["instruction"], one["output"]) for one in asked] == [
        ("什么是外壳？", "外壳是用户与系统之间的一个程序，比如 bash和 zsh 都是。"),
        ("如何列出所有的文件？", "使用选项 -a 就可以列出所有文件。"),
        ("命令 ls 是做什么的？", "列出目录内容的程序。"),
    ]
    (article,) = texts(folder / "baike.jsonl", None, "{title}：{summary}\n{sections[].content}")
    assert article.startswith("ls.1：ls - 列出目录内容的程序\n列出指定文件的信息")
    (kept_back,) = texts(folder / "held_out.jsonl", ["text"])
    assert kept_back.startswith("系统基础") and (folder / "wiki.json").read_bytes() == b"[]"


def test_an_exam_asks_for_each_command_s_own_description_among_others() -> None:
    pages = [
        (f"c{n}.1", [Section("名称", (f"c{n}, d{n} - 把第 {n} 号文件排成一列。",))])
        for n in range(200)
    ]
    pages += [("x.1", [Section("名称", ("x - the English one",))]), ("y.1", [])]
    commands = commands_of(pages)
    assert len(commands) == 200 and commands["c7"] == "把第 7 号文件排成一列"
    rows = list(csv.DictReader(io.StringIO(exam_rows(commands, list(commands)[:40]).decode())))
    for number, row in enumerate(rows):
        assert row[row["answer"]] == commands[f"c{number}"] and f"c{number} " in row["question"]
        assert len({row[letter] for letter in "ABCD"}) == 4
    assert {sum(row["answer"] == letter for row in rows) for letter in "ABCD"} <= {9, 10, 11}


def test_every_package_stands_in_the_table_with_its_licence() -> None:
    for name in ("README.md", "README.zh-CN.md"):
        rows = (ROOT / "examples/chinese" / name).read_text("utf-8").splitlines()
        for package in packages.PACKAGES:
            assert re.fullmatch("[0-9a-f]{64}", package.sha256)
            assert any(f"| `{package.name}` | {package.version} |" in row for row in rows)
    assert json.dumps([package.licence for package in packages.PACKAGES]).count("GPL-2+") == 3
