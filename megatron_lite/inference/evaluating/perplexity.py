"""Perplexity and bits per byte of texts and token files, through a sliding window.

    tokens    p  1  2  3  4  5  6  7  8  9      p: the token that begins a document
    window    [p  1  2  3] scores  1 2 3 4
    stride 2        [2  3  4  5] scores  5 6
                          [4  5  6  7] scores  7 8 ...

Each token is scored once, the first time a window reaches it.  Documents do not see one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_lite.config.errors import ConfigError, NumericsError
from megatron_lite.inference.evaluating.scorer import Ids, ScoredRow, Scorer


class Window(NamedTuple):
    """A window's inputs [begin, end) of a document with its first token, of which `scored` are targets:
    the last ones that its inputs predict."""

    begin: int
    end: int
    scored: int


def windows_over(inputs: int, window: int, stride: int) -> Iterator[Window]:
    """The windows over so many inputs, each of which predicts one token."""
    done = begin = 0
    while done < inputs:
        end = min(begin + window, inputs)
        yield Window(begin, end, end - done)
        done, begin = end, begin + stride


def window_rows(tokens: Ids, window: int, stride: int) -> Iterator[ScoredRow]:
    """The windows of a document; its first token is seen and not scored."""
    for begin, end, scored in windows_over(len(tokens) - 1, window, stride):
        positions = np.arange(end - begin - scored, end - begin)
        yield ScoredRow(tokens[begin:end], positions, tokens[begin + 1 + positions])


class Document(NamedTuple):
    """tokens: all of them, the first one seen and not scored; size: bytes of its text, None if not known."""

    tokens: Ids
    size: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Of one file.  nats: the sum of -log p over its scored tokens; size: bytes of its text."""

    file: str
    documents: int
    tokens: int
    size: int | None
    windows: int
    window: int
    stride: int
    nats: float
    likeliest: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where no float holds it."""
        return math.exp(self.loss) if self.loss < 709.0 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """All nats in bits, over all bytes; None where the bytes are not known."""
        return self.nats / math.log(2) / self.size if self.size else None

    @property
    def accuracy(self) -> float:
        """Share of tokens that were the likeliest."""
        return self.likeliest / self.tokens

    def values(self) -> dict[str, Any]:
        """For JSON."""
        derived = ("loss", "perplexity", "bits_per_byte", "accuracy")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def choose_window(
    asked: int | None, stride: int | None, *, positions: int, limited: bool
) -> tuple[int, int]:
    """Window and stride; positions: of the model; limited: it cannot see more.

    By default all its positions, and half of the window.  ConfigError for what cannot be.
    """
    window = positions if asked is None else asked
    if window < 1 or (limited and window > positions):
        at_most = f" and at most the model's {positions} positions" if limited else ""
        raise ConfigError(f"--window {window} must be at least 1{at_most}")
    step = max(1, window // 2) if stride is None else stride
    if not 1 <= step <= window:
        raise ConfigError(
            f"--stride {step} must be from 1 to --window {window}: a longer one would leave out tokens"
        )
    return window, step


def measure_perplexity(
    scorer: Scorer,
    file: str,
    documents: Iterable[Document],
    *,
    window: int,
    stride: int,
    told: Callable[[int], object] = lambda tokens: None,
) -> Perplexity:
    """The perplexity of documents with at least one token to score among them.

    told: the number of tokens of each scored window.  Raises NumericsError where one has no number.
    """
    counted = _Counted()
    nats: list[float] = []
    likeliest = tokens = 0
    for scores in scorer.stream(counted.rows(documents, window, stride)):
        nats.append(float(scores.log_probabilities.sum()))
        likeliest += int(scores.likeliest.sum())
        tokens += len(scores.likeliest)
        told(len(scores.likeliest))
    total = -math.fsum(nats)
    if not math.isfinite(total):
        raise NumericsError(
            f"{file}: the log probability of a token is not finite - try --dtype float32, or another "
            "checkpoint"
        )
    return Perplexity(
        file=file, documents=counted.documents, tokens=tokens, size=counted.size,
        windows=len(nats), window=window, stride=stride, nats=total, likeliest=likeliest,
    )  # fmt: skip


@dataclass(slots=True)
class _Counted:
    """What went by in a stream of documents."""

    documents: int = 0
    size: int | None = 0

    def rows(self, documents: Iterable[Document], window: int, stride: int) -> Iterator[ScoredRow]:
        for document in documents:
            if len(document.tokens) > 1:
                self.documents += 1
                known = self.size is not None and document.size is not None
                self.size = (self.size or 0) + (document.size or 0) if known else None
                yield from window_rows(document.tokens, window, stride)


def with_first(first: int | None, tokens: Sequence[int] | Ids) -> Ids:
    """The tokens of a document behind the one that begins it, if there is one."""
    head = [] if first is None else [first]
    return np.concatenate([np.asarray(head, np.int64), np.asarray(tokens, np.int64)])
