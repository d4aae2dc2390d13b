"""The distributed optimizer: named rows, 6 + 12/d bytes per parameter, whole tensors on request."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.blueprint.figure.parts import Tensor
from megatron_lite.blueprint.ownership import balance, cut_rows, whole_owners
from megatron_lite.engines.shards import ShardLayout
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece
from megatron_lite.train.assemble import assemble
from tests.support.axes import BF16, ZERO
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, tiny_config


@given(st.integers(0, 200), st.integers(1, 17))
def test_rows_are_cut_without_gap_or_repeat(rows, ranks) -> None:
    cut = cut_rows(rows, ranks)
    assert len(cut) == ranks
    assert [r for block in cut for r in range(block.start, block.stop)] == list(range(rows))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_whole_tensors_go_to_the_least_loaded(sizes, ranks) -> None:
    owners = whole_owners(sizes, ranks)
    load = [sum(s for s, o in zip(sizes, owners, strict=True) if o == k) for k in range(ranks)]
    # greedy: nobody is ahead of the least loaded by more than the largest tensor
    assert max(load) - min(load) <= max(sizes)
    assert balance(load) >= 1.0


def test_seven_billion_parameters_balance_as_whole_tensors() -> None:
    layer = [4096 * 4096] * 4 + [4096 * 11008] * 3
    sizes = [32000 * 4096, *layer * 32, 32000 * 4096]
    for ranks in (8, 16, 32):
        owners = whole_owners(sizes, ranks)
        load = [sum(s for s, o in zip(sizes, owners, strict=True) if o == k) for k in range(ranks)]
        assert balance(load) < 1.05


def piece(name, start, stop, shape):
    shape = (stop - start, *shape[1:])
    return ParameterPiece(Tensor(name, shape, "weight"), start, stop, shape, (0,) * len(shape))


def parameters(shapes):
    made = []
    for index, shape in enumerate(shapes):
        tensor = torch.nn.Parameter(torch.randn(*shape))
        half = shape[0] // 2  # two pieces, as a fused matrix has
        pieces = (
            piece(f"{index}.a", 0, half, shape),
            piece(f"{index}.b", half, shape[0], shape),
        )
        made.append(LocalParameter(tensor, pieces))
    return made


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 13), st.integers(1, 5)), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from(["", "a", "ab"]),
)
def test_packing_is_undone_by_unpacking_and_owned_rows_cover_everything(
    shapes, ranks, whole
) -> None:
    made = parameters([shape if shape[1] > 1 else shape[:1] for shape in shapes])
    layout = ShardLayout.build(made, ranks, whole=lambda piece: piece.name[-1] in whole)
    tensors = {id(local): local.parameter.detach() for local in made}
    buffer = layout.pack(lambda local: tensors[id(local)], torch.zeros(1))
    assert buffer.shape == (ranks, layout.columns)
    back = {key: torch.full_like(value, float("nan")) for key, value in tensors.items()}
    layout.unpack(buffer, lambda local: back[id(local)])
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    owned = {key: torch.full_like(value, float("nan")) for key, value in tensors.items()}
    for rank in range(ranks):
        for place, rows, values in layout.own_rows(rank, buffer[rank]):
            target = place.piece.of(owned[id(place.local)])[rows.start : rows.stop]
            assert target.isnan().all(), "owned twice"
            target.copy_(values.view(target.shape))
    assert all(torch.equal(owned[key], tensors[key]) for key in tensors)


def bytes_per_parameter(rank, ranks, changes):
    config = tiny_config(model__vocab_size=64, **changes)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank))
    tensors = [
        *(local.parameter for local in run.parameters),
        *(gradient for _, gradient in run.engine.accumulators()),
        *(piece.data for piece in run.engine.state(owned=False)),
    ]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / sum(local.parameter.numel() for local in run.parameters)


@pytest.mark.parametrize("how", ["tied_across_stages", "late"])
def test_what_stages_sum_is_owned_by_the_same_replica_of_each(how) -> None:
    (table, other) = parameters([(8, 3), (6, 5)])
    table = replace(table, **{how: True})
    for held, loads in (([table, other], [0.0, 0.0]), ([other, table], [9.0, 1.0])):
        layout = ShardLayout.build(held, 2, whole=lambda piece: 1.0, loads=loads)
        owners = {place.owner for place in layout.places if place.local is table}
        assert owners == {0}
    assert loads == [11.0, 3.0], "its cost counts for what is dealt out next"


@pytest.mark.parametrize(
    ("ranks", "changes", "expected"),
    [
        (1, {BF16: True}, 18.0),
        (2, {BF16: True}, 18.0),
        (2, {BF16: True, ZERO: 1}, 12.0),
        (4, {BF16: True, ZERO: 1}, 9.0),
        (4, {ZERO: 1}, 10.0),
    ],
)
def test_bytes_per_parameter_are_6_plus_12_over_d(ranks, changes, expected) -> None:
    """bf16: 2 + 4 and 12/d; fp32, whose weights are their own masters: 8 + 8/d."""
    for measured in spawn(bytes_per_parameter, ranks, changes):
        assert measured == pytest.approx(expected, rel=1e-3)
