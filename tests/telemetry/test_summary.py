"""The few numbers of a run are those worked out by hand; the drawing is a picture."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.config.errors import DataError
from megatron_lite.telemetry.record import EvaluationRecord, record_json
from megatron_lite.telemetry.summary import describe_losses, measure_speed, never_ran, smoothed
from tests.support.extras import needs
from tests.support.places import ROOT
from tests.telemetry.records import STEP

REPORT = ROOT / "tools" / "report.py"


def step(iteration: int, tgs: float, seconds: float, **changes: object):
    return replace(
        STEP,
        iteration=iteration,
        tokens_per_second_per_gpu=tgs,
        seconds_per_iteration=seconds,
        **changes,
    )


RUN = [
    step(1, 5.0, 100.0, warmup=True, loss=10.0),
    step(2, 200.0, 1.0, loss=8.0, skipped_iterations=0),
    step(3, 100.0, 2.0, loss=7.0, skipped_iterations=0),
    step(4, 50.0, 4.0, loss=6.0, skipped_iterations=0),
    EvaluationRecord(iteration=4, split="validation", samples=64, loss=6.5, seconds=1.0),
    EvaluationRecord(iteration=4, split="test", samples=64, loss=math.log(700), seconds=1.0),
]


def test_mean_speed_is_tokens_over_time_without_warm_up() -> None:
    speed = measure_speed(RUN, source="x")
    assert (speed.steps, speed.left_out) == (3, 1)
    assert speed.mean == pytest.approx(600.0 / 7.0)
    assert (speed.median, speed.smallest, speed.largest) == (100.0, 50.0, 200.0)
    assert speed.seconds_per_iteration == pytest.approx(7.0 / 3.0)
    assert speed.mfu == pytest.approx(STEP.mfu)


def test_steps_on_another_number_of_ranks_do_not_count() -> None:
    before = step(1, 999.0, 1.0, world_size=8)
    assert measure_speed([before, *RUN], source="x") == measure_speed(RUN, source="x")


def test_mfu_is_unknown_where_a_step_has_none() -> None:
    run = [replace(record, mfu=None) if record is RUN[2] else record for record in RUN]
    assert measure_speed(run, source="x").mfu is None


def test_no_steady_step_is_a_data_error() -> None:
    with pytest.raises(DataError, match="somewhere has 1 steps and none after the warm-up"):
        measure_speed([replace(RUN[0], skipped_iterations=0)], source="somewhere")


def test_losses_in_words() -> None:
    assert describe_losses(RUN) == [
        "iterations 1 to 4 of 10, 7680 samples, 15728640 tokens",
        "training loss 10.0000 -> 6.0000",
        "validation loss 6.5000 (PPL 665.14) at iteration 4; best 6.5000 at 4",
        "test loss 6.5511 (PPL 700.00)",
        "2 steps were skipped",
    ]
    assert describe_losses([]) == ["no optimizer step yet"]


def test_smoothing_keeps_a_straight_line_and_skips_nan() -> None:
    line = [float(value) for value in range(20)]
    assert smoothed(line, window=7) == pytest.approx(line)
    assert smoothed([1.0, math.nan, 3.0], window=3) == [1.0, 2.0, 3.0]
    assert math.isnan(smoothed([math.nan], window=3)[0])


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPORT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(record_json(record) + "\n" for record in RUN))
    return tmp_path


def test_report_prints_the_speed_and_writes_nothing(run_folder: Path) -> None:
    done = report(str(run_folder), "--tgs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "tokens per gpu per second (tgs): mean 85.714 | median 100.000 | min 50.000 | max 200.000\n"
    )
    assert [path.name for path in run_folder.iterdir()] == ["metrics.jsonl"]


def test_report_draws_a_png(run_folder: Path) -> None:
    needs("matplotlib")
    done = report(str(run_folder))
    assert done.returncode == 0, done.stderr
    png = run_folder / "loss.png"
    assert done.stdout.endswith(f"test loss 6.5511 (PPL 700.00)\n2 steps were skipped\n"
                                f"loss curve: {png}\n")  # fmt: skip
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert (width, height) == (1170, 936)


def test_report_of_a_folder_without_metrics_exits_3(tmp_path: Path) -> None:
    done = report(str(tmp_path / "none"), "--tgs")
    assert done.returncode == 3
    assert done.stderr.startswith("FATAL[3] ")
    assert "metrics.jsonl" in done.stderr


def test_skipped_steps_are_no_speed() -> None:
    skipped = step(5, 900.0, 0.1, skipped_iterations=1)
    speed = measure_speed([*RUN, skipped], source="x")
    assert (speed.steps, speed.skipped) == (3, 1)
    assert speed.mean == measure_speed(RUN, source="x").mean
    assert "1 of warm-up, 1 skipped)" in str(speed)


def test_a_run_whose_optimizer_never_ran_is_told_so() -> None:
    run = [step(n, 900.0, 0.1, skipped_iterations=1, warmup=n == 1) for n in (1, 2, 3)]
    with pytest.raises(DataError, match="NO OPTIMIZER STEP RAN: all 3 steps were skipped"):
        measure_speed(run, source="x")
    assert any("*** NO OPTIMIZER STEP RAN" in line for line in describe_losses(run))


def test_the_advice_where_nothing_was_learnt_fits_its_cause() -> None:
    assert "from 4.29497e+09 to 65536; " in never_ran(10, 2.0**32, 65536.0)
    assert "--initial-loss-scale 65536 (" in never_ran(10, 2.0**32, 2.0**30)
    assert "--initial-loss-scale 512 (" in never_ran(10, 1024.0, 512.0)
    assert "scale" not in never_ran(10, 1.0, 1.0) and "warnings" in never_ran(10, 1.0, 1.0)
