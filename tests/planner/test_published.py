"""Published rows: what follows exactly from their shapes, and how far our predictions are off."""

from __future__ import annotations

import math

import pytest

from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.blueprint.schedules.simulate import simulate
from megatron_lite.blueprint.stages import round_robin
from megatron_lite.planner.activations import VARIANTS, korthikanti
from megatron_lite.planner.forecast import measured, rates
from megatron_lite.planner.memory import layer_items
from tests.planner import published
from tests.planner.published import Run, error, plan


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return {run.name: error(run) for run in published.RUNS}


def test_every_prediction_is_within_a_tenth(
    errors: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print()
        for run in published.RUNS:
            used = "calibrates" if run.calibrates else ""
            print(f"{run.name:<40}{errors[run.name]:>+8.1%}  {used:<12}{run.source}")
    assert {name: off for name, off in errors.items() if abs(off) > 0.10} == {}


@pytest.mark.parametrize("runs", [published.A100_RUNS, published.H100_RUNS], ids=["a100", "h100"])
def test_a_third_at_most_calibrates_and_the_device_is_its_fit(
    runs: tuple[Run, ...], errors: dict[str, float]
) -> None:
    chosen = [run for run in runs if run.calibrates]
    assert 0 < len(chosen) <= len(runs) / 3
    mean = sum(math.log1p(errors[run.name]) for run in chosen) / len(chosen)
    assert abs(mean) < 0.005


def test_predictions_are_as_good_as_the_fit(errors: dict[str, float]) -> None:
    """No overfitting: held-out runs are not much further off than those fitted on."""
    for runs in (published.A100_RUNS, (*published.H100_RUNS, *published.LLAMA_RUNS)):
        off = {
            fitted: math.sqrt(
                sum(errors[r.name] ** 2 for r in runs if r.calibrates is fitted)
                / sum(r.calibrates is fitted for r in runs)
            )
            for fitted in (True, False)
        }
        assert off[False] < 1.3 * off[True] + 0.01


@pytest.mark.parametrize(
    ("run", "billions"), list(zip(published.SC21_RUNS, published.SC21_PARAMETERS, strict=True))
)
def test_sc21_parameter_counts(run: Run, billions: float) -> None:
    assert plan(run).blueprint.num_parameters / 1e9 == pytest.approx(billions, abs=0.06)


SC21_PETAFLOPS = (4.4, 8.8, 18.2, 34.6, 70.8, 143.8, 227.1, 297.4, 410.2, 502.0)


@pytest.mark.parametrize(
    ("run", "aggregate"), list(zip(published.SC21_RUNS, SC21_PETAFLOPS, strict=True))
)
def test_sc21_aggregate_and_per_gpu_flops_belong_together(run: Run, aggregate: float) -> None:
    """The per-GPU column gives a step time; its rates give the aggregate column and the peak share."""
    assert run.hardware_tflops is not None
    predicted = plan(run)
    step = predicted.rates.step_seconds * predicted.rates.tflops_hardware / run.hardware_tflops
    again = measured(predicted, step).rates
    assert again.tflops_hardware * run.gpus / 1e3 == pytest.approx(aggregate, rel=0.006)
    assert again.hfu == pytest.approx(run.hardware_tflops / 312)


K22_SHARES = {  # percent MFU and HFU of the present work (arXiv:2205.05198, table 5)
    "22B": (41.5, 43.7), "175B": (51.4, 52.8), "530B": (56.0, 57.0), "1T": (56.3, 57.0),
}  # fmt: skip


@pytest.mark.parametrize("size", list(K22_SHARES))
def test_k22_measured_times_give_the_published_shares(size: str) -> None:
    run = next(r for r in published.K22_RUNS if r.name == f"K22 {size} present work")
    assert run.seconds is not None
    found = measured(plan(run), run.seconds).rates
    mfu, hfu = K22_SHARES[size]
    # the times are printed to 0.01 s, half a percent of the shortest
    rounding = 0.005 / run.seconds
    assert found.mfu * 100 == pytest.approx(mfu, abs=0.05, rel=rounding)
    assert found.hfu_published * 100 == pytest.approx(hfu, abs=0.05, rel=rounding)


def test_k22_activations_of_a_175b_layer() -> None:
    """arXiv:2205.05198, table 2 with b 1, t 8: 579 / 359 / 327 / 107 / 50 MB."""
    run = next(r for r in published.K22_RUNS if r.name == "K22 175B present work")
    model = plan(run).blueprint.model
    found = [korthikanti(model, micro_batch_size=1, tp=8, variant=v) / 1e6 for v in VARIANTS]
    assert [round(megabytes) for megabytes in found] == [579, 359, 327, 107, 50]


def test_our_layers_keep_what_the_formula_says_where_attention_is_fused() -> None:
    """34 sbh/t with sequence parallelism: 16-bit tensors and masks; a flash kernel adds 4 bytes a row."""
    run = next(r for r in published.K22_RUNS if r.name == "K22 175B present work")
    blueprint, asked = published._drawn(run)
    items = layer_items(blueprint, asked)[0]
    expected = korthikanti(blueprint.model, micro_batch_size=1, tp=8, variant="tp+sp+selective")
    assert items.total - items.core == expected


def test_bloom_measured_time_gives_149_tflops() -> None:
    assert published.BLOOM_RUN.seconds is not None
    found = measured(plan(published.BLOOM_RUN), published.BLOOM_RUN.seconds).rates
    assert found.tflops_hardware == pytest.approx(149.0, rel=0.002)


def test_70b_on_h100_419_7_tflops_is_42_percent() -> None:
    """Megatron-Core's README: 70B, tp 8, pp 2, 768 H100, 419.7 TFLOP/s, 42 %."""
    flags = published.gpt(84, 8192, 64, tp=8, pp=2, batch=384, seq=4096, vocab=131072)
    run = Run(name="70B", source="Megatron-Core README", hardware="h100", gpus=768,
              flags=f"{flags} {published._NEMO}", seconds=1.0)  # fmt: skip
    predicted = plan(run)
    per_step = predicted.blueprint.flops_per_token_full * 384 * 4096
    found = rates(predicted.blueprint, predicted.asked, per_step / 768 / 419.7e12, 989.0)
    assert found.tflops == pytest.approx(419.7)
    assert round(found.mfu * 100) == 42


ZERO_BUBBLE = [
    # arXiv:2401.10241, tables 4 and 9: p, m, ms of F, B, W and of a message, rates of 1F1B and ZB-H1
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585),
    (32, 128, 10.419, 10.207, 7.715, 0.408, 0.2168, 0.1106),
]  # fmt: skip


@pytest.mark.parametrize("row", ZERO_BUBBLE, ids=["1.5B", "28.3B"])
def test_zero_bubble_paper_rates_with_communication(row: tuple[float, ...]) -> None:
    pp, num = int(row[0]), int(row[1])
    forward, inputs, weights, message, one_f_one_b, zb_h1 = row[2:]
    seconds = {Op.F: forward, Op.I: inputs, Op.W: weights, Op.B: inputs + weights}

    def cost(action: Action) -> float:
        return seconds[action.op]

    ideal = num * (forward + inputs + weights)
    for name, rate in (("1f1b", one_f_one_b), ("zb-h1", zb_h1)):
        schedule = SCHEDULES[name].generate(round_robin(pp), num)
        makespan = simulate(schedule, cost, latency=message).makespan
        assert (makespan - ideal) / makespan == pytest.approx(rate, abs=0.002), name
