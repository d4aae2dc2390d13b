"""The flags that say which model speaks, and how; shared by all tools that let one speak."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_lite.blueprint.devices import short_name
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.extensions import add_extend_flag
from megatron_lite.data.chat.conversation import Renderer, renderer_of
from megatron_lite.data.chat.formats import CHAT_FORMATS, Message
from megatron_lite.data.provenance import ALLOW_MISMATCH
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import asked_begin
from megatron_lite.inference.model import PRECISIONS, ModelSource, build_model, find_model
from megatron_lite.inference.sampling import Sampling
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner.hardware import DEVICES

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PRECISIONS}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, and its tokenizer."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--load",
        required=True,
        help="run folder, one iter_N folder of it, or one of Hugging Face's",
    )
    group.add_argument(
        "--adapter", help="adapters to use with it: a folder of PEFT's, or a run of --lora-rank"
    )
    group.add_argument("--ckpt-step", type=int, help="this iteration instead of the newest")
    group.add_argument("--vocab-file", help="instead of the one the run was trained with")
    group.add_argument("--merge-file", help="instead of the one the run was trained with")
    group.add_argument(
        ALLOW_MISMATCH, action="store_true", help="speak with another tokenizer than its own"
    )
    group.add_argument(
        "--first-token", metavar="ID",
        help="what every text begins with: an id, eod or none; by default as the model was trained",
    )  # fmt: skip
    group.add_argument("--dtype", choices=_DTYPES, help="as the weights are kept by default")
    group.add_argument("--use-cpu", action="store_true", help="even where there is a GPU")
    add_extend_flag(group)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How its tokens are drawn."""
    group = parser.add_argument_group("how tokens are drawn")
    group.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    group.add_argument("--top-k", type=int, default=0, help="keep the k likeliest; 0 keeps all")
    group.add_argument("--top-p", type=float, default=1.0, help="keep this much probability")
    group.add_argument(
        "--min-p", type=float, default=0.0, help="keep what is so likely beside the likeliest"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1: what was there is less likely",
    )
    group.add_argument("--seed", type=int, default=1234, help="of the draws (%(default)s)")


def add_chat_flags(add: Callable[..., Any]) -> None:
    """How a conversation is written for it."""
    add(
        "--chat-template", metavar="NAME|FILE",
        help=f"{', '.join(CHAT_FORMATS)}, or a file in Jinja; by default the model's own",
    )  # fmt: skip


def add_cache_flags(parser: argparse.ArgumentParser) -> None:
    """What is kept of a long text."""
    group = parser.add_argument_group("endless texts")
    group.add_argument(
        "--cache-tokens", type=int, default=0,
        help="keep only so many tokens in mind, the first and the latest: text may be endless",
    )  # fmt: skip
    group.add_argument(
        "--sink-tokens", type=int, help="of --cache-tokens, the first ones of the text (4)"
    )


def settle_cache(asked: argparse.Namespace) -> None:
    """The default of --sink-tokens; ConfigError where nothing would come of what was given."""
    if asked.sink_tokens is None:
        asked.sink_tokens = 4
    elif not asked.cache_tokens:
        raise ConfigError(
            f"--sink-tokens {asked.sink_tokens} is of --cache-tokens: give it too, or leave out "
            "--sink-tokens"
        )


def sampling_of(asked: argparse.Namespace) -> Sampling:
    """ConfigError for a value out of its range."""
    return Sampling(
        temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
    )  # fmt: skip


class Speaker(NamedTuple):
    """A model that was loaded, its tokenizer, and where both are from."""

    source: ModelSource
    model: Decoder
    tokenizer: Tokenizer


Look = Callable[[ModelSource, Tokenizer], Sequence[str]]
"""Checks what a model is to be used for before its weights are read; returns what to say about it."""


class TriedTemplate:
    """How conversations are written, by --chat-template; looks before the weights are read."""

    def __init__(self, asked: argparse.Namespace, tried: Sequence[Message] | None) -> None:
        """tried: what a template must be able to write, DataError where it is not; None tries nothing."""
        self._asked, self._tried = asked, tried
        self._found: Renderer | None = None

    @property
    def renderer(self) -> Renderer:
        """Of the model that was looked at."""
        assert self._found is not None, "the model is looked at first"
        return self._found

    def look(self, source: ModelSource, tokenizer: Tokenizer) -> Sequence[str]:
        """A Look: there is nothing to say."""
        adapter = self._asked.adapter
        self._found = renderer_of(
            tokenizer, source.tokenizer_folder, self._asked.chat_template,
            begins=tokenizer.begins, adapter=adapter and Path(adapter),
        )  # fmt: skip
        if self._tried is not None:
            try:
                self._found.ids(self._tried)
            except BaseException:
                self._found.sandbox.close()
                raise
        return ()


def look_at_nothing(source: ModelSource, tokenizer: Tokenizer) -> Sequence[str]:
    """A Look of tools that take any model."""
    return ()


def load_speaker(
    asked: argparse.Namespace, ctx: ParallelContext, look: Look = look_at_nothing
) -> Speaker:
    """Of the flags of add_model_flags; rank 0 says what there is to say about them."""
    adapter = None if asked.adapter is None else Path(asked.adapter)
    source = find_model(Path(asked.load), ctx, step=asked.ckpt_step, adapter=adapter)
    tokenizer, said = source.tokenizer(
        asked.vocab_file, asked.merge_file, allowed=asked.allow_tokenizer_mismatch
    )
    if asked.first_token is not None:
        assert source.config.vocab_size is not None
        tokenizer.begins = asked_begin(asked.first_token, tokenizer, source.config.vocab_size)
    said = [*source.notices, *said, *look(source, tokenizer)]
    for line in said if ctx.rank == 0 else ():
        print(f"WARNING: {line}", file=sys.stderr)
    dtype = None if asked.dtype is None else _DTYPES[asked.dtype]
    return Speaker(source, build_model(source, ctx, dtype=dtype), tokenizer)


def device_bandwidth(device: torch.device) -> tuple[str, float | None]:
    """A device's name, and its memory's GB/s where a table has them."""
    if device.type != "cuda":
        return "this CPU", None
    name = torch.cuda.get_device_name(device)
    known = DEVICES.get(short_name(name) or "")
    return name, None if known is None else known.bandwidth_gb_s
