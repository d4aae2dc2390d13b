"""The token counter: what each dataset of a blend holds, and how often a run would read it.

Sums over indices: a million documents take a tenth of a second, and nothing else is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_HEADS = ("documents", "tokens", "bytes", "weight", "tokens taken", "epochs")


class TokenCount(NamedTuple):
    """One dataset: what it holds (bytes: of its tokens on disk), and its weight as given."""

    name: str
    documents: int
    tokens: int
    bytes: int
    weight: float


def counter_table(counts: Sequence[TokenCount], run_tokens: int | None) -> list[str]:
    """A line for each dataset and one for all; run_tokens: of the whole run, one epoch if None.

    epochs: how often each token of the dataset is read, at its share of the weights.
    """
    documents, tokens, size = (
        sum(getattr(one, what) for one in counts) for what in ("documents", "tokens", "bytes")
    )
    total, whole = sum(one.weight for one in counts), tokens if run_tokens is None else run_tokens
    rows = [("dataset", *_HEADS)]
    for one in counts:
        share = one.weight / total if total else 0.0
        rows.append((one.name, f"{one.documents:,}", f"{one.tokens:,}", f"{one.bytes:,}",
                     f"{share:.4f}", f"{share * whole:,.0f}", _epochs(share * whole, one.tokens)))  # fmt: skip
    rows.append(("all", f"{documents:,}", f"{tokens:,}", f"{size:,}", "1.0000", f"{whole:,}",
                 _epochs(whole, tokens)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{name:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        for name, *cells in rows
    ]


def _epochs(taken: float, tokens: int) -> str:
    return f"{taken / tokens:.3f}" if tokens else "-"
