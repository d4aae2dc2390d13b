"""CLEX: equal to NTK before it has learned, to its paper's equation afterwards, and its gradients exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.inference import generate as generating
from megatron_lite.inference.generate import Generation, TextRequest
from megatron_lite.kernels.random import some_of
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.rotary import rotary_frequencies
from megatron_lite.layers.stretching import RotarySlowing, step_stretch
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.decoding import likeliest, whole_forward
from tests.support.engines import named
from tests.support.recording import record
from tests.support.tiny import context, draw, make_batches, tiny_config

MODEL = ModelConfig(
    num_layers=1, hidden_size=128, num_attention_heads=2, vocab_size=64, seq_length=16,
    position_embedding_type="rope", rope_scaling_type="clex", rope_scaling_factor=8.0,
    rope_original_length=16, rope_clex_width=2,
)  # fmt: skip
CHANGES: dict[str, Any] = {
    "model__position_embedding_type": "rope", "model__rope_scaling_type": "clex",
    "model__rope_scaling_factor": 4.0, "model__rope_original_length": 8,
    "model__hidden_dropout": 0.0, "model__attention_dropout": 0.0,
}  # fmt: skip


def slowing(model: ModelConfig, *, learned: float) -> RotarySlowing:
    stage = StageContext(model, ParallelContext.serial(), padded_vocab_size=64, vocab_size=64)
    part = stage.figure.slowing
    assert part is not None and (part.pairs, part.width) == (32, model.rope_clex_width * 64)
    made = RotarySlowing(stage, part)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        made.up.normal_(0.0, 0.2, generator=generator)
        made.down.normal_(0.0, learned, generator=generator) if learned else made.down.zero_()
    return made


def at_length(length: int | tuple[int, ...]) -> ForwardContext:
    return ForwardContext(torch.zeros(1, dtype=torch.int64), torch.arange(4), length=length)


@pytest.mark.parametrize("stretch", [1, 2, 4, 8])
def test_before_it_has_learned_it_is_ntk(stretch: int) -> None:
    length = stretch * MODEL.rope_original_length - 3
    found = rotary_frequencies(64, MODEL, length=length)
    found = found * slowing(MODEL, learned=0.0).factors(at_length(length))
    ntk = dataclasses.replace(
        MODEL, rope_scaling_type="ntk", rope_scaling_factor=2.0 * stretch - 1.0
    )
    torch.testing.assert_close(found, rotary_frequencies(64, ntk), rtol=1e-6, atol=0.0)


def by_the_paper(made: RotarySlowing, stretch: int, steps: int = 200) -> np.ndarray:
    """Frequencies by the equation as arXiv:2310.16450 has it, of z = log of the frequencies; in NumPy."""
    up, down = (weight.detach().double().numpy() for weight in (made.up, made.down))
    i, d = np.arange(0, 64, 2), 64
    plain = 1e4 ** (-i / d)

    def slope(t: float, z: np.ndarray) -> np.ndarray:
        read = z + np.log(plain * (2 * t - 1) ** (-i / (d - 2)))
        hidden = up @ read
        return down @ (hidden / (1 + np.exp(-hidden))) - 2 * i / ((d - 2) * (2 * t - 1))

    z, h = np.log(plain), 1 / steps
    for n in range((stretch - 1) * steps):
        t = 1 + n * h
        one = slope(t, z)
        two = slope(t + h / 2, z + h / 2 * one)
        three = slope(t + h / 2, z + h / 2 * two)
        four = slope(t + h, z + h * three)
        z = z + h / 6 * (one + 2 * two + 2 * three + four)
    return np.exp(z)


@pytest.mark.parametrize("stretch", [2, 5])
def test_what_it_has_learned_is_the_papers_equation(stretch: int) -> None:
    made = slowing(MODEL, learned=0.003)
    length = stretch * MODEL.rope_original_length
    factors = made.factors(at_length(length))
    assert (factors - 1.0).abs().max() > 0.1
    found = (rotary_frequencies(64, MODEL, length=length) * factors).numpy()
    np.testing.assert_allclose(found, by_the_paper(made, stretch), rtol=1e-6)
    both = made.factors(at_length((length, 7)))
    assert torch.equal(both[0], factors) and torch.equal(both[1], torch.ones(32).double())


def test_a_step_draws_its_stretch_and_its_positions() -> None:
    stage = StageContext(MODEL, ParallelContext.serial(), padded_vocab_size=64, vocab_size=64)
    drawn = [step_stretch(stage, step) for step in range(200)]
    lengths = [one.length for one in drawn if one is not None]
    assert set(lengths) == {16 * t for t in range(2, 9)} and len(lengths) == 200
    for one in drawn:
        assert one is not None and len(one.positions) == 16
        assert (one.positions.diff() > 0).all()
        assert one.positions[0] >= 0 and one.positions[-1] < one.length
    assert torch.equal(drawn[3].positions, step_stretch(stage, 3).positions)  # type: ignore[union-attr]
    assert not torch.equal(some_of(64, 16, 1), some_of(64, 16, 2))
    assert some_of(9, 9, 1).tolist() == list(range(9))
    counts = torch.stack([some_of(8, 2, n) for n in range(2000)]).unique(return_counts=True)[1]
    assert counts.min() > 420 and counts.max() < 580, (
        "each of 8 is one of 2 in a quarter of the draws"
    )
    longer = dataclasses.replace(stage, model=dataclasses.replace(MODEL, seq_length=100))
    assert {step_stretch(longer, n).length for n in range(20)} == {112, 128}  # type: ignore[union-attr]
    plain = dataclasses.replace(MODEL, rope_scaling_type="none")
    assert step_stretch(dataclasses.replace(stage, model=plain), 0) is None


def one_rank(learned: float = 0.003, **changes: Any) -> Run:
    config = tiny_config(**CHANGES | changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    with torch.no_grad():
        weights = named(run.engine.weights(owned=False))
        weights["rotary.down"].normal_(0.0, learned, generator=torch.Generator().manual_seed(5))
    return run


def gradients_of_a_step(run: Run, **changes: Any) -> dict[str, Tensor]:
    """Of all tensors, before the update."""
    kept: dict[str, Tensor] = {}
    reduce = run.engine.reduce

    def kept_reduce() -> None:
        reduce()
        kept.update({n: g.clone() for n, g in named(run.engine.gradients(owned=False)).items()})

    run.engine.reduce = kept_reduce  # type: ignore[method-assign]
    config = tiny_config(**CHANGES | changes)
    train_step(
        run, make_batches(config, run.blueprint, 0, 0, ragged=True), lr=0.0, weight_decay=0.0
    )
    return kept


def test_gradients_are_those_of_one_graph_through_the_equation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against autograd from the loss to the weights at once, solved anew in every forward by Heun's rule."""
    found = gradients_of_a_step(one_rank())

    def straight(self: RotarySlowing, at: ForwardContext) -> Tensor:
        i = torch.arange(0, 2 * self.part.pairs, 2).double()
        d, steps = 2.0 * self.part.pairs, 50
        stretch = at.whole // self.model.rope_original_length  # type: ignore[operator]
        u = torch.zeros_like(i)

        def slope(t: float, u: Tensor) -> Tensor:
            log_ntk = -i / d * np.log(1e4) - i / (d - 2.0) * np.log(2.0 * t - 1.0)
            return self.down.double() @ torch.nn.functional.silu(
                self.up.double() @ (2.0 * log_ntk + u)
            )

        for n in range((stretch - 1) * steps):
            first = slope(1 + n / steps, u)
            u = u + (first + slope(1 + (n + 1) / steps, u + first / steps)) / (2 * steps)
        return u.exp()

    monkeypatch.setattr(RotarySlowing, "factors", straight)
    expected = gradients_of_a_step(one_rank())
    assert found.keys() == expected.keys()
    for name in ("rotary.up", "rotary.down"):
        assert expected[name].norm() > 0
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)


def test_learning_moves_its_weights_and_use_follows_them() -> None:
    """Samples of 16 tokens where 8 were trained: in use their stretch is 2."""
    run = one_rank()
    batches = make_batches(tiny_config(**CHANGES), run.blueprint, 0, 0)
    losses = []
    for _ in range(3):
        losses.append(float(evaluation_step(run, batches).total))
        assert float(evaluation_step(run, batches).total) == losses[-1]
        train_step(run, batches, lr=0.05, weight_decay=0.0)
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3


@pytest.mark.parametrize("by", [None, record], ids=["step by step", "recorded"])
def test_a_text_is_continued_by_the_stretch_it_will_have(monkeypatch, by) -> None:
    """Cached as uncached, within the trained 8 tokens and beyond them; in a batch as alone."""
    monkeypatch.setattr(generating, "recorder", lambda model: by)
    (stage,) = one_rank(learned=0.05).pipeline.stages.values()
    model = stage.module.eval()
    assert isinstance(model, Decoder)
    prompts, new = ([3, 1, 4, 1, 5, 9], [2, 7], [9, 8, 7]), (14, 5, 20)
    found: list[list[int]] = [[], [], []]
    asked = [TextRequest(p, n, likeliest) for p, n in zip(prompts, new, strict=True)]
    for token in Generation(model, rows=2, chunk=4).run(asked):
        found[token.request].append(int(token.id or 0))
    lengths = [len(p) + n for p, n in zip(prompts, new, strict=True)]
    assert lengths == [20, 7, 23]
    for prompt, whole, ids in zip(prompts, lengths, found, strict=True):
        text = list(prompt)
        while len(text) < whole:
            text.append(int(likeliest(whole_forward(model, text, whole)[None], text)))
        assert text == [*prompt, *ids]
    far, near = (whole_forward(model, prompts[0], length) for length in (20, 8))
    assert not torch.equal(far, near)
