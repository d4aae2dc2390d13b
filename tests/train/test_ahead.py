"""A run that hears of each step one step late ends as one that waits: same weights, words, exit code."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.train import ahead, loop
from megatron_lite.train.readback import HostCopy
from megatron_lite.train.step import begin_step
from tests.support.spawn import spawn
from tests.train.runs import LONG, MLiteFault, argv, curve, records, run_main, steps

EIGHT = ["--train-iters", "8", "--eval-interval", "4", "--eval-iters", "1", "--save-interval", "5",
         "--log-interval", "2", "--spike-window", "3"]  # fmt: skip
TIMES = re.compile(
    r"(?<=time per iteration \(ms\): )[\d.]+|(?<=samples per second: )[\d.]+|(?<=\(tgs\): )[\d.]+"
    r"|(?<=TFLOPs: )[\d.]+|(?<=datetime: ).*| in [\d.]+ s\b.*|\S+/run\b\S*"
)
LATE = ("cuda", "cpu")
Told = dict[str, Any]


def told(words: list[str], folder: Path, fault: str) -> Told:
    """All that a run leaves behind which does not depend on the time it took."""
    os.environ.pop("MLITE_FAULT", None)
    if fault:
        with MLiteFault(fault):
            done = run_main(*argv(*words, "--save", str(folder)))
    else:
        done = run_main(*argv(*words, "--save", str(folder)))
    kinds = [(type(one).__name__, one.iteration) for one in records(folder)]
    saved = {p.name for p in folder.glob("iter_*")}
    return {
        "rc": done.rc, "err": TIMES.sub("", done.err),
        "out": TIMES.sub("", done.out.partition("training ...")[2]),
        "waits": [line for line in done.out.splitlines() if "waits for the device" in line],
        "curve": curve(steps(folder)), "kinds": kinds, "saved": saved,
    }  # fmt: skip


def ci(value: str) -> Any:
    """A case for which CI is early enough."""
    return pytest.param(value, marks=pytest.mark.ci)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: list[str]) -> Callable[..., Told]:
    """What a run tells when it waits; it must tell the same when it runs ahead."""

    def compare(*words: str, fault: str = "", late: bool = True) -> Told:
        heard = []

        def hear(*arguments: Any) -> Any:
            heard.append(ahead.hear(*arguments))
            return heard[-1]

        waited = told([*data, *EIGHT, *words], tmp_path / "waits" / "run", fault)
        monkeypatch.setattr(ahead, "BESIDE_THE_HOST", LATE)
        monkeypatch.setattr(loop, "hear", hear)
        found = told([*data, *EIGHT, *words], tmp_path / "late" / "run", fault)
        assert bool(heard) == late, "no step was heard late: nothing is compared"
        for name, value in waited.items():
            assert found[name] == value, name
        return found

    return compare


@pytest.mark.parametrize(
    "words",
    [
        "",
        ci("--optimizer sgd --check-replicas 4 --manual-gc --manual-gc-interval 2"),
        ci(
            "--log-params-norm --log-num-zeros-in-grad --rampup-batch-size 4 4 8 --global-batch-size 8"
        ),
        ci("--bf16 --lr-warmup-iters 3 --exit-interval 7"),
        ci("--optimizer sophiag --sophia-hessian-interval 3 --log-params-norm"),
    ],
)
def test_a_run_without_faults(both, words: str) -> None:
    assert both(*words.split())["rc"] == 0


CASES: dict[str, tuple[str, str, int, str]] = {
    "stop": ("step3.loss:0:nan-again", "", 7, "iteration 3: the loss is nan"),
    "a passing fault stops": ("step3.loss:0:nan", "", 7, "a passing fault of the machine"),
    "the second step": ("step2.loss:0:nan-again", "", 7, "step=1: iteration 2: the loss is nan"),
    "the last step": ("step8.loss:0:nan-again", "", 7, "step=7: iteration 8: the loss is nan"),
    "before a save": ("step5.loss:0:nan-again", "", 7, "step=4: iteration 5: the loss is nan"),
    "skip": ("step3.loss:0:nan-again", "--on-non-finite skip", 0, "skipped, 1 so far"),
    "healed": ("step3.loss:0:nan", "--on-non-finite skip", 0, "the second result is taken"),
    "a gradient, healed": ("step7.gradient:0:nan=blocks.1.mlp.up.weight", "--on-non-finite skip",
                           0, "the gradient of blocks.1.mlp.up.weight, summed over rank 0"),
    "without replay": ("step3.gradient:0:nan=blocks.1.mlp.up.weight", "--rerun-mode disabled",
                       7, "the gradient of blocks.1.mlp.up.weight, summed over rank 0"),
    "skip by sgd": ("step3.loss:0:nan-again", "--on-non-finite skip --optimizer sgd", 0, "skipped"),
    "unguarded": ("step3.gradient:0:nan", "--no-check-for-nan-in-loss-and-grad --save-interval 99",
                  7, "hold values that are not finite"),
    "a spike that warns": ("step7.gradient:0:spike-again", "", 0, "iteration 7: the gradient norm"),
    "a loss spike that warns": ("step6.loss:0:spike-again", "--loss-spike-factor 3", 0,
                                "iteration 6: the loss of"),
    "the next step fails": ("step7.forward:0:error3", "", 3, "FATAL[3] rank=0 step=6"),
    "the next step begins with a failure": ("step7:0:error3", "", 3, "FATAL[3] rank=0 step=6"),
    "a bug in the next step": ("step3.backward:0:bug", "", 70, "FATAL[70] rank=0 step=2"),
}  # fmt: skip


EVERY_TIME = ("stop", "skip", "a gradient, healed", "the next step fails")


@pytest.mark.parametrize("case", [name if name in EVERY_TIME else ci(name) for name in CASES])
def test_a_bad_step_ends_as_in_a_run_that_waits(both, case: str) -> None:
    fault, words, rc, said = CASES[case]
    found = both(*words.split(), fault=fault)
    assert found["rc"] == rc and said in found["err"], found["err"]


def test_a_device_that_fails_the_next_step_hides_no_failure_by_the_record_before(
    monkeypatch: pytest.MonkeyPatch, data: list[str], folder: Path
) -> None:
    def broken(copy: HostCopy) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ahead, "BESIDE_THE_HOST", LATE)
    monkeypatch.setattr(HostCopy, "is_there", property(broken))
    found = told([*data, *EIGHT], folder, "step7.forward:0:error3")
    assert found["rc"] == 3 and "FATAL[3] rank=0 step=6" in found["err"], found["err"]


WAITS = {
    "--fp16": ("--fp16 --initial-loss-scale 65536", "", 0),
    "--on-spike skip": ("--on-spike skip", "step7.gradient:0:spike-again", 0),
    "--on-spike stop": ("--on-spike stop", "step7.gradient:0:spike-again", 7),
    "--rerun-mode validate_results": ("--rerun-mode validate_results --loss-spike-factor 3",
                                      "step7.loss:0:spike", 0),
    "--timing-log-level 1": ("--timing-log-level 1", "", 0),
    "--profile-timeline": ("--profile-timeline --profile-step-start 3 --profile-step-end 5", "", 0),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.parametrize("reason", WAITS)
def test_what_must_be_judged_before_the_update_waits_and_says_so_once(
    reason: str, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, fault, rc = WAITS[reason]
    words = [*data, *EIGHT, *flags.split()]
    waited = told(words, tmp_path / "waits" / "run", fault)
    monkeypatch.setattr(ahead, "BESIDE_THE_HOST", LATE)
    monkeypatch.setattr(loop, "hear", None)
    found = told(words, tmp_path / "late" / "run", fault)
    assert len(found["waits"]) == 1 and reason in found["waits"][0] and not waited["waits"]
    for name in ("rc", "err", "curve", "kinds", "saved"):
        assert found[name] == waited[name]
    assert found["rc"] == rc


def test_a_step_in_which_nothing_counts(both, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncounted(run, batches, vote):
        if run.progress.step == 2:
            batches = [replace(b, loss_mask=b.loss_mask * 0) for b in batches]
        return begin_step(run, batches, vote)

    monkeypatch.setattr(loop, "begin_step", uncounted)
    found = both()
    assert found["rc"] == 0
    assert "iteration 3: nothing in the samples 8 to 11 counts" in found["err"]


def test_a_signal_stops_after_the_same_step(both, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in step 4: the vote of step 5 knows of it, and what was begun of step 6 is gone."""

    def signalled(run, batches, vote):
        if run.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin_step(run, batches, vote)

    monkeypatch.setattr(loop, "begin_step", signalled)
    found = both(*LONG, "--save-interval", "99", "--eval-interval", "99")
    assert found["rc"] == 75 and found["saved"] == {"iter_0000005"}


def late_ranks(
    rank: int, ranks: int, words: list[str], folder: str, fault: str, late: bool
) -> Told:
    """The same on ranks that join by themselves."""
    ahead.BESIDE_THE_HOST = LATE if late else ("cuda",)
    return told(words, Path(folder) / str(late) / "run", fault)


LAYOUTS = {
    "dp2, sharded": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "tp2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2",
}


@pytest.mark.ci
@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ("dp2, sharded", "step3.loss:1:nan"),
        ("tp2", "step3.gradient:1:nan-again"),
        ("pp2", "step3.loss:1:nan-again"),
    ],
)
def test_ranks_hear_together(layout, fault, data: list[str], tmp_path: Path) -> None:
    words = [*data, *EIGHT, *LAYOUTS[layout].split(), "--on-non-finite", "skip", "--micro-batch-size",
             "1", "--log-straggler"]  # fmt: skip
    waited, found = (
        spawn(late_ranks, 2, words, str(tmp_path), fault, late, join=False)
        for late in (False, True)
    )
    for one, other in zip(waited, found, strict=True):
        assert one["rc"] == 0
        for name in ("rc", "err", "curve", "saved"):
            assert other[name] == one[name]


# --- nothing waits


WAITING = {
    getattr(Tensor, name): name
    for name in ("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__",
                 "__index__")
}  # fmt: skip


class Refusing:
    """Refuses, during a step, what would wait for the device, but in HostCopy.read().

    copies: (step in which it was begun, whether that waits for nothing) by copy; read: (step in which
    it was begun, step in which it was read).
    """

    def __init__(self) -> None:
        self.step, self.reading, self.steps_watched = 0, False, 0
        self.begun: dict[int, int] = {}
        self.blocking: list[bool] = []
        self.read: list[tuple[int, int]] = []
        functions, operators = self, self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                assert functions.reading or func not in WAITING, f"{WAITING[func]} waits"
                return func(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                scalar = func is torch.ops.aten._local_scalar_dense.default
                assert operators.reading or not scalar, "a scalar is read"
                return func(*args, **(kwargs or {}))

        self.modes = (Functions, Operators)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    """Around each step of a run but those that are heard at once: the first and the last."""
    watch = Refusing()
    step, begin, read = loop._step, HostCopy.__init__, HostCopy.read

    def watched_step(session):
        watch.step = session.progress.step + 1
        if watch.step in (1, session.reach.length.iterations):
            return step(session)
        watch.steps_watched += 1
        with watch.modes[0](), watch.modes[1]():
            return step(session)

    def watched_begin(copy, numbers):
        before = Tensor.copy_

        def copy_(to, source, non_blocking=False):
            watch.blocking.append(not non_blocking)
            return before(to, source, non_blocking=non_blocking)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "copy_", copy_)
            begin(copy, numbers)
        watch.begun[id(copy)] = watch.step

    def watched_read(copy):
        watch.read.append((watch.begun[id(copy)], watch.step))
        watch.reading = True
        try:
            return read(copy)
        finally:
            watch.reading = False

    monkeypatch.setattr(loop, "_step", watched_step)
    monkeypatch.setattr(HostCopy, "__init__", watched_begin)
    monkeypatch.setattr(HostCopy, "read", watched_read)
    monkeypatch.setattr(ahead, "BESIDE_THE_HOST", LATE)
    return watch


def test_ten_steps_read_nothing_but_copies_of_steps_before(
    refusing: Refusing, data: list[str], folder: Path
) -> None:
    words = ["--train-iters", "12", "--eval-interval", "99", "--log-interval", "3", "--log-params-norm",
             "--log-num-zeros-in-grad", "--hidden-dropout", "0.1", "--attention-dropout", "0.1",
             "--reset-attention-mask", "--eod-mask-loss"]  # fmt: skip
    done = run_main(*argv(*data, *words, "--save", str(folder)))
    assert done.rc == 0, done.err
    assert refusing.steps_watched == 10 and len(steps(folder)) == 12
    late = [(begun, read) for begun, read in refusing.read if begun not in (1, 12)]
    assert {begun for begun, _ in late} == set(range(2, 12))
    assert all(read == begun + 1 for begun, read in late), "only of a step that is finished"
    assert refusing.blocking and not any(refusing.blocking)


def test_what_waits_is_caught(refusing: Refusing, monkeypatch, data: list[str]) -> None:
    def curious(run, batches, vote):
        begun = begin_step(run, batches, vote)
        print(float(begun.attempt.loss))
        return begun

    monkeypatch.setattr(loop, "begin_step", curious)
    done = run_main(*argv(*data))
    assert done.rc == 70 and "__float__ waits" in done.err
