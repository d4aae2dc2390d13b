"""Which datasets are mixed in which shares: --data-path and its relatives, and --split.

A list is `P`, or `P1 P2 ...`, or `w1 P1 w2 P2 ...`.  An item that looks like a number makes the
whole list a weighted one, so a mistyped weight is an error and never a dataset's name.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.data import DataConfig

MAX_DATASETS = 32766
"""The blend index numbers datasets in int16, as Megatron's does."""

DEFAULT_SPLIT = "969, 30, 1"
"""Megatron's shares of train, validation and test."""

MOCK_SPLIT = (1 / 3, 1 / 3, 1 / 3)
"""Megatron's shares of synthetic documents, whatever --split says."""

SPLITS = ("train", "valid", "test")

_NUMBER_LIKE = re.compile(r"[+-]?[0-9]*[.,]?[0-9]+%?|[+-]?(nan|inf|infinity)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Blend:
    """Datasets in the order given, and their weights as given (not normalised)."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    """None: in proportion to the datasets' lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blends:
    """Where the splits read: one blend cut by `split`, or one blend for each split."""

    shared: Blend | None = None
    """--data-path; its documents are dealt to the splits by `split`."""
    split: tuple[float, float, float] | None = None
    """Shares of train, valid and test, summing to 1; only with `shared` or `mock`."""
    by_split: Mapping[str, Blend] = field(default_factory=dict)
    """train, valid, test -> its own blend; a split that is absent has no data."""
    mock: bool = False
    """Synthetic documents."""


def parse_blend(items: Sequence[str], *, source: str = "--data-path") -> Blend:
    """Read `P`, `P1 P2 ...` or `w1 P1 w2 P2 ...`; ConfigError names the item that is wrong."""
    if not items:
        raise ConfigError(f"{source} names no dataset; give a prefix, or weights and prefixes")
    if not any(map(_looks_like_number, items)):
        weights = None
        prefixes = list(items)
    else:
        weights, prefixes = _weighted(items, source)
    seen: dict[str, str] = {}
    for prefix in prefixes:
        _check_prefix(prefix, source)
        plain = posixpath.normpath(prefix)
        if plain in seen:
            raise ConfigError(
                f"{source}: {prefix} is named twice; name it once, with the sum of the weights"
            )
        seen[plain] = prefix
    if len(prefixes) > MAX_DATASETS:
        raise ConfigError(
            f"{source}: {len(prefixes)} datasets; at most {MAX_DATASETS} can be mixed, "
            "merge some with tools/merge_datasets.py"
        )
    return Blend(tuple(prefixes), weights)


def _weighted(items: Sequence[str], source: str) -> tuple[tuple[float, ...], list[str]]:
    form = "weights and prefixes take turns: w1 P1 w2 P2 ..."
    weights: list[float] = []
    for at in range(0, len(items), 2):
        weight = _weight(items[at])
        if weight is None:
            raise ConfigError(
                f"{source}: item {at + 1}, {items[at]!r}, stands where a weight belongs but is "
                f"not a positive finite number; {form} (a prefix that is a number: ./{items[at]})"
            )
        weights.append(weight)
        if at + 1 == len(items):
            raise ConfigError(
                f"{source}: {len(items)} items, and the weight {items[at]} at the end has no "
                f"prefix; {form} (a prefix that is a number: ./{items[at]})"
            )
        if _looks_like_number(items[at + 1]):
            raise ConfigError(
                f"{source}: item {at + 2}, {items[at + 1]!r}, stands where a prefix belongs but "
                f"is a number; {form} (a prefix that is a number: ./{items[at + 1]})"
            )
    if not math.isfinite(sum(weights)):
        raise ConfigError(f"{source}: the weights' sum is not finite; give smaller weights")
    return tuple(weights), list(items[1::2])


def _looks_like_number(text: str) -> bool:
    if _NUMBER_LIKE.fullmatch(text.strip()):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _weight(text: str) -> float | None:
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if math.isfinite(weight) and weight > 0 else None


def _check_prefix(prefix: str, source: str) -> None:
    if not prefix.strip():
        raise ConfigError(f"{source}: an empty prefix (an unset shell variable?)")
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            raise ConfigError(
                f"{source}: {prefix} is a file; give the prefix without {suffix}: "
                f"{prefix.removesuffix(suffix)}"
            )


def parse_split(text: str) -> tuple[float, float, float]:
    """`949,50,1` as shares that sum to 1; also with `/` or spaces, missing shares are 0.

    Quotes or brackets around it belong to a shell or YAML file that passed them on.
    """
    parts = [part for part in re.split(r"[,/\s]+", text.strip(" \t\n'\"[]()")) if part]
    shares: list[float] = []
    for part in parts:
        try:
            share = float(part)
        except ValueError:
            share = math.nan
        if not math.isfinite(share) or share < 0:
            raise ConfigError(
                f"--split {text!r}: {part!r} is not a share; give three numbers, e.g. 949,50,1"
            )
        shares.append(share)
    total = sum(shares)
    if not 1 <= len(shares) <= 3 or not 0 < total < math.inf:
        raise ConfigError(f"--split {text!r}: give one to three shares, not all 0, e.g. 949,50,1")
    train, valid, test = (share / total for share in (*shares, 0.0, 0.0)[:3])
    return train, valid, test


def data_sources(data: DataConfig) -> tuple[str, ...]:
    """The flags that name data; a run has exactly one (the three per-split flags are one)."""
    per_split = any((data.train_data_path, data.valid_data_path, data.test_data_path))
    given = {
        "--data-path": bool(data.data_path),
        "--data-args-path": data.data_args_path is not None,
        "--train/valid/test-data-path": per_split,
        "--per-split-data-args-path": data.per_split_data_args_path is not None,
        "--mock-data": data.mock_data,
    }
    return tuple(flag for flag, is_given in given.items() if is_given)


def blends(data: DataConfig) -> Blends:
    """What each split reads; reads the files that --data-args-path and its twin name.

    Raises ConfigError for no source, several sources, --split with per-split data, or a bad list.
    """
    named = data_sources(data)
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise ConfigError(
            f"exactly one source of data is needed, got {found}; give one of --data-path, "
            "--data-args-path, --train-data-path (with --valid-data-path, --test-data-path), "
            "--per-split-data-args-path, --mock-data"
        )
    (source,) = named
    if source in ("--train/valid/test-data-path", "--per-split-data-args-path"):
        if data.split is not None:
            raise ConfigError(f"--split {data.split} cuts one blend, but {source} names its own")
        return Blends(by_split=_per_split(data))
    split = parse_split(data.split if data.split is not None else DEFAULT_SPLIT)
    if data.mock_data:
        return Blends(split=MOCK_SPLIT, mock=True)
    if data.data_args_path is not None:
        where = f"--data-args-path {data.data_args_path}"
        items = _read(data.data_args_path, "--data-args-path").split()
        return Blends(shared=parse_blend(items, source=where), split=split)
    return Blends(shared=parse_blend(data.data_path), split=split)


def named_prefixes(data: DataConfig) -> list[str]:
    """All prefixes that the flags name, each once."""
    found = blends(data)
    named = [*([found.shared] if found.shared else []), *found.by_split.values()]
    return list(dict.fromkeys(prefix for blend in named for prefix in blend.prefixes))


def _per_split(data: DataConfig) -> dict[str, Blend]:
    if data.per_split_data_args_path is None:
        lists = {"train": data.train_data_path, "valid": data.valid_data_path}
        lists["test"] = data.test_data_path
        return {
            split: parse_blend(items, source=f"--{split}-data-path")
            for split, items in lists.items()
            if items
        }
    path = data.per_split_data_args_path
    where = f"--per-split-data-args-path {path}"
    try:
        content = json.loads(_read(path, "--per-split-data-args-path"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or not set(content) <= set(SPLITS):
        raise ConfigError(
            f'{where}: must be an object {{"train": [...], "valid": [...], "test": [...]}}'
        )
    found: dict[str, Blend] = {}
    for split, raw in content.items():
        if raw is None or raw == []:
            continue
        strange = not isinstance(raw, list) or any(
            isinstance(item, bool) or not isinstance(item, str | int | float) for item in raw
        )
        if strange:
            raise ConfigError(f"{where}: {split!r} must be a list of weights and prefixes")
        items = [item if isinstance(item, str) else repr(item) for item in raw]
        found[split] = parse_blend(items, source=f"{where}, {split!r}")
    if not found:
        raise ConfigError(f"{where}: names no dataset for any split")
    return found


def _read(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{flag} {path}: cannot be read ({reason})") from None
