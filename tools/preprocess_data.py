"""JSON lines to Megatron's token files: `{output-prefix}_{key}_document.{bin,idx}`."""

from __future__ import annotations

import argparse
import contextlib
import glob
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.config.data import DataConfig
from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.preprocess import Job, Summary, preprocess
from megatron_lite.data.tokenizers.build import TOKENIZERS
from megatron_lite.storage.disk import Disk

REFUSED = {
    "split_sentences": "--split-sentences is for BERT; GPT data has one sequence per document",
    "keep_newlines": "--keep-newlines belongs to --split-sentences; newlines are always kept",
}


def parse_arguments() -> argparse.Namespace:
    """Megatron's flags; what has no meaning here is refused by name or said to be unnecessary."""
    parser = ToolParser(prog="preprocess_data.py", description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="JSON-lines files or globs")
    add("--output-prefix", required=True, help="folder and first part of the files' names")
    add("--json-keys", nargs="+", default=["text"], help="each gives its own pair of files")
    add("--tokenizer-type", default="GPT2BPETokenizer", help=", ".join(TOKENIZERS))
    add("--vocab-file", help="gpt2-vocab.json")
    add("--merge-file", help="gpt2-merges.txt")
    add("--tokenizer-model", help="folder or file of the other tokenizers")
    add("--vocab-size", type=int, help="for NullTokenizer")
    add("--append-eod", action="store_true", help="end every document with the EOD token")
    add("--workers", type=int, default=1, help="processes that tokenize")
    add("--log-interval", type=int, default=1000, help="documents between two progress lines")
    add("--partitions", type=int, default=1, help="accepted; reading is streamed anyway")
    add("--chunk-size", type=int, help="accepted; batches are cut by bytes")
    add("--dataset-impl", default="mmap", help="mmap, the only format")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    add("--keep-newlines", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, reason in REFUSED.items():
        if getattr(arguments, name):
            raise ConfigError(reason)
    if arguments.dataset_impl != "mmap":
        raise ConfigError(f"--dataset-impl {arguments.dataset_impl}: only mmap is written")
    for name in ("workers", "log_interval", "partitions", "chunk_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if len(set(arguments.json_keys)) != len(arguments.json_keys):
        raise ConfigError(f"--json-keys {' '.join(arguments.json_keys)} names a key twice")
    if arguments.partitions > 1:
        print("note: --partitions has no effect: the input is streamed", file=sys.stderr)
    if arguments.chunk_size is not None:
        print("note: --chunk-size has no effect: batches are cut by bytes", file=sys.stderr)
    return arguments


def find_inputs(patterns: list[str]) -> list[str]:
    """The files the patterns name, each pattern's in sorted order."""
    found: list[str] = []
    for pattern in patterns:
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern))
        if not names:
            raise DataError(f"--input {pattern} does not exist")
        for name in names:
            if not Path(name).is_file():
                raise DataError(f"--input {name} is no file - name its files or a glob")
        found += names
    return found


class Progress:
    """Megatron's progress line on stderr, every so many documents."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.next = interval

    def __call__(self, documents: int, size: int, seconds: float) -> None:
        if documents < self.next:
            return
        self.next = documents - documents % self.interval + self.interval
        rate, speed = documents / seconds, size / seconds / 1e6
        print(
            f"Processed {documents} documents ({rate:.1f} docs/s, {speed:.2f} MB/s).",
            file=sys.stderr,
        )


def print_summary(summary: Summary) -> None:
    """What was written, one line per pair of files."""
    speed = summary.input_bytes / max(summary.seconds, 1e-9) / 1e6
    for count in summary.keys:
        print(
            f"{count.prefix}.bin/.idx: {count.documents} documents ({count.empty} empty), "
            f"{count.sequences} sequences, {count.tokens} tokens ({count.eods} EOD), {count.dtype}"
        )
    print(f"{summary.input_bytes} bytes in {summary.seconds:.1f} s ({speed:.2f} MB/s)")


@contextlib.contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """SIGTERM ends the run like Ctrl-C: workers stopped, temporary files removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    arguments = parse_arguments()
    job = Job(
        data=DataConfig(
            tokenizer_type=arguments.tokenizer_type,
            vocab_file=arguments.vocab_file,
            merge_file=arguments.merge_file,
            tokenizer_model=arguments.tokenizer_model,
        ),
        vocab_size=arguments.vocab_size,
        keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
    )
    with sigterm_is_ctrl_c():
        summary = preprocess(
            job,
            inputs=find_inputs(arguments.input),
            output_prefix=arguments.output_prefix,
            workers=arguments.workers,
            disk=Disk(),
            overwrite=arguments.overwrite,
            progress=Progress(arguments.log_interval),
        )
    print_summary(summary)
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
