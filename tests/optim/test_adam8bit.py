"""adam8bit: AdamW's formula on moments of 8 bits, equal to a plain reference and to torchao's optimizer."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.optimizers import state_bytes, treatment
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.optim.adam8bit import AdamW8bit, decode, dynamic_map, encode
from megatron_lite.optim.groups import Groups
from tests.support.axes import BF16, PP, SP, TP, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.extras import needs
from tests.support.spawn import spawn
from tests.support.tiny import draw, tiny_config
from tests.train.runs import alone

STEPS, BLOCK = 20, 16
EIGHT = {"optim__optimizer": "adam8bit", "optim__adam8bit_block_size": BLOCK}
LRS = [1e-2 * (1 + k % 3) for k in range(STEPS)]


def drawn(shape, dtype, steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    value = torch.randn(*shape, generator=generator, dtype=torch.float64)
    gradients = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) * 10.0 ** -(k % 4)
        for k in range(steps)
    ]
    return value.to(dtype), [gradient.to(dtype) for gradient in gradients]


def state_of(value, block):
    optim = OptimConfig(optimizer="adam8bit", adam8bit_block_size=block)
    return Groups(optim).new_state(Tensor("a.weight", (128, 128), "weight"), value)


def stepped(value, gradients, *, block=BLOCK, taken=None, state=None):
    value = value.clone()
    state = state_of(value, block) if state is None else state
    rule = AdamW8bit(0.9, 0.999, 1e-8, block)
    for step, (gradient, lr) in enumerate(zip(gradients, LRS, strict=False)):
        rule.update([value], [gradient], [state], steps=step, lr=lr, weight_decay=0.1, taken=taken)
    return value, state


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_256_numbers_that_are_finer_where_they_are_larger(signed) -> None:
    numbers = dynamic_map(signed=signed)
    assert len(set(numbers)) == 256 and numbers == sorted(numbers)
    assert {0.0, 1.0} <= set(numbers)
    positive = [n for n in numbers if 0 < n < 1]
    assert len(positive) == (127 if signed else 254)
    assert positive[0] == pytest.approx(0.55e-6 if signed else 0.325e-6)
    assert positive[-1] == pytest.approx(1 - 0.9 / (128 if signed else 256))
    if signed:
        assert [-n for n in numbers if -1 < n < 0] == positive[::-1]


@pytest.mark.parametrize("columns", [48, 40, 7])
def test_an_element_has_the_nearest_number_of_its_block(columns) -> None:
    """By trying all of them; the last block of a row may be short."""
    exact, _ = drawn((6, columns), torch.float64, 0)
    exact[2] = 0.0
    numbers = torch.tensor(dynamic_map(signed=True), dtype=torch.float64)
    codes, scale = encode(exact, numbers, BLOCK)
    back = decode(codes, scale, numbers, BLOCK)
    assert codes.dtype == torch.uint8 and scale.shape == (6, -(-columns // BLOCK))
    for first in range(0, columns, BLOCK):
        block = exact[:, first : first + BLOCK]
        largest = block.abs().amax(1, keepdim=True)
        torch.testing.assert_close(scale[:, first // BLOCK], largest[:, 0], rtol=0, atol=0)
        distance = (block.unsqueeze(2) - largest.unsqueeze(2) * numbers).abs().amin(2)
        got = (block - back[:, first : first + BLOCK]).abs()
        torch.testing.assert_close(got, distance, rtol=0, atol=1e-15)
    assert not back[2].any()


def reference(value, gradients):
    """AdamW (arXiv:1711.05101) in float64; its moments go through the nearest of their block's numbers."""
    maps = [torch.tensor(dynamic_map(signed=s)).double() for s in (True, False)]
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for t, (g, lr) in enumerate(zip(gradients, LRS, strict=True), 1):
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        change = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        value = value - lr * (0.1 * value + change)
        stored = []
        for moment, numbers in zip((first, second), maps, strict=True):
            blocks = moment.reshape(-1, BLOCK)
            largest = blocks.abs().amax(1, keepdim=True)
            nearest = (blocks.unsqueeze(2) / largest.unsqueeze(2) - numbers).abs().argmin(2)
            stored.append((numbers[nearest] * largest).view_as(moment))
        first, second = stored
    return value


def test_it_is_adamws_formula_on_moments_of_eight_bits() -> None:
    value, gradients = drawn((12, 64), torch.float64)
    expected = reference(value, gradients)
    got, state = stepped(value, gradients)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (got - value).abs().mean() > 0.05
    assert state["exp_avg_8bit"].unique().numel() > 100


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_whole_blocks_are_updated_as_the_whole(dim) -> None:
    value, gradients = drawn((12, 64), torch.float32)
    expected, states = stepped(value, gradients)
    for first, length in ((0, 3 * (BLOCK if dim else 1)), (48 if dim else 3, 16 if dim else 9)):
        part, state = stepped(
            value.narrow(dim, first, length),
            [g.narrow(dim, first, length).contiguous() for g in gradients],
        )
        # torch's kernel rounds the ends of a row in another way than what fills a vector
        torch.testing.assert_close(part, expected.narrow(dim, first, length), rtol=1e-5, atol=1e-6)
        own = states["exp_avg_sq_8bit"].narrow(dim, first, length)
        assert (state["exp_avg_sq_8bit"] != own).float().mean() < 0.01


def test_what_is_not_taken_keeps_its_bits() -> None:
    value, gradients = drawn((12, 64), torch.float32)
    yes, state = stepped(value, gradients, taken=torch.tensor(True))
    expected, others = stepped(value, gradients)
    assert torch.equal(yes, expected) and all(map(torch.equal, state.values(), others.values()))
    before = {name: tensor.clone() for name, tensor in state.items()}
    bad = [torch.full_like(value, float("nan"))]
    no, state = stepped(yes, bad, taken=torch.tensor(False), state=state)
    assert torch.equal(no, yes) and all(map(torch.equal, state.values(), before.values()))


@pytest.mark.oracles
@pytest.mark.parametrize("shape", [(32, 512), (20, 256)])
def test_it_is_torchaos_optimizer(shape) -> None:
    """Whose blocks are of the flat tensor: the same where a row is a number of blocks."""
    theirs = needs("torchao.optim").AdamW8bit
    maps = needs("torchao.optim.quant_utils").create_dynamic_map
    for signed in (True, False):
        assert dynamic_map(signed=signed) == pytest.approx(maps(signed), rel=1e-6, abs=0)
    value, gradients = drawn(shape, torch.float32)
    parameter = torch.nn.Parameter(value.clone())
    optimizer = theirs([parameter], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for gradient, lr in zip(gradients, LRS, strict=True):
        optimizer.param_groups[0]["lr"].fill_(lr)
        parameter.grad = gradient.clone()
        optimizer.step()
    got, state = stepped(value, gradients, block=256)
    kept = optimizer.state[parameter]
    for name in ("exp_avg", "exp_avg_sq"):
        scale = kept[name].scale.view(shape[0], -1)
        torch.testing.assert_close(state[f"{name}_scale"], scale, rtol=1e-5, atol=0)
        # a number half way between two may be rounded the other way
        assert (state[f"{name}_8bit"] != kept[name].codes).float().mean() < 1e-3
    # its bias correction 1 - 0.999^t is rounded in fp32: 1e-5 of a step
    away = (got - parameter.detach()).abs() > 1e-5
    assert away.float().mean() < 1e-3 and (got - value).abs().mean() > 0.05


def test_small_tensors_keep_adams_moments_and_others_two_bytes() -> None:
    optim = OptimConfig(optimizer="adam8bit")
    assert treatment(optim, Tensor("a.bias", (8192,), "bias")).rule == "adam"
    assert treatment(optim, Tensor("a.weight", (63, 64), "weight")).rule == "adam"
    matrix = Tensor("a.weight", (1024, 1000), "weight")
    assert treatment(optim, matrix).rule == "adam8bit"
    assert state_bytes(optim, matrix, 1) == 2 * (1024 * 1000 + 1024 * 4 * 4)


def test_tp_ranks_have_whole_blocks() -> None:
    with pytest.raises(ConfigError, match="cuts its 128 columns between .* a block of 64"):
        draw(tiny_config(**{"optim__optimizer": "adam8bit", TP: 2}), 2)
    draw(tiny_config(**EIGHT | {TP: 2}), 2)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param((2, {TP: 2, SP: True}), (1, {}), id="tp to one", marks=pytest.mark.ci),
        pytest.param(
            (2, {ZERO: 1, BF16: True}), (4, {TP: 2, PP: 2, BF16: True}),
            id="bf16 shared to tp and pp", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_it_resumes_in_any_layout_and_bit_for_bit_in_its_own(tmp_path, saved, loaded) -> None:
    folder, other, same = (str(tmp_path / name) for name in ("saved", "other", "same"))
    (ranks, changes), (others, elsewhere) = saved, loaded
    went_on = spawn(train_and_save, ranks, EIGHT | changes, folder, 2, 2)
    resumed = spawn(load_and_save_again, ranks, EIGHT | changes, folder, same, 2)
    assert resumed == went_on
    moved = spawn(load_and_save_again, others, EIGHT | elsewhere, folder, other, 2)
    assert moved[0] == pytest.approx(went_on[0], rel=1e-3)
    stored = whole(tmp_path / "saved")
    assert stored == whole(tmp_path / "other") == whole(tmp_path / "same")
    assert {"exp_avg_8bit.blocks.0.mlp.up.weight", "exp_avg_scale.blocks.0.mlp.up.weight"} <= set(
        stored
    )


def test_another_block_size_is_told(tmp_path) -> None:
    """Before its blocks are read as those of this run."""
    words = ("--mock-data", "--optimizer", "adam8bit", "--adam8bit-block-size")
    save = ("--save", str(tmp_path), "--load", str(tmp_path))
    assert alone(*words, "16", *save).rc == 0
    again = alone(*words, "32", *save, "--train-iters", "6")
    assert again.rc == 4 and "2 blocks of a row of embedding.tokens.weight" in again.err
    assert "blocks of 32 are 1: give the --adam8bit-block-size" in again.err
