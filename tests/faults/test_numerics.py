"""Bad numbers in whole runs: N1, N2 and N4 of the fault list, on ranks that torchrun would start."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.launch import TINY, Ended, Running, start
from tests.support.sizes import with_flags
from tests.train.runs import steps

PP2 = ["--pipeline-model-parallel-size", "2", "--global-batch-size", "8"]
SKIP = ["--on-non-finite", "skip", "--print-state-hash"]
RUNS: dict[str, tuple[int, str | None, list[str]]] = {
    "loss": (4, "step3.loss:3:nan-again", PP2),
    "gradient": (2, "step3.gradient:1:nan-again=blocks.1.attention.q.weight", []),
    "clean": (2, None, SKIP),
    "skipped": (2, "step3.loss:1:nan-again", SKIP),
    "healed": (2, "step3.loss:1:nan", SKIP),
    "poisoned": (2, "step6.gradient:1:nan=blocks.1.mlp.up.weight", [
        "--no-check-for-nan-in-loss-and-grad", "--save-interval", "3", "--keep-last", "1",
    ]),
    "drift": (2, "step3:1:flip=blocks.0.mlp.up.weight", [
        "--check-replicas", "2", "--save-interval", "4",
    ]),
    "fp16": (2, None, [
        "--fp16", "--initial-loss-scale", "1e9", "--min-loss-scale", "1e9",
        "--loss-scale-patience", "3", *PP2,
    ]),
    "spike": (2, "step5.gradient:1:spike-again", ["--spike-window", "4", "--on-spike", "skip"]),
    "spike replayed": (2, "step5.loss:1:spike", [
        "--spike-window", "4", "--loss-spike-factor", "3", "--grad-norm-spike-factor", "0",
        "--rerun-mode", "validate_results", *SKIP,
    ]),
}  # fmt: skip


Outcome = tuple[list[Ended], Path]
"""How the ranks ended, and the run folder."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Outcome]]:
    """The outcome of a run by name.  All start at once: most of their time is starting."""
    running: dict[str, tuple[Running, Path]] = {}
    for name, (ranks, fault, flags) in RUNS.items():
        folder = tmp_path_factory.mktemp("numerics") / "run"
        argv = with_flags([*TINY, "--save-interval", "100"], *flags, "--save", str(folder))
        running[name] = (start(ranks, argv, fault=fault), folder)

    @functools.cache
    def wait(name: str) -> Outcome:
        run, folder = running[name]
        return run.wait(120), folder

    yield wait
    for run, _ in running.values():
        run.close()


def reports(ranks: list[Ended]) -> set[str]:
    """What the FATAL lines say without the rank."""
    return {re.sub(r"rank=\d+", "", rank.fatal, count=1) for rank in ranks}


def test_a_nan_loss_on_one_rank_ends_all_with_the_same_line_and_is_printed(outcome) -> None:
    ranks, folder = outcome("loss")
    assert [rank.rc for rank in ranks] == [7] * 4, [rank.err for rank in ranks]
    (line,) = reports(ranks)
    assert line.startswith("FATAL[7]  step=2: iteration 3: the loss is nan")
    # of samples 16 to 23 dp rank 1's first micro batch has the second pair
    assert "the loss of samples 18, 19 on rank 3 is the first value that is not finite" in line
    assert re.search(r"iteration +3/ .* lm loss: nan .* number of nan iterations: +1", ranks[3].out)
    last = steps(folder)[-1]
    assert last.iteration == 3 and last.loss != last.loss
    assert not list(folder.glob("iter_*")), "nothing may be saved after it"


def test_a_nan_in_one_gradient_names_the_parameter_the_rank_and_the_samples(outcome) -> None:
    ranks, _ = outcome("gradient")
    assert [rank.rc for rank in ranks] == [7, 7]
    (line,) = reports(ranks)
    assert "the gradient of blocks.1.attention.q.weight on rank 1, from samples 10, 11" in line
    assert "(of 1 there)" in line


def test_a_skipped_step_counts_and_learns_nothing(outcome) -> None:
    ranks, folder = outcome("skipped")
    assert [rank.rc for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    assert "WARNING: iteration 3: the loss is nan" in ranks[0].err
    assert "skipped, 1 so far" in ranks[0].err and "WARNING" not in ranks[1].err
    assert re.search(r"iteration +3/ .* lm loss: nan .* skipped iterations: +1", ranks[1].out)
    records = steps(folder)
    assert [r.samples for r in records] == [4 * n for n in range(1, 7)]
    assert [r.skipped_iterations for r in records] == [0, 0, 1, 0, 0, 0]
    # the learning rate is a function of the samples of successful steps
    assert records[2].learning_rate == records[1].learning_rate > records[3].learning_rate


def test_a_passing_fault_costs_nothing(outcome) -> None:
    hashes = {}
    for name in ("clean", "healed", "spike replayed", "skipped"):
        ranks, _ = outcome(name)
        assert [rank.rc for rank in ranks] == [0, 0], [rank.err for rank in ranks]
        (hashes[name],) = re.findall(r"state hash at iteration 6: (\w+)", ranks[0].out)
        if name in ("healed", "spike replayed"):
            assert "a passing fault of the machine - the second result is taken" in ranks[0].err
            assert re.search(r"the loss of samples \d+, \d+ on rank 1 was ", ranks[0].err)
    assert hashes["clean"] == hashes["healed"] == hashes["spike replayed"] != hashes["skipped"]


def test_a_gradient_spike_is_skipped_where_asked(outcome) -> None:
    ranks, folder = outcome("spike")
    assert [rank.rc for rank in ranks] == [0, 0], [rank.err for rank in ranks]
    assert re.search(
        r"iteration 5: the gradient norm of .* times the median .* of the last 4 steps "
        r"\(--grad-norm-spike-factor 100\) - skipped, 1 so far", ranks[0].err
    )  # fmt: skip
    assert [r.skipped_iterations for r in steps(folder)] == [0, 0, 0, 0, 1, 0]


def test_a_flipped_bit_of_one_copy_ends_all_before_it_is_saved(outcome) -> None:
    ranks, folder = outcome("drift")
    assert [rank.rc for rank in ranks] == [6, 6], [rank.err for rank in ranks]
    (line,) = reports(ranks)
    # flipped at the begin of iteration 3; --check-replicas 2 looks after 2 and 4, before the save
    assert line.startswith("FATAL[6]  step=4: iteration 4: the copies of blocks.0.mlp.up.weight")
    assert "ranks 0, 1 of dp differ" in line
    assert not list(folder.glob("iter_*"))


def test_fp16_that_never_stops_overflowing_ends_with_what_overflows(outcome) -> None:
    ranks, folder = outcome("fp16")
    assert [rank.rc for rank in ranks] == [7, 7], [rank.err for rank in ranks]
    (line,) = reports(ranks)
    assert "iteration 3: 3 steps in a row overflowed in fp16, now at loss scale 1e+09" in line
    assert re.search(r"the gradient of [\w.]+ on rank 1, from samples \d+, \d+, is the first", line)
    assert "run again from the same weights it is the same" in line and "--bf16" in line
    records = steps(folder)
    assert [r.skipped_iterations for r in records] == [1, 1, 1]
    assert len({r.learning_rate for r in records}) == 1 and records[-1].samples == 24


def test_weights_that_are_not_finite_are_not_saved_and_the_older_checkpoint_stays(outcome) -> None:
    ranks, folder = outcome("poisoned")
    assert [rank.rc for rank in ranks] == [7, 7], "guards were off, the save looks all the same"
    (line,) = reports(ranks)
    assert "iteration 6 is not kept: " in line and "hold values that are not finite" in line
    assert [path.name for path in folder.glob("iter_*")] == ["iter_0000003"]
