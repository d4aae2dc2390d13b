"""What is optimised is chosen from a table; its numbers are the same in every layout, and are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lite.checkpoint.description import saved_model
from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.config.errors import CheckpointError, ConfigError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.rules.table import check_config
from megatron_lite.layers import chunks
from megatron_lite.layers.chunks import chunked_loss_sum
from megatron_lite.train.assemble import assemble
from megatron_lite.train.objectives.base import Metric, finished
from megatron_lite.train.objectives.table import LOSSES
from megatron_lite.train.step import evaluation_step, train_step
from tests.support.axes import PP, SCHEDULE, SP, TP
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config
from tests.train import toys
from tests.train.runs import alone, evaluations, steps

STEPS = 3
CHUNK = "parallel__logits_chunk_mib"
LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {TP: 2}),
    "tp2 x pp2": (4, {TP: 2, PP: 2, SP: True, SCHEDULE: "zb-h1"}),
    "tp2 in chunks": (2, {TP: 2, SP: True, CHUNK: 0.001}),
    "pp2 in chunks": (2, {PP: 2, SCHEDULE: "zb-h1", CHUNK: 0.001}),
}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    for name, (needs, make) in toys.ROWS.items():
        monkeypatch.setitem(OBJECTIVES, name, needs)
        monkeypatch.setitem(LOSSES, name, make)


def measured(rank, ranks, changes, objective):
    """Per step: the loss, then the metrics; at the end what an evaluation summed."""
    toys.register()
    sgd = {"optim__optimizer": "sgd"}  # Adam makes whole steps of rounding noise
    config = tiny_config(train__objective=objective, **sgd, **changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    seen = []
    for step in range(STEPS):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        result = train_step(run, batches, lr=0.1, weight_decay=0.0)
        seen.append((result.loss.item(), dict(result.metrics), result.update.grad_norm.item()))
    return seen, evaluation_step(run, batches).tolist()


def check_alike(found, serial):
    """Losses, metrics, gradient norms and an evaluation's sums; every step rests on the updates before."""
    for (loss, metrics, norm), (its_loss, its_metrics, its_norm) in zip(
        found[0], serial[0], strict=True
    ):
        assert (loss, norm) == (
            pytest.approx(its_loss, rel=1e-5),
            pytest.approx(its_norm, rel=1e-4),
        )
        assert metrics == pytest.approx(its_metrics, rel=1e-4)
    assert found[1] == pytest.approx(serial[1], rel=1e-4)


@pytest.fixture(scope="module")
def serial():
    (found,) = spawn(measured, 1, {}, "accuracy")
    return found


def test_they_are_the_same_in_chunks_of_tokens(serial, monkeypatch):
    numbers = []

    def noted(*args):
        numbers.append(args[-1].number)
        return chunked_loss_sum(*args)

    monkeypatch.setattr(chunks, "chunked_loss_sum", noted)
    check_alike(measured(0, 1, {CHUNK: 0.002}, "accuracy"), serial)
    assert set(numbers) == {4}


IN_CI = ["tp2 x pp2", "tp2 in chunks", "pp2 in chunks"]


@pytest.mark.parametrize("name", ["dp2", *(pytest.param(n, marks=pytest.mark.ci) for n in IN_CI)])
def test_metrics_are_the_same_in_every_layout_and_on_every_rank(serial, name):
    for found in spawn(measured, *LAYOUTS[name], "accuracy"):
        check_alike(found, serial)


@pytest.fixture(scope="module")
def serial_value():
    (found,) = spawn(measured, 1, {}, "value")
    return found


@pytest.mark.parametrize("name", ["tp2", pytest.param("tp2 x pp2", marks=pytest.mark.ci)])
def test_a_scalar_head_is_trained_the_same_in_every_layout(serial_value, name):
    assert len({loss for loss, _, _ in serial_value[0]}) == STEPS
    for found in spawn(measured, *LAYOUTS[name], "value"):
        check_alike(found, serial_value)


def test_metrics_are_sums_and_means_over_the_weight_and_leave_the_loss_alone(serial):
    seen, (_, count, share, hits) = serial
    (plain,) = spawn(measured, 1, {}, "language-model")
    assert [(loss, norm) for loss, _, norm in seen] == [(loss, norm) for loss, _, norm in plain[0]]
    assert [metrics for _, metrics, _ in plain[0]] == [{}] * STEPS
    assert share == hits > 0
    told = [metrics for _, metrics, _ in seen]
    weights = {metrics["hits"] / metrics["accuracy"] for metrics in told if metrics["hits"]}
    assert weights and all(weight == pytest.approx(round(weight)) for weight in weights)
    assert count == pytest.approx(round(count))


def test_metrics_are_in_the_records_and_on_the_console(tmp_path: Path) -> None:
    run = alone("--mock-data", "--save", str(tmp_path), "--objective", "accuracy", "--log-interval",
                "2", "--eval-iters", "2", "--eval-interval", "4", "--split", "8,1,1")  # fmt: skip
    assert run.rc == 0, run.err
    records = steps(tmp_path)
    assert all(record.metrics.keys() == {"accuracy", "hits"} for record in records)
    for record in (*records, *evaluations(tmp_path)):
        assert 0.0 <= record.metrics["accuracy"] <= 1.0
    for record in records:  # 4 samples of 16 tokens
        assert record.metrics["hits"] == pytest.approx(64 * record.metrics["accuracy"])
    mean = sum(record.metrics["accuracy"] for record in records[2:]) / 2
    (line,) = [line for line in run.out.splitlines() if " iteration        4/" in line]
    assert f"| accuracy: {mean:.6E} | hits: {64 * mean:.6E} | loss scale:" in line
    assert run.out.count("| accuracy value: ") == len(evaluations(tmp_path)) > 0


def test_a_language_model_without_metrics_writes_no_field_for_them(tmp_path: Path) -> None:
    assert alone("--mock-data", "--save", str(tmp_path)).rc == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    fields = {name for line in lines for name in json.loads(line)}
    assert fields and not fields & {"metrics", "loss_name"}


def test_a_run_goes_on_with_its_own_objective_and_another_starts_from_its_weights(tmp_path) -> None:
    words, values = str(tmp_path / "words"), str(tmp_path / "values")
    assert alone("--mock-data", "--save", words).rc == 0
    other = alone("--mock-data", "--load", words, "--objective", "accuracy", "--train-iters", "6")
    assert (
        other.rc == 4 and "--objective: language-model -> accuracy; give --objective" in other.err
    )
    half = ["--mock-data", "--load", words, "--save", values, "--objective", "value", "--finetune"]
    tuned = alone(*half, "--exit-interval", "2")
    assert tuned.rc == 0, tuned.err
    assert "the vocabulary head is left out, the scalar head starts from --seed" in tuned.out
    assert " | loss: " in tuned.out and "lm loss" not in tuned.out and "PPL" not in tuned.out
    assert {step.loss_name for step in steps(tmp_path / "values")} == {"loss"}
    resumed = alone("--mock-data", "--load", values, "--save", values, "--objective", "value")
    assert resumed.rc == 0, resumed.err
    straight = alone(*half[:4], str(tmp_path / "straight"), *half[5:])
    assert resumed.state_hash == straight.state_hash
    folder = tmp_path / "values" / "iter_0000004"
    assert saved_model(read_manifest(folder), folder, head=None).num_layers == 2
    with pytest.raises(
        CheckpointError, match="--objective value, have a scalar head; what is asked"
    ):
        saved_model(read_manifest(folder), folder)


def test_weights_of_an_objective_that_is_not_known_are_refused(tmp_path, monkeypatch) -> None:
    assert alone("--mock-data", "--save", str(tmp_path), "--objective", "value").rc == 0
    monkeypatch.delitem(OBJECTIVES, "value")
    again = alone("--mock-data", "--load", str(tmp_path), "--train-iters", "6")
    assert (
        again.rc == 4 and "trained on --objective value, which this program does not" in again.err
    )


def test_an_unknown_objective_is_refused_with_the_list() -> None:
    names = ", ".join(OBJECTIVES)
    with pytest.raises(ConfigError, match=f"--objective reward is not known; choose from {names}"):
        check_config(tiny_config(train__objective="reward"), 1)


def test_every_objective_can_be_made() -> None:
    assert set(OBJECTIVES) == set(LOSSES)


def test_where_nothing_counts_a_mean_is_no_number() -> None:
    class Two:
        metrics = (Metric("share"), Metric("sum", mean=False))

    assert str(finished(Two(), [0.0, 3.0], 0.0)) == "{'share': nan, 'sum': 3.0}"  # type: ignore[arg-type]
