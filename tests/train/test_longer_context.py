"""Beyond the trained length: what is lost without scaling, what YaRN keeps, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lite.data.batch import Batch
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.engines import named
from tests.support.tiny import context, draw, tiny_config
from tests.train.runs import alone

SHORT, LONG = 64, 256
SLOTS, VALUES, BATCH = 8, 6, 16
ASKED = SLOTS * VALUES
FILLERS = ASKED + SLOTS + VALUES
VOCABULARY = FILLERS + 10


def recall(number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [length + 1] and the mask of what counts: a text whose first tokens give each slot a value.

    Behind them are fillers, among which each slot is asked for once; the answer follows.
    """
    draw_of = np.random.default_rng(number)
    values = draw_of.integers(0, VALUES, SLOTS)
    tokens = draw_of.integers(FILLERS, VOCABULARY, length + 1)
    tokens[:SLOTS] = np.arange(SLOTS) * VALUES + values
    order = draw_of.permutation(SLOTS)
    places = SLOTS + 2 * np.sort(draw_of.choice((length - SLOTS) // 2, SLOTS, replace=False))
    tokens[places], tokens[places + 1] = ASKED + order, ASKED + SLOTS + values[order]
    mask = np.zeros(length, dtype=np.float32)
    mask[places] = 1.0
    return tokens, mask


def batch(first: int, length: int) -> Batch:
    numbers = np.arange(first, first + BATCH)
    tokens, masks = zip(*(recall(int(n), length) for n in numbers), strict=True)
    return Batch(np.stack(tokens).astype(np.int64), numbers, np.stack(masks))


def made(length: int, weights: Run | None = None, **scaling: Any) -> Run:
    """One layer of attention, as wide as recalling takes; its slowest channel turns by 0.9 in 64 tokens."""
    config = tiny_config(
        model__num_layers=1, model__hidden_size=64, model__num_attention_heads=2,
        model__seq_length=length, model__vocab_size=VOCABULARY, model__init_method_std=0.1,
        model__position_embedding_type="rope", model__rotary_base=100.0,
        model__normalization="RMSNorm", model__swiglu=True, model__add_bias_linear=False,
        model__hidden_dropout=0.0, model__attention_dropout=0.0,
        train__micro_batch_size=BATCH, train__global_batch_size=BATCH,
        **{f"model__{name}": value for name, value in scaling.items()},
    )  # fmt: skip
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    if weights is not None:
        with torch.no_grad():
            old = named(weights.engine.weights(owned=False))
            for name, tensor in named(run.engine.weights(owned=False)).items():
                tensor.copy_(old.get(name, tensor))
    return run


def tuned(run: Run, steps: int, first: int, lr: float) -> Run:
    for step in range(steps):
        numbered = batch(first + step * BATCH, run.context.model.seq_length)
        train_step(run, [numbered], lr=lr * min(1.0, (step + 1) / 10), weight_decay=0.0)
    return run


def loss_beyond(run: Run) -> float:
    """Of answers behind the first 64 tokens of texts that no training saw; of all where texts end there."""
    length = run.context.model.seq_length
    asked = batch(10**6, length)
    if length > SHORT:
        asked.loss_mask[:, :SHORT] = 0.0
    sums = evaluation_step(run, [asked])
    return float(sums.total / sums.count)


SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"rope_original_length": SHORT}, "llama3": {"rope_original_length": SHORT},
    "dynamic": {"rope_original_length": SHORT}, "clex": {"rope_original_length": SHORT},
    "linear": {}, "ntk": {},
}  # fmt: skip


@pytest.mark.slow
def test_a_model_of_64_tokens_reaches_256_by_scaling_and_not_without() -> None:
    """Perplexities as a user would judge them: as bad as guessing without, and as at 64 after a few steps."""
    short = tuned(made(SHORT), 130, 0, 3e-3)
    before = loss_beyond(short)
    assert before < 0.1, "it learned to recall"
    plain = loss_beyond(made(LONG, short))
    assert plain > 1.0 and np.exp(plain) >= 2 * np.exp(before)
    stretched = {
        kind: made(LONG, short, rope_scaling_type=kind, rope_scaling_factor=4.0, **said)
        for kind, said in SCALED.items()
    }
    for kind, run in stretched.items():
        assert loss_beyond(run) < 0.5 * plain, kind
    after = loss_beyond(tuned(stretched["yarn"], 15, 10**5, 1e-3))
    assert np.exp(after) <= 1.2 * np.exp(before)
    clex = {"rope_scaling_type": "clex", "rope_scaling_factor": 4.0, **SCALED["clex"]}
    spread = tuned(made(SHORT, short, **clex), 30, 10**5, 1e-3)
    learned = loss_beyond(made(LONG, spread, **clex))
    assert np.exp(learned) <= 1.2 * np.exp(before), "it reaches 256 by samples of 64"


ROPE = ["--position-embedding-type", "rope"]
LONGER = ["--seq-length", "32", "--allow-data-change", "--exit-interval", "3", "--eval-iters", "0"]
YARN = ["--rope-scaling-type", "yarn", "--rope-scaling-factor", "2"]
NAMES = "seq_length,rotary_base,rope_scaling_type"


@pytest.fixture(scope="module")
def trained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of samples of 16 tokens."""
    folder = tmp_path_factory.mktemp("short") / "run"
    done = alone(*data, *ROPE, "--save", str(folder), "--exit-interval", "2")
    assert done.rc == 0, done.err
    return folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "32 tokens are 16 more than the 16 that this model was trained for, and its positions are "
             "not scaled: expect nonsense beyond them. --rope-scaling-type yarn --rope-scaling-factor 2 "
             "--rope-original-length 16 "),
        ([*YARN, "--rope-original-length", "16"], None),
        (["--rotary-base", "50000"], None),
        (YARN, "--rope-original-length 8192 is not the 16 tokens that the checkpoint's model was trained for"),
        ([*YARN, "--rope-original-length", "16", "--rope-scaling-factor", "1.5"],
         "--seq-length 32 is more than --rope-original-length 16 x --rope-scaling-factor 1.5 = 24: give a "
         "factor of 2"),
    ],
)  # fmt: skip
def test_longer_samples_than_the_weights_know_are_a_warning_with_numbers(
    data: list[str], trained: Path, words: list[str], told: str | None
) -> None:
    done = alone(
        *data, *ROPE, "--load", str(trained), *LONGER, *words, "--allow-model-change", NAMES
    )
    assert done.rc == 0, done.err
    found = [line for line in done.err.splitlines() if "--rope-" in line]
    assert (found == []) if told is None else (len(found) == 1 and told in found[0]), done.err
    assert all(line.startswith("WARNING: ") for line in found)
