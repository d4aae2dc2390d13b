"""The perplexity of a held-out split under n-gram models: what a trained model must beat.

Unigram, bigram and trigram with interpolated Kneser-Ney smoothing, of the training split's tokens,
each counted once; in the result a blend's datasets count with their weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np

from megatron_lite.config.blend import DEFAULT_SPLIT, parse_blend, parse_split
from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.blended import normalized
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.ngrams import NgramCounts, NgramModel, Stream, count
from megatron_lite.data.pretrain import DocumentRange, split_ranges
from megatron_lite.data.provenance import maker_of, require_same
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, write_output

HELD_OUT = {"valid": 1, "test": 2}
HELD_OUT_HELP = "test; valid where a file has no document for testing"
NAMES = ("unigram", "bigram", "trigram")
_PIECE = 1 << 20  # tokens read at once


@dataclass(frozen=True, slots=True)
class Score:
    """Loss in nats per token, and its exponential."""

    loss: float
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramReport:
    """What each model achieves."""

    split: str
    models: dict[str, Score]
    vocab_size: int
    train_tokens: int
    held_out_tokens: int


def pieces(source: IndexedDataset, part: DocumentRange) -> Iterator[Stream]:
    """The tokens of some sequences, in some pieces."""
    ends = np.cumsum(source.sequence_lengths[part.start : part.stop], dtype=np.int64)
    begin = 0
    while begin < len(ends):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _PIECE, side="right")))
        yield np.concatenate(source[part.start + begin : part.start + end]).astype(np.int64)
        begin = end


def parts_of(
    source: IndexedDataset, split: str, held_out: str
) -> tuple[DocumentRange, DocumentRange]:
    """Its training and its held-out sequences; DataError where either has no token."""
    ranges = split_ranges(parse_split(split), len(source))
    found = []
    for name, part in (("training", ranges[0]), (held_out, ranges[HELD_OUT[held_out]])):
        if part is None or not source.sequence_lengths[part.start : part.stop].any():
            raise DataError(f"{source.prefix}: its {name} split is empty - change --split")
        found.append(part)
    return found[0], found[1]


def held_out_of(sources: Sequence[IndexedDataset], split: str) -> str:
    """The test split, or the validation split where a file has no token for testing."""
    try:
        for source in sources:
            parts_of(source, split, "test")
    except DataError:
        return "valid"
    return "test"


def measure_ngrams(
    data_path: list[str],
    *,
    split: str,
    held_out: str | None,
    vocab_size: int | None,
    max_order: int = 3,
) -> NgramReport:
    """Raises DataError where a split holds nothing, ConfigError for a blend that is none."""
    blend = parse_blend(data_path)
    sources = [IndexedDataset(prefix) for prefix in blend.prefixes]
    makers = {source.prefix: maker_of(source) for source in sources}
    require_same(makers, None, allowed=False, whose="")
    held_out = held_out or held_out_of(sources, split)
    parts = [parts_of(source, split, held_out) for source in sources]
    highest = 0
    for source in sources:
        for piece in pieces(source, DocumentRange(0, len(source))):
            highest = max(highest, int(piece.max(initial=0)))
            if vocab_size is not None and highest >= vocab_size:
                raise DataError(f"{source.prefix}: id {highest} is not below {vocab_size} ids")
    size = vocab_size or highest + 1
    if float(size) ** max_order >= 2.0**63:
        raise ConfigError(f"--max-order {max_order} of {size} ids is more than 2^63; choose less")

    tests = [
        np.concatenate(list(pieces(source, test)))
        for source, (_, test) in zip(sources, parts, strict=True)
    ]
    train = [(source, part) for source, (part, _) in zip(sources, parts, strict=True)]
    weights = normalized(
        blend.weights or [float(s.sequence_lengths[p.start : p.stop].sum()) for s, p in train]
    )
    tables: list[NgramCounts] = []
    models = {}
    for order in range(1, max_order + 1):
        tables.append(count((pieces(s, part) for s, part in train), order, size))
        model = NgramModel(tables, size)
        losses = [-np.log(model.probabilities(test)).mean() for test in tests]
        loss = float(np.dot(weights, losses))
        models[NAMES[order - 1]] = Score(loss, float(np.exp(loss)))
    return NgramReport(
        split=held_out,
        models=models,
        vocab_size=size,
        train_tokens=int(tables[0].counts.sum()),
        held_out_tokens=sum(map(len, tests)),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(prog="ngrams.py", description=__doc__)
    parser.add_argument("--data-path", nargs="+", required=True, help="as for training")
    parser.add_argument("--split", default=DEFAULT_SPLIT, help="as for training; 969,30,1")
    parser.add_argument("--held-out", choices=sorted(HELD_OUT), help=HELD_OUT_HELP)
    parser.add_argument(
        "--vocab-size", type=int, help="ids there are; the highest in the files + 1"
    )
    parser.add_argument(
        "--max-order",
        type=int,
        choices=range(1, len(NAMES) + 1),
        default=len(NAMES),
        help="3; every different n-gram takes some 50 bytes of memory",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here as well")
    arguments = parser.parse_args()
    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        raise ConfigError(f"--vocab-size {arguments.vocab_size} must be at least 1")
    return arguments


def main() -> int:
    """Count, print, and write --json where it is asked for."""
    arguments: Any = parse_arguments()
    if arguments.json is not None:
        check_outputs("--json", [arguments.json], Disk())
    found = measure_ngrams(
        arguments.data_path,
        split=arguments.split,
        held_out=arguments.held_out,
        vocab_size=arguments.vocab_size,
        max_order=arguments.max_order,
    )
    if arguments.json is not None:
        write_output(arguments.json, (json.dumps(asdict(found)) + "\n").encode(), Disk())
    for name, score in found.models.items():
        print(
            f"{name} on the {found.split} split: loss {score.loss:.6E} | PPL {score.perplexity:.6E}"
        )
    print(
        f"{found.vocab_size} ids | {found.train_tokens} training tokens "
        f"| {found.held_out_tokens} held-out tokens"
    )
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
