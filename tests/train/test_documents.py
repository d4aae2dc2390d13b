"""Packed documents that do not see one another: the loss of both is the loss of each alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lite.config.errors import DataError
from megatron_lite.data.batch import Batch, collate
from megatron_lite.data.build import Datasets
from megatron_lite.data.documents import DocumentEnds
from megatron_lite.data.samples import Sample
from megatron_lite.kernels.dropout import dropout
from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.layers.dropout import HiddenDropout, step_dropout
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous.heartbeat import Alone
from megatron_lite.rendezvous.launch import Launch, World
from megatron_lite.train.assemble import assemble
from megatron_lite.train.feed import to_device
from megatron_lite.train.reading import _in_turn
from megatron_lite.train.step import train_step
from tests.support.axes import PP, SP, TP
from tests.support.sizes import SEQ, VOCAB
from tests.support.spawn import RankFailed, spawn
from tests.support.tiny import context, draw, tiny_config
from tests.train.runs import alone as train_alone

EOD = VOCAB - 1
ENDS = DocumentEnds(eod=EOD, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)
LEARNED: dict[str, Any] = {"train__micro_batch_size": 1, "train__global_batch_size": 1}
ROPE = LEARNED | {"model__position_embedding_type": "rope"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "serial": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2-sp": (
        2,
        {TP: 2, SP: True},
    ),
    "pp2": (2, {PP: 2}),
}


def documents() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    return tuple(  # type: ignore[return-value]
        np.append(random.integers(0, EOD, size), EOD) for size in (6, SEQ - 6 - 2)
    )


def packed(*, reset_attention_mask: bool = True) -> list[Batch]:
    tokens = np.concatenate([*documents(), [3]]).astype(np.int64)
    assert len(tokens) == SEQ + 1
    ends = dataclasses.replace(ENDS, reset_attention_mask=reset_attention_mask)
    return [collate([Sample(tokens)], np.array([0]), ends)]


def alone() -> list[Batch]:
    """Each document at the beginning of a sample of its own; nothing behind it counts."""
    batches = []
    for number, document in enumerate(documents()):
        tokens = np.zeros((1, SEQ + 1), np.int64)
        tokens[0, : len(document)] = document
        mask = np.zeros((1, SEQ), np.float32)
        mask[0, : len(document) - 1] = 1.0
        batches.append(Batch(tokens, np.array([number]), mask))
    return batches


def one_step(rank: int, ranks: int, changes: dict[str, Any], kind: str) -> tuple[float, float]:
    torch.set_num_threads(1)
    micro = 2 if kind == "alone" else 1
    config = tiny_config(**(changes | {"train__global_batch_size": micro}))
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    batches = {
        "alone": alone,
        "packed": packed,
        "seeing": lambda: packed(reset_attention_mask=False),
    }[kind]()
    result = train_step(run, batches, lr=0.0, weight_decay=0.0)
    return result.loss.item(), result.update.grad_norm.item()


@pytest.mark.parametrize("positions", [LEARNED, ROPE], ids=["learned", "rope"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_two_packed_documents_give_the_loss_of_the_two_alone(
    layout: tuple[int, dict[str, Any]], positions: dict[str, Any]
) -> None:
    ranks, changes = layout
    ((loss, norm), *_) = spawn(one_step, 1, positions, "alone")
    for found_loss, found_norm in spawn(one_step, ranks, positions | changes, "packed"):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert found_norm == pytest.approx(norm, rel=1e-5)


def test_without_the_mask_the_second_document_sees_the_first() -> None:
    ((alone_loss, _),) = spawn(one_step, 1, ROPE, "alone")
    ((seeing_loss, _),) = spawn(one_step, 1, ROPE, "seeing")
    assert seeing_loss != pytest.approx(alone_loss, rel=1e-4)


def test_a_document_ends_with_its_eod() -> None:
    samples = [Sample(np.array(row)) for row in ([5, 9, 9, 6, 7, 9], [9, 1, 2, 3, 4, 5])]
    ends = DocumentEnds(eod=9, reset_position_ids=True, reset_attention_mask=True)
    batch = collate(samples, np.arange(2), ends)
    assert batch.positions is not None and batch.segments is not None
    assert batch.positions.tolist() == [[0, 1, 0, 0, 1], [0, 0, 1, 2, 3]]
    assert batch.segments.tolist() == [0, 2, 3, 5, 6, 10] and batch.longest_segment == 4
    assert batch.loss_mask.min() == 1.0
    fed = to_device(batch, torch.device("cpu")).positions
    assert fed.encoded[:, 0].tolist() == [0, 1, 0, 0, 1] and fed.index.tolist() == [0, 1, 2, 3, 4]
    assert fed.segments.cu_seqlens.dtype == torch.int32
    assert fed.segments.allowed.sum(dim=-1)[:, 0].tolist() == [[1, 2, 1, 1, 2], [1, 1, 2, 3, 4]]


def test_dropout_goes_by_the_place_in_the_sample() -> None:
    config = tiny_config(model__hidden_dropout=0.5)
    run = assemble(config, draw(config, 1), ParallelContext.serial())
    x = torch.ones(8, 1, 32)
    drops = step_dropout(run.context, 0)
    at = ForwardContext(samples=torch.tensor([3]), index=torch.arange(8), dropout=drops)
    restarted = dataclasses.replace(at, restarted=torch.zeros(8, 1, dtype=torch.int64))
    site = HiddenDropout(run.context, 0, "mlp.output")
    plain = dropout(x, site.call(at))
    assert torch.equal(dropout(x, site.call(restarted)), plain)
    assert not torch.equal(plain[0], plain[1])


def _turns(rank: int, ranks: int, folder: str, case: str) -> list[str]:
    """Two nodes of one rank each; a node of its own file system writes into its own folder."""
    launch = Launch(rank=rank, world_size=ranks, local_rank=0 if case == "nodes" else rank,
                    local_world_size=1 if case == "nodes" else ranks)  # fmt: skip
    config = tiny_config()
    blueprint = draw(config, ranks)
    ctx = context(blueprint, rank)
    place = Path(folder) / (str(rank) if case == "nodes" else "shared")
    happened: list[str] = []

    def build() -> Datasets:
        if case == "broken" and rank == 0:
            raise DataError("the data is broken")
        happened.append("found" if place.exists() else "built")
        place.mkdir(exist_ok=True)
        return Datasets(None, None, None, digest=rank if case == "different" else 7)

    _in_turn(build, launch, ctx, World(Alone()))
    return happened


def test_one_rank_builds_and_the_others_find(tmp_path: Path) -> None:
    assert spawn(_turns, 2, str(tmp_path), "shared") == [["built"], ["found"]]


def test_a_node_without_the_files_builds_its_own(tmp_path: Path) -> None:
    assert spawn(_turns, 2, str(tmp_path), "nodes") == [["built"], ["built"]]


@pytest.mark.parametrize(
    "case, words", [("different", "read different data"), ("broken", "the data is broken")]
)
def test_all_ranks_stop_where_one_cannot_go_on(tmp_path: Path, case: str, words: str) -> None:
    with pytest.raises(RankFailed) as caught:
        spawn(_turns, 2, str(tmp_path), case)
    assert any(words in text for text in caught.value.errors.values())
    assert all("DataError" in text for text in caught.value.errors.values())


@pytest.mark.parametrize(
    "words",
    [
        "--reset-position-ids --reset-attention-mask --eod-mask-loss",
        "--dataloader-type cyclic --num-workers 2",
    ],
    ids=["documents", "cyclic"],
)
def test_two_steps_and_two_more_are_four(words: str, data: list[str], tmp_path: Path) -> None:
    once, again, plain = (tmp_path / name for name in ("once", "again", "plain"))
    save = ["--save-interval", "2", *words.split(), "--save"]
    straight = train_alone(*data, *save, str(once))
    resumed = train_alone(*data, *save, str(again), "--load", str(once), "--ckpt-step", "2")
    assert straight.rc == resumed.rc == 0, straight.err + resumed.err
    assert "loaded checkpoint" in resumed.out and resumed.state_hash == straight.state_hash
    without = train_alone(*data, "--save", str(plain), "--save-interval", "2")
    assert without.state_hash != straight.state_hash
