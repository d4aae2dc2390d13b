"""What a device is told before it starts, how long its groups wait, and how its failures are named."""

from __future__ import annotations

import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.cli import pretrain_gpt
from megatron_lite.config.errors import DeviceFault, DistributedError, OutOfMemory
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous import launch
from megatron_lite.rendezvous.launch import Launch, gather_ranks, set_device_environment
from megatron_lite.train import program, session
from megatron_lite.train.ending.failures import Failures
from tests.support.launch import TINY, free_port
from tests.support.sizes import with_flags
from tests.support.spawn import spawn

TIED = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def config_of(*words: str):  # type: ignore[no-untyped-def]
    return parse(with_flags(TINY, *words)).config


def timeouts(rank: int, ranks: int) -> dict[str, float]:
    grid = draw_up(config_of(*TIED), ranks).grid
    seconds = timedelta(seconds=77)
    ctx = ParallelContext.from_grid(grid, rank, torch.device("cpu"), timeout=seconds)
    axes = (ctx.tp, ctx.dp, ctx.pp, ctx.model, ctx.tied)
    return {
        axis.name: axis.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        for axis in axes
        if axis.group is not None
    }


@pytest.mark.ci
def test_every_group_has_the_timeout_that_was_asked_for() -> None:
    for found in spawn(timeouts, 4):
        assert found == dict.fromkeys(("tp", "pp", "tp-pp", "tied"), 77.0)


def test_a_run_hands_its_timeout_to_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Stop(Exception):
        pass

    def from_grid(*_: object, timeout: timedelta) -> None:
        asked.append(timeout)
        raise Stop

    monkeypatch.setattr(session.ParallelContext, "from_grid", from_grid)
    config = config_of("--distributed-timeout-minutes", "3")
    failures = Failures(0, folder=None, debug=False)
    with pytest.raises(Stop):
        session.open_session(
            session.Start(config, Launch(0, 2), session.TokenizerFacts(61, None), torch.device("cpu"), [],
                          failures, session.NoFaults(), None, None)  # type: ignore[arg-type]
        )  # fmt: skip
    assert asked == [timedelta(minutes=3)]


def test_the_environment_is_set_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device makes the context, whose number of queues is then fixed."""
    monkeypatch.delenv(QUEUES, raising=False)
    seen: list[tuple[str, str | None]] = []

    def note(name: str, answer: object) -> object:
        return lambda *_: (seen.append((name, os.environ.get(QUEUES))), answer)[1]

    for name, answer in (("is_available", True), ("device_count", 4), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, note(name, answer))

    class Stop(Exception):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    monkeypatch.setattr(program, "gather_ranks", stop)
    monkeypatch.setattr(program, "cpu_notices", lambda *_: [])
    monkeypatch.setattr(program, "peak_notices", lambda *_: [])
    notices: list[str] = []
    failures = Failures(1, folder=None, debug=False)
    here = Launch(1, 4, local_rank=1)
    with pytest.raises(Stop):
        program.train(config_of(*TIED), here, stop, notices, failures)
    assert [name for name, _ in seen][-1] == "set_device" and {value for _, value in seen} == {"1"}
    assert failures.device == torch.device("cuda", 1)
    assert any(f"{QUEUES} set to 1" in notice for notice in notices)


@pytest.mark.parametrize(
    ("before", "tp", "backend", "after"),
    [
        (None, 2, None, "1"), ("32", 2, None, "32"), ("1", 2, None, "1"), ("", 2, None, ""),
        (None, 1, None, None), (None, 2, "gloo", None),
    ],
)  # fmt: skip
def test_the_users_number_of_queues_stays(
    monkeypatch: pytest.MonkeyPatch,
    before: str | None,
    tp: int,
    backend: str | None,
    after: str | None,
) -> None:
    monkeypatch.delenv(QUEUES, raising=False)
    if before is not None:
        monkeypatch.setenv(QUEUES, before)
    parallel = ParallelConfig(tensor_model_parallel_size=tp, distributed_backend=backend)  # type: ignore[arg-type]
    notices = set_device_environment(parallel, use_cpu=False)
    assert os.environ.get(QUEUES) == after
    assert bool(notices) == (after not in (before, None) or before in ("32", ""))
    assert set_device_environment(parallel, use_cpu=True) == []


def test_too_late_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(QUEUES, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    (said,) = set_device_environment(ParallelConfig(tensor_model_parallel_size=2), use_cpu=False)
    assert "CUDA has started" in said and QUEUES not in os.environ


def test_what_nccl_left_of_an_earlier_attempt_is_gone_before_anybody_goes_on() -> None:
    port = free_port()
    store = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    store.set("exception_dump", "rank 1 failed")
    parallel = ParallelConfig(distributed_timeout_minutes=0.5)

    def join(rank: int) -> bool:
        here = Launch(
            rank, 2, rank, 2, host="127.0.0.1", port=port, agent_holds_store=True, attempt=1
        )
        world = gather_ranks(here, parallel, end=lambda verdict: None)
        gone = not store.check(["exception_dump"])
        world.presence.leave()
        return gone

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(join, (1, 0))) == [True, True]
    assert launch._NCCL_FAILED == "exception_dump"


def reported(error: BaseException, **given: object) -> tuple[str, int]:
    """The FATAL line and exit code of a rank that fails so."""
    failures = Failures(3, folder=None, debug=False)
    for name, value in given.items():
        setattr(failures, name, value)
    known = failures._in_our_words(error)
    return str(known), failures.report(error)


OOM = "CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
NO_ROOM = {
    "torch": torch.OutOfMemoryError(OOM),
    "the driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "NCCL": torch.distributed.DistBackendError("NCCL error in: x.cpp:1, Cuda failure 2 'out of memory'"),
    "the host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "Python": MemoryError(),
    "the system": OSError(12, "Cannot allocate memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ROOM)
def test_no_room_is_no_bug_of_ours(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, code = reported(NO_ROOM[name], device=torch.device("cuda", 1))
    said = capsys.readouterr().err
    assert code == OutOfMemory.exit_code == 2 and "rank 3 is out of memory of cuda:1" in text
    assert "bug of ours" not in said and "Traceback" not in said and "--micro-batch-size" in said


def test_no_room_stands_beside_the_plan_with_the_cheapest_change() -> None:
    config = config_of("--micro-batch-size", "2", "--global-batch-size", "4")
    plan = functools.partial(pretrain_gpt._beside_the_plan, config, 2, 1)
    text, _ = reported(torch.OutOfMemoryError(OOM.replace("2.00 MiB", "1.00 KiB")), plan=plan)
    assert "planned 0.00 GiB (" in text and "optimizer" in text
    assert "cheapest change by the plan: --use-distributed-optimizer frees" in text
    flags = ["--num-layers", "24", "--hidden-size", "2048", "--num-attention-heads", "16",
             "--seq-length", "2048", "--max-position-embeddings", "2048"]  # fmt: skip
    large = config_of(*flags, "--micro-batch-size", "8", "--global-batch-size", "16",
                      "--use-distributed-optimizer")  # fmt: skip
    plan = functools.partial(pretrain_gpt._beside_the_plan, large, 2, 0, on_gpu=False)
    assert "by the plan: --zero-stage 2 frees" in plan(1e9)
    parallel = dataclasses.replace(large.parallel, zero_stage=2)
    large = dataclasses.replace(large, parallel=parallel)
    plan = functools.partial(pretrain_gpt._beside_the_plan, large, 2, 0, on_gpu=False)
    assert "by the plan: --micro-batch-size 4 frees" in plan(1e9)
    assert "no single change frees enough" in plan(1e15)
    # 1 MB was missing, but what the plan needs is far above what there is: half of it frees too little
    gib = float(plan(0.0).split("planned ")[1].split()[0])
    assert "--micro-batch-size 4 frees" in plan(1e6, room=gib * 2**30 * 1.1)
    # parts of a layer where these are enough, whole layers where they are not
    assert "--recompute-modules core_attn mlp frees" in plan(1e6, room=gib * 2**30 * 0.3)
    assert "--recompute-granularity full" in plan(1e6, room=gib * 2**30 * 0.15)
    assert f"of {gib * 0.01:.2f} GiB - no single change" in plan(1e6, room=gib * 2**30 * 0.01)
    smaller = dataclasses.replace(large, train=dataclasses.replace(large.train, micro_batch_size=1))
    plan = functools.partial(pretrain_gpt._beside_the_plan, smaller, 2, 0, on_gpu=False)
    assert "--recompute-granularity selective" in plan(0.0)


FAULT = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_a_failing_device_has_a_class_of_its_own(
    kind: type[RuntimeError], capsys: pytest.CaptureFixture[str]
) -> None:
    text, code = reported(kind(f"{FAULT}\nCompile with"), device=torch.device("cuda", 1))
    assert code == DeviceFault.exit_code == 6
    assert text.startswith(f"rank 3: cuda:1 failed and no rank is missing: {FAULT} - look at")
    assert "bug of ours" not in capsys.readouterr().err


def test_a_device_that_fails_after_a_rank_was_lost_names_that_rank() -> None:
    lost = SimpleNamespace(
        step=4, explain=lambda what: "rank 1 was lost", leave=lambda line=None: None
    )
    text, code = reported(RuntimeError(FAULT), presence=lost)
    assert (text, code) == ("rank 1 was lost", DistributedError.exit_code)
