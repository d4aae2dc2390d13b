"""--engine deepspeed: DeepSpeed's own ZeRO trains what ours trains, and its state is ours by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_lite.config.rules.table import problems
from megatron_lite.engines.deepspeed.fragments import boxes
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import begin_step, train_step
from tests.support.axes import BF16, PP, TP, ZERO
from tests.support.engines import counted
from tests.support.extras import needs
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

ENGINE = "parallel__engine"
THEIRS = {ENGINE: "deepspeed"}
CASES: dict[str, dict[str, Any]] = {
    "0": {},
    "1": {ZERO: 1},
    "2": {ZERO: 2},
    "3": {ZERO: 3},
    "0-sgd": {"optim__optimizer": "sgd"},
}


def steps_of(rank: int, ranks: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each case loss and norm of four steps, then the gradients of a fifth, and the state, whole."""
    found = {}
    for name, changes in cases.items():
        config = tiny_config(train__global_batch_size=8, model__num_layers=2, **changes)
        blueprint = draw(config, ranks)
        run = assemble(config, blueprint, context(blueprint, rank))
        numbers = []
        for step in range(4):
            batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
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
                    (p.name, p.shape, p.offset, p.data.numpy().copy())
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
def both() -> tuple[list[Any], list[Any]]:
    """What ours and theirs come to, by rank."""
    needs("deepspeed")
    ours = spawn(steps_of, 2, CASES)
    return ours, spawn(steps_of, 2, {name: case | THEIRS for name, case in CASES.items()})


@pytest.mark.oracles
@pytest.mark.parametrize("name", CASES)
def test_losses_and_norms_equal_ours(both, name) -> None:
    ours, theirs = (row[0][name][0] for row in both)
    assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.oracles
@pytest.mark.parametrize("what", ["gradients", "state", "weights"])
@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_there_once_by_its_name(both, name, what) -> None:
    ours, theirs = (whole(ranks, name, what) for ranks in both)
    assert theirs.keys() == ours.keys()
    for tensor, values in ours.items():
        # softmax does not see a bias of the keys: its gradient is rounding, of which Adam makes steps
        blind = tensor.endswith("attention.k.bias") and what == "weights"
        torch.testing.assert_close(theirs[tensor], values, rtol=1e-5, atol=1e-2 if blind else 1e-6)


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
        ({"optim__optimizer": "muon"}, "with --optimizer muon: DeepSpeed's flat"),
        ({"optim__param_groups": ["head.*:rule=sgd"]}, "has one optimizer for all"),
        ({"optim__lisa_layers": 1}, "with --lisa-layers: what DeepSpeed trains"),
        ({"parallel__overlap_param_gather": True, ZERO: 1}, "with --overlap-param-gather"),
    ],
)  # fmt: skip
def test_what_deepspeed_does_not_run_is_refused_with_the_way_out(changes, said) -> None:
    found = [text for text in problems(tiny_config(**changes, **THEIRS), 2) if said in text]
    assert len(found) == 1 and "drop --engine, or" in found[0]
    assert not [text for text in problems(tiny_config(**changes), 2) if said in text]
