"""--decoupled-lr moves what has a row per token alone; --apply-layernorm-1p keeps norms in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_lite.config.flags.parser import parse
from megatron_lite.config.sections.optim import LearningRateConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.optim.learning_rate import LearningRateSchedule
from tests.train.runs import alone, on_ranks, steps

SGD = ("--mock-data", "--optimizer", "sgd", "--sgd-momentum", "0", "--clip-grad", "0", "--lr", "0.5",
       "--lr-decay-style", "constant", "--lr-warmup-iters", "0", "--weight-decay", "0")  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint of one rank."""
    newest = sorted(folder.glob("iter_*"))[-1]
    found: dict[str, torch.Tensor] = {}
    for file in sorted(newest.glob("*.safetensors")):
        found |= load_file(file)
    return found


def after_one_step(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    done = alone(*SGD, *words, "--train-iters", "1", "--save", str(folder))
    assert done.rc == 0, done.err
    return weights(folder)


@pytest.mark.ci
def test_embedding_and_output_move_at_their_own_rate(tmp_path: Path) -> None:
    untied = "--untie-embeddings-and-output-weights"
    start = after_one_step(tmp_path / "start", untied, "--lr", "1e-38")
    plain = after_one_step(tmp_path / "plain", untied)
    apart = after_one_step(tmp_path / "apart", untied, "--decoupled-lr", "2", "--min-lr", "0")
    tables = [name for name in plain if "tokens.weight" in name or "head.weight" in name]
    assert len(tables) == 2 and len(plain) > 20
    for name in plain:
        times = 4.0 if name in tables else 1.0
        moved, other = plain[name] - start[name], apart[name] - start[name]
        if "weight" in name:
            assert moved.abs().max() > 0, name
        torch.testing.assert_close(other, times * moved, rtol=1e-3, atol=1e-6)


@pytest.mark.ci
@pytest.mark.parametrize("layout", [
    ["--tensor-model-parallel-size", "2"], ["--use-distributed-optimizer"],
    pytest.param(["--pipeline-model-parallel-size", "2"], marks=pytest.mark.slow),
])  # fmt: skip
def test_every_layout_takes_the_same_two_rates(layout: list[str], tmp_path: Path) -> None:
    words = (
        "--mock-data",
        "--decoupled-lr",
        "3e-2",
        "--decoupled-min-lr",
        "1e-3",
        "--save-interval",
        "0",
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert alone(*words, "--save", str(one)).rc == 0
    done = on_ranks(2, *words, *layout, "--save", str(two))
    assert done.rc == 0, done.err
    for ours, theirs in zip(steps(two), steps(one), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-4)
        assert ours.decoupled_learning_rate == theirs.decoupled_learning_rate
    assert steps(one)[0].decoupled_learning_rate == 3e-2 and steps(one)[0].learning_rate == 1e-2
    assert steps(one)[-1].decoupled_learning_rate == pytest.approx(1e-3)


def test_the_decoupled_curve_is_the_same_curve_between_its_own_ends() -> None:
    """megatron.core's get_lr with a param group's own max_lr and min_lr; the start is shared."""
    lr = LearningRateConfig(lr=1.0, min_lr=0.1, lr_decay_style="cosine", lr_warmup_iters=2,
                            decoupled_lr=4.0, decoupled_min_lr=0.0)  # fmt: skip
    curve = LearningRateSchedule.from_config(lr, TrainConfig(train_iters=10), lambda done: done)
    apart = curve.decoupled(lr)
    assert apart is not None
    for samples in range(12):
        plain = curve.at(samples)
        share = plain if samples <= 2 else (plain - 0.1) / 0.9
        assert apart.at(samples) == pytest.approx(4.0 * share)
    inherits = curve.decoupled(LearningRateConfig(lr=1.0, min_lr=0.1, decoupled_lr=4.0))
    assert inherits is not None and inherits.min_lr == 0.1
    assert curve.decoupled(LearningRateConfig(lr=1.0)) is None


@pytest.mark.ci
def test_a_resume_with_another_decoupled_rate_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    words = ("--mock-data", "--save", folder, "--save-interval", "2", "--exit-interval", "2")
    assert alone(*words, "--decoupled-lr", "0.05").rc == 0
    done = alone(*words[:-2], "--load", folder)
    assert done.rc == 4 and "--decoupled-lr: 0.05 -> not used" in done.err
    assert alone(*words[:-2], "--load", folder, "--decoupled-lr", "0.05").rc == 0


@pytest.mark.ci
def test_a_resume_with_other_groups_of_parameters_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    words = ("--mock-data", "--save", folder, "--save-interval", "2", "--exit-interval", "2")
    asked = ("--param-groups", "embedding.*:lr=0.5", "kind=norm:rule=sgd")
    done = alone(*words, *asked)
    assert done.rc == 0, done.err
    assert "parameters: sgd, lr 1 x --lr = 0.01, weight decay 0 x" in done.out
    words = (*words[:-2], "--load", folder)
    done = alone(*words)
    assert (
        done.rc == 4 and "--param-groups: embedding.*:lr=0.5 kind=norm:rule=sgd -> none" in done.err
    )
    done = alone(*words, "--override-opt-param-scheduler")
    assert done.rc == 4 and "other --param-groups" in done.err and "--no-load-optim" in done.err
    assert alone(*words, *asked).rc == 0


@pytest.mark.ci
def test_a_resume_with_another_draw_of_blocks_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    words = ("--mock-data", "--save", folder, "--save-interval", "2")
    asked = ("--lisa-layers", "1", "--lisa-interval", "1")
    done = alone(*words, "--exit-interval", "2", *asked)
    assert done.rc == 0, done.err
    assert "LISA: 1 of 2 blocks train at a time, drawn anew every 1 updates" in done.out
    done = alone(*words, "--load", folder)
    assert done.rc == 4 and "--lisa-layers" in done.err and "no state of this optimizer" in done.err
    assert alone(*words, "--load", folder, *asked).rc == 0
    whole = tmp_path / "whole"
    assert alone(*words[:2], str(whole), *words[3:], *asked).rc == 0
    assert [s.loss for s in steps(whole)] == [s.loss for s in steps(Path(folder))]


@pytest.mark.parametrize("norm", ["LayerNorm", pytest.param("RMSNorm", marks=pytest.mark.ci)])
def test_norms_kept_less_one_train_as_plain_ones(norm: str, tmp_path: Path) -> None:
    words = ("--mock-data", "--normalization", norm, "--save-interval", "0")
    plain, less = tmp_path / "plain", tmp_path / "less"
    assert alone(*words, "--save", str(plain)).rc == 0
    assert alone(*words, "--apply-layernorm-1p", "--save", str(less)).rc == 0
    for ours, theirs in zip(steps(less), steps(plain), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    one, zero = weights(plain), weights(less)
    norms = [name for name in one if "norm.weight" in name and "exp_avg" not in name]
    assert len(norms) == 5
    for name in norms:
        torch.testing.assert_close(zero[name] + 1.0, one[name], rtol=1e-4, atol=1e-5)
    assert parse(["--apply-layernorm-1p"]).config.model.apply_layernorm_1p


@pytest.mark.ci
@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("--optimizer adam", "--optimizer lion", "--optimizer: adam -> lion"),
        ("--optimizer adam", "--optimizer sgd --sgd-momentum 0", "--optimizer: adam -> sgd"),
        (
            "--optimizer adafactor", "--optimizer adafactor --adafactor-scale-parameter",
            "--adafactor-scale-parameter: False -> True",
        ),
        (
            "--optimizer muon --muon-extra-scale-factor 0.2", "--optimizer muon",
            "--muon-extra-scale-factor: 0.2 -> 1.0",
        ),
    ],
    ids=["lion", "sgd", "adafactor", "muon"],
)  # fmt: skip
def test_a_resume_by_other_updates_on_the_same_states_is_refused(
    before, now, said, tmp_path: Path
) -> None:
    words = ["--mock-data", "--save", str(tmp_path), "--load", str(tmp_path)]
    assert alone(*words, *before.split(), "--exit-interval", "2").rc == 0
    refused = alone(*words, *now.split())
    assert (
        refused.rc == 4
        and f"with other updates (checkpoint -> this command line): {said}" in refused.err
    )
    taken = alone(*words, *now.split(), "--override-opt-param-scheduler")
    assert taken.rc == 0 and f"--override-opt-param-scheduler: {said}" in taken.out + taken.err
