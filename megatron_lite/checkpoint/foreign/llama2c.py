"""A Llama becomes llama2.c's model.bin: its first header for run.c (fp32), version 2 for runq.c (Q8_0).

    first      7 int32: width, feed-forward width, layers, heads, key heads, rows (below 0: a head of its
               own), positions; then fp32: token table, all attention norms, wq wk wv wo of all layers, all
               feed-forward norms, w1 w2 w3, final norm, two tables of angles that run.c skips, the head
    version 2  "24ka", 2, the 7 numbers (rows above 0), a byte: head tied, the size of a group; zeros up to
               256 bytes; fp32 norms; then every matrix: int8, and an fp32 scale for each group

run.c turns neighbouring channels of q and k, with the base 10000 and the epsilon 1e-5, and nothing else.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_lite.checkpoint.foreign.gguf import neighbours
from megatron_lite.checkpoint.huggingface.conversion import Conversion
from megatron_lite.checkpoint.huggingface.exporting import Export, plan_export
from megatron_lite.checkpoint.huggingface.names import Names
from megatron_lite.config.errors import CheckpointError, NumericsError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.storage.disk import Disk, DiskFile

MODEL_BIN = "model.bin"
LLAMA2C_DTYPES = ("f32", "q8_0")
_MAGIC, _VERSION, _HEADER, _GROUP = 0x616B3432, 2, 256, 64
_NAMES = Names(
    prefix="",
    outside={"embedding.tokens": "tok_embeddings", "final_norm": "norm", "head": "output"},
    layer="layers.{}.",
    block={
        "attention_norm": "attention_norm", "attention.q": "wq", "attention.k": "wk",
        "attention.v": "wv", "attention.output": "wo", "mlp_norm": "ffn_norm", "mlp.gate": "w1",
        "mlp.down": "w2", "mlp.up": "w3",
    },
)  # fmt: skip
_FIRST = ("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3",
          "norm", "output")  # fmt: skip
_SECOND = ("attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2",
           "w3", "output")  # fmt: skip
_NORM_KINDS = ("attention_norm", "ffn_norm", "norm")


@dataclass(frozen=True, slots=True)
class Llama2cExport:
    """A checkpoint that run.c can compute; group: numbers of one scale, 0 in fp32."""

    inner: Export
    group: int

    @property
    def bytes(self) -> int:
        """Of all tensors, at most."""
        return sum(self.inner.form(conversion).bytes for conversion in self.inner.conversions)


def plan_llama2c(plan: Export, kind: str, dtype: str | None) -> Llama2cExport:
    """kind: the key of the family in FAMILIES; dtype: one of LLAMA2C_DTYPES, fp32 by default.

    Raises CheckpointError naming all that run.c does not compute.
    """
    model = plan.model
    lacks = [] if kind == "llama" else [f"the family {plan.family.title}"]
    said = plan.family.config_out(model, eod=None, dtype="float32")
    wanted = {
        "--norm-epsilon": (model.norm_epsilon, 1e-5),
        "--rotary-base": (model.rotary_base, 10000.0),
        "--kv-channels": (model.head_size * model.num_attention_heads, model.hidden_size),
        "--rope-scaling-type": (model.rope_scaling_type, "none"),
        "biases": (said.get("mlp_bias", False), False),
    }
    if kind == "llama":
        lacks += [
            f"{name} {now}, only {only}" for name, (now, only) in wanted.items() if now != only
        ]
    if lacks:
        raise CheckpointError(
            f"llama2.c does not compute {'; '.join(lacks)}: export to another format"
        )
    inner = plan_export(
        plan.store, plan.manifest, plan.trained, torch.float32, family=kind, names=_NAMES,
        adapters=plan.adapters,
    )  # fmt: skip
    group = 0
    if dtype == "q8_0":
        group = math.gcd(_GROUP, model.hidden_size, model.ffn_size)
    return Llama2cExport(inner, group)


def export_llama2c(export: Llama2cExport, folder: Path, *, disk: Disk) -> str:
    """Write model.bin into an empty folder.  The peak is one tensor in fp32 and what is made of it."""
    model = export.inner.model
    with disk.create(folder / MODEL_BIN) as file:
        file.write(_header(model, export.group))
        for conversion in _in_order(export.inner.conversions, _SECOND if export.group else _FIRST):
            if not export.group and conversion.theirs == "output.weight":
                _angles(file, model)  # before the head
            values = _values(export.inner, conversion)
            if export.group and _module(conversion) not in _NORM_KINDS:
                _write_packed(file, values, export.group)
            else:
                file.write(values.numpy().data)
        if not export.group and not model.untie_embeddings_and_output_weights:
            _angles(file, model)  # there is no head
        file.fsync()
    return MODEL_BIN


def _header(model: ModelConfig, group: int) -> bytes:
    untied, rows = model.untie_embeddings_and_output_weights, model.vocab_size or 0
    sizes = (model.hidden_size, model.ffn_size, model.num_layers, model.num_attention_heads,
             model.num_kv_heads)  # fmt: skip
    if not group:
        return struct.pack("<7i", *sizes, -rows if untied else rows, model.num_positions)
    head = struct.pack("<Ii7i", _MAGIC, _VERSION, *sizes, rows, model.num_positions)
    return (head + struct.pack("<Bi", not untied, group)).ljust(_HEADER, b"\0")


def _module(conversion: Conversion) -> str:
    return conversion.theirs.rsplit(".", 2)[-2]


def _in_order(found: Sequence[Conversion], order: Sequence[str]) -> Iterator[Conversion]:
    """All of one kind, from the first layer to the last, and then the next kind."""
    for module in order:
        yield from (conversion for conversion in found if _module(conversion) == module)


def _values(export: Export, conversion: Conversion) -> Tensor:
    tensor = export.tensor(conversion)
    if not bool(torch.isfinite(tensor).all()):
        raise NumericsError(
            f"{conversion.theirs} holds values that are not finite: nothing is made of it"
        )
    turned = _module(conversion) in ("wq", "wk")
    return neighbours(tensor, export.model.head_size) if turned else tensor.contiguous()


def _angles(file: DiskFile, model: ModelConfig) -> None:
    """cos and sin of every position, which run.c has room for and does not read."""
    d = model.head_size
    exponent = np.arange(0, d, 2, dtype=np.float64) / d
    angle = np.outer(np.arange(model.num_positions), 10000.0**-exponent)
    file.write(np.cos(angle).astype(np.float32).data)
    file.write(np.sin(angle).astype(np.float32).data)


def _write_packed(file: DiskFile, values: Tensor, group: int) -> None:
    """Each group by its largest value, which becomes 127."""
    groups = values.reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True) / 127
    packed = (groups / scale.masked_fill(scale == 0, 1)).round().to(torch.int8)
    file.write(packed.numpy().data)
    file.write(scale.numpy().data)
