"""The planner's kernels between products are those that a real layer runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.blueprint.figure.parts import Norm
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.kernels import reference
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import step_dropout
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner.hardware import DEVICES
from megatron_lite.planner.pieces import COMPILED_KERNELS, MASK_KERNELS, Moved, kernel_table, moved

S, B, H = 64, 2, 256
GPT = ModelConfig(
    num_layers=1, hidden_size=H, num_attention_heads=4, seq_length=S, hidden_dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
LLAMA = dataclasses.replace(
    GPT, ffn_hidden_size=512, normalization="RMSNorm", swiglu=True, add_bias_linear=False,
    position_embedding_type="rope", num_query_groups=2,
)  # fmt: skip
DROPPED = dataclasses.replace(GPT, hidden_dropout=0.1)

PRODUCTS = ("mm", "addmm", "bmm", "add_", "scaled_dot_product")
"""add_: what a weight's gradient is added by; on a GPU its product does."""


class Counting(TorchDispatchMode):
    """Counts operations that are a kernel on a GPU, and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Carry it out; what gives a view of its input is none."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [
            x
            for x in (*tree_leaves((args, kwargs)), *tree_leaves(out))
            if isinstance(x, torch.Tensor)
        ]
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        held = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs))
                if isinstance(x, torch.Tensor)}  # fmt: skip
        views = not name.endswith("_") and all(
            x.untyped_storage().data_ptr() in held for x in results
        )
        if not views and not any(word in name for word in PRODUCTS) and "empty" not in name:
            self.kernels += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def counted(model: ModelConfig, dtype: torch.dtype) -> tuple[Moved, Moved]:
    """A layer's forward and its backward: what a second layer adds to one."""
    passes = [_passes(dataclasses.replace(model, num_layers=n), dtype) for n in (1, 2)]
    one, two = ([(c.kernels, c.bytes / dtype.itemsize) for c in pair] for pair in passes)
    forward, backward = (Moved(b[0] - a[0], b[1] - a[1]) for a, b in zip(one, two, strict=True))
    return forward, backward


def _passes(model: ModelConfig, dtype: torch.dtype) -> tuple[Counting, Counting]:
    context = StageContext(
        model, ParallelContext.serial(), padded_vocab_size=8, vocab_size=8,
        precision=PrecisionConfig(bf16=dtype is torch.bfloat16),
    )  # fmt: skip
    layers = Decoder(context, range(model.num_layers), has_embedding=False, has_head=False)
    at = ForwardContext(
        samples=torch.arange(B), index=torch.arange(S), first_sample=0,
        dropout=step_dropout(context, 0),
    )  # fmt: skip
    x = torch.randn(S, B, H, dtype=dtype, requires_grad=True) * 1.0
    with Counting() as forward:
        y = layers(x, at)
    gradient = torch.ones_like(y)
    with Counting() as backward:
        y.backward(gradient)
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("model", [GPT, DROPPED, LLAMA], ids=["gpt", "dropout", "llama"])
def test_a_layers_kernels_and_bytes_are_those_counted(
    model: ModelConfig, dtype: torch.dtype
) -> None:
    forward, backward = counted(model, dtype)
    parts = figure_of(model, 8).layers[0]
    mask = DEVICES["h100"].dropout_values * 2 / dtype.itemsize if model.hidden_dropout else None
    table = kernel_table(compiled=False, width=dtype.itemsize)
    said, said_back = moved(parts, table, tokens=S * B, split=S * B, tp=1, mask=mask)
    assert (said.kernels, said_back.kernels) == (forward.kernels, backward.kernels)
    assert said.values == pytest.approx(forward.values, rel=0.02)
    # the second kernel of a LayerNorm's backward is part of one operation here
    unseen = 2 * S * B * H * sum(norm.function == "LayerNorm" for norm in parts.of(Norm))
    assert said_back.values - unseen == pytest.approx(backward.values, rel=0.02)


def test_a_mask_is_made_by_so_many_kernels() -> None:
    without, dropped = (counted(model, torch.bfloat16)[0].kernels for model in (GPT, DROPPED))
    assert dropped - without == 2 * (MASK_KERNELS + 2)


ELEMENTS = 4096


@pytest.mark.parametrize("name", ["LayerNorm", "gelu", "swiglu"])
def test_a_compiled_piece_reads_and_writes_what_it_is_given_and_gives(name: str) -> None:
    x = torch.randn(16, ELEMENTS // 16)
    weight = torch.ones(ELEMENTS // 16)
    if name == "LayerNorm":
        y = reference.layer_norm(x, weight, weight, 1e-5)
    elif name == "gelu":
        y = reference.gelu(x)
    else:
        x = torch.randn(16, 2 * ELEMENTS // 16)
        y = reference.swiglu(x)
    assert COMPILED_KERNELS[name].forward == (1, (x.numel() + y.numel()) / ELEMENTS)
