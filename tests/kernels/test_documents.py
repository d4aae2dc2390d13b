"""Which attention kernel runs on which device; documents by their borders, with twins for a CPU."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.kernels import documents, flash, reference, vendor
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.kernels.segments import TILE, Segments
from megatron_lite.kernels.table import PREFERENCES, Need, choose
from tests.support.kernels import (
    LENGTH,
    MASKED,
    VARLEN,
    arguments,
    flash_on_a_cpu,
    flex_on_a_cpu,
    packed_rows,
    varlen_on_a_cpu,
)

HOPPER = Need(torch.device("cuda"), torch.bfloat16, capability=(9, 0), length=8192, head_size=64,
              compile=True)  # fmt: skip
AMPERE = replace(HOPPER, capability=(8, 0))
PACKED = replace(HOPPER, segments=True)
DROPPED = replace(PACKED, dropout=0.1)
WINDOW = replace(HOPPER, window=True)
CHOICES = {
    "sm90": (HOPPER, "torch-sdpa"),
    "sm120": (replace(HOPPER, capability=(12, 0)), "torch-sdpa"),
    "sm80": (AMPERE, "flash-attn"),
    "sm89": (replace(HOPPER, capability=(8, 9)), "flash-attn"),
    "sm75": (replace(HOPPER, capability=(7, 5)), "torch-sdpa"),
    "fp32": (replace(AMPERE, dtype=torch.float32), "torch-sdpa"),
    "cpu": (replace(HOPPER, device=torch.device("cpu"), capability=None), "torch-sdpa"),
    "flash on sm90": (replace(HOPPER, backend="flash"), "flash-attn"),
    "fused on sm80": (replace(AMPERE, backend="fused"), "torch-sdpa"),
    "fa4 on sm90": (replace(HOPPER, backend="fa4"), "flash-attn-4"),
    "fa4 on sm80": (replace(AMPERE, backend="fa4"), "torch-sdpa"),
    "fa4 with dropout": (replace(HOPPER, backend="fa4", dropout=0.1), "torch-sdpa"),
    "documents": (PACKED, "torch-flex"),
    "short rows": (replace(PACKED, length=512), "torch-varlen"),
    "no compiler": (replace(PACKED, compile=False), "torch-varlen"),
    "small heads": (replace(PACKED, head_size=8), "torch-varlen"),
    "odd heads": (replace(PACKED, head_size=12, compile=False), "torch-sdpa"),
    "documents on sm80": (replace(PACKED, capability=(8, 0)), "flash-attn"),
    "documents on sm75": (replace(PACKED, capability=(7, 5)), "torch-flex"),
    "documents, asked": (replace(PACKED, backend="flash"), "flash-attn"),
    "documents by fa4": (replace(PACKED, backend="fa4"), "flash-attn-4"),
    "documents and dropout": (DROPPED, "flash-attn"),
    "no borders with dropout": (replace(DROPPED, backend="fused"), "torch-sdpa"),
    "documents in fp32": (replace(PACKED, dtype=torch.float32), "torch-sdpa"),
    "documents, scaled": (replace(PACKED, layer_scaling=True), "reference"),
    "documents, spelled out": (replace(PACKED, backend="unfused"), "reference"),
    "window": (WINDOW, "torch-flex"),
    "window of short rows": (replace(WINDOW, length=512), "torch-varlen"),
    "window, no compiler": (replace(WINDOW, compile=False), "torch-varlen"),
    "window on sm80": (replace(WINDOW, capability=(8, 0)), "flash-attn"),
    "window, asked": (replace(WINDOW, backend="flash"), "flash-attn"),
    "window by fa4": (replace(WINDOW, backend="fa4"), "flash-attn-4"),
    "window and dropout": (replace(WINDOW, dropout=0.1), "flash-attn"),
    "window in fp32": (replace(WINDOW, dtype=torch.float32), "torch-sdpa"),
    "window on a cpu": (replace(WINDOW, device=torch.device("cpu"), capability=None), "torch-sdpa"),
    "window of documents": (replace(WINDOW, segments=True), "torch-flex"),
    "rehearsed window": (
        replace(WINDOW, device=torch.device("meta"), compile=False),
        "torch-varlen",
    ),
    "rehearsed": (replace(PACKED, device=torch.device("meta"), compile=False), "torch-varlen"),
    "rehearsed, plain": (replace(AMPERE, device=torch.device("meta")), "torch-sdpa"),
}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn and flash-attn-4 can be imported."""
    flash_on_a_cpu(monkeypatch)
    for name in ("flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.mark.parametrize(("need", "name"), CHOICES.values(), ids=CHOICES.keys())
def test_the_device_and_the_call_decide_which_kernel_runs(
    packages: None, need: Need, name: str
) -> None:
    assert choose("attention", need, PREFERENCES[need.backend]).implementation.name == name


def test_without_the_packages_torch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, None)
    missing = "not importable (ModuleNotFoundError"
    for need, name in (
        (AMPERE, "torch-sdpa"), (replace(PACKED, capability=(8, 0)), "torch-flex"),
        (replace(HOPPER, backend="flash"), "torch-sdpa"), (DROPPED, "torch-sdpa"),
        (replace(HOPPER, backend="fa4"), "torch-sdpa"),
    ):  # fmt: skip
        choice = choose("attention", need, PREFERENCES[need.backend])
        assert choice.implementation.name == name and missing in choice.why, choice.why
    said = choose("attention", HOPPER, PREFERENCES["auto"]).why
    assert "torch's own is faster from sm90 on; --attention-backend flash takes it" in said
    assert "torch-flex" not in said, "documents are no matter here"


BORDERS = {
    "whole rows": [0, 300, 600],
    "borders inside of tiles": [0, 7, 131, 300, 301, 429, 600],
    "borders on tiles": [0, 128, 256, 300, 428, 556, 600],
    "single tokens": [*range(301), 600],
    "padded at the end": [0, 40, 300, 600, 600, 600],
}


@pytest.mark.parametrize("window", [None, 1, 100, 128, 257])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS.keys())
def test_the_block_mask_is_torchs_own_of_the_dense_mask(
    borders: list[int], window: int | None
) -> None:
    packed = packed_rows(borders)
    call = AttentionCall(segments=packed, window=window)
    allowed = call.allowed(LENGTH, LENGTH, torch.device("cpu"))[:, 0]
    ours = packed.block_mask(window)
    theirs = create_block_mask(
        lambda b, h, i, j: allowed[b, i, j], 2, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=TILE
    )
    every = torch.meshgrid(*map(torch.arange, (2, LENGTH, LENGTH)), indexing="ij")
    b, i, j = every
    assert torch.equal(ours.mask_mod(b, None, i, j), allowed)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for number, which in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices"),
                          ("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")):  # fmt: skip
        listed = torch.arange(getattr(ours, which).shape[-1]) < getattr(ours, number)[..., None]
        assert torch.equal(getattr(ours, which)[listed], getattr(theirs, which)[listed]), which
    assert ours.shape == (2, 1, LENGTH, LENGTH)


class NothingRead(TorchDispatchMode):
    """Refuses what waits for a device, and tensors with a number for every pair of tokens."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            assert made.numel() < 20_000, (func, made.shape)
        return made


def test_the_block_mask_reads_nothing_and_makes_no_square_of_the_sequence() -> None:
    packed = packed_rows(BORDERS["borders inside of tiles"])
    for window in (None, 100):
        with NothingRead():
            made = packed.block_mask(window)
        assert "allowed" not in vars(packed)
        assert (
            made
            is packed.block_mask(window)
            is packed.unmasked().block_mask(window)
            is packed.unmasked().unmasked().block_mask(window)
        )


def test_flex_is_compiled_once_for_changing_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    flex_on_a_cpu(monkeypatch, backend="eager")
    counters.clear()
    for borders in BORDERS.values():
        q, k, v, _ = arguments("documents")
        for _layer in range(2):
            documents.flex(q, k, v, AttentionCall(segments=packed_rows(borders))).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_where_the_compiler_fails_a_dense_mask_takes_over_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler\non this machine")

    flex_on_a_cpu(monkeypatch, backend=broken)
    q, k, v, call = arguments("documents")
    flex = documents.Flex()
    found = flex(q, k, v, call)
    said = capsys.readouterr().err
    assert "WARNING: FlexAttention could not be compiled (RuntimeError: no compiler)" in said
    assert said.count("\n") == 1
    assert torch.equal(found, vendor.sdpa(q, k, v, call))
    assert torch.equal(flex(q, k, v, call), found) and capsys.readouterr().err == ""


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("version", VARLEN)
def test_varlen_is_called_as_each_torch_wants_it(
    monkeypatch: pytest.MonkeyPatch, version: str, scale: float | None
) -> None:
    varlen_on_a_cpu(monkeypatch, version)
    q, k, v, call = arguments("documents")
    call = replace(call, scale=scale)
    expected = reference.attention(q, k, v, call)
    torch.testing.assert_close(documents.varlen(q, k, v, call), expected)


def test_varlen_is_looked_at_once_and_not_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    varlen_on_a_cpu(monkeypatch)
    documents.varlen_options.cache_clear()
    looked = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda run: looked.append(run) or signature(run))
    for name in ("documents", "window"):
        documents.varlen(*arguments(name))
    assert len(looked) == 1


@pytest.mark.parametrize("name", MASKED)
def test_varlen_without_memory_is_as_large_as_a_fused_kernel(name: str) -> None:
    q, k, v, call = arguments(name)
    with torch.device("meta"):
        y = documents.varlen(*(x.detach().to("meta") for x in (q, k, v)), call)
    assert y.shape == q.shape and y.device.type == "meta"


def test_flash_hears_of_dropout_determinism_borders_and_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flash_on_a_cpu(monkeypatch)
    heard: list[dict[str, Any]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, *borders: Any, **options: Any) -> Tensor:
        heard.append(options)
        return q

    package = sys.modules["flash_attn"]
    monkeypatch.setattr(package, "flash_attn_func", noted)
    monkeypatch.setattr(package, "flash_attn_varlen_func", noted)
    q, k, v, packed = arguments("documents")
    packed = replace(packed, window=9)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for call in (AttentionCall(dropout=0.1, seed=5), replace(packed, dropout=0.1, seed=5)):
        assert torch.equal(flash.flash(q, k, v, call), q)
        assert torch.initial_seed() == 5
    told = {"dropout_p": 0.1, "softmax_scale": None, "causal": True, "deterministic": True}
    assert heard == [told, told | {"window_size": (8, 0)}]


class Ran(TorchDispatchMode):
    """Notes the operations of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _rows(**options: Any) -> tuple[list[Tensor], AttentionCall]:
    heads, segments = options.pop("heads", (4, 4)), options.pop("packed", False)
    length = options.pop("length", 32)
    q, k, v = (
        torch.randn(2, n, length, 16, requires_grad=True) for n in (heads[0], *heads[1:] * 2)
    )
    whole = Segments(torch.tensor([0, length], dtype=torch.int32), length, 1, length)
    return [q, k, v], AttentionCall(segments=whole if segments else None, **options)


@pytest.mark.parametrize("options", [
    {}, {"heads": (4, 2)}, {"packed": True}, {"packed": True, "heads": (4, 2)}, {"dropout": 0.1},
    {"length": 1},
], ids=str)  # fmt: skip
def test_the_named_kernel_is_the_one_that_runs(options: dict[str, Any]) -> None:
    tensors, call = _rows(**options)
    with Ran() as seen:
        vendor.sdpa(*tensors, call)
    fused = any("flash_attention_for_cpu" in name for name in seen.names)
    assert vendor.sdpa_kernel(*tensors, call) == ("flash" if fused else "math")
