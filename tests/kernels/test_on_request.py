"""Rows that must be asked for: other people's kernels behind stand-ins of their packages, and --kernel."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules.table import problems
from megatron_lite.kernels import on_request
from megatron_lite.kernels.on_request import INSTALLED_BY, ON_REQUEST, rows_of
from megatron_lite.kernels.table import TABLE, Implementation, Need
from megatron_lite.layers.choosing import chosen
from megatron_lite.rehearsal.rehearse import stand_in
from tests.support.checkpoints import assembled, train
from tests.support.kernels import arguments, run_with_gradients
from tests.support.tiny import draw, tiny_config

CPU, GPU = (Need(torch.device(kind), torch.float32) for kind in ("cpu", "cuda"))
LLAMA = {"model__swiglu": True, "model__normalization": "RMSNorm", "model__num_layers": 2}
ROWS = [
    pytest.param(op, row, id=f"{op}-{row.name}") for op, rows in ON_REQUEST.items() for row in rows
]


class RMSNorm(torch.autograd.Function):
    """As Liger's: the gradient of the output may be written over, which is asked not to be done."""

    @staticmethod
    def forward(ctx, x, weight, epsilon, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), epsilon).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            y = F.rms_norm(x, x.shape[-1:], weight, ctx.epsilon)
        return *torch.autograd.grad(y, (x, weight), dy), None, None, None, None


class SiLUMul(torch.autograd.Function):
    """As Liger's: what was kept of the forward is written over in backward."""

    @staticmethod
    def forward(ctx, gate, up):
        assert gate.is_contiguous() and up.is_contiguous()
        ctx.kept = gate, up
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.kept
        share = torch.sigmoid(gate)
        silu = gate * share
        with torch.no_grad():
            gate.copy_(dy * up * (silu * (1.0 - share) + share))
            up.copy_(dy * silu)
        return gate, up


@pytest.fixture
def packages(monkeypatch) -> None:
    """liger_kernel and apex as far as the rows call them."""

    def layer_norm(x, weight, bias, shape, epsilon):
        return F.layer_norm(x, shape, weight, bias, epsilon)

    found = {
        "liger_kernel": {}, "apex": {}, "apex.normalization": {}, "fused_layer_norm_cuda": {},
        "liger_kernel.ops": {"LigerRMSNormFunction": RMSNorm, "LigerSiLUMulFunction": SiLUMul},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": layer_norm},
    }  # fmt: skip
    for name, contents in found.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def on_a_cpu(packages, monkeypatch) -> None:
    """Their rows run on a CPU, too."""
    for op, rows in ON_REQUEST.items():
        here = [replace(row, usable=lambda need: None) for row in rows]
        monkeypatch.setitem(ON_REQUEST, op, here)


@pytest.mark.parametrize(("op", "row"), ROWS)
def test_a_row_equals_its_reference_and_keeps_what_it_was_given(op, row, packages) -> None:
    ours, theirs = (run_with_gradients(r, op) for r in (row, TABLE[op][-1]))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    given = arguments(op)
    results = row.run(*given)
    (results[-1] if isinstance(results, tuple) else results).sum().backward()
    for one, other in zip(given, arguments(op), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other), "written over"


def test_a_layer_norm_without_bias_gets_one_of_zeros(packages) -> None:
    x, weight = torch.randn(3, 8), torch.rand(8)
    torch.testing.assert_close(
        on_request.apex_layer_norm(x, weight, None, 1e-5), F.layer_norm(x, (8,), weight, None, 1e-5)
    )
    bias = torch.rand(8)
    torch.testing.assert_close(
        on_request.liger_rms_norm(x, weight, bias, 1e-5), F.rms_norm(x, (8,), weight, 1e-5) + bias
    )


@pytest.mark.parametrize(("op", "row"), ROWS)
def test_a_row_says_why_it_cannot_run_and_is_never_preferred(op, row, monkeypatch) -> None:
    assert row.usable(CPU) == "needs a GPU"
    for name in ("liger_kernel", "apex"):
        monkeypatch.setitem(sys.modules, name, None)
    assert row.usable(GPU).startswith("not importable (ModuleNotFoundError: ")
    assert row.name in INSTALLED_BY and row.name not in [other.name for other in TABLE[op]]
    assert rows_of(op)[: len(TABLE[op])] == TABLE[op]


def test_importable_rows_are_usable_on_a_gpu_and_an_old_package_is_a_reason(
    packages, monkeypatch
) -> None:
    assert all(row.values[1].usable(GPU) is None for row in ROWS)
    monkeypatch.delattr(sys.modules["liger_kernel.ops"], "LigerSiLUMulFunction")
    (row,) = ON_REQUEST["swiglu"]
    assert "not importable (AttributeError" in row.usable(GPU)


def test_asking_for_one_that_cannot_run_names_the_package_and_the_way_out(monkeypatch) -> None:
    with pytest.raises(
        ConfigError,
        match=r"--kernel swiglu=liger cannot run: needs a GPU; leave it out for reference",
    ):
        chosen("swiglu", CPU, ["swiglu=liger"])
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ConfigError, match=r"not importable .* - pip install -e '.\[liger\]'"):
        chosen("swiglu", GPU, ["liger"])
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match=r"- docs/guides/install-gpu.md says how it is built"):
        chosen("layer_norm", GPU, ["layer_norm=apex"])


def test_a_run_takes_what_was_asked_for_and_learns_the_same(on_a_cpu) -> None:
    _, _, plain = first = assembled(0, 1, LLAMA)
    _, _, asked = second = assembled(0, 1, LLAMA | {"precision__kernel": ["liger"]})
    assert not any("liger" in line for line in plain.context.kernels)
    assert [line for line in asked.context.kernels if "liger" in line] == [
        f"{op}: liger (asked for)" for op in ("rms_norm", "add_dropout_rms_norm", "swiglu")
    ]
    assert train(*second, 3) == pytest.approx(train(*first, 3), rel=1e-5)


def test_one_op_alone_is_asked_for_by_its_name(on_a_cpu) -> None:
    words = ["rms_norm=liger", "swiglu=reference"]
    lines = assembled(0, 1, LLAMA | {"precision__kernel": words})[2].context.kernels
    assert [line for line in lines if "asked" in line] == [
        "rms_norm: liger (asked for)", "swiglu: reference (asked for)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ligre"], r"--kernel ligre: no op has such a row; there are apex, .*liger"),
        (["swiglue=liger"], "--kernel swiglue=liger: no op swiglue; there are .*swiglu"),
        (["swiglu=apex"], "--kernel swiglu=apex: swiglu has the rows .*reference, liger"),
        (["layer_norm=apex"], "--kernel layer_norm=apex changes nothing: this model has the ops"),
        (["apex"], "--kernel apex changes nothing"),
        (["gelu=reference"], "--kernel gelu=reference changes nothing"),
    ],
)
def test_words_that_mean_nothing_are_refused_when_the_model_is_built(words, said, on_a_cpu) -> None:
    with pytest.raises(ConfigError, match=said):
        assembled(0, 1, LLAMA | {"precision__kernel": words})


def test_a_rehearsal_stands_for_a_device_that_is_not_here() -> None:
    config = tiny_config(**LLAMA | {"precision__kernel": ["liger"]})
    with stand_in(config, draw(config, 1), 0) as actor:
        assert not any("liger" in line for line in actor.run.context.kernels)


def test_malformed_words_are_refused_with_the_rest_of_the_config() -> None:
    def said(*words):
        config = parse(["--preset", "gpt3-125m", "--lr", "1e-3", "--train-iters", "1",
                        "--mock-data", "--vocab-size", "60", "--kernel", *words]).config  # fmt: skip
        return "\n".join(problems(config, 1))

    assert "--kernel 'a=b=c' is neither OP=ROW nor ROW" in said("a=b=c")
    assert "--kernel names swiglu 2 times" in said("swiglu=liger", "swiglu=reference")
    assert "attention is chosen by --attention-backend" in said("attention=reference")
    assert said("liger", "swiglu=reference") == ""


def test_a_row_of_an_extension_can_be_asked_for(monkeypatch) -> None:
    mine = Implementation("mine", TABLE["swiglu"][-1].run, lambda need: None)
    monkeypatch.setitem(TABLE, "swiglu", [*TABLE["swiglu"], mine])
    assert chosen("swiglu", CPU, ["swiglu=mine"]).implementation is mine
    assert chosen("swiglu", CPU, []).implementation is not mine
    assert chosen("swiglu", CPU, ["mine"]).run is mine.run
