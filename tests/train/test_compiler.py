"""A compiler that fails is heard: at the start from rank 0 for all, later from the rank it happens on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_lite.kernels.compiled import Compiler
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.telemetry.recorder import Recorder
from megatron_lite.train.measuring.log import Log
from megatron_lite.train.measuring.timing import RunTimers
from megatron_lite.train.measuring.waits import Waits
from megatron_lite.train.session import Talk, _tried
from tests.support.tiny import tiny_config


def tried(rank: int) -> Compiler:
    """What a rank compiles with after the start."""
    ctx = dataclasses.replace(ParallelContext.serial(), rank=rank)
    talk = Talk(ctx, Log(ctx), RunTimers(0), Recorder(), Waits(), None)
    return _tried(tiny_config(precision__torch_compile="on"), talk)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_after_the_start_is_told_by_the_rank_that_has_it(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no space left for kernels")

    monkeypatch.setattr(Compiler, "try_on", lambda self, device: None)
    compiler = tried(rank)
    compiler.backend = broken  # type: ignore[assignment]
    x = torch.linspace(-1.0, 1.0, 5)
    piece = compiler.piece("gelu", torch.nn.functional.gelu)
    for _ in range(2):
        assert torch.equal(piece(x), torch.nn.functional.gelu(x))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: rank {rank}: --torch-compile: ")
    assert "failed on gelu" in line and "no space left" in line and "--no-torch-compile" in line


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_at_the_start_is_told_once_for_all(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Compiler, "try_on", lambda self, device: "no C++ compiler")
    assert "no C++ compiler" in (tried(rank).failure or "")
    assert capsys.readouterr().err.count("WARNING: --torch-compile") == (rank == 0)
