"""bf16 moments: rounding that loses nothing in the mean, and the update with them."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim import portions
from megatron_lite.optim.adam import AdamW
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.rounding import round_into, threshold

NARROW = OptimConfig(
    use_precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"
)
RULE = AdamW(beta1=0.9, beta2=0.999, eps=1e-8)


def rounded(values, update):
    stored = torch.empty(values.shape, dtype=torch.bfloat16)
    round_into([stored], [values.clone()], update=update)
    return stored


def test_a_number_becomes_one_of_its_two_neighbours_and_the_mean_over_updates_is_itself() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(200, generator=generator) * 10.0 ** torch.randint(
        -30, 30, (200,), generator=generator
    )
    updates = 4096
    found = torch.stack([rounded(values, update).double() for update in range(updates)])
    below = (values.view(torch.int32) & -0x10000).view(torch.float32).double()  # nearer to zero
    above = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    assert ((found == below) | (found == above)).all()
    step = (above - below).abs()
    # an even walk through the thresholds is off by a few updates, random ones by their root (64)
    assert ((found.mean(0) - values).abs() / step).max() < 4 / updates


def test_what_bf16_holds_is_kept_with_its_sign_and_at_every_threshold() -> None:
    infinite = float("inf")
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-126, infinite, -infinite, float("nan")])
    for update in range(100):
        stored = rounded(values, update)
        assert torch.equal(stored.float()[:-1], values[:-1]) and stored[-1].isnan()
        assert stored[1].signbit()
    assert {0 <= threshold(update) < 1 << 16 for update in range(10_000)} == {True}


def test_a_second_moment_falls_as_fp32s_does_where_nearest_rounding_stands_still() -> None:
    """At the default beta2, 0.999: gradients of 1, then of 0.1, for 1200 updates each."""
    beta2 = RULE.beta2
    parameter = torch.zeros(64)
    state = Groups(NARROW).new_state(Tensor("a.weight", (64,), "weight"), parameter)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    exact, nearest = 0.0, torch.zeros(64, dtype=torch.bfloat16)
    for steps in range(2400):
        size = 1.0 if steps < 1200 else 0.1
        RULE.update([parameter], [torch.full((64,), size)], [state], steps=steps, lr=0.0,
                    weight_decay=0.0)  # fmt: skip
        exact = beta2 * exact + (1 - beta2) * size**2
        nearest = (beta2 * nearest.float() + (1 - beta2) * size**2).bfloat16()
        if steps == 1199:
            assert nearest[0] == 0.25 and exact == pytest.approx(0.699, abs=0.001)
    assert nearest[0] == 0.25 and exact == pytest.approx(0.217, abs=0.001)
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(exact, rel=0.02)
    assert state["exp_avg"].float().mean().item() == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("formats", [("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_an_update_is_that_of_fp32_but_for_what_is_left_out_of_the_moments(
    formats, monkeypatch
) -> None:
    """Cut into portions or whole, for tensors of any shapes; a gradient is not touched."""
    first, second = formats
    optim = OptimConfig(
        use_precision_aware_optimizer=True, exp_avg_dtype=first, exp_avg_sq_dtype=second
    )
    shapes = [(7, 5), (3,), (), (2, 3, 4), (0, 3)]
    generator = torch.Generator().manual_seed(0)

    def updated(settings, at_once):
        monkeypatch.setattr(portions, "_AT_ONCE_ON_CPU", at_once)
        generator.manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        groups = Groups(settings)
        states = [
            groups.new_state(Tensor("a.weight", shape, "weight"), value)
            for shape, value in zip(shapes, values, strict=True)
        ]
        for steps in range(20):
            gradients = [torch.randn(shape, generator=generator) for shape in shapes]
            before = [gradient.clone() for gradient in gradients]
            RULE.update(values, gradients, states, steps=steps, lr=1e-2, weight_decay=0.1)
            assert all(map(torch.equal, gradients, before))
        return values, states

    exact, _ = updated(OptimConfig(), 8)
    whole, kept = updated(optim, 1 << 18)
    cut, again = updated(optim, 8)
    for one, other in zip(kept, again, strict=True):
        for name, tensor in one.items():
            # torch's vector and scalar code differ in a last bit, which may decide where bf16 rounds
            torch.testing.assert_close(other[name], tensor, rtol=2**-7, atol=1e-30)
        assert {name: str(t.dtype) for name, t in one.items()} == {
            "exp_avg": f"torch.{'bfloat16' if first == 'bf16' else 'float32'}",
            "exp_avg_sq": f"torch.{'bfloat16' if second == 'bf16' else 'float32'}",
        }
    for theirs, ours, same in zip(exact, whole, cut, strict=True):
        torch.testing.assert_close(same, ours, rtol=0, atol=20 * 1e-2 * 2**-7)
        # twenty steps of 1e-2, each off by 2^-8 of itself at most for either moment
        torch.testing.assert_close(ours, theirs, rtol=0, atol=20 * 1e-2 * 2**-6)
        assert not ours.numel() or not torch.equal(ours, theirs)
