"""Matrices that tp cuts, updated whole by one of its ranks: the same in every layout, saved in all of them."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.ownership import Rows
from megatron_lite.blueprint.turns import ALWAYS
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.engines.held import Held
from megatron_lite.engines.matrices import CutMatrices
from megatron_lite.engines.offload import HostUpdate
from megatron_lite.optim.groups import Groups, Rates
from megatron_lite.optim.shares import TpShare
from megatron_lite.parallel.shard import MASTER, ParameterPiece
from megatron_lite.planner.memory import PlanInputs, memory
from megatron_lite.rehearsal.rehearse import stand_in
from tests.support.axes import BF16, PP, SP, TP, ZERO
from tests.support.checkpoints import load_and_save_again, train_and_save, whole
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, tiny_config

GALORE = {
    "optim__optimizer": "galore", "optim__galore_rank": 4, "optim__galore_update_proj_gap": 3,
}  # fmt: skip
MUON = {"optim__optimizer": "muon", "model__num_layers": 2}
MATRICES = ("attention.q", "attention.k", "attention.v", "attention.output", "mlp.up", "mlp.down")


def tensors(config, ranks, *, owned):
    """Of each rank: the optimizer's named slices."""
    blueprint = draw(config, ranks)
    found = []
    for rank in range(ranks):
        with stand_in(config, blueprint, rank) as actor:
            found.append(list(actor.run.engine.state(owned=owned)))
    return found


@pytest.mark.parametrize("changes", [{TP: 2}, {TP: 2, ZERO: 1, BF16: True}, {TP: 4, ZERO: 1}])
def test_each_matrix_has_one_owner_and_owners_have_equal_work(changes) -> None:
    ranks = 4
    held = tensors(tiny_config(**MUON | changes), ranks, owned=False)
    owners = {
        f"blocks.{n}.{name}.weight": [
            rank for rank, state in enumerate(held)
            if any(s.name == f"momentum.blocks.{n}.{name}.weight" for s in state)
        ]
        for n in range(2) for name in MATRICES
    }  # fmt: skip
    copies = 1 if ZERO in changes else ranks // changes[TP]
    assert all(len(found) == copies for found in owners.values()), owners
    work = [
        sum(math.prod(s.shape) * min(s.shape) for s in state if s.name.startswith("momentum."))
        for state in held
    ]
    assert max(work) < 1.6 * sum(work) / ranks  # 4 of 32 x 32, 2 of 128 x 32 in each layer
    for state in held:
        whole_ones = [s for s in state if s.name.startswith("momentum.")]
        assert all(tuple(s.data.shape) == s.shape for s in whole_ones)


def test_states_and_masters_tile_every_tensor_once() -> None:
    config = tiny_config(**MUON | {TP: 2, PP: 2, ZERO: 1, BF16: True})
    found: dict[str, int] = {}
    shapes = {}
    for state in tensors(config, 8, owned=True):
        for piece in state:
            found[piece.name] = found.get(piece.name, 0) + piece.data.numel()
            shapes[piece.name] = piece.shape
    assert found == {name: math.prod(shape) for name, shape in shapes.items()}
    assert shapes[f"{MASTER}blocks.1.mlp.up.weight"] == (128, 32)
    assert (
        "exp_avg.embedding.tokens.weight" in shapes and "momentum.final_norm.weight" not in shapes
    )


@pytest.mark.parametrize("more", [{}, {BF16: True}, {ZERO: 1}])
def test_the_plan_counts_whole_masters_and_momentum(more) -> None:
    """In fp32, too, where an owner has the weights of others' shards once more."""
    config = tiny_config(**MUON | {TP: 2} | more)
    blueprint = draw(config, 4)
    asked = PlanInputs(
        config.parallel, config.precision, config.train.micro_batch_size, on_gpu=False
    )
    (planned,) = memory(blueprint, asked)
    held = tensors(config, 4, owned=False)
    momentum, states, masters = (
        sum(s.data.nbytes for state in held for s in state if s.name.startswith(kind))
        for kind in ("momentum.", ("momentum.", "exp_avg"), MASTER)
    )
    assert planned.kinds["moments"] * 4 == pytest.approx(
        states, rel=2e-2
    )  # padding of the vocabulary
    if BF16 in more:
        assert planned.kinds["masters"] * 4 == pytest.approx(masters, rel=2e-2)
    else:
        assert masters == 0 and planned.kinds["masters"] * 4 == momentum


CUT = [("a", (4, 6), 0), ("b", (6, 4), 1), ("c", (8, 2), 0), ("d", (2, 4), 1), ("e", (4, 4), 0)]


class Doubles:
    """The master becomes the gradient's double."""

    def update(self, parameters, gradients, states, **rest) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.copy_(2 * gradient)


def gathered_and_spread(rank, ranks):
    """What this rank owns, whether it saw whole gradients, and whether its shards are right afterwards."""
    ctx = context(draw(tiny_config(**{TP: ranks}), ranks), rank)
    groups = Groups(OptimConfig(optimizer="muon"), _rules={"muon": Doubles()})
    shards, whole_ones = [], {}
    for name, shape, dim in CUT:
        whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        piece = ParameterPiece(
            Tensor(name, shape, "weight", cuts=(("tp", dim),)), 0, 0, shape, (0, 0)
        )
        gradient = whole.chunk(ranks, dim)[rank]
        weight = torch.zeros_like(gradient, dtype=torch.bfloat16)
        shards.append(
            Held(
                None,
                piece,
                Rows(0, len(weight)),
                slice(None),
                weight,
                gradient,
                weight,
                TpShare(shape, dim),
                ALWAYS,
            )
        )
        whole_ones[name] = whole
    host = HostUpdate(ctx, groups, share=0.0, span=lambda name: nullcontext())
    cut = CutMatrices(shards, ctx, groups, host)
    cut.update(Rates(0.0, 0.0), steps=0, taken=None)
    right = all(torch.equal(own.master, 2 * whole_ones[own.spec.name]) for own in cut.owned)
    spread = all(torch.equal(held.weight, (2 * held.gradient).bfloat16()) for held in shards)
    for held in shards:
        held.weight.add_(1)
    cut.follow(masters=True)
    kept = all(torch.equal(own.master, 2 * whole_ones[own.spec.name]) for own in cut.owned)
    cut.follow(masters=False)
    followed = all(torch.equal(o.master, 2 * whole_ones[o.spec.name] + 1) for o in cut.owned)
    return [own.spec.name for own in cut.owned], right, spread, kept, followed


def test_owners_see_whole_gradients_and_all_ranks_get_their_shards() -> None:
    results = spawn(gathered_and_spread, 2)
    assert sorted(name for mine, *_ in results for name in mine) == [name for name, _, _ in CUT]
    assert all(all(held) for _, *held in results), results


@pytest.mark.ci
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param((2, GALORE | {TP: 2}), (2, GALORE | {PP: 2}), id="galore, tp to pp"),
        pytest.param((4, {TP: 2, ZERO: 1, SP: True}), (1, {}), id="tp and dp to one"),
        pytest.param((1, {BF16: True}), (2, {TP: 2, BF16: True}), id="one to tp, bf16",
                     marks=pytest.mark.slow),
        pytest.param((4, {TP: 2, PP: 2, BF16: True}), (2, {ZERO: 1, BF16: True}), id="tp and pp to dp, bf16",
                     marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_runs_resume_in_any_layout_and_bit_for_bit_in_their_own(tmp_path, saved, loaded) -> None:
    of_muon = "optim__optimizer" not in saved[1]
    exact = {"optim__muon_fp32_matmul_prec": "highest"} if of_muon else {}
    folder, other, same = (str(tmp_path / name) for name in ("saved", "other", "same"))
    (ranks, changes), (others, elsewhere) = saved, loaded
    went_on = spawn(train_and_save, ranks, MUON | exact | changes, folder, 2, 2)
    resumed = spawn(load_and_save_again, ranks, MUON | exact | changes, folder, same, 2)
    assert resumed == went_on
    moved = spawn(load_and_save_again, others, MUON | exact | elsewhere, folder, other, 2)
    within = 1e-3 if BF16 in changes else 1e-6
    assert moved[0] == pytest.approx(went_on[-1], rel=within)
    assert whole(tmp_path / "saved") == whole(tmp_path / "other") == whole(tmp_path / "same")
    kept = "momentum" if of_muon else "low_exp_avg"
    assert {name.partition(".")[0] for name in whole(tmp_path / "saved")} >= {kept, "exp_avg"}
