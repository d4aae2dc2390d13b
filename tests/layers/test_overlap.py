"""Tensor-parallel collectives run under matrix products: the order in which they are begun and awaited."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.layers import gradients, linear, product
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.gradients import WeightGradients
from megatron_lite.layers.mlp import MLP
from megatron_lite.parallel.context import Axis, ParallelContext
from tests.support.spawn import spawn

S, B, H = 8, 2, 12


class Noted:
    """A collective in flight whose end is noted; see parallel.collectives.Pending."""

    def __init__(self, pending: Any, name: str, events: list[str]) -> None:
        self.pending, self.name, self.events = pending, name, events

    def wait(self) -> torch.Tensor:
        self.events.append(f"{self.name} awaited")
        return self.pending.wait()


class Products(TorchDispatchMode):
    """Notes each matrix product: `dx` of a linear layer, `dw` into an accumulator or a forward."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_", "bmm"):
            self.events.append("dw" if name == "addmm_" else "product")
        return func(*args, **(kwargs or {}))


def mlp_of(rank: int, ranks: int, sequence_parallel: bool) -> tuple[StageContext, MLP]:
    tp = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD)
    model = ModelConfig(hidden_size=H, num_attention_heads=2, num_layers=1, seq_length=S,
                        add_bias_linear=False)  # fmt: skip
    context = StageContext(
        model, ParallelContext(torch.device("cpu"), tp=tp), padded_vocab_size=16, vocab_size=16,
        sequence_parallel=sequence_parallel,
    )  # fmt: skip
    module = MLP(context, 0)
    torch.manual_seed(rank)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    context.gradients.attach(
        [(p, torch.zeros_like(p)) for p in module.parameters()], lambda p: None
    )
    return context, module


def order(rank: int, ranks: int, sequence_parallel: bool, deferred: bool) -> list[list[str]]:
    """What happens in the backward of an MLP, and what in its W."""
    context, module = mlp_of(rank, ranks, sequence_parallel)
    tokens = S // ranks if sequence_parallel else S
    y = module(torch.randn(tokens, B, H, requires_grad=True))
    events: list[str] = []

    def noting(call: Any, name: str) -> Any:
        def begin(x: torch.Tensor, axis: Axis) -> Any:
            if axis.size == 1:
                return call(x, axis)
            events.append(f"{name} begun")
            return Noted(call(x, axis), name, events)

        return begin

    product.start_all_gather = gradients.start_all_gather = noting(  # type: ignore[assignment]
        product.start_all_gather, "gather"
    )
    product.start_all_reduce = noting(product.start_all_reduce, "reduce")
    product.start_reduce_scatter = noting(product.start_reduce_scatter, "scatter")
    seen = []
    context.gradients.defer_to(0 if deferred else None)
    with Products(events):
        y.backward(torch.randn_like(y))
    seen.append(events.copy())
    if deferred:
        events.clear()
        with Products(events):
            context.gradients.run(0)
        seen.append(events.copy())
    return seen


def test_the_input_gradients_all_reduce_runs_under_the_weight_gradient() -> None:
    for (backward,) in spawn(order, 2, False, False):
        down, up = ["product", "dw"], ["product", "reduce begun", "dw", "reduce awaited"]
        assert backward == down + up


def test_with_sequence_parallelism_both_collectives_of_a_column_run_under_a_product() -> None:
    for (backward,) in spawn(order, 2, True, False):
        assert backward == [
            # down: the gradient of its output comes as slices
            "gather begun", "gather awaited", "product", "dw",
            # up: its input is gathered again under dx, dx is scattered under dw
            "gather begun", "product", "scatter begun", "gather awaited", "dw", "scatter awaited",
        ]  # fmt: skip


def test_a_deferred_products_gathers_run_under_the_product_before() -> None:
    for backward, later in spawn(order, 2, True, True):
        assert backward == [
            "gather begun", "gather awaited", "product",  # down, no product of weights
            "product", "scatter begun", "scatter awaited",  # up: its input is not gathered at all
        ]  # fmt: skip
        assert later == [
            "gather begun", "gather begun", "gather awaited", "dw", "gather awaited", "dw"
        ]  # fmt: skip


class Seen(TorchDispatchMode):
    """Names of all operations that write to or make something as large as a weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.names: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.numel() == self.size and not func.is_view:
            self.names.append((func.name().removeprefix("aten::"), made.dtype))
        return made


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (PrecisionConfig(), [("addmm_", torch.float32)]),
        # a CPU multiplies bf16 into bf16 only; nothing of it goes through .grad
        (PrecisionConfig(bf16=True), [("mm", torch.bfloat16), ("add_.Tensor", torch.float32)]),
    ],
    ids=["fp32", "bf16"],
)
def test_a_weight_gradient_is_added_straight_to_the_fp32_accumulator(precision, expected) -> None:
    model = ModelConfig(hidden_size=H, num_attention_heads=2, num_layers=1, seq_length=S)
    context = StageContext(
        model, ParallelContext.serial(), padded_vocab_size=16, vocab_size=16, precision=precision
    )
    layer = linear.ColumnParallelLinear(
        context, Matrix("up", (("up", 5 * H),), H, "rows", bias=True)
    )
    torch.nn.init.normal_(layer.weight)
    total = torch.zeros(5 * H, H)
    sink: WeightGradients = context.gradients
    sink.attach([(layer.weight, total)], lambda p: None)
    x = torch.randn(S, B, H, dtype=context.dtype)
    y = layer(x)
    with Seen(layer.weight.numel()) as seen:
        y.sum().backward()
    assert seen.names == expected
    assert layer.weight.grad is None
    dy = torch.ones(S * B, 5 * H)
    torch.testing.assert_close(total, dy.t() @ x.float().view(-1, H), rtol=1e-2, atol=2e-2)
