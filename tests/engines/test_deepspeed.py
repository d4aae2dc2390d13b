"""--engine deepspeed: DeepSpeed's own ZeRO trains what ours trains, and its state is ours by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_lite.config.rules.engines import ITS_OPTIMIZERS
from megatron_lite.config.rules.table import problems
from megatron_lite.engines.deepspeed.fragments import boxes
from megatron_lite.engines.deepspeed.written import STATE_NAMES
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import begin_step, evaluation_step, train_step
from tests.support.axes import BF16, FULL, HOST, PP, TP, ZERO
from tests.support.checkpoints import load_and_save_again, same_in_every_way, train_and_save
from tests.support.checkpoints import whole as saved_tensors
from tests.support.engines import counted
from tests.support.extras import needs
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

ENGINE, KEYS = "parallel__engine", "parallel__deepspeed_keys"
THEIRS = {ENGINE: "deepspeed"}
ON_HOST = {HOST: True}
APART = "zero_optimization.stage3_param_persistence_threshold=0"
"""Else all weights of a tiny model are whole between the layers, too."""
CASES: dict[str, dict[str, Any]] = {
    "0": {},
    "1": {ZERO: 1},
    "2": {ZERO: 2},
    "3": {ZERO: 3},
    "3-apart": {ZERO: 3, KEYS: [APART]},
    "3-recompute": {ZERO: 3, KEYS: [APART], **FULL},
    "0-sgd": {"optim__optimizer": "sgd"},
    "1-waits": {ZERO: 1, "parallel__overlap_grad_reduce": False},
    "1-host": {ZERO: 1, **ON_HOST},
    "2-host": {ZERO: 2, **ON_HOST},
    "3-host": {
        ZERO: 3,
        **ON_HOST,
        KEYS: [APART, 'zero_optimization.offload_param={"device": "cpu"}'],
    },
    "1-bf16": {ZERO: 1, BF16: True},
    "1-bf16-sums": {
        ZERO: 1,
        BF16: True,
        "parallel__accumulate_allreduce_grads_in_fp32": False,
    },
    "2-bf16": {ZERO: 2, BF16: True},
    "3-bf16": {ZERO: 3, BF16: True, KEYS: [APART]},
}


def steps_of(
    rank: int, ranks: int, cases: dict[str, dict[str, Any]], disturbed: bool = False
) -> dict[str, Any]:
    """Of each case loss and norm of four steps, then the gradients of a fifth, and the state, whole."""
    found = {}
    for name, changes in cases.items():
        config = tiny_config(train__global_batch_size=8, model__num_layers=2, **changes)
        blueprint = draw(config, ranks)
        run = assemble(config, blueprint, context(blueprint, rank))
        numbers = []
        for step in range(4):
            batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
            if step == 2 and disturbed:  # neither a skipped step nor an evaluation leaves a trace
                run.engine.discard(begin_step(run, batches[::-1]).attempt.norm)
                evaluation_step(run, batches)
            result = train_step(run, batches, lr=1e-2, weight_decay=0.1)
            numbers += [float(result.loss), float(result.update.grad_norm)]
        begin_step(run, make_batches(config, blueprint, run.ctx.dp.rank, 4))
        held = {
            "gradients": run.engine.gradients(owned=True),
            "state": run.engine.state(owned=True),
            "weights": run.engine.weights(owned=True),
        }
        found[name] = (
            numbers,
            {
                what: [
                    (p.name, p.shape, p.offset, p.data.float().numpy().copy())
                    for p in counted(pieces, run.ctx)
                ]
                for what, pieces in held.items()
            },
        )
    return found


def whole(ranks: list[Any], name: str, what: str) -> dict[str, torch.Tensor]:
    """Canonical tensors put together from all ranks' boxes, each element once."""
    made: dict[str, torch.Tensor] = {}
    for row in ranks:
        for tensor, shape, offset, data in row[name][1][what]:
            target = made.setdefault(tensor, torch.full(shape, torch.nan))
            at = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
            assert target[at].isnan().all(), f"{tensor}: a box of two ranks"
            target[at] = torch.from_numpy(data)
    assert not any(tensor.isnan().any() for tensor in made.values())
    return made


@pytest.fixture(scope="module")
def ours() -> list[Any]:
    """What our engine comes to, by rank and case; bf16 as fp32, which it rounds."""
    changes = {
        name: case | {ZERO: min(case.get(ZERO, 0), 1), KEYS: []} for name, case in CASES.items()
    }
    return spawn(steps_of, 2, changes)


@pytest.fixture(scope="module")
def theirs() -> list[Any]:
    """And theirs."""
    needs("deepspeed")
    return spawn(steps_of, 2, {name: case | THEIRS for name, case in CASES.items()}, deadline=400)


@pytest.mark.oracles
@pytest.mark.parametrize("name", CASES)
def test_losses_and_norms_equal_ours(ours, theirs, name) -> None:
    # DeepSpeed has autograd add bf16 wgrads, we add products in fp32, or round each sum
    close = 2e-2 if "sums" in name else 1e-3 if "bf16" in name else 1e-6
    assert theirs[0][name][0] == pytest.approx(ours[0][name][0], rel=close)


@pytest.mark.oracles
@pytest.mark.parametrize("what", ["gradients", "state", "weights"])
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_there_once_by_its_name(ours, theirs, name, what) -> None:
    expected, found = (whole(ranks, name, what) for ranks in (ours, theirs))
    assert found.keys() == expected.keys()
    low = "bf16" in name
    for tensor, values in expected.items():
        if what != "gradients" and "attention.k.bias" in tensor:
            continue  # softmax does not see it: its gradient is rounding, of which Adam makes steps
        atol = (
            0.05 if "sums" in name else 0.02
        )  # of four steps of Adam, each of 0.01 in any direction
        close = {"rtol": 0.05, "atol": atol} if low else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found[tensor], values, **close)


@pytest.mark.oracles
def test_neither_a_skipped_step_nor_an_evaluation_leaves_a_trace(theirs) -> None:
    cases = {name: case | THEIRS for name, case in CASES.items()}
    again = spawn(steps_of, 2, cases, True, deadline=400)
    assert {n: row[0] for n, row in again[0].items()} == {n: row[0] for n, row in theirs[0].items()}


@pytest.mark.oracles
@pytest.mark.parametrize("name", ["0", "1", "2", "3-host", "1-bf16", "2-bf16", "3-bf16"])
def test_a_checkpoint_is_resumed_exactly_and_loads_into_our_engine(tmp_path, name) -> None:
    needs("deepspeed")
    case = CASES[name] | THEIRS
    shared = {key: value for key, value in case.items() if key == BF16}
    same_in_every_way(tmp_path, shared, case, close=1e-3 if shared else 1e-6)


@pytest.mark.oracles
@pytest.mark.parametrize("name", ["1", "3-apart", "2-bf16"])
def test_our_checkpoint_loads_into_deepspeed(tmp_path, name) -> None:
    needs("deepspeed")
    case = CASES[name] | THEIRS
    shared = {key: value for key, value in case.items() if key == BF16}
    saved, again = str(tmp_path / "saved"), str(tmp_path / "again")
    went_on = train_and_save(0, 1, shared, saved, 2, 2)
    moved = spawn(load_and_save_again, 2, case, saved, again, 2)[0]
    assert moved == pytest.approx(went_on, rel=1e-3 if shared else 1e-6)
    assert saved_tensors(tmp_path / "saved") == saved_tensors(tmp_path / "again")


class _Local:
    """A parameter of two pieces, [5, 3] and [2, 3], and a row of padding."""

    class Piece:
        def __init__(self, start: int, stop: int, offset: tuple[int, ...]) -> None:
            self.start, self.stop, self.offset = start, stop, offset

    pieces = (Piece(0, 5, (10, 0)), Piece(5, 7, (0, 0)))


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 24), (0, 0), (4, 5), (1, 2), (2, 8), (3, 20), (14, 16)]
)
def test_boxes_hold_each_element_of_a_range_once(start: int, stop: int) -> None:
    seen = []
    for box in boxes(_Local, (8, 3), start, stop):  # type: ignore[arg-type]
        rows = [range(o, o + n) for o, n in zip(box.offset, box.sizes, strict=True)]
        first = box.offset[0] - box.piece.offset[0] + box.piece.start
        seen += [(first + row - rows[0][0]) * 3 + column for row in rows[0] for column in rows[1]]
        assert len(rows[0]) * len(rows[1]) == box.stop - box.start
    assert seen == list(range(start, min(stop, 21)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({TP: 2}, "--tensor-model-parallel-size 2: its ZeRO shares between"),
        ({PP: 2}, "--pipeline-model-parallel-size 2: its ZeRO shares between"),
        ({"precision__fp16": True}, "with --fp16: DeepSpeed scales the loss"),
        ({BF16: True}, "with --bf16 without ZeRO"),
        ({"optim__optimizer": "muon"}, "with --optimizer muon: flat partitions"),
        ({"optim__param_groups": ["head.*:rule=sgd"]}, "it has one optimizer for all"),
        ({"lora__lora_rank": 2, "lora__lora_variant": "dora"}, "with --lora-variant dora: lengths"),
        ({"model__rope_scaling_type": "clex"}, "with --rope-scaling-type clex: the gradient"),
        (ON_HOST, "with --optimizer-cpu-offload without ZeRO"),
        (ON_HOST | {ZERO: 2, "parallel__optimizer_offload_fraction": 0.5}, "has a share at stage 3"),
        ({"optim__lisa_layers": 1}, "with --lisa-layers: what DeepSpeed trains"),
        ({"parallel__overlap_param_gather": True, ZERO: 1}, "with --overlap-param-gather"),
    ],
)  # fmt: skip
def test_what_deepspeed_does_not_run_is_refused_with_the_way_out(changes, said) -> None:
    found = [text for text in problems(tiny_config(**changes, **THEIRS), 2) if said in text]
    assert len(found) == 1 and "drop --engine, or" in found[0]
    assert not [text for text in problems(tiny_config(**changes), 2) if said in text]


def test_each_optimizer_that_is_allowed_has_its_states_named() -> None:
    assert set(STATE_NAMES) == set(ITS_OPTIMIZERS)
