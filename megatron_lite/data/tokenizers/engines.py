"""Libraries that implement a tokenizer, fastest first, each checked against the one that defines it.

    candidates: gigatoken ─▶ tiktoken ─▶ tokenizers ─▶ plain
    the first that is installed, loads the vocabulary and gives the reference's ids on HARD runs

What was chosen and why the faster ones were not is kept in words and printed.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.extras import how_to_install

AUTO = "auto"
TOKENIZER_ENGINES = (AUTO, "gigatoken", "tiktoken", "tokenizers", "sentencepiece", "plain")
CACHE_BYTES = 256 << 20  # gigatoken remembers every word it met; beyond this it starts anew

HARD = (
    "",
    " ",
    "\n\n\t  x  \n",
    "Hello, world! I'll say it's they've we'd I'M DON'T can’t",
    "naïve café — ﬁne e\u0301 Ångström",
    "你好，世界。？！“引号”（括号）；：、《书》　全角空格ＡＢＣ１２３",
    "㐀㐁䶵𠀀𠮷𡃁𪚥 鿿 〇々 한국어 ひらがな カタカナ ｶﾅ",
    "😀👨‍👩‍👧‍👦🇩🇪🏳️‍🌈 ☃\ufe0f",
    "\u0000\u0001\x07\x1b\x7f\x85\ufeff\u200b\u2028\u2029\u00a0\u3000 end",
    "𝒜\U0010ffff\ufffd\ufffe",
    "a" * 3000,
    " " * 300 + "end" + "\n" * 200 + "\t" * 50,
    "。" * 500 + "!" * 500 + "7" * 500,
    "abc123DEF_foo.bar(x)[0]=3.14e-10;\r\n\r\n\t// 1,234,567.89 €",
    "العربية עברית हिन्दी ไทย Ελληνικά русский",
    "<|endoftext|><|im_start|> <s></s> [MASK] <unk>▁▁_ Ġ",
    "don't  stop   believing    in  'quotes' ''s 'S 'll\u2019ve",
    "line one\nline two\r\nline three\rline four\n\n\n  indented\n\tx",
)
"""Where implementations of one pattern differ: spaces, apostrophes, scripts, controls, long runs."""


class Encoded(NamedTuple):
    """Many texts: all ids one after the other, and how many each text has."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]


def joined_ids(ids: Sequence[Sequence[int]]) -> Encoded:
    """Lists of ids as one array."""
    lengths = np.fromiter((len(part) for part in ids), np.int64, len(ids))
    flat = np.fromiter((token for part in ids for token in part), np.int32, int(lengths.sum()))
    return Encoded(flat, lengths)


class TokenizerEngine(Protocol):
    """One library (or our own code) that turns texts into ids."""

    name: str
    """What is said about it, with its version."""

    threaded: bool
    """It works in threads of its own without holding Python back; worker processes are no use."""

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of many texts; UnicodeEncodeError for a lone surrogate."""
        ...


class Unavailable(Exception):
    """An engine that cannot be used here; the text says why and what would help."""


class Candidate(NamedTuple):
    """An engine by name, and how it is made (Unavailable where it cannot be)."""

    name: str
    make: Callable[[], TokenizerEngine]


def version_of(package: str) -> str:
    """`package 1.2.3`, of an installed distribution."""
    return f"{package} {importlib.metadata.version(package)}"


def missing(package: str, extra: str) -> Unavailable:
    """The package is not installed."""
    return Unavailable(f"{package} is not installed ({how_to_install(extra)})")


class FunctionEngine:
    """Encodes text by text with a function that gives lists."""

    threaded = False

    def __init__(self, name: str, encode: Callable[[str], Sequence[int]]) -> None:
        self.name = name
        self._encode = encode

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of many texts."""
        for text in texts:
            text.encode("utf-8")
        return joined_ids([self._encode(text) for text in texts])


class TokenizersEngine:
    """Hugging Face's `tokenizers`."""

    threaded = False

    def __init__(self, fast: Any) -> None:
        self.name = version_of("tokenizers")
        self.fast = fast

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of many texts."""
        for text in texts:
            text.encode("utf-8")
        encodings = self.fast.encode_batch_fast(list(texts), add_special_tokens=False)
        parts = [np.array(encoding.ids, np.int32) for encoding in encodings]
        lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
        return Encoded(np.concatenate(parts) if parts else np.empty(0, np.int32), lengths)


class TiktokenEngine:
    """OpenAI's `tiktoken` with given ranks; an array per text, no lists."""

    threaded = False

    def __init__(self, ranks: dict[bytes, int], pattern: str, *, shift: int = 0) -> None:
        try:
            import tiktoken  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise missing("tiktoken", "tiktoken") from error
        self.name = version_of("tiktoken")
        self.encoding: Any = tiktoken.Encoding(
            "local", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self._shift = shift

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of many texts."""
        parts = []
        for text in texts:
            text.encode("utf-8")
            parts.append(self.encoding.encode_to_numpy(text, disallowed_special=()))
        lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
        flat = np.concatenate(parts) if parts else np.empty(0, np.uint32)
        return Encoded(flat.astype(np.int32) + np.int32(self._shift), lengths)


class GigatokenEngine:
    """`gigatoken`: SIMD word splitting and a cache of words, in threads of its own."""

    threaded = True

    def __init__(self, load: Callable[[Any], Any], *, shift: int = 0) -> None:
        """load makes the tokenizer from gigatoken's Tokenizer class; called again to empty it."""
        try:
            import gigatoken  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise missing("gigatoken", "fast") from error
        self.name = version_of("gigatoken")
        self._shift = shift
        self._load: Callable[[], Any] = lambda: load(gigatoken.Tokenizer)
        try:
            self._fast: Any = self._load()
        except Unavailable:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise Unavailable(f"{self.name} cannot load this vocabulary: {error}") from error
        self._base = resident_bytes()

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of many texts."""
        if not texts:
            return Encoded(np.empty(0, np.int32), np.empty(0, np.int64))
        layout = self._fast.encode_batch([text.encode("utf-8") for text in texts]).layout
        ids = np.asarray(layout.content.data).view(np.int32)
        lengths = np.diff(np.asarray(layout.offsets.data))
        self._forget()
        return Encoded(ids + np.int32(self._shift) if self._shift else ids, lengths)

    def _forget(self) -> None:
        """Start with an empty cache once it has outgrown its share of the memory."""
        if resident_bytes() - self._base > CACHE_BYTES:
            del self._fast
            self._fast = self._load()
            self._base = resident_bytes()


def resident_bytes() -> int:
    """Memory this process holds now (where the system tells), else the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return pages * os.sysconf("SC_PAGE_SIZE")


def first_difference(
    engine: TokenizerEngine, reference: TokenizerEngine, texts: Sequence[str]
) -> str | None:
    """None where both give equal ids, else the text and where its ids part."""
    ours, theirs = engine.encode_batch(texts), reference.encode_batch(texts)
    if np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.ids, theirs.ids):
        return None
    starts, others = np.cumsum(ours.lengths), np.cumsum(theirs.lengths)
    for i, text in enumerate(texts):
        mine = ours.ids[starts[i] - ours.lengths[i] : starts[i]]
        right = theirs.ids[others[i] - theirs.lengths[i] : others[i]]
        if not np.array_equal(mine, right):
            both = min(len(mine), len(right))
            parted = np.flatnonzero(mine[:both] != right[:both])
            at = int(parted[0]) if len(parted) else both
            return f"{text[:40]!r} parts from {reference.name} at token {at}"
    raise AssertionError("the arrays differ, but no text does")


class EngineChoice:
    """The engine in use for one vocabulary, its reference, and what was found on the way."""

    def __init__(
        self, candidates: Sequence[Candidate], *, reference: Sequence[str], asked: str = AUTO
    ) -> None:
        """candidates: fastest first; reference: names of those that may define the ids, best first.

        asked: one name, or "auto".  ConfigError where what was asked cannot be had.
        """
        self.notes: list[str] = []
        self._made: dict[str, TokenizerEngine] = {}
        self._candidates = {candidate.name: candidate for candidate in candidates}
        if asked != AUTO and asked not in self._candidates:
            raise ConfigError(
                f"--tokenizer-engine {asked} cannot carry out this tokenizer; choose from "
                f"{', '.join([AUTO, *self._candidates])}"
            )
        self._asked = asked
        self._order = list(self._candidates) if asked == AUTO else [asked]
        self._engine: TokenizerEngine | None = None
        names = [asked] if asked in reference else reference
        self.reference = next(filter(None, map(self._try, names)), None)

    def _try(self, name: str) -> TokenizerEngine | None:
        if name not in self._made and name in self._candidates:
            try:
                self._made[name] = self._candidates[name].make()
            except Unavailable as error:
                self.notes.append(str(error))
                del self._candidates[name]
        return self._made.get(name)

    @property
    def engine(self) -> TokenizerEngine:
        """The fastest engine that may be used; chosen when first needed."""
        if self._engine is None:
            self._engine = self._first()
        return self._engine

    @property
    def exact(self) -> TokenizerEngine:
        """The reference, where there is one: for single texts, without choosing a fast engine."""
        return self.reference or self.engine

    def _first(self) -> TokenizerEngine:
        for name in self._order:
            engine = self._try(name)
            if engine is None:
                continue
            if self.reference is None or engine is self.reference:
                return engine
            difference = first_difference(engine, self.reference, HARD)
            if difference is None:
                return engine
            self.notes.append(f"{engine.name} is not used: {difference}")
        raise ConfigError("no engine for this tokenizer: " + "; ".join(self.notes))

    def check(self, texts: Sequence[str]) -> None:
        """Compare with the reference on real text; an engine that differs is replaced, loudly."""
        while self.reference is not None and self.engine is not self.reference:
            difference = first_difference(self.engine, self.reference, texts)
            if difference is None:
                return
            self.notes.append(f"{self.engine.name} is not used: {difference}")
            self._order = [n for n in self._order if self._made.get(n) is not self.engine]
            self._engine = None

    def check_again(self, text: str) -> None:
        """The same in the middle of a run, where continuing would mix two engines: DataError."""
        if self.reference is None or self.engine is self.reference:
            return
        difference = first_difference(self.engine, self.reference, [text])
        if difference is not None:
            raise DataError(
                f"{self.engine.name} disagrees with its reference: {difference} - run again with "
                f"--tokenizer-engine {self.reference.name.split()[0]}"
            )

    def describe(self) -> str:
        """One line: the engine, what it was checked against, and why no faster one."""
        text = self.engine.name
        if self.reference is None:
            text += " (not checked: its reference is not installed)"
        elif self.engine is not self.reference:
            text += f" (ids equal {self.reference.name}'s)"
        return "; ".join([text, *self.notes])


class EngineTokenizer:
    """The encoding half of a tokenizer: one text by the reference, many by the fastest engine."""

    choice: EngineChoice
    begins: Sequence[int] = ()

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Tokens that no text gives, whatever it spells, by what they are written as."""
        return {}

    @property
    def unknown(self) -> int | None:
        """The id for what the vocabulary lacks; None where it lacks nothing, or gives nothing for it."""
        return None

    @property
    def loses_text(self) -> bool:
        """What the vocabulary lacks gives no id at all, not even the unknown one."""
        return False

    def encode(self, text: str) -> list[int]:
        """Ids of one text; a lone surrogate raises UnicodeEncodeError."""
        ids: list[int] = self.choice.exact.encode_batch([text]).ids.tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        """Ids of many texts; a lone surrogate raises UnicodeEncodeError."""
        return self.choice.engine.encode_batch(texts)
