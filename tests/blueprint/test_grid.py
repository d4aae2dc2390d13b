"""Ranks and groups against Megatron's documented examples and the definition of a grid."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.blueprint.grid import AXES, Coords, RankGrid
from megatron_lite.config.errors import ConfigError

SIXTEEN = RankGrid(tp=2, pp=4, dp=2)
USERS = RankGrid(tp=8, pp=8)

grids = st.builds(
    RankGrid,
    tp=st.integers(1, 4),
    cp=st.integers(1, 3),
    dp=st.integers(1, 4),
    pp=st.integers(1, 4),
    order=st.sampled_from(["tp-cp-dp-pp", "tp-cp-pp-dp"]),
)


def test_sixteen_ranks_fall_into_megatrons_groups() -> None:
    assert SIXTEEN.groups("tp") == [(r, r + 1) for r in range(0, 16, 2)]
    assert SIXTEEN.groups("dp") == [
        (0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15),
    ]  # fmt: skip
    assert SIXTEEN.groups("pp") == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    assert SIXTEEN.groups("tp-pp") == [(0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15)]


def test_users_64_gpus_keep_tensor_groups_on_nodes_and_pipelines_across() -> None:
    assert USERS.groups("tp") == [tuple(range(8 * n, 8 * n + 8)) for n in range(8)]
    assert USERS.groups("pp") == [tuple(range(n, 64, 8)) for n in range(8)]
    assert USERS.groups("dp") == [(n,) for n in range(64)]
    assert USERS.groups("tp-pp") == [tuple(range(64))]


def test_tp_cp_pp_dp_numbers_pipelines_before_replicas() -> None:
    grid = RankGrid(tp=2, pp=4, dp=2, order="tp-cp-pp-dp")
    assert grid.groups("pp") == [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14), (9, 11, 13, 15)]
    assert grid.groups("dp") == [(n, n + 8) for n in range(8)]


def test_coordinates_of_rank_13() -> None:
    assert RankGrid(tp=8, dp=2, pp=2).coords(13) == Coords(tp=5, cp=0, dp=1, pp=0)
    assert USERS.coords(13) == Coords(tp=5, cp=0, dp=0, pp=1)


def test_tied_groups_join_first_and_last_stage_of_the_same_slice() -> None:
    assert SIXTEEN.tied_groups() == [(0, 12), (1, 13), (2, 14), (3, 15)]
    assert SIXTEEN.tied_group(13) == (1, 13)
    assert SIXTEEN.tied_group(5) == (5,)
    folded = dataclasses.replace(SIXTEEN, folded=True)
    assert folded.tied_groups() == [(0,), (1,), (2,), (3,)]
    assert folded.tied_group(13) == (13,)
    assert RankGrid(tp=2, dp=2).tied_groups() == [(0,), (1,), (2,), (3,)]


@given(grids)
def test_rank_inverts_coords(grid: RankGrid) -> None:
    assert [grid.rank(**grid.coords(r)._asdict()) for r in range(grid.world_size)] == list(
        range(grid.world_size)
    )


@given(grids, st.sampled_from(["-".join(c) for n in (1, 2, 3, 4)
                               for c in itertools.combinations(AXES, n)]))  # fmt: skip
def test_groups_split_the_ranks_by_the_other_axes(grid: RankGrid, axes: str) -> None:
    groups = grid.groups(axes)
    assert sorted(r for ranks in groups for r in ranks) == list(range(grid.world_size))
    others = [axis for axis in AXES if axis not in axes.split("-")]
    for ranks in groups:
        assert len(ranks) == grid.size(axes)
        assert list(ranks) == sorted(ranks)
        assert len({tuple(getattr(grid.coords(r), a) for a in others) for r in ranks}) == 1
        assert all(grid.group(axes, r) == ranks for r in ranks)
    assert groups == sorted(groups)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: RankGrid(order="tp-pp"), "'tp-pp' must name each"),
        (lambda: RankGrid(tp=0), "tp has size 0"),
        (lambda: USERS.coords(64), "rank 64 is not on a grid of 64 ranks"),
        (lambda: USERS.rank(pp=8), "pp=8 is not on a grid with pp 8"),
        (lambda: USERS.groups("ep"), "no such axes: 'ep'"),
    ],
)
def test_what_is_not_on_the_grid_is_said(wrong: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        wrong()  # type: ignore[operator]
