"""Adafactor's own step in a run: shown as its learning rate, resumed exactly, not taken for --lr."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import alone, curve, steps

RATE = ("--lr", "--lr-decay-style", "--lr-warmup-iters")
PAPER = (
    "--mock-data", "--optimizer", "adafactor", "--adafactor-relative-step",
    "--adafactor-scale-parameter", "--adafactor-warmup-init",
)  # fmt: skip


def test_the_log_shows_the_relative_step_and_a_resume_goes_on_with_it(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = alone(*PAPER, "--save", str(whole), without=RATE)
    assert done.rc == 0, done.err
    rates = [record.learning_rate for record in steps(whole)]
    assert rates == pytest.approx([1e-6 * (t + 1) for t in range(1, 5)])  # of the next update
    again = (*PAPER, "--save", str(parts), "--load", str(parts))
    first = alone(*again, "--exit-interval", "2", without=RATE)
    second = alone(*again, without=RATE)
    assert (first.rc, second.rc) == (0, 0), first.err + second.err
    assert curve(steps(parts)) == curve(steps(whole))
    assert second.state_hash == done.state_hash
    given = alone(
        "--mock-data", "--optimizer", "adafactor", "--save", str(tmp_path / "given"),
        "--load", str(parts), "--train-iters", "6",
    )  # fmt: skip
    assert given.rc == 4 and "--lr: 1 -> 0.01" in given.err
