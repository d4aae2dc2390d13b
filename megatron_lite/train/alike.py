"""What must be the same on every rank: flags, tokenizer, code, version of PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_lite.config.sections.run import RunConfig
from megatron_lite.rendezvous.launch import Launch, World, compare_ranks, wait_for_all
from megatron_lite.train.ending.faults import Fault, NoFaults
from megatron_lite.train.patience import told
from megatron_lite.train.reading import TokenizerFacts

OpenTokens = Callable[[], tuple[RunConfig, TokenizerFacts]]
"""Builds the tokenizer: the config with its vocabulary, and what training must know of it."""


def open_alike(
    open_tokens: OpenTokens, launch: Launch, world: World, faults: Fault | NoFaults
) -> tuple[RunConfig, TokenizerFacts]:
    """Build the tokenizer on ranks that have met: a rank that takes long for it is not taken for lost.

    Raises ConfigError, on every rank alike, where the ranks were not started alike.
    """
    say = functools.partial(print, flush=True) if launch.rank == 0 else lambda line: None
    with told("building the tokenizer", say):
        faults.at("tokenizer")
        config, tokens = open_tokens()
        wait_for_all(world, "tokenizer", launch.world_size)
    compare_ranks(launch, world, facts(config, tokens))
    return config, tokens


def plain(config: RunConfig) -> dict[str, Any]:
    """The config as JSON-ready sections of plain values."""
    return dataclasses.asdict(config)


def facts(config: RunConfig, tokens: TokenizerFacts) -> dict[str, str]:
    """What must be the same on every rank; a cache may lie elsewhere on every node."""
    found = {
        f"{section}.{name}": json.dumps(value)
        for section, fields in plain(config).items()
        for name, value in fields.items()
        if name != "data_cache_path"
    }
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    versions = {
        "megatron_lite (hash of its code)": code.hexdigest()[:16],
        "torch": torch.__version__,
    }
    tokenizer = (
        f"{tokens.vocab_size} ids, eod {tokens.eod}, hash {tokens.made_with.fingerprint[:16]}"
    )
    return found | versions | {"tokenizer": tokenizer}
