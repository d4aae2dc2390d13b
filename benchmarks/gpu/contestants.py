"""Who runs: our trainer, a plain GPT-2 and Hugging Face's Llama, all from the same first weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.plain_gpt import PlainGPT
from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.data.batch import Batch
from megatron_lite.engines.base import Update
from megatron_lite.kernels.table import PREFERENCES
from megatron_lite.layers.attention import choose_attention
from megatron_lite.optim.groups import Rates
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.ahead import Unheard, hear, update_unheard
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import begin_step, settle

LR, WEIGHT_DECAY = 1e-4, 0.1
Weights = Mapping[str, Tensor]
"""Canonical name -> global tensor of the first weights, on the host."""


class NotInstalled(Exception):
    """A contestant's library is not here; the row says so."""


class Contestant(Protocol):
    """One way to train the same model on the same batches."""

    def step(self, batch: Batch) -> Tensor:
        """Forward, backward, clipping and AdamW; the mean loss, still on the device."""
        ...


@dataclass
class Ours:
    """This project's training step, as the trainer calls it on a GPU, without its log line."""

    flags: list[str]
    device: torch.device
    document: int | None = None
    """Tokens of each document of a row, which do not see those of another; None: all see all."""
    attention: str | None = None
    """The kernel of attention by its name in the table; None: what is chosen here."""
    run: Run = field(init=False)
    last: Update | None = None
    unheard: Unheard | None = None

    def __post_init__(self) -> None:
        config = parse(self.flags).config
        self.micro = config.train.micro_batch_size
        context = ParallelContext.serial(str(self.device))
        with _preferring(self.attention):
            self.run = assemble(config, draw_up(config, 1), context)
            line = choose_attention(self.run.context, training=True, segments=True)
        if self.attention not in (None, line.implementation.name):
            raise NotInstalled(f"{self.attention} does not run here: {line.why}")

    def step(self, batch: Batch) -> Tensor:
        """See Contestant."""
        starts = range(0, len(batch.tokens), self.micro)
        parts = [_rows(batch, start, start + self.micro, self.document) for start in starts]
        rates = Rates(LR, WEIGHT_DECAY)
        begun = begin_step(self.run, parts)
        if self.unheard is not None and hear(self.run, self.unheard) is None:
            raise AssertionError("a step of the benchmark was not finite")
        if self.run.runs_ahead:
            self.unheard = update_unheard(self.run, begun, rates)
            self.last = self.unheard.update
        else:
            self.last = settle(self.run, begun, rates).update
        return begun.attempt.loss

    def first_weights(self) -> Weights:
        """What the others begin with."""
        slices = self.run.engine.weights(owned=False)
        return {one.name: one.data.detach().cpu().clone() for one in slices}


@contextmanager
def _preferring(kernel: str | None) -> Iterator[None]:
    """Attention by this row of the table where a model is built inside."""
    before = PREFERENCES["auto"]
    if kernel is not None:
        PREFERENCES["auto"] = [kernel, "reference"]
    try:
        yield
    finally:
        PREFERENCES["auto"] = before


def _rows(batch: Batch, start: int, stop: int, document: int | None) -> Batch:
    """Samples [start, stop), every so many tokens a document."""
    loss_mask = batch.loss_mask[start:stop]
    segments = None
    if document is not None:
        rows, length = loss_mask.shape
        begins = np.arange(0, length, document)
        ends = [*(row * length + begins for row in range(rows)), [rows * length]]
        segments = np.concatenate(ends).astype(np.int32)
    return Batch(
        batch.tokens[start:stop], batch.sample_numbers[start:stop], loss_mask, segments=segments
    )


@dataclass
class Plain:
    """A module under autocast with fp32 masters and fused AdamW, compiled: what nanoGPT does.

    loss: (module, inputs [b, s], labels [b, s]) -> mean loss.
    """

    module: torch.nn.Module
    loss: Callable[[torch.nn.Module, Tensor, Tensor], Tensor]
    device: torch.device

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.module.to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=on_gpu
        )

    def step(self, batch: Batch) -> Tensor:
        """See Contestant."""
        host = torch.from_numpy(batch.tokens)
        if self.device.type == "cuda":
            host = host.pin_memory()
        tokens = host.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(self.module, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _fill(module: torch.nn.Module, of: Callable[[str], Tensor]) -> None:
    """Give every parameter its first values; rows of padding beyond what is given stay zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            given = of(name)
            parameter.zero_()[: given.shape[0]] = given


def plain_gpt2(weights: Weights, sizes: Mapping[str, int], device: torch.device) -> Plain:
    """GPT-2 in plain PyTorch, whole and compiled; the vocabulary padded to 128 as nanoGPT has it."""
    rows = -(-sizes["vocabulary"] // 128) * 128
    model = PlainGPT(sizes["layers"], sizes["hidden"], sizes["heads"], sizes["sequence"], rows)
    ends = {"tokens.weight": "embedding.tokens.weight", "positions.weight": "embedding.positions.weight",
            "norm.weight": "final_norm.weight", "norm.bias": "final_norm.bias"}  # fmt: skip
    parts = {"norm1": "attention_norm", "norm2": "mlp_norm", "out": "attention.output",
             "up": "mlp.up", "down": "mlp.down"}  # fmt: skip

    def of(name: str) -> Tensor:
        if name in ends:
            return weights[ends[name]]
        _, layer, part, leaf = name.split(".")
        if part == "qkv":
            return torch.cat([weights[f"blocks.{layer}.attention.{k}.{leaf}"] for k in "qkv"])
        return weights[f"blocks.{layer}.{parts[part]}.{leaf}"]

    _fill(model, of)

    def loss(module: torch.nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(module(inputs), labels)

    return Plain(model, torch.compile(loss), device)


def hugging_face_llama(weights: Weights, sizes: Mapping[str, int], device: torch.device) -> Plain:
    """transformers' Llama with its layers compiled one by one, attention by SDPA."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise NotInstalled(f"transformers is not installed ({error})") from error
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"],
        intermediate_size=sizes["ffn"], num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=sizes["sequence"], rms_norm_eps=1e-5,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ends = {"model.embed_tokens.weight": "embedding.tokens.weight",
            "model.norm.weight": "final_norm.weight", "lm_head.weight": "head.weight"}  # fmt: skip
    parts = {
        "self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k",
        "self_attn.v_proj": "attention.v", "self_attn.o_proj": "attention.output",
        "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
    }  # fmt: skip

    def of(name: str) -> Tensor:
        if name in ends:
            return weights[ends[name]]
        layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        return weights[f"blocks.{layer}.{parts[part]}.weight"]

    _fill(model, of)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer)

    def loss(module: torch.nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return _cross_entropy(module(input_ids=inputs).logits, labels)

    return Plain(model, loss, device)
