"""State in host memory: the same bits as beside the weights, whatever is updated at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lite.blueprint.optimizers import OPTIMIZERS
from megatron_lite.engines import offload
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.axes import BF16, HOST, PP, TP, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

FORMS = [
    pytest.param({}, id="fp32", marks=pytest.mark.ci),
    pytest.param({BF16: True}, id="bf16"),
]


def trained(changes, rank=0, ranks=1, steps=3):
    config = tiny_config(model__num_layers=2, **changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    losses = []
    for step in range(steps):
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step)
        result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
        losses.append(float(result.loss))
    return run, losses


def bits(run):
    kept = [*run.engine.weights(owned=False), *run.engine.state(owned=False)]
    return {(piece.name, piece.offset): piece.data.clone() for piece in kept}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "apex-adam"])
@pytest.mark.parametrize("form", FORMS)
def test_every_optimizer_trains_to_the_same_bits(optimizer, form, monkeypatch) -> None:
    changes = {"optim__optimizer": optimizer} | form
    beside, losses = trained(changes)
    monkeypatch.setattr(offload, "HOST_PORTION", 1 << 10)
    for share in (1.0, 0.5):
        there = {HOST: True, "parallel__optimizer_offload_fraction": share}
        host, again = trained(changes | there)
        assert again == losses
        assert same(bits(host), bits(beside))


LAYOUTS = [
    {TP: 2, ZERO: 1},
    {TP: 2, ZERO: 1, BF16: True, "parallel__overlap_param_gather": True},
    {TP: 2, "optim__optimizer": "adafactor", "optim__adafactor_scale_parameter": True},
    {TP: 2, ZERO: 1, BF16: True, "optim__optimizer": "muon"},
    {PP: 2, ZERO: 1, BF16: True, "optim__lisa_layers": 1, "optim__lisa_interval": 1},
    {PP: 2, TP: 2, "precision__fp16": True},
    {ZERO: 2, BF16: True},
    {ZERO: 2, TP: 2, "optim__optimizer": "galore"},
    {ZERO: 3, BF16: True},
    {ZERO: 3, TP: 2, "optim__optimizer": "adam8bit", "optim__adam8bit_block_size": 64},
    {ZERO: 3, PP: 2, BF16: True, "optim__optimizer": "muon"},
    {ZERO: 3, BF16: True, "optim__optimizer": "sophiag", "optim__sophia_hessian_interval": 2},
]


def the_same_in(rank, ranks, layouts):
    """Of each layout, whether a run with its state on the host has the bits of one without."""
    offload.HOST_PORTION = 1 << 10
    found = []
    for changes in layouts:
        beside, losses = trained(changes, rank, ranks)
        for share in (1.0, 0.4):
            there = {HOST: True, "parallel__optimizer_offload_fraction": share}
            host, again = trained(changes | there, rank, ranks)
            found.append(losses == again and same(bits(host), bits(beside)))
    return found


def test_layouts_train_to_the_same_bits() -> None:
    for found in spawn(the_same_in, 4, [LAYOUTS[1], LAYOUTS[8]]):
        assert all(found), found


@pytest.mark.slow
def test_all_layouts_train_to_the_same_bits() -> None:
    for found in spawn(the_same_in, 4, LAYOUTS):
        assert all(found), found


class LateLane:
    """Copies that are made when they are waited for, as a device may make them; those before them, too."""

    def __init__(self, device) -> None:
        self.waiting = []

    def follow(self) -> None:
        """They are late in any case."""

    def copy(self, pairs):
        self.waiting.append(list(pairs))
        return Late(self, self.waiting[-1])

    def deliver(self, last=None) -> None:
        while self.waiting:
            made = self.waiting.pop(0)
            for target, source in made:
                target.copy_(source)
            if made is last:
                return

    def join(self) -> None:
        self.deliver()


class Late:
    def __init__(self, lane, copies) -> None:
        self.lane, self.copies = lane, copies

    def synchronize(self) -> None:
        if any(made is self.copies for made in self.lane.waiting):
            self.lane.deliver(self.copies)


def test_no_copy_is_used_before_it_is_waited_for(monkeypatch) -> None:
    changes = {BF16: True, HOST: True}
    monkeypatch.setattr(offload, "HOST_PORTION", 1 << 10)
    at_once, losses = trained(changes)
    monkeypatch.setattr(offload, "_Lane", LateLane)
    late, again = trained(changes)
    assert losses == again
    assert same(bits(late), bits(at_once))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumes_one_without_and_back(tmp_path, form) -> None:
    places = [({}, {HOST: True}), ({HOST: True}, {})]
    for number, (first, then) in enumerate(places):
        saved, again = (str(tmp_path / f"{number}-{name}") for name in ("saved", "again"))
        went_on = train_and_save(0, 1, form | first, saved, 2, 2)
        assert load_and_save_again(0, 1, form | then, saved, again, 2) == went_on
        assert whole(Path(saved)) == whole(Path(again))
    assert whole(tmp_path / "0-saved") == whole(tmp_path / "1-saved")
