"""The perplexity of a held-out split under word counts alone: what a model must at least beat.

Counts of the training split, plus one for every id, are the prediction; a blend's datasets count
with their weights, in the prediction and in the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.config.blend import DEFAULT_SPLIT, parse_blend, parse_split
from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.blended import normalized
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.pretrain import split_ranges
from megatron_lite.data.provenance import maker_of, require_same

HELD_OUT = {"valid": 1, "test": 2}
PIECE = 1024  # sequences read at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Unigram:
    """What counts alone achieve; loss in nats per token."""

    split: str
    loss: float
    perplexity: float
    vocab_size: int
    train_tokens: int
    held_out_tokens: int


def token_counts(source: IndexedDataset, start: int, stop: int, size: int) -> npt.NDArray[np.int64]:
    """How often every id below `size` stands in sequences start to stop - 1."""
    counts = np.zeros(size, dtype=np.int64)
    for begin in range(start, stop, PIECE):
        tokens = np.concatenate(source[begin : min(begin + PIECE, stop)])
        found = np.bincount(tokens, minlength=size)
        if len(found) > size:
            raise DataError(f"{source.prefix}: id {len(found) - 1} is not below {size} ids")
        counts += found
    return counts


def measure(data_path: list[str], *, split: str, held_out: str, vocab_size: int | None) -> Unigram:
    """Raises DataError where a split holds nothing, ConfigError for a blend that is none."""
    blend = parse_blend(data_path)
    sources = [IndexedDataset(prefix) for prefix in blend.prefixes]
    makers = {source.prefix: maker_of(source) for source in sources}
    require_same(makers, None, allowed=False, whose="")
    ranges = [split_ranges(parse_split(split), len(source)) for source in sources]
    size = vocab_size or 1 + max(
        int(s.get(i).max(initial=0)) for s in sources for i in range(len(s))
    )

    def counts(number: int) -> list[npt.NDArray[np.int64]]:
        found = []
        for source, documents in zip(sources, ranges, strict=True):
            part = documents[number]
            table = np.zeros(size, np.int64) if part is None else token_counts(source, *part, size)
            if not table.any():
                name = "training" if number == 0 else held_out
                raise DataError(f"{source.prefix}: its {name} split is empty - change --split")
            found.append(table)
        return found

    train, other = counts(0), counts(HELD_OUT[held_out])
    weights = normalized(blend.weights or [float(table.sum()) for table in train])
    predicted = sum(
        weight * (table + 1.0) / (table.sum() + size)
        for weight, table in zip(weights, train, strict=True)
    )
    surprise = -np.log(np.asarray(predicted))
    loss = sum(
        weight * float(table @ surprise) / int(table.sum())
        for weight, table in zip(weights, other, strict=True)
    )
    return Unigram(
        split=held_out,
        loss=loss,
        perplexity=float(np.exp(loss)),
        vocab_size=size,
        train_tokens=sum(int(table.sum()) for table in train),
        held_out_tokens=sum(int(table.sum()) for table in other),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(prog="unigram.py", description=__doc__)
    parser.add_argument("--data-path", nargs="+", required=True, help="as for training")
    parser.add_argument("--split", default=DEFAULT_SPLIT, help="as for training; 969,30,1")
    parser.add_argument("--held-out", choices=sorted(HELD_OUT), default="test")
    parser.add_argument(
        "--vocab-size", type=int, help="ids there are; the highest in the files + 1"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here as well")
    arguments = parser.parse_args()
    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        raise ConfigError(f"--vocab-size {arguments.vocab_size} must be at least 1")
    return arguments


def main() -> int:
    """Count, print, and write --json where it is asked for."""
    arguments: Any = parse_arguments()
    found = measure(
        arguments.data_path,
        split=arguments.split,
        held_out=arguments.held_out,
        vocab_size=arguments.vocab_size,
    )
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
    print(
        f"unigram on the {found.split} split: loss {found.loss:.6E} | PPL {found.perplexity:.6E} "
        f"| {found.vocab_size} ids | {found.train_tokens} training tokens "
        f"| {found.held_out_tokens} held-out tokens"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, results=True))
