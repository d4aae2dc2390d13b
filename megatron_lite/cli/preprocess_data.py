"""Text to Megatron's token files: `{output-prefix}_{key}_document.{bin,idx,meta.json}`.

With --chat conversations to `{output-prefix}.{bin,idx,meta.json}` and, beside them,
`{output-prefix}_loss_mask.{bin,idx}`: which of their tokens are learned.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from tqdm import tqdm

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.masks import MASK_DTYPE, MASK_SUFFIX
from megatron_lite.data.preparing.chat_flags import add_chat_input_flags, chat_job
from megatron_lite.data.preparing.encode import Job
from megatron_lite.data.preparing.input_flags import add_input_flags, longest_line
from megatron_lite.data.preparing.inputs import find_inputs
from megatron_lite.data.preparing.preprocess import preprocess, shard_prefix
from megatron_lite.data.preparing.ray_engine import preprocess_on_ray
from megatron_lite.data.preparing.room import check_pairs
from megatron_lite.data.preparing.summary import Summary, chat_line
from megatron_lite.data.preparing.tokenizer_flags import add_tokenizer_flags, tokenizer_section
from megatron_lite.data.provenance import KeyCounts
from megatron_lite.data.tokenizers.engines import AUTO, TOKENIZER_ENGINES
from megatron_lite.storage.disk import Disk

MOST_UNKNOWN = 0.001  # of the tokens; from here on it is said loudly

REFUSED_FLAGS = {
    "split_sentences": "--split-sentences is for BERT; GPT data has one sequence per document",
    "keep_newlines": "--keep-newlines belongs to --split-sentences; newlines are always kept",
}


def parse_arguments() -> argparse.Namespace:
    """Megatron's flags; what has no meaning here is refused by name or said to be unnecessary."""
    parser = ToolParser(prog="preprocess_data.py", description=__doc__)
    add = parser.add_argument_group("input").add_argument
    add_input_flags(add, keys="each gives its own pair of files")
    add(
        "--shard", metavar="I/N", help="only the I-th of N parts, I from 1; merge_datasets.py joins"
    )
    add = parser.add_argument_group("tokenizer").add_argument
    add_tokenizer_flags(add)
    add(
        "--tokenizer-engine",
        choices=TOKENIZER_ENGINES,
        default=AUTO,
        help="library; the fastest exact one",
    )
    add("--append-eod", action="store_true", help="end every document with the EOD token")
    add_chat_input_flags(parser.add_argument_group("conversations (--chat)").add_argument)
    add = parser.add_argument_group("output").add_argument
    add("--output-prefix", required=True, help="folder and first part of the files' names")
    add("--overwrite", action="store_true", help="replace files that are there")
    add("--resume", action="store_true", help="resume an interrupted run")
    add = parser.add_argument_group("work").add_argument
    add("--workers", type=int, help="processes or threads that tokenize; the cores there are")
    add("--engine", choices=["local", "ray"], default="local", help="where the work is done")
    add("--shards", type=int, help="tasks of --engine ray; one per --workers CPUs of the cluster")
    add("--ray-address", default="auto", help="auto: the cluster there is; host:port; or local")
    add("--log-interval", type=int, default=1000, help="documents between two progress lines")
    add("--partitions", type=int, default=1, help="accepted; reading is streamed anyway")
    add("--chunk-size", type=int, help="accepted; batches are cut by bytes")
    add("--dataset-impl", default="mmap", help="mmap, the only format")
    add("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    add("--keep-newlines", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """ConfigError for what cannot work."""
    for name, reason in REFUSED_FLAGS.items():
        if getattr(arguments, name):
            raise ConfigError(reason)
    if arguments.dataset_impl != "mmap":
        raise ConfigError(f"--dataset-impl {arguments.dataset_impl}: only mmap is written")
    for name in ("workers", "shards", "log_interval", "partitions", "chunk_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if len(set(arguments.json_keys)) != len(arguments.json_keys):
        raise ConfigError(f"--json-keys {' '.join(arguments.json_keys)} names a key twice")
    if arguments.template is not None and len(arguments.json_keys) > 1:
        raise ConfigError("--template makes one text; give one --json-keys, which names the files")
    if arguments.resume and arguments.overwrite:
        raise ConfigError("--resume and --overwrite: resume a run, or replace it?")
    if arguments.engine == "ray" and arguments.shard is not None:
        raise ConfigError("--shard is for your own scheduler; with --engine ray give --shards N")
    if arguments.engine == "local" and arguments.shards is not None:
        raise ConfigError("--shards is for --engine ray; --shard I/N makes one of N parts here")
    if arguments.partitions > 1:
        print("note: --partitions has no effect: the input is streamed", file=sys.stderr)
    if arguments.chunk_size is not None:
        print("note: --chunk-size has no effect: batches are cut by bytes", file=sys.stderr)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`3/8` as (3, 8)."""
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--shard {text}: write I/N with I from 1 to N, e.g. 1/8 to 8/8")
    return int(index), int(count)


def rate(count: float, per: float, form: str) -> str:
    """A quotient as text; `-` over next to nothing: a run that found its work done has no speed."""
    return f"{count / per:{form}}" if per > 1e-3 else "-"


class ProgressLine:
    """A bar on a terminal; in a log Megatron's line every so many documents."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.next = interval
        self.began = time.perf_counter()
        self.before: tuple[int, int, int] | None = None
        self.bar: tqdm[None] | None = None

    def __call__(self, summary: Summary) -> None:
        now = (summary.documents, summary.read_bytes, summary.tokens)
        if self.before is None:  # rates are of this run, not of what --resume found
            self.before = now if summary.resumed else (0, 0, 0)
        seconds = time.perf_counter() - self.began
        documents, size, tokens = (a - b for a, b in zip(now, self.before, strict=True))
        if sys.stderr.isatty():
            self._draw(summary, rate(documents, seconds, ",.0f"))
        elif summary.documents >= self.next:
            self.next = summary.documents - summary.documents % self.interval + self.interval
            left = seconds * (summary.total_bytes - summary.read_bytes)
            print(
                f"Processed {summary.documents} documents ({rate(documents, seconds, '.1f')} docs/s, "
                f"{rate(size / 1e6, seconds, '.2f')} MB/s); {summary.tokens} tokens, "
                f"{rate(tokens / 1e6, seconds, '.2f')} M tokens/s, ETA {rate(left, size, '.0f')} s",
                file=sys.stderr,
            )

    def _draw(self, summary: Summary, speed: str) -> None:
        if self.bar is None:
            self.bar = tqdm(
                total=summary.total_bytes, unit="B", unit_scale=True, smoothing=0.1,
                initial=summary.read_bytes if summary.resumed else 0, desc="tokenizing",
            )  # fmt: skip
        self.bar.update(summary.read_bytes - self.bar.n)
        self.bar.set_postfix_str(
            f"{speed} docs/s, {summary.documents:,} docs, {summary.tokens / 1e6:,.1f} M tokens",
            refresh=False,
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def print_unknown(prefix: str, count: KeyCounts, name: str) -> None:
    """How much of the text the vocabulary lacks; loud where it is much."""
    share = count.unknown / max(count.tokens - count.eods, 1)
    print(f"  unknown: {count.unknown} tokens ({share:.4%}) are {name}")
    if share > MOST_UNKNOWN:
        print(
            f"WARNING: {prefix}: {share:.2%} of the text's tokens are unknown ({name}), more than "
            f"{MOST_UNKNOWN:.1%}: the vocabulary lacks characters of this text, and a model learns "
            "nothing there - take another tokenizer, or train one on this text",
            file=sys.stderr,
        )


def print_summary(summary: Summary) -> None:
    """What was written, one line per pair of files."""
    print(f"tokenizer: {summary.tokenizer}")
    print(f"end of document: {summary.end_of_document}")
    for prefix, count in zip(summary.prefixes, summary.keys, strict=True):
        dtype = str(MASK_DTYPE) if prefix.endswith(MASK_SUFFIX) else summary.dtype
        print(
            f"{prefix}.bin/.idx: {count.documents} documents ({count.empty} empty), "
            f"{count.sequences} sequences, {count.tokens} tokens ({count.eods} EOD), "
            f"{dtype}"
        )
        if summary.unknown and not prefix.endswith(MASK_SUFFIX):
            print_unknown(prefix, count, summary.unknown)
    if summary.told:
        print(chat_line(summary))
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.skipped.items()))
    print(f"skipped: {summary.skipped.total()} records" + (f" ({reasons})" if reasons else ""))
    read = summary.read_bytes - summary.read_before
    if not read:
        print(f"{summary.read_bytes} bytes, all read before")
        return
    before = f" ({summary.read_before} read before)" if summary.read_before else ""
    speed = rate(read / 1e6, summary.seconds, ".2f")
    print(f"{summary.read_bytes} bytes{before} in {summary.seconds:.1f} s ({speed} MB/s)")


@contextlib.contextmanager
def sigterm_is_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP end the run like Ctrl-C: workers stopped, temporary files removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    caught = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = [signal.signal(number, stop) for number in caught]
    try:
        yield
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """No search for garbage every 700 objects: each walks the vocabulary, 0.2 s at the start."""
    before = gc.get_threshold()
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)  # nor does the search at the end of the process walk it
    try:
        yield
    finally:
        gc.set_threshold(*before)


def here(arguments: argparse.Namespace, job: Job, workers: int) -> Summary:
    """The work is done by this machine."""
    # a thread that comes back from the tokenizer must not wait 5 ms for the one that parses
    sys.setswitchinterval(0.0005)
    with contextlib.closing(ProgressLine(arguments.log_interval)) as progress:
        return preprocess(
            job,
            inputs=find_inputs(arguments.input),
            output_prefix=arguments.output_prefix,
            workers=workers,
            disk=Disk(),
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            shard=parse_shard(arguments.shard),
            progress=progress,
        )


def by_ray(arguments: argparse.Namespace, job: Job, workers: int) -> Summary:
    """The work is done by tasks on a Ray cluster; finished shards are always kept."""

    def report(done: int, count: int, seconds: float) -> None:
        left = seconds / done * (count - done)
        print(f"{done} of {count} shards, {seconds:.0f} s, ETA {left:.0f} s", file=sys.stderr)

    return preprocess_on_ray(
        job,
        inputs=find_inputs(arguments.input),
        output_prefix=arguments.output_prefix,
        shards=arguments.shards,
        workers=arguments.workers or 1,
        address=arguments.ray_address,
        disk=Disk(),
        overwrite=arguments.overwrite,
        report=report,
    )


def main() -> int:
    """Preprocess as the command line says."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    arguments = parse_arguments()
    workers = arguments.workers or len(os.sched_getaffinity(0))
    # read by the libraries that have threads of their own; before they are imported
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    job = Job(
        data=tokenizer_section(arguments),
        vocab_size=arguments.vocab_size,
        keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        template=arguments.template,
        on_bad_line=arguments.on_bad_line,
        engine=arguments.tokenizer_engine,
        text_unit=arguments.text_unit,
        longest=longest_line(arguments),
        chat=chat_job(arguments),
    )
    shard, prefix = parse_shard(arguments.shard), arguments.output_prefix
    check_pairs(job, shard_prefix(prefix, shard) if shard else prefix, Disk())
    with sigterm_is_ctrl_c(), rare_collections():
        summary = (by_ray if arguments.engine == "ray" else here)(arguments, job, workers)
    print_summary(summary)
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="the same command with --resume continues from here"))


if __name__ == "__main__":
    start()
