"""Number formats against plain references: torch's GradScaler, and attention written out in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_lite.engines.loss_scale import LossScale
from megatron_lite.kernels import reference
from megatron_lite.kernels.attention import AttentionCall
from megatron_lite.layers.attention import choose_attention
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.tiny import context, draw, make_batches, tiny_config
from tests.train.runs import alone

FP16_LARGEST = 65504.0


@pytest.mark.parametrize("seed", range(4))
def test_the_scale_moves_as_torchs_grad_scaler_moves_it(seed) -> None:
    """Hysteresis 1 is torch's rule; windows of 1 to 7, sparse and dense overflows, 200 steps."""
    chance = random.Random(seed)
    window, density = 1 + 2 * seed, (0.02, 0.1, 0.2, 0.3)[seed]
    ours = LossScale(2.0**12, True, 2.0**-120, window, 1, 1)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=window)
    weight = torch.zeros(1, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.0)
    for _ in range(200):
        overflow = chance.random() < density
        if ours.scale >= 2.0**31:
            overflow = True  # ours never grows beyond 2^32
        weight.grad = torch.tensor([math.inf if overflow else 1.0])
        theirs.scale(torch.zeros(1))
        theirs.step(sgd)
        theirs.update()
        ours.update(overflow)
        assert ours.scale == theirs.get_scale()


def test_hysteresis_tolerates_all_but_the_last_overflow_and_only_growth_restores_it() -> None:
    scaler = LossScale(1024.0, True, 1.0, 2, 3, 3)
    scales = []
    for overflow in (True, True, False, True, True, False, False, True, True, True):
        scaler.update(overflow)
        scales.append(scaler.scale)
    # two are tolerated (a quiet step in between restores nothing), then each halves; then it grows
    assert scales == [1024, 1024, 1024, 512, 256, 256, 512, 512, 512, 256]


def test_the_scale_stays_between_its_minimum_and_two_to_the_32() -> None:
    scaler = LossScale(8.0, True, 2.0, 1, 1, 1)
    for overflow, expected in ((True, 4.0), (True, 2.0), (True, 2.0), (False, 4.0)):
        scaler.update(overflow)
        assert scaler.scale == expected
    for _ in range(60):
        scaler.update(overflow=False)
    assert scaler.scale == 2.0**32


def test_a_fixed_scale_stays_and_state_goes_on_where_it_was() -> None:
    fixed = LossScale(128.0, False, 1.0, 1, 1, 1)
    for overflow in (True, False, True):
        fixed.update(overflow)
    assert fixed.scale == 128.0
    whole = LossScale(1024.0, True, 1.0, 3, 2, 2)
    chance = random.Random(3)
    for _ in range(50):
        resumed = LossScale(1.0, True, 1.0, 3, 2, 2)
        resumed.load(whole.state())
        overflow = chance.random() < 0.3
        whole.update(overflow)
        resumed.update(overflow)
        assert resumed == whole


def attended(q, k, v, softmax):
    """Causal attention written out: q, k, v [b, n, s, d]; softmax in the given format."""
    scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    weights = scores.to(softmax).masked_fill(future, -math.inf).softmax(-1)
    return weights.to(q.dtype) @ v


def heads(dtype, size=1.0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 24, 16, generator=generator).mul(size).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_runs_in_fp32_unless_told_otherwise(dtype) -> None:
    q, k, v = heads(dtype, 2.0)
    exact = attended(*(x.double() for x in (q, k, v)), torch.float64)
    for in_fp32, softmax in ((True, torch.float32), (False, dtype)):
        ours = reference.attention(q, k, v, AttentionCall(softmax_in_fp32=in_fp32))
        assert torch.equal(ours, attended(q, k, v, softmax))
        assert (ours.double() - exact).norm() < 0.02 * exact.norm()


def test_a_kernel_that_cannot_leave_fp32_says_so() -> None:
    config = tiny_config(model__attention_softmax_in_fp32=False)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    choice = choose_attention(run.context, training=True)
    assert choice.implementation.name == "torch-sdpa"
    assert "--no-attention-softmax-in-fp32: its softmax is in fp32 in any case" in choice.why


def test_layer_scaling_multiplies_in_fp32() -> None:
    """Scores of up to 1e5 are multiplied back to where fp16 ends; hence the rule that wants fp32."""
    q, k, v = heads(torch.float16, 300.0)
    for in_fp32 in (True, False):
        call = AttentionCall(layer_scale=16.0, softmax_in_fp32=in_fp32)
        assert torch.isfinite(reference.attention(q, k, v, call)).all() == in_fp32


def test_layer_scaling_keeps_fp16_scores_in_range() -> None:
    q, k, v = heads(torch.float16, 300.0)
    largest = (q.double() @ k.double().transpose(-1, -2)).abs().max().item() / 4.0
    assert largest > FP16_LARGEST
    assert not torch.isfinite(reference.attention(q, k, v, AttentionCall())).all()
    scaled = reference.attention(q, k, v, AttentionCall(layer_scale=16.0))
    exact = attended(*(x.double() for x in (q, k, v)), torch.float64)
    # scores of 1e5 rounded to 11 bits: where two keys are near the top either may win
    close = (scaled.double() - exact).abs() < 1e-2 * exact.abs().max()
    assert torch.isfinite(scaled).all() and close.double().mean() > 0.95


def losses(**changes):
    config = tiny_config(model__num_layers=3, **changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    seen = []
    for step in range(4):
        run.progress.step = step
        batches = make_batches(config, blueprint, 0, step)
        result = train_step(run, batches, lr=1e-2, weight_decay=0.0)
        seen += [result.loss.item(), result.update.grad_norm.item()]
    return seen


def test_layer_scaling_changes_no_loss_and_no_gradient() -> None:
    plain = losses()
    assert losses(model__apply_query_key_layer_scaling=True) == pytest.approx(plain, rel=2e-5)


def test_tf32_is_what_the_flag_says() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for flags, expected in ((["--tf32"], True), ([], False)):
            assert alone("--mock-data", "--train-iters", "2", *flags).rc == 0
            assert torch.backends.cuda.matmul.allow_tf32 == expected
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
