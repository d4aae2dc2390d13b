"""Calibration finds the device behind measured times, writes a file that --hardware reads, runs for real."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest

from megatron_lite.cli.calibrate import TOOL, model, trials
from megatron_lite.config.errors import ConfigError
from megatron_lite.planner import calibrate
from megatron_lite.planner.calibrate import FITTED, Trial
from megatron_lite.planner.hardware import DEVICES, Device, find_device

TRUE = dataclasses.replace(
    DEVICES["cpu"], sustained=0.4, attention=0.15, memory_efficiency=0.5, launch_seconds=2e-5,
    link_efficiency=0.4, dropout_values=4.0, half_inner=40.0, overlap=0.0,
)  # fmt: skip


def timed(found: list[Trial], device: Device) -> list[Trial]:
    """The trials as if this device had run them."""
    return [
        dataclasses.replace(trial, seconds=calibrate.plan_trial(trial, device).rates.step_seconds)
        for trial in found
    ]


def test_a_fit_predicts_layouts_it_has_not_seen() -> None:
    """Times come from a device that the fit does not know: within 4 percent on others."""
    start = dataclasses.replace(DEVICES["cpu"], overlap=0.0)
    fitted = calibrate.fit_device(start, timed(trials(gpu=False, devices=2), TRUE))
    others = [
        Trial("deep", model(8, 384, seq=256, micro=2, batch=16), 1),
        Trial("tp", model(6, 512, seq=256, micro=4, batch=8) + " --tensor-model-parallel-size 2", 2),
        Trial("pp", model(8, 384, seq=256, micro=2, batch=8) + " --pipeline-model-parallel-size 2", 2),
        Trial("dp", model(6, 384, seq=512, micro=2, batch=8), 2),
    ]  # fmt: skip
    off = [calibrate.error(trial, fitted) for trial in timed(others, TRUE)]
    assert max(abs(error) for error in off) < 0.04
    assert max(abs(calibrate.error(t, DEVICES["cpu"])) for t in timed(others, TRUE)) > 0.2


def test_the_file_reads_back_as_the_same_device(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(calibrate.as_yaml(TRUE))
    device = find_device(str(path))
    for name in (*FITTED, "peak_tflops", "memory_gb", "cpu", "overlap", "devices_per_node"):
        here, there = getattr(device, name), getattr(TRUE, name)
        assert math.isclose(here, there, rel_tol=1e-5), name


def test_a_trial_that_fails_says_why() -> None:
    wrong = Trial("wrong", model(2, 60, seq=16, micro=1, batch=1))
    with pytest.raises(ConfigError, match="the trial 'wrong' ended with 2: FATAL"):
        calibrate.measure_trial(wrong, tool=TOOL, steps=4, environment=os.environ)


@pytest.mark.ci
def test_trials_are_real_runs_of_one_rank_and_of_two() -> None:
    small = model(1, 64, seq=32, micro=2, batch=4, vocab=128)
    for ranks in (1, 2):
        done = calibrate.measure_trial(
            Trial("small", small, ranks), tool=TOOL, steps=4, environment=os.environ
        )
        assert 0.0 < done.seconds < 60.0
