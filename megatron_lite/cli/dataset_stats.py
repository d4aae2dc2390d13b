"""What is in token pairs: documents, tokens, lengths (as a picture), frequent tokens, samples.

python tools/dataset_stats.py PREFIX [PREFIX ...] [--plot lengths.png] [--top 20] [--samples 3]
    [--tokenizer-type T --vocab-file F --merge-file F --tokenizer-model F]    shows tokens as text
python tools/dataset_stats.py --table [WEIGHT] PREFIX [[WEIGHT] PREFIX ...] [--tokens 1000000000]
    the token counter: documents, tokens, bytes, and the epochs that a run of so many tokens makes

Counting reads the index alone: a million documents take well under a second.  --top and --samples
read tokens, --top at most --most-tokens of each pair (evenly spread pieces).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from megatron_lite.config.blend import parse_blend
from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extras import how_to_install
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.counter import TokenCount, counter_table
from megatron_lite.data.indexed import IndexedDataset, bin_path
from megatron_lite.data.provenance import (
    ALLOW_MISMATCH,
    MadeWith,
    made_with,
    maker_of,
    require_same,
    told_of_unknown,
)
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, write_output

_DRAWN = (".png", ".svg", ".pdf")  # what --plot can be
_PIECE = 1 << 20  # tokens counted together
PERCENTILES = (1, 10, 50, 90, 99)
_SHOWN = 400  # characters of a sample


class Lengths(NamedTuple):
    """Tokens of every document of one pair."""

    prefix: str
    dataset: IndexedDataset
    tokens: npt.NDArray[np.int64]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prefix", nargs="+", help="path of a pair without .bin/.idx; with --table as --data-path")
    add("--table", action="store_true", help="one line for each pair, weights before the prefixes")
    add(
        "--tokens",
        type=int,
        help="with --table: tokens of the whole run; each pair once if left out",
    )
    add = parser.add_argument_group("what is shown beside").add_argument
    add("--plot", metavar="PNG", help="draw the lengths of documents (extra: plot)")
    add("--top", type=int, default=0, help="show so many of the most frequent tokens")
    add("--most-tokens", type=int, default=100_000_000, help="tokens read for --top, of each pair")
    add("--samples", type=int, default=0, help="show the beginning of so many documents")
    add("--seed", type=int, default=0, help="of the choice of documents")
    add = parser.add_argument_group("tokenizer").add_argument
    add("--tokenizer-type", help="show tokens as text: GPT2BPETokenizer, HuggingFaceTokenizer, ...")
    add("--vocab-file", help="gpt2-vocab.json")
    add("--merge-file", help="gpt2-merges.txt")
    add("--tokenizer-model", help="model file or folder of the other tokenizers")
    add(
        ALLOW_MISMATCH,
        action="store_true",
        help="pairs of another tokenizer, or of several, all the same",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print; returns the exit code."""
    asked = _parse(sys.argv[1:] if argv is None else argv)
    for name in ("top", "samples", "seed"):
        if getattr(asked, name) < 0:
            raise ConfigError(f"--{name} {getattr(asked, name)}: give 0 or more")
    if asked.plot is not None:
        if Path(asked.plot).suffix not in _DRAWN:
            raise ConfigError(f"--plot {asked.plot}: give a file that ends in {', '.join(_DRAWN)}")
        check_outputs("--plot", [asked.plot], Disk())
        _pyplot()
    if asked.tokens is not None and (not asked.table or asked.tokens < 1):
        raise ConfigError(f"--tokens {asked.tokens}: give --table, and a number above 0")
    if asked.table:
        return _print_table(asked)
    text = _Text(asked)
    found = [measure_lengths(prefix) for prefix in asked.prefix]
    makers = {one.prefix: maker_of(one.dataset) for one in found}
    allowed = asked.allow_tokenizer_mismatch
    said = require_same(makers, text.made_with, allowed=allowed, whose="--tokenizer-type")
    for line in (*said, *(told_of_unknown(makers) if text.made_with else ())):
        print(f"NOTE: {line}", file=sys.stderr)
    for lengths in found:
        _print_counts(lengths, makers[lengths.prefix])
        if asked.top:
            _print_frequent(lengths.dataset, asked.top, asked.most_tokens, text)
        if asked.samples:
            _print_samples(lengths, asked.samples, asked.seed, text)
    if len(found) > 1:
        print(f"all: {sum(int(one.tokens.sum()) for one in found):,} tokens")
    if asked.plot:
        plot(found, asked.plot)
        print(f"lengths of documents: {asked.plot}")
    return 0


def _print_table(asked: argparse.Namespace) -> int:
    blend = parse_blend(asked.prefix, source="--table")
    found = [IndexedDataset(prefix) for prefix in blend.prefixes]
    held = [int(one.sequence_lengths.sum(dtype=np.int64)) for one in found]
    weights = blend.weights if blend.weights is not None else held
    counts = [
        TokenCount(
            prefix, len(one.document_indices) - 1, tokens, tokens * one.dtype.itemsize, weight
        )
        for prefix, one, tokens, weight in zip(blend.prefixes, found, held, weights, strict=True)
    ]
    print("\n".join(counter_table(counts, asked.tokens)))
    return 0


def measure_lengths(prefix: str) -> Lengths:
    """Tokens of every document, from the index alone."""
    dataset = IndexedDataset(prefix)
    ends = np.concatenate(([0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)))
    return Lengths(prefix, dataset, np.diff(ends[dataset.document_indices]))


def _print_counts(lengths: Lengths, maker: MadeWith | None) -> None:
    tokens = lengths.tokens
    print(
        f"{lengths.prefix}: {len(tokens):,} documents ({int((tokens == 0).sum()):,} empty), "
        f"{len(lengths.dataset):,} sequences, {int(tokens.sum()):,} tokens of "
        f"{lengths.dataset.dtype}" + ("" if maker is None else f", made with {maker}")
    )
    if len(tokens):
        values = np.percentile(tokens, PERCENTILES).astype(np.int64)
        shares = ", ".join(f"{p} % {v:,}" for p, v in zip(PERCENTILES, values, strict=True))
        print(
            f"  tokens per document: mean {tokens.mean():,.1f}, shortest {tokens.min():,}, "
            f"{shares}, longest {tokens.max():,}"
        )


class _Text:
    """Tokens as text where a tokenizer was named, else as numbers."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.tokenizer: Any = None
        self.made_with: MadeWith | None = None
        self._allowed: bool = asked.allow_tokenizer_mismatch
        if asked.tokenizer_type is not None:
            # tokenizer libraries are extras, and counting needs none
            from megatron_lite.data.tokenizers.build import build_tokenizer  # noqa: PLC0415

            names = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
            data = DataConfig(**{name: getattr(asked, name) for name in names})
            self.tokenizer = build_tokenizer(data)
            self.made_with = made_with(self.tokenizer, data)

    def of(self, ids: npt.NDArray[np.integer[Any]]) -> str:
        if self.tokenizer is None:
            return " ".join(str(token) for token in ids.tolist())
        outside = ids[ids >= self.tokenizer.vocab_size]
        if outside.size and not self._allowed:
            raise DataError(
                f"a file holds token id {outside[0]}, which {self.made_with} lacks - give the tokenizer the "
                f"files were made with, or {ALLOW_MISMATCH} to show such ids as numbers"
            )
        if outside.size:
            return " ".join(str(token) for token in ids.tolist())
        return repr(self.tokenizer.decode(ids.tolist()))


def _print_frequent(dataset: IndexedDataset, top: int, most: int, text: _Text) -> None:
    counts, read = frequencies(dataset, most)
    order = np.argsort(counts, kind="stable")[::-1][:top]
    print(f"  most frequent of {read:,} tokens read, {int((counts > 0).sum()):,} different:")
    for token in order[counts[order] > 0]:
        share = counts[token] / read
        print(f"    {share:8.3%}  {counts[token]:>14,}  {token:>7}  {text.of(np.array([token]))}")


def frequencies(dataset: IndexedDataset, most: int) -> tuple[npt.NDArray[np.int64], int]:
    """How often each id stands in at most `most` tokens, in evenly spread pieces."""
    path = bin_path(dataset.prefix)
    size = path.stat().st_size // dataset.dtype.itemsize
    counts = np.zeros(1, np.int64)
    if size == 0:
        return counts, 0
    tokens = np.memmap(path, dataset.dtype.newbyteorder("<"), "r")
    pieces = -(-size // _PIECE)
    step = max(1, -(-size // max(most, 1)))
    read = 0
    for piece in range(0, pieces, step):
        part = tokens[piece * _PIECE : (piece + 1) * _PIECE]
        found = np.bincount(part)
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
        read += len(part)
    return counts, read


def _print_samples(lengths: Lengths, number: int, seed: int, text: _Text) -> None:
    dataset, bounds = lengths.dataset, lengths.dataset.document_indices
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(lengths.tokens))[:number]
    for document in np.sort(chosen):
        first, stop = int(bounds[document]), int(bounds[document + 1])
        tokens = np.concatenate([np.empty(0, dataset.dtype), *dataset[first:stop]])
        shown = text.of(tokens[:_SHOWN])
        rest = " ..." if len(shown) > _SHOWN or len(tokens) > _SHOWN else ""
        print(f"  document {document} ({len(tokens):,} tokens): {shown[:_SHOWN]}{rest}")


def _pyplot() -> Any:
    try:
        import matplotlib  # noqa: PLC0415  an optional extra

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib: {how_to_install('plot')}") from error
    return pyplot


def plot(found: Sequence[Lengths], path: str) -> None:
    """Two histograms over the length, logarithmic: documents, and the tokens they hold."""
    pyplot = _pyplot()
    longest = max((int(one.tokens.max(initial=1)) for one in found), default=1)
    edges = np.geomspace(1, max(longest, 2), 60)
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    for one in found:
        tokens = one.tokens[one.tokens > 0]
        name = Path(one.prefix).name
        style = {"histtype": "stepfilled", "alpha": 0.5, "label": name}
        upper.hist(tokens, bins=edges, **style)
        lower.hist(tokens, bins=edges, weights=tokens, **style)
    upper.set_ylabel("documents")
    lower.set_ylabel("tokens in them")
    lower.set_xlabel("tokens per document")
    lower.set_xscale("log")
    upper.set_title("Lengths of documents")
    if len(found) <= 10:
        upper.legend()
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format=Path(path).suffix[1:])
    write_output(path, image.getvalue(), Disk())
    pyplot.close(figure)


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
