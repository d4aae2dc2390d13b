"""Inputs of odd sizes for every op of the kernel table, and its implementations run on them."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.kernels import documents, nf4, reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.compiled import compiled
from megatron_lite.kernels.cross_entropy import LocalScores, VocabularyPart
from megatron_lite.kernels.dropout import DropoutCall
from megatron_lite.kernels.random import feature_bits, key
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.table import TABLE, Implementation

S, B, H = 7, 2, 24
"""Tokens, samples and features of the ops on hidden values."""

MASKED = {
    "documents": {"segments": True}, "window": {"window": True},
    "documents in a window": {"segments": True, "window": True},
}  # fmt: skip
"""Inputs of attention that only kernels for masks are made for -> what Need says of them."""

INPUTS = {op: (op, *MASKED) if op == "attention" else (op,) for op in TABLE}
"""Op -> the names of its inputs in arguments()."""

ROWS, LENGTH = 2, 300
"""Of packed documents: three tiles of FlexAttention's a row, the last one not full."""


def packed_rows(borders: list[int], *, length: int = LENGTH) -> Segments:
    """Two rows whose documents end at these cumulative lengths."""
    longest = max(b - a for a, b in zip(borders, borders[1:], strict=False))
    return Segments(torch.tensor(borders, dtype=torch.int32), longest, ROWS, length)


IN_PLACE = ("linear_weight_gradient", "cross_entropy", "cross_entropy_gradients", "unpack_nf4")
"""Ops without a gradient of their own: they write over an input, or nothing of it learns."""


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
    attended = [draw(ROWS, heads, LENGTH, 16) for heads in (4, 2, 2)]
    packed = packed_rows([0, 7, 131, 300, 301, 429, 600])
    joining = [hidden(), hidden(), draw(H), dropout_call()]
    return {
        "linear_forward": [hidden(), draw(16, H), draw(16)],
        "linear_input_gradient": [draw(S, B, 16), draw(16, H)],
        "linear_weight_gradient": [draw(S, B, 16), hidden(), draw(16, H).detach()],
        "split_rotate": [draw(S, B, 64), 4, 2, (angle.cos(), angle.sin())],
        "rotate_heads": [draw(B, 4, S, 8), draw(B, 2, S, 8), angle.cos(), angle.sin()],
        "dropout": [hidden(), dropout_call()],
        "add_dropout": joining,
        "add_dropout_layer_norm": [*joining, draw(H), draw(H), 1e-5],
        "add_dropout_rms_norm": [*joining, draw(H), None, 1e-5],
        "cross_entropy": [*vocabulary, True],
        "cross_entropy_gradients": [
            *vocabulary[:2],
            VocabularyPart(0, 20),
            draw(S, B),
            draw(S, B),
            (draw(S, B), draw(S, B)),
        ],
        "layer_norm": [hidden(), draw(H), draw(H), 1e-5],
        "rms_norm": [hidden(), draw(H), None, 1e-5],
        "gelu": [draw(3, 7)],
        "gelu_erf": [draw(3, 7)],
        "swiglu": [draw(3, 14)],
        "unpack_nf4": [
            torch.randint(256, (5, 96), generator=generator, dtype=torch.uint8),
            torch.rand(5, 3, generator=generator),
            nf4.quantile_pairs(torch.device("cpu")),
            torch.float32,
        ],
        "attention": [draw(2, 4, 9, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 8), AttentionCall()],
        "documents": [*attended, AttentionCall(segments=packed)],
        "window": [*attended, AttentionCall(window=150)],
        "documents in a window": [*attended, AttentionCall(segments=packed, window=129)],
    }[op]


def run_with_gradients(
    row: Implementation,
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The op's results, and the gradient of each input that needs one; op: a name of its inputs."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            floats = value.requires_grad
            value = value.detach().to(device, dtype if floats else value.dtype)
            return value.requires_grad_(floats)
        if isinstance(value, DropoutCall):
            return DropoutCall(*map(moved, value))
        if isinstance(value, AttentionCall) and value.segments is not None:
            borders = value.segments.cu_seqlens.to(device)
            return replace(value, segments=replace(value.segments, cu_seqlens=borders))
        return tuple(map(moved, value)) if type(value) is tuple else value

    inputs = [moved(value) for value in arguments(op)]
    needed = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    with torch.set_grad_enabled(op not in IN_PLACE):
        found = row.run(*inputs)
    if isinstance(found, LocalScores):  # the offset is between a row's scores and its gradients
        found = (found.picked, found.log_sum, found.negentropy)
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


def attended_by_borders(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, dropout: float = 0.0,
    window_size: tuple[int, int] = (-1, 0),
) -> Tensor:  # fmt: skip
    """q, k, v: [b s, n, d], one document after the other -> [b s, n, d]."""
    assert dropout == 0.0, "this twin drops nothing"
    flat = [x.transpose(0, 1)[None] for x in (q, k, v)]
    ends = borders.tolist()
    pieces = [
        reference.attention(*(x[:, :, begin:end] for x in flat), _within(window_size))[0]
        for begin, end in zip(ends, ends[1:], strict=False)
    ]
    return torch.cat(pieces, dim=1).transpose(0, 1)


def _within(window_size: tuple[int, int]) -> AttentionCall:
    """A causal call that sees as far as flash kernels are told, -1 for all."""
    left, right = window_size
    assert right == 0, window_size
    return AttentionCall(window=None if left == -1 else left + 1, softmax_in_fp32=False)


def flex_on_a_cpu(patch: pytest.MonkeyPatch, backend: Any = "aot_eager") -> None:
    """FlexAttention's own mathematics, traced as on a GPU, gradients included, without fused kernels."""
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    patch.setattr(flex, "_validate_device", lambda *tensors: None)  # refuses gradients on a CPU
    torch._dynamo.reset()
    run = compiled(flex.flex_attention, backend)
    patch.setattr(documents, "compiled_flex", lambda: run)


def _varlen_2_10(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: None = None,
) -> Tensor:  # fmt: skip
    assert is_causal and cu_seq_q is cu_seq_k and max_q == max_k
    assert q.shape == k.shape == v.shape and max_q >= int(cu_seq_q.diff().max())
    return attended_by_borders(q, k, v, cu_seq_q)


def _varlen_2_11(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: None = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert cu_seq_q is cu_seq_k and max_q == max_k >= int(cu_seq_q.diff().max())
    assert q.shape == k.shape == v.shape
    scaled = q if scale is None else q * (scale * q.shape[-1] ** 0.5)
    return attended_by_borders(scaled, k, v, cu_seq_q, window_size=window_size)


def _varlen_2_12(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    assert enable_gqa == (q.shape[1] != k.shape[1])
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _varlen_2_11(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )


VARLEN = {"2.10": _varlen_2_10, "2.11": _varlen_2_11, "2.12": _varlen_2_12}
"""torch -> its varlen_attn, with that version's parameters."""


def varlen_on_a_cpu(patch: pytest.MonkeyPatch, torch_version: str = "2.12") -> None:
    """The function that has no kernel on a CPU replaced by an equal one."""
    module = importlib.import_module("torch.nn.attention.varlen")
    patch.setattr(module, "varlen_attn", VARLEN[torch_version])


def flash_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """A package flash-attn with its functions' parameters and the reference's numbers."""

    def whole(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        assert causal and dropout_p == 0.0 and window_size[1] in (-1, 0)
        call = replace(_within((window_size[0], 0)), scale=softmax_scale)
        return reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), call).transpose(1, 2)

    def by_borders(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
        softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        assert causal and softmax_scale is None and cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k >= int(cu_seqlens_q.diff().max())
        assert window_size[1] in (-1, 0)  # causal says the same
        return attended_by_borders(q, k, v, cu_seqlens_q, dropout_p, (window_size[0], 0))

    package: Any = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = whole, by_borders
    patch.setitem(sys.modules, "flash_attn", package)


def flash_4_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    """FlashAttention 4 in torch's place, activated by name; what runs is torch's flash of a CPU."""
    varlen_on_a_cpu(patch)
    attention = importlib.import_module("torch.nn.attention")

    def activate(name: str) -> None:
        assert name == "FA4", name

    patch.setattr(attention, "activate_flash_attention_impl", activate)


def bitsandbytes_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's function takes a matrix as one row of bytes, upper half first, and a row of scales."""

    def dequantize_4bit(codes: Tensor, state: types.SimpleNamespace) -> Tensor:
        assert (codes.dim(), codes.shape[1], state.quant_type) == (2, 1, "nf4")
        numbers = [half for byte in codes[:, 0].tolist() for half in divmod(byte, 16)]
        scales = [state.absmax[n // state.blocksize] for n in range(len(numbers))]
        values = [state.code[n] * scale for n, scale in zip(numbers, scales, strict=True)]
        return torch.stack(values).view(state.shape).to(state.dtype)

    library = types.SimpleNamespace(
        QuantState=types.SimpleNamespace, dequantize_4bit=dequantize_4bit
    )
    monkeypatch.setattr(nf4, "bitsandbytes", lambda: library)


ON_A_CPU: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "torch-flex": flex_on_a_cpu,
    "torch-varlen": varlen_on_a_cpu,
    "flash-attn": flash_on_a_cpu,
    "flash-attn-4": flash_4_on_a_cpu,
    "bitsandbytes": bitsandbytes_on_a_cpu,
}
"""Rows that need a GPU -> what stands in for their kernel, so that ours around it is tested."""
