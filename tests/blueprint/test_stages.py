"""Layers dealt to stages."""

from __future__ import annotations

import pytest

from megatron_lite.blueprint.stages import Stage, cut_stages, layers_per_stage, round_robin
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.parallel import ParallelConfig


def test_layers_are_dealt_evenly_with_global_numbers() -> None:
    stages = cut_stages(layers_per_stage(6, 3, ParallelConfig()))
    assert stages == (
        Stage(0, (0, 1), has_embedding=True, has_head=False),
        Stage(1, (2, 3), has_embedding=False, has_head=False),
        Stage(2, (4, 5), has_embedding=False, has_head=True),
    )


def test_one_stage_has_everything() -> None:
    assert cut_stages((3,)) == (Stage(0, (0, 1, 2), has_embedding=True, has_head=True),)


def test_uneven_counts_keep_the_order_of_layers() -> None:
    assert [stage.layers for stage in cut_stages((1, 3, 2))] == [(0,), (1, 2, 3), (4, 5)]


def test_chunk_c_of_rank_r_is_stage_c_pp_plus_r() -> None:
    placement = round_robin(4, 3)
    assert all(placement[c * 4 + r] == r for c in range(3) for r in range(4))


def test_layers_that_do_not_divide_name_what_would() -> None:
    with pytest.raises(ConfigError, match=r"--num-layers 6 .* 4 pipeline stages.*\[1, 2, 3, 6\]"):
        layers_per_stage(6, 4, ParallelConfig())


@pytest.mark.parametrize(
    "field",
    ["decoder_first_pipeline_num_layers", "account_for_loss_in_pipeline_split"],
)
def test_uneven_splits_are_refused_not_ignored(field: str) -> None:
    with pytest.raises(ConfigError, match="--" + field.replace("_", "-")):
        layers_per_stage(8, 4, ParallelConfig(**{field: 1}))
