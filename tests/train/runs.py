"""Tiny runs of the real tool, in this process or on ranks, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint.manifest import Manifest, read_manifest
from megatron_lite.cli import pretrain_gpt
from megatron_lite.telemetry.record import (
    EvaluationRecord,
    StepRecord,
    TelemetryRecord,
    read_metrics,
)
from megatron_lite.train.ending.stop import stop_signals
from tests.support.launch import TINY, launch
from tests.support.sizes import with_flags

FOUR_STEPS = with_flags(
    TINY, "--use-cpu", "--vocab-size", "60", "--attention-dropout", "0", "--hidden-dropout", "0",
    "--train-iters", "4", "--lr-warmup-iters", "1", "--lr-decay-style", "cosine",
    "--num-workers", "0", "--print-state-hash",
    without=("--mock-data", "--max-position-embeddings"),
)  # fmt: skip
"""Four steps of four samples; what a test gives stands in the place of what stands here."""

LONG = ["--train-iters", "100000", "--lr-decay-iters", "100000"]
"""Steps that no test waits for."""

HANDLED = stop_signals()


@dataclass(frozen=True)
class Outcome:
    """Exit code, stdout and stderr of a run; of all ranks together where there are several."""

    rc: int
    out: str
    err: str

    @property
    def state_hash(self) -> str:
        """What --print-state-hash printed."""
        (found,) = re.findall(r"state hash at iteration \d+: ([0-9a-f]{64})", self.out)
        return found


class MLiteFault:
    """MLITE_FAULT while the block runs, for runs of this process."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __enter__(self) -> None:
        os.environ["MLITE_FAULT"] = self.fault

    def __exit__(self, *_: object) -> None:
        del os.environ["MLITE_FAULT"]


def argv(*words: str, without: Sequence[str] = ()) -> list[str]:
    """FOUR_STEPS and the words of a test, of which the last value of a flag counts, `without` some."""
    return with_flags(FOUR_STEPS, *words, without=without)


def run_main(*words: str) -> Outcome:
    """The tool's main in this process; the signal handlers are put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            rc = pretrain_gpt.main(words)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(rc, out.getvalue(), err.getvalue())


def alone(*words: str, without: Sequence[str] = ()) -> Outcome:
    """One rank of FOUR_STEPS, in this process."""
    return run_main(*argv(*words, without=without))


def on_ranks(ranks: int, *words: str) -> Outcome:
    """Several ranks as torchrun would start them; their exit codes must be the same."""
    if ranks == 1:
        return alone(*words)
    ended = launch(ranks, argv(*words))
    codes = {rank.rc for rank in ended}
    assert len(codes) == 1, [(rank.rc, rank.err[-500:]) for rank in ended]
    return Outcome(
        codes.pop(), "".join(rank.out for rank in ended), "".join(rank.err for rank in ended)
    )


def records(folder: Path) -> list[TelemetryRecord]:
    """metrics.jsonl of a run folder."""
    return read_metrics(folder / "metrics.jsonl")


def manifest(folder: Path, iteration: int) -> Manifest:
    """What a checkpoint of a run holds."""
    return read_manifest(folder / f"iter_{iteration:07d}")


def steps(folder: Path) -> list[StepRecord]:
    """Its training steps."""
    return [record for record in records(folder) if isinstance(record, StepRecord)]


def evaluations(folder: Path) -> list[EvaluationRecord]:
    """Its evaluations."""
    return [record for record in records(folder) if isinstance(record, EvaluationRecord)]


def curve(found: Sequence[StepRecord]) -> list[tuple[str, ...]]:
    """All that must not depend on how often a run was interrupted, to the last bit."""
    return [
        tuple(map(repr, (  # nan is not equal to itself, its name is
            r.iteration, r.samples, r.tokens, r.loss, r.grad_norm, r.learning_rate, r.loss_scale,
            r.global_batch_size, r.skipped_iterations,
        )))
        for r in found
    ]  # fmt: skip
