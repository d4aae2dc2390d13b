"""Inputs of odd sizes for every op of the kernel table, and its implementations run on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.cross_entropy import VocabularyPart
from megatron_lite.kernels.dropout import DropoutCall
from megatron_lite.kernels.random import feature_bits, key
from megatron_lite.kernels.table import Implementation

S, B, H = 7, 2, 24
"""Tokens, samples and features of the ops on hidden values."""


IN_PLACE = ("linear_weight_gradient", "cross_entropy", "cross_entropy_gradients")
"""Ops that write over an input, and so have no gradient of their own."""


def dropout_call(rate: float = 0.25, step: int = 3) -> DropoutCall:
    """The dropout of some layer of a step."""
    return DropoutCall(
        rate=rate,
        key=torch.tensor(key(1234, step, 5, "attention.output")),
        samples=torch.tensor([11, 12]),
        positions=torch.arange(S),
        features=feature_bits(torch.arange(H)),
    )


def arguments(op: str) -> list[Any]:
    """What an op is called with; tensors that need a gradient are the run's number format."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(True)

    def hidden() -> Tensor:
        return draw(S, B, H)

    angle = torch.rand(S, 1, 1, 3, generator=generator) * 6.0
    vocabulary = [draw(S, B, 20), torch.arange(S * B).view(S, B), VocabularyPart(0, 17)]
    joining = [hidden(), hidden(), draw(H), dropout_call()]
    return {
        "linear_forward": [hidden(), draw(16, H), draw(16)],
        "linear_input_gradient": [draw(S, B, 16), draw(16, H)],
        "linear_weight_gradient": [draw(S, B, 16), hidden(), draw(16, H).detach()],
        "split_rotate": [draw(S, B, 64), 4, 2, (angle.cos(), angle.sin())],
        "dropout": [hidden(), dropout_call()],
        "add_dropout": joining,
        "add_dropout_layer_norm": [*joining, draw(H), draw(H), 1e-5],
        "add_dropout_rms_norm": [*joining, draw(H), None, 1e-5],
        "cross_entropy": [*vocabulary, True],
        "cross_entropy_gradients": [*vocabulary, draw(S, B), draw(S, B), (draw(S, B), draw(S, B))],
        "layer_norm": [hidden(), draw(H), draw(H), 1e-5],
        "rms_norm": [hidden(), draw(H), None, 1e-5],
        "gelu": [draw(3, 7)],
        "gelu_erf": [draw(3, 7)],
        "swiglu": [draw(3, 14)],
        "attention": [draw(2, 4, 9, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 8), AttentionCall()],
    }[op]


def run_with_gradients(
    row: Implementation,
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The op's results, and the gradient of each input that needs one."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            floats = value.requires_grad
            value = value.detach().to(device, dtype if floats else value.dtype)
            return value.requires_grad_(floats)
        if isinstance(value, DropoutCall):
            return DropoutCall(*map(moved, value))
        return tuple(map(moved, value)) if type(value) is tuple else value

    inputs = [moved(value) for value in arguments(op)]
    needed = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    with torch.set_grad_enabled(op not in IN_PLACE):
        found = row.run(*inputs)
    results = found if isinstance(found, tuple) else (found,)
    if op not in IN_PLACE:
        weighted(results).backward()
    return [*results, *(x.grad for x in needed if x.grad is not None)]


def weighted(results: tuple[Tensor, ...]) -> Tensor:
    """One number in which every element of the results has a weight of its own."""
    return torch.stack([part.sum() for part in _weighted(results)]).sum()


def _weighted(results: tuple[Tensor, ...]) -> Iterator[Tensor]:
    for result in results:
        places = torch.linspace(0.0, 1.0, result.numel(), device=result.device)
        wide = result if result.dtype == torch.float64 else result.float()
        yield wide * places.view(result.shape)
