"""A run that was cut anywhere, or into shards, gives the bytes of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from tests.support.preprocess import NULL, TOOL, attempt, call, hashes, job, numbers, write_lines


def test_shards_merged_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [numbers(tmp_path / "a.jsonl", 40), numbers(tmp_path / "b.jsonl", 1, seed=1)]
    write_lines(Path(inputs[1]), {"text": "5 " * 5000, "b": ""})  # some shards have no beginning
    common = ("--input", *inputs, "--json-keys", "text", "b", *NULL, "--append-eod")
    assert call(monkeypatch, *common, "--output-prefix", tmp_path / "whole") == 0
    count = 5
    for index in range(1, count + 1):
        where = ("--output-prefix", tmp_path / "part", "--shard", f"{index}/{count}")
        assert call(monkeypatch, *common, *where) == 0
    for key in ("text", "b"):
        pieces = sorted(tmp_path.glob(f"part_*-of-5_{key}_document.idx"))
        assert len(pieces) == count
        with IndexedDatasetBuilder(tmp_path / f"merged_{key}_document.bin", np.uint16) as builder:
            for piece in pieces:
                builder.add_index(piece.with_suffix(""))
            builder.finalize()
        for suffix in ("bin", "idx"):
            merged = (tmp_path / f"merged_{key}_document.{suffix}").read_bytes()
            assert merged == (tmp_path / f"whole_{key}_document.{suffix}").read_bytes()


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_a_shard_that_is_none_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    source = numbers(tmp_path / "a.jsonl", 3)
    arguments = ("--input", source, "--output-prefix", tmp_path / "x", *NULL, f"--shard={text}")
    assert call(monkeypatch, *arguments) == 2
    assert "I from 1 to N" in capsys.readouterr().err


@pytest.mark.ci
def test_a_crash_at_any_operation_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    source = numbers(tmp_path / "a.jsonl", 4)

    recorded = RecordingDisk()
    attempt(source, tmp_path / "whole", recorded, resume=False)
    expected = hashes(tmp_path / "whole")
    assert len(expected) == 4
    resumed = 0
    for k in range(len(recorded.operations)):
        folder = tmp_path / str(k)
        with pytest.raises(SimulatedCrash):
            attempt(source, folder, FaultyDisk(fail_at=k, crash="raise", tear=True), resume=False)
        complete = [p.name for p in folder.glob("x_*.idx")] if folder.exists() else []
        assert all(hashes(folder)[name] == expected[name] for name in complete)
        resumed += (folder / ".x.partial/journal.json").exists()
        attempt(source, folder, Disk(), resume=True)
        assert hashes(folder) == expected
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert resumed > 20


def test_resume_after_kill_9_gives_the_same_bytes_with_other_workers(tmp_path: Path) -> None:
    source = numbers(tmp_path / "a.jsonl", 3000)
    common = dict(inputs=[source], batch_bytes=4000, disk=Disk())
    preprocess(job(), output_prefix=str(tmp_path / "whole"), workers=1, **common)  # type: ignore[arg-type]
    program = (
        "import os, sys\n"
        "from megatron_lite.config.sections.data import DataConfig\n"
        "from megatron_lite.data.preparing.encode import Job\n"
        "from megatron_lite.data.preparing.preprocess import preprocess\n"
        "from megatron_lite.storage.disk import Disk\n"
        "def stop(summary):\n"
        "    if summary.documents > 1500: os.kill(os.getpid(), 9)\n"
        "preprocess(Job(DataConfig(tokenizer_type='NullTokenizer'), 1000), inputs=[sys.argv[1]],\n"
        "    output_prefix=sys.argv[2], workers=1, disk=Disk(), batch_bytes=4000,\n"
        "    mark_seconds=0, progress=stop)\n"
    )
    prefix = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", program, source, prefix], cwd=TOOL.parents[1])
    assert done.returncode == -9 and not list(tmp_path.glob("killed_*"))
    summary = preprocess(
        job(),
        output_prefix=str(prefix),
        workers=2,
        resume=True,
        **common,  # type: ignore[arg-type]
    )
    assert summary.resumed and summary.documents == 3000
    for suffix in ("bin", "idx"):
        whole = (tmp_path / f"whole_text_document.{suffix}").read_bytes()
        assert (tmp_path / f"killed_text_document.{suffix}").read_bytes() == whole
    again = preprocess(
        job(),
        output_prefix=str(prefix),
        workers=1,
        resume=True,
        **common,  # type: ignore[arg-type]
    )
    assert again.keys == summary.keys  # finished: nothing is done, nothing is refused


def interrupted(prefix: Path, source: str) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    stops = iter([lambda _: None, stop])
    with pytest.raises(KeyboardInterrupt):
        preprocess(
            job(), inputs=[source], output_prefix=str(prefix), workers=1, disk=Disk(),
            batch_bytes=1000, mark_seconds=0, progress=lambda s: next(stops)(s),
        )  # fmt: skip


def test_resume_with_other_settings_is_refused_and_without_it_the_run_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, prefix = numbers(tmp_path / "a.jsonl", 100), tmp_path / "x"
    interrupted(prefix, source)
    arguments = ("--input", source, "--output-prefix", prefix, *NULL)
    assert call(monkeypatch, *arguments, "--append-eod", "--resume") == 2
    assert "--append-eod was False, is True" in capsys.readouterr().err
    assert (tmp_path / ".x.partial/journal.json").exists()
    assert call(monkeypatch, *arguments) == 0
    assert len(IndexedDataset(f"{prefix}_text_document").document_indices) == 101
    assert not (tmp_path / ".x.partial").exists()


def test_two_runs_cannot_write_the_same_files(tmp_path: Path) -> None:
    source, prefix = numbers(tmp_path / "a.jsonl", 100), str(tmp_path / "x")

    def start_second(_: object) -> None:
        with pytest.raises(ConfigError, match="another run is writing"):
            preprocess(job(), inputs=[source], output_prefix=prefix, workers=1, disk=Disk())

    preprocess(
        job(), inputs=[source], output_prefix=prefix, workers=1, disk=Disk(),
        batch_bytes=1000, progress=start_second,
    )  # fmt: skip
    assert len(IndexedDataset(f"{prefix}_text_document").document_indices) == 101
