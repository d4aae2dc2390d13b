"""Text to token files by the command line: the right bytes, or one clear line and nothing left."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.cli import preprocess_data
from megatron_lite.config.errors import StorageError
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preparing.encode import Job
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.data.tokenizers.training import train_bpe
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk
from tests.support.extras import needs
from tests.support.preprocess import NULL, TOOL, call, hashes, job, write_lines


def test_documents_sentences_and_eods_are_megatrons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(
        tmp_path / "a.json",
        {"text": "1 2 3"},
        {"text": ""},
        {"text": ["4", "", "5 6"]},
        {"text": "7", "other": 1},
    )
    prefix = tmp_path / "out" / "a"
    arguments = ("--input", source, "--output-prefix", prefix, *NULL, "--append-eod")
    assert call(monkeypatch, *arguments, "--dataset-impl", "mmap", "--log-interval", 2) == 0
    ds = IndexedDataset(f"{prefix}_text_document")
    assert [sequence.tolist() for sequence in ds] == [[1, 2, 3, 1000], [4], [5, 6, 1000], [7, 1000]]
    assert ds.document_indices.tolist() == [0, 1, 1, 3, 4]
    assert ds.dtype == np.uint16
    captured = capsys.readouterr()
    assert "4 documents (1 empty), 4 sequences, 10 tokens (3 EOD), uint16" in captured.out
    assert "Processed 4 documents (" in captured.err and "docs/s, " in captured.err


def test_golden_bytes_come_out_of_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_lines(
        tmp_path / "a.json", {"text": "11 12 13"}, {"text": "21 22"}, {"text": "31 32 33 34"}
    )
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "50256", "--append-eod"]
    assert call(monkeypatch, "--input", source, "--output-prefix", tmp_path / "a", *null) == 0
    assert hashes(tmp_path) == {
        "a_text_document.bin": "bc35d075b25d7f63e4c36ad28996f70268d8fb38436e48f50d1ee046fe981143",
        "a_text_document.idx": "a0f36eb2d41fae44730b192eab5e12309fbd9432d5f2617eab3366ecc32e9bac",
    }


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    records = [
        {"a": " ".join(map(str, random.integers(0, 999, n))), "b": [str(n % 7), "", "8 9"]}
        for n in random.integers(0, 30, 300)
    ]
    source = str(write_lines(tmp_path / "a.json", *records))
    found = []
    for workers in (1, 2, 3):
        job = Job(DataConfig(tokenizer_type="NullTokenizer"), 1000, ("a", "b"), append_eod=True)
        folder = tmp_path / str(workers)
        preprocess(
            job,
            inputs=[source, source],
            output_prefix=str(folder / "x"),
            workers=workers,
            disk=Disk(),
            batch_bytes=500,  # many small batches: order matters
        )
        found.append(hashes(folder))
    assert len(found[0]) == 4 and found[0] == found[1] == found[2]
    ds = IndexedDataset(tmp_path / "1" / "x_a_document")
    flat = [[int(word) for word in record["a"].split()] for record in records * 2]
    assert [s.tolist() for s in ds] == [[*words, 1000] for words in flat if words]


def test_a_full_disk_at_any_operation_leaves_nothing_or_whole_pairs(tmp_path: Path) -> None:
    source = str(write_lines(tmp_path / "a.json", {"a": "1 2", "b": "3"}, {"a": "4", "b": "5"}))

    def attempt(folder: Path, disk: Disk) -> None:
        data = DataConfig(tokenizer_type="NullTokenizer")
        preprocess(
            Job(data, 1000, ("a", "b"), append_eod=False),
            inputs=[source],
            output_prefix=str(folder / "x"),
            workers=1,
            disk=disk,
        )

    recorded = RecordingDisk()
    attempt(tmp_path / "whole", recorded)
    first_rename = [operation.kind for operation in recorded.operations].index("rename")
    for k in range(len(recorded.operations)):
        folder = tmp_path / str(k)
        with pytest.raises(StorageError, match="No space left"):
            attempt(folder, FaultyDisk(fail_at=k, error=errno.ENOSPC, tear=True, lasting=True))
        names = os.listdir(folder) if folder.exists() else []
        assert names == [] or k > first_rename
        for key in "ab":
            pair = [f"x_{key}_document.bin", f"x_{key}_document.idx"]
            assert sorted(set(names) & set(pair)) in ([], pair)
        assert not [name for name in names if "partial" in name]


def test_what_is_there_stays_unless_overwrite_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_lines(tmp_path / "a.json", {"text": "1"})
    second = write_lines(tmp_path / "b.json", {"text": "2 3"})
    call(monkeypatch, "--input", first, "--output-prefix", tmp_path / "x", *NULL)
    before = hashes(tmp_path)
    arguments = ("--input", second, "--output-prefix", tmp_path / "x", *NULL)
    assert call(monkeypatch, *arguments) == 2
    assert "--overwrite" in capsys.readouterr().err and hashes(tmp_path) == before
    (tmp_path / "x_text_document.idx").unlink()
    assert call(monkeypatch, *arguments) == 2  # a .bin alone is somebody's, too
    assert call(monkeypatch, *arguments, "--overwrite") == 0
    assert IndexedDataset(tmp_path / "x_text_document")[0].tolist() == [2, 3]


@pytest.mark.parametrize(
    "extra, code, message",
    [
        (["--split-sentences"], 2, "--split-sentences"),
        (["--dataset-impl", "lazy"], 2, "--dataset-impl lazy"),
        (["--workers", "0"], 2, "--workers 0"),
        (["--max-line-mb", "0"], 2, "--max-line-mb 0 must be above 0 and at most 16384"),
        (["--text-unit", "word"], 2, "--text-unit"),
        (["--unknown"], 2, "--unknown"),
        (["--json-keys", "a", "a"], 2, "names a key twice"),
        (["--tokenizer-type", "Nope"], 2, "--tokenizer-type Nope"),
        (["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "/no"], 3, "--vocab-file /no"),
        (["--input", "/no/file"], 3, "--input /no/file does not exist"),
        (["--input", "/dev/null"], 3, "--input /dev/null is no file"),
        (["--output-prefix", "/proc/no/x"], 5, "/proc/no"),
        (["--json-keys", "a/b"], 2, "--json-keys a/b would be a folder"),
    ],
)
def test_wrong_flags_end_with_their_code_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    code: int,
    message: str,
) -> None:
    source = write_lines(tmp_path / "a.json", {"text": "1"})
    arguments = ("--input", source, "--output-prefix", tmp_path / "x", *NULL, *extra)
    assert call(monkeypatch, *arguments) == code
    err = capsys.readouterr().err
    assert err.startswith(f"FATAL[{code}] ") and message in err and len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def workers_of(pid: int) -> list[int]:
    """The processes that multiprocessing started for work (not its resource tracker)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "victim, code", [("worker", 3), ("parent-term", 130), ("parent-int", 130), ("parent-kill", -9)]
)
def test_a_death_ends_everything_soon_with_nothing_under_a_name(
    tmp_path: Path, victim: str, code: int
) -> None:
    line = json.dumps({"text": "1 2 3 4 5 6 7 8 " * 500}) + "\n"
    (tmp_path / "a.json").write_text(line * 6000)
    arguments = ["--input", tmp_path / "a.json", "--output-prefix", tmp_path / "x", *NULL]
    tool = subprocess.Popen(
        [sys.executable, TOOL, *arguments, "--workers", "2"], stderr=subprocess.PIPE, text=True
    )
    began = time.monotonic()
    while not list(tmp_path.glob(".x*")) or len(workers := workers_of(tool.pid)) < 2:
        assert time.monotonic() < began + 120 and tool.poll() is None
        time.sleep(0.02)
    # a second or two where nothing else runs: the machine's pace is what the end is measured by
    patience = 5 + 3 * (time.monotonic() - began)
    if victim == "worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        signals = {"term": signal.SIGTERM, "int": signal.SIGINT, "kill": signal.SIGKILL}
        tool.send_signal(signals[victim.removeprefix("parent-")])
    began = time.monotonic()
    _, err = tool.communicate(timeout=4 * patience)
    assert tool.returncode == code
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < began + patience
        time.sleep(0.02)
    assert time.monotonic() < began + patience
    assert not list(tmp_path.glob("x_*"))
    if victim != "parent-kill":
        assert f"FATAL[{code}]" in err and os.listdir(tmp_path) == ["a.json"]


def test_facts_name_counts_tokenizer_and_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.json", {"text": "1 2"}, {"text": ""}, {"text": "3"})
    arguments = ("--input", source, "--output-prefix", tmp_path / "x", *NULL, "--append-eod")
    assert call(monkeypatch, *arguments) == 0
    facts = json.loads((tmp_path / "x_text_document.meta.json").read_text())
    assert {key: facts[key] for key in ("documents", "empty", "sequences", "tokens", "eods")} == {
        "documents": 3, "empty": 1, "sequences": 2, "tokens": 5, "eods": 2,
    }  # fmt: skip
    digests = hashes(tmp_path)
    assert facts["sha256"] == {s: digests[f"x_text_document.{s}"] for s in ("bin", "idx")}
    assert facts["dtype"] == "uint16" and facts["tokenizer"]["vocab_size"] == 1001
    assert facts["tokenizer"]["fingerprint"] == job().tokenizer().fingerprint()


@pytest.mark.parametrize("ids, dtype", [(65498, "uint16"), (65499, "int32"), (70000, "int32")])
def test_the_dtype_follows_the_vocabulary_and_the_largest_id_survives(
    tmp_path: Path, ids: int, dtype: str
) -> None:
    source = write_lines(tmp_path / "a.json", {"text": f"{ids - 1} 0"})
    data = DataConfig(tokenizer_type="NullTokenizer")
    preprocess(
        Job(data, ids, append_eod=True), inputs=[str(source)],
        output_prefix=str(tmp_path / "x"), workers=1, disk=Disk(),
    )  # fmt: skip
    ds = IndexedDataset(tmp_path / "x_text_document")
    assert ds.dtype == dtype and ds[0].tolist() == [ids - 1, 0, ids]


def test_a_template_and_every_input_kind_go_through_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    records = [{"a": n, "b": str(n + 1)} for n in range(20)]
    write_lines(folder / "1.jsonl", *records)
    (folder / "2.json").write_text(json.dumps(records, indent=2))
    (folder / "3.jsonl.gz").write_bytes(gzip.compress((folder / "1.jsonl").read_bytes()))
    arguments = ("--input", folder, "--input", folder / "1*", "--output-prefix", tmp_path / "x")
    assert call(monkeypatch, *arguments, *NULL, "--template", "{a} {b}") == 0
    ds = IndexedDataset(tmp_path / "x_text_document")
    assert [s.tolist() for s in ds] == [[n, n + 1] for n in range(20)] * 4


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    needs("tokenizers")
    folder = tmp_path_factory.mktemp("vocabulary")
    texts = ["the quick brown fox, 你好世界 42 times;"] * 5
    for name, content in train_bpe(texts, 400, 8).items():
        (folder / name).write_bytes(content)
    names = ("--vocab-file", "gpt2-vocab.json", "--merge-file", "gpt2-merges.txt")
    return [str(folder / name) if n % 2 else name for n, name in enumerate(names)]


def test_every_engine_and_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: list[str]
) -> None:
    records = [{"text": f"the {n} foxes 你好 {'x' * (n % 9)}\n\n" * (n % 4)} for n in range(200)]
    source = write_lines(tmp_path / "a.json", *records)
    found = {}
    for engine, workers in [
        ("gigatoken", 1), ("gigatoken", 2), ("tiktoken", 1), ("tokenizers", 2), ("plain", 1),
    ]:  # fmt: skip
        if engine != "plain":
            needs(engine)
        folder = tmp_path / f"{engine}{workers}"
        assert call(
            monkeypatch, "--input", source, "--output-prefix", folder / "x", *vocabulary,
            "--append-eod", "--workers", workers, "--tokenizer-engine", engine,
        ) == 0  # fmt: skip
        found[engine, workers] = hashes(folder)
    assert len({json.dumps(digests) for digests in found.values()}) == 1


@pytest.mark.oracles
def test_a_local_ray_cluster_writes_the_same_bytes_and_names_a_bad_line(
    tmp_path: Path, vocabulary: list[str]
) -> None:
    needs("ray")
    records = [{"text": f"the {n} foxes 你好 " * (n % 9)} for n in range(500)]
    source = write_lines(tmp_path / "a.json", *records)
    common = [sys.executable, str(TOOL), "--input", str(source), *vocabulary, "--append-eod"]
    ray = ["--engine", "ray", "--ray-address", "local", "--shards", "3"]
    subprocess.run([*common, "--output-prefix", tmp_path / "here"], check=True)
    subprocess.run([*common, "--output-prefix", tmp_path / "there", *ray], check=True)
    for suffix in ("bin", "idx"):
        here = (tmp_path / f"here_text_document.{suffix}").read_bytes()
        assert (tmp_path / f"there_text_document.{suffix}").read_bytes() == here
    assert not list(tmp_path.glob("there_*-of-3*"))
    with source.open("a") as file:
        file.write("{\n")
    done = subprocess.run(
        [*common, "--output-prefix", tmp_path / "bad", *ray], capture_output=True, text=True
    )
    assert done.returncode == 3 and "a.json:501: no JSON" in done.stderr
    assert not list(tmp_path.glob("bad_text*"))


@pytest.mark.slow
def test_memory_follows_the_batch_and_not_the_file(tmp_path: Path, vocabulary: list[str]) -> None:
    """400 MB of text with ever new words, which no cache may keep: under 1.2 GB at any time."""
    random = np.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(50_000):
            letters = random.integers(97, 123, 8000, dtype=np.uint8)
            letters[random.random(8000) < 0.12] = 32
            file.write(b'{"text":"' + letters.tobytes() + b'"}\n')
    arguments = ["--input", path, "--output-prefix", tmp_path / "x", *vocabulary, "--workers", "2"]
    program = (
        "import resource, runpy, sys; sys.argv[0] = sys.argv.pop(1)\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('KB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, TOOL, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("KB ")[1]) < 1_200_000


def test_a_terminal_shows_a_bar_with_rates_and_time_left(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.json", *({"text": "1 2 3"} for _ in range(100)))
    arguments = ["--input", source, "--output-prefix", tmp_path / "x", *NULL, "--workers", "1"]
    screen, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    done = subprocess.run(
        [sys.executable, TOOL, *arguments], stdout=subprocess.DEVNULL, stderr=terminal, timeout=60
    )
    os.close(terminal)
    shown = os.read(screen, 1 << 16).decode()
    os.close(screen)
    assert done.returncode == 0
    assert re.search(r"tokenizing: 100%.*B/s, [\d,]+ docs/s, 100 docs, 0\.0 M tokens", shown)


@pytest.mark.parametrize(("count", "per", "text"), [(10.0, 4.0, "2.50"), (616.512, 0.0, "-")])
def test_a_rate_over_no_time_is_not_a_number(count: float, per: float, text: str) -> None:
    """A run that finds its work done says no 616512000.00 MB/s."""
    assert preprocess_data.rate(count, per, ".2f") == text


class SmallDisk(Disk):
    """A disk with this much space left."""

    def free_bytes(self, path: str | os.PathLike[str]) -> int:
        return 10_000


@pytest.mark.parametrize("records, fits", [(700, True), (1600, False)])
def test_text_that_will_not_fit_is_refused_after_the_first_batch(
    tmp_path: Path, records: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "a.json", *({"text": "1 2 3 4"} for _ in range(records)))
    seen: list[int] = []

    def run() -> None:
        preprocess(job(), inputs=[str(source)], output_prefix=str(tmp_path / "x"), workers=1,
                   disk=SmallDisk(), batch_bytes=2000,
                   progress=lambda summary: seen.append(summary.documents))  # fmt: skip

    monkeypatch.setattr("megatron_lite.data.preparing.room.PER_SEQUENCE", 0)
    monkeypatch.setattr("megatron_lite.data.preparing.room.PER_DOCUMENT", 0)
    if fits:
        run()
        return
    with pytest.raises(StorageError, match=r"has 10000 bytes free, but the first \d+ of \d+ .* 12"):
        run()
    assert not seen and os.listdir(tmp_path) == ["a.json"]
