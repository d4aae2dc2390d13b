"""What cannot be written is refused before anything is read or computed, in every tool."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError, StorageError
from megatron_lite.config.exit import run_tool
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk
from megatron_lite.storage.outputs import check_folder, check_outputs, check_prefix, write_output
from tests.support.extras import needs
from tests.support.places import ROOT

MODEL = ["--num-layers", "1", "--hidden-size", "8", "--num-attention-heads", "1", "--seq-length",
         "8", "--max-position-embeddings", "8", "--micro-batch-size", "1", "--global-batch-size",
         "1", "--train-iters", "1", "--lr", "0.1"]  # fmt: skip
ABSENT = "/no/such/input"  # a tool that looks at its input first names this instead
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]

TOOLS: dict[str, tuple[str, list[str], str]] = {
    # the flag that says where to write; the words before it; what belongs to the name
    "preprocess_data": ("--output-prefix", ["--input", ABSENT, *NULL], ""),
    "merge_datasets": ("--output-prefix", ["--input", ABSENT], ""),
    "convert_flat": ("--output-prefix", [ABSENT, "--eod", "1"], ""),
    "check_dataset": ("--repair", [ABSENT], ""),
    "dataset_stats": ("--plot", [ABSENT], ".png"),
    "report": ("--output", [ABSENT], ".png"),
    "plan": ("--output", [*MODEL, "--hardware", ABSENT], ".json"),
    "plan --draw": ("--draw", [*MODEL, "--hardware", ABSENT], ".svg"),
    "calibrate": ("--output", ["--steps", "1000000"], ".yaml"),
    "ngrams": ("--json", ["--data-path", ABSENT], ".json"),
    "train_tokenizer": ("--output-dir", ["--input", ABSENT, "--vocab-size", "300"], ""),
    "build_index": ("--data-cache-path", [*MODEL, "--data-path", ABSENT, *NULL], ""),
    "convert": ("", [ABSENT], ""),
    "extend_vocabulary": ("", [ABSENT, ABSENT], ""),
    "demo_corpus": ("", [], ""),
    "evaluate": ("--json", ["--load", ABSENT, "--text", ABSENT], ".json"),
}


def call(monkeypatch: pytest.MonkeyPatch, case: str, where: str) -> int:
    flag, words, suffix = TOOLS[case]
    words = [*words, *([flag] if flag else []), where + suffix]
    monkeypatch.setattr(sys, "argv", [case.split()[0], *words])
    return run_tool(importlib.import_module(f"megatron_lite.cli.{case.split()[0]}").main)


@pytest.mark.parametrize("case", TOOLS)
def test_a_place_that_cannot_be_written_is_refused_first(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case in ("dataset_stats", "report"):
        needs("matplotlib")
    (tmp_path / "file").touch()
    wrong: list[tuple[str, int, str]] = [
        (str(tmp_path / "file" / "x"), 5, "is a file"),
        ("/proc/no/x", 5, "/proc/no/x"),
        (str(tmp_path / ("x" * 256)), 2, "too long"),
    ]
    if TOOLS[case][0].endswith("prefix"):
        wrong += [(f"{tmp_path}/new/", 2, "first part of the files' names")]
        (tmp_path / "y_text_document.meta.json").mkdir()
        (tmp_path / "y.idx").mkdir()
        wrong += [(f"{tmp_path}/y", 2, "is a folder")]
    for where, code, message in wrong:
        before = sorted(os.listdir(tmp_path))
        assert call(monkeypatch, case, where) == code
        err = capsys.readouterr().err
        assert err.startswith(f"FATAL[{code}] ") and message in err, err
        assert ABSENT not in err and len(err.splitlines()) == 1
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("case", TOOLS)
def test_a_disk_that_takes_nothing_is_found_first(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if case in ("dataset_stats", "report"):
        needs("matplotlib")
    module = importlib.import_module(f"megatron_lite.cli.{case.split()[0]}")
    monkeypatch.setattr(module, "Disk", lambda: FaultyDisk(fail_at=0, error=28, lasting=True))
    assert call(monkeypatch, case, str(tmp_path / "new" / "x")) == 5
    err = capsys.readouterr().err
    assert "No space left" in err and ABSENT not in err and os.listdir(tmp_path) == []


def test_tools_that_write_look_first() -> None:
    """A new tool is asked, too: who writes, checks."""
    folder = ROOT / "megatron_lite" / "cli"
    writers = ("write_atomically", "write_output", "folder_at_once", "IndexedDatasetBuilder",
               "convert_flat(", "preprocess(", "kind_for(")  # fmt: skip
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        # flags' one file is tracked; chat looks when /save is typed
        if any(word in text for word in writers) and path.stem not in ("flags", "chat"):
            assert path.stem in {case.split()[0] for case in TOOLS}, path


Check = Callable[[Path], object]
PLACES: dict[str, tuple[Check, type[Exception], str]] = {
    "empty": (lambda f: check_outputs("--x", [""], Disk()), ConfigError, "--x .empty. is no file"),
    "folder": (lambda f: check_outputs("--x", [f], Disk()), ConfigError, "is a folder"),
    "slash": (lambda f: check_outputs("--x", [f"{f}/a/"], Disk()), ConfigError, "is no file's name"),
    "dots": (lambda f: check_outputs("--x", [f"{f}/.."], Disk()), ConfigError, "is no file's name"),
    "pipe": (lambda f: (os.mkfifo(f / "p"), check_outputs("--x", [f / "p"], Disk())),
             ConfigError, "is a device or a pipe"),
    "device": (lambda f: check_outputs("--x", ["/dev/stdout"], Disk()), ConfigError, "is no file"),
    "NUL": (lambda f: check_outputs("--x", [f"{f}/a\0b"], Disk()), ConfigError, "NUL"),
    "long": (lambda f: check_outputs("--x", [f / ("é" * 130)], Disk()), ConfigError, "too long"),
    "long path": (lambda f: check_outputs("--x", [f"{f}/" + "d/" * 2100 + "x"], Disk()),
                  ConfigError, "too long"),
    "room": (lambda f: check_outputs("--x", [f / "a"], Disk(), needed=1 << 60), StorageError,
             rf"--x: .* bytes free, but {1 << 60} bytes are needed .* - free some space"),
    "room for a folder": (lambda f: check_folder("--x", f / "a", Disk(), needed=1 << 60),
                          StorageError, "bytes are needed"),
    "prefix": (lambda f: check_prefix("--x", f"{f}/"), ConfigError, "/corpus"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_what_is_wrong_with_a_place_is_said(case: str, tmp_path: Path) -> None:
    check, kind, message = PLACES[case]
    with pytest.raises(kind, match=message):
        check(tmp_path)
    assert os.listdir(tmp_path) in ([], ["p"])


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    paths: Sequence[Path] = [tmp_path / "old", tmp_path / "new" / "deep" / "x"]
    check_outputs("--x", paths, Disk())
    assert os.listdir(tmp_path) == ["old"]
    (tmp_path / "link").symlink_to(tmp_path / "old")
    write_output(tmp_path / "link", b"new", Disk())  # through the link, as open() would
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_text() == "new"
    write_output(paths[1], b"x", Disk())
    assert paths[1].read_bytes() == b"x"
    shutil.rmtree(tmp_path / "new")
