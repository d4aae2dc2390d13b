"""KEYS: every documented key of a ds.json -> what becomes of it; and where an unknown one may belong."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from megatron_lite.config.deepspeed.key import DeepSpeedKey
from megatron_lite.config.deepspeed.system_keys import SYSTEM_KEYS
from megatron_lite.config.deepspeed.training_keys import TRAINING_KEYS

KEYS: Mapping[str, DeepSpeedKey] = MappingProxyType(
    {row.name: row for row in (*TRAINING_KEYS, *SYSTEM_KEYS)}
)
"""Name with dots -> row."""

SECTIONS = frozenset(
    ".".join(name.split(".")[:depth]) for name in KEYS for depth in range(1, name.count(".") + 1)
)
"""Names that hold keys."""


def near_key(name: str) -> str:
    """What may have been meant by an unknown name, as words behind it."""
    section, _, last = name.rpartition(".")
    beside = {
        known.rpartition(".")[2]: known
        for known in (*KEYS, *SECTIONS)
        if known.rpartition(".")[0] == section
    }
    close = difflib.get_close_matches(last.lower(), beside, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {beside[close[0]]}?"
    anywhere = {known.rpartition(".")[2]: known for known in KEYS}
    close = difflib.get_close_matches(last.lower(), anywhere, n=1, cutoff=0.7)
    return (
        f"; did you mean {anywhere[close[0]]}?" if close else "; docs/guides/deepspeed.md lists all"
    )
