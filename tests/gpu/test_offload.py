"""State in host memory beside a GPU: the numbers of a run without, and its memory (CPU twin: tests/engines)."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.engines import offload
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, HOST
from tests.support.tiny import draw, make_batches, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def trained(**changes):
    config = tiny_config(**changes)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, ParallelContext.serial("cuda"))
    losses = []
    for step in range(5):
        run.progress.step = step
        batches = make_batches(config, blueprint, 0, step)
        losses.append(train_step(run, batches, lr=1e-2, weight_decay=0.1).loss.item())
    return run, losses


@pytest.mark.parametrize("optimizer", ["adam", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("form", [{}, {BF16: True}], ids=["fp32", "bf16"])
def test_losses_equal_those_of_a_run_without(optimizer, form, monkeypatch) -> None:
    """Many portions, so that each buffer is used again while copies are on their way."""
    changes = {"optim__optimizer": optimizer, "optim__muon_fp32_matmul_prec": "highest", **form}
    _, beside = trained(**changes)
    monkeypatch.setattr(offload, "HOST_PORTION", 1 << 12)
    for share in (1.0, 0.5):
        there = {HOST: True, "parallel__optimizer_offload_fraction": share}
        run, losses = trained(**changes, **there)
        # the rules are the same, a device's rounding of roots and products is another
        assert losses == pytest.approx(beside, rel=2e-2 if form else 1e-4)
        assert not run.runs_ahead
        where = {piece.data.device.type for piece in run.engine.state(owned=False)}
        assert where == ({"cpu"} if share == 1.0 else {"cpu", "cuda"})


def test_memory_of_the_device_falls_by_masters_and_moments() -> None:
    kept = {}
    for host in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        run, _ = trained(**{HOST: host, BF16: True, "model__hidden_size": 512})
        kept[host] = torch.cuda.memory_allocated() - before
        size = run.blueprint.num_parameters
        del run
    assert kept[False] - kept[True] == pytest.approx(12 * size, rel=0.05)


def test_weights_are_there_when_the_next_forward_reads_them(monkeypatch) -> None:
    """The device is busy before and after: nothing waits for it but what must."""
    monkeypatch.setattr(offload, "HOST_PORTION", 1 << 12)
    _, losses = trained(**{HOST: True, BF16: True})
    lane = offload._Lane

    class Slow(lane):
        def copy(self, pairs):
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(3_000_000)  # some milliseconds before each copy
            return super().copy(pairs)

    monkeypatch.setattr(offload, "_Lane", Slow)
    _, late = trained(**{HOST: True, BF16: True})
    assert late == pytest.approx(losses, rel=1e-3)
