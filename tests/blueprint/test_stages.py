"""Layers dealt to stages."""

from __future__ import annotations

from megatron_lite.blueprint.stages import StageLayers, cut_stages, folded, round_robin


def test_layers_keep_their_global_numbers() -> None:
    stages = cut_stages((2, 2, 2))
    assert stages == (
        StageLayers(0, (0, 1), has_embedding=True, has_head=False),
        StageLayers(1, (2, 3), has_embedding=False, has_head=False),
        StageLayers(2, (4, 5), has_embedding=False, has_head=True),
    )


def test_one_stage_has_everything() -> None:
    assert cut_stages((3,)) == (StageLayers(0, (0, 1, 2), has_embedding=True, has_head=True),)


def test_uneven_counts_keep_the_order_of_layers() -> None:
    assert [stage.layers for stage in cut_stages((1, 3, 2))] == [(0,), (1, 2, 3), (4, 5)]


def test_chunk_c_of_rank_r_is_stage_c_pp_plus_r() -> None:
    placement = round_robin(4, 3)
    assert all(placement[c * 4 + r] == r for c in range(3) for r in range(4))


def test_a_folded_pipeline_ends_where_it_begins() -> None:
    assert folded(3) == (0, 1, 2, 2, 1, 0)
    assert folded(1) == (0, 0)
