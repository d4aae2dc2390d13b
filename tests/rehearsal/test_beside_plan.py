"""What rehearsed ranks say and allocate is what the plan says they do."""

import pytest

from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.rehearsed import RehearsedRank, beside_plan
from megatron_lite.rehearsal.rehearse import num_microbatches, one_of_each, rehearse
from megatron_lite.train.objectives.table import LOSSES
from tests.support.axes import BF16, HOST, PP, SCHEDULE, SP, TP, UNTIED, ZERO
from tests.support.tiny import draw, tiny_config
from tests.train import toys

BATCH = "train__global_batch_size"


@pytest.mark.parametrize(
    "changes",
    [
        {TP: 2, PP: 2, SP: True, BF16: True},
        {TP: 2, PP: 2, SP: True, ZERO: 1, SCHEDULE: "zb-h1", "data__reset_attention_mask": True},
        {TP: 2, PP: 2, SCHEDULE: "gpipe", "precision__fp16": True,
         "parallel__recompute_granularity": "full", "parallel__recompute_method": "block",
         "parallel__recompute_num_layers": 1, "parallel__distribute_saved_activations": True},
        {TP: 2, PP: 2, SP: True, ZERO: 1, "optim__optimizer": "muon"},
        pytest.param({TP: 2, PP: 2, BF16: True, "optim__optimizer": "galore"},
                     marks=pytest.mark.slow),
        # 256 KiB of logits
        {TP: 2, PP: 2, SP: True, BF16: True, "parallel__logits_chunk_mib": 0.07},
        pytest.param({
            TP: 2, PP: 2, SP: True, ZERO: 1, BF16: True, "optim__optimizer": "sophiag",
            "optim__sophia_hessian_fraction": 0.5,
        }, marks=pytest.mark.ci),
        pytest.param({
            TP: 2, PP: 2, SP: True, BF16: True, "optim__optimizer": "adafactor",
            "optim__adafactor_scale_parameter": True,
        }, marks=pytest.mark.ci),
        pytest.param({
            TP: 2, PP: 2, ZERO: 1, "model__position_embedding_type": "rope",
            "model__rope_scaling_type": "clex", "model__rope_original_length": 64,
            "model__rope_scaling_factor": 2.0,
        }, marks=pytest.mark.slow),
    ],
    ids=["1f1b", "zb-h1", "gpipe", "muon", "galore", "head in chunks", "curvature", "adafactor",
         "learned frequencies"],
)  # fmt: skip
def test_volume_is_the_plans_to_the_byte_and_memory_within_a_tenth(changes):
    for row in rehearsed_beside_plan(changes):
        assert set(row.sent_ratios) >= {"tp", "pp", "dp", "tied"}
        check_beside_plan(row)


@pytest.mark.parametrize(
    "changes",
    [
        {SP: True, BF16: True},
        pytest.param({
            UNTIED: True, "lora__lora_targets": ("all",), "lora__lora_dropout": 0.1,
            "parallel__recompute_granularity": "full", "parallel__recompute_method": "uniform",
            "parallel__recompute_num_layers": 1,
        }, marks=pytest.mark.slow),
        pytest.param({"lora__lora_variant": "dora", BF16: True}, marks=pytest.mark.ci),
        *(pytest.param({"lora__lora_variant": "dora", **more}, marks=pytest.mark.slow) for more in (
            {SP: True, "lora__lora_targets": ("down_proj",)},
            {"parallel__recompute_granularity": "full", "parallel__recompute_method": "uniform",
             "parallel__recompute_num_layers": 1},
            {"parallel__recompute_granularity": "selective", SP: True,
             "parallel__recompute_modules": ["core_attn", "mlp", "layernorm"]},
        )),
        *(pytest.param({"lora__lora_targets": (name,), "parallel__recompute_granularity": "selective",
                        "parallel__recompute_modules": ["mlp"], **more}, marks=pytest.mark.slow)
          for name, more in (("mlp.up", {}), ("down_proj", {SP: True}))),
        pytest.param({"lora__lora_base": "nf4"}, marks=pytest.mark.ci),
        pytest.param({"lora__lora_base": "nf4", "lora__lora_variant": "dora"}, marks=pytest.mark.slow),
    ],
    ids=["sp", "all", "dora", "dora of some", "dora again", "dora again in part", "mlp again",
         "mlp again sp", "nf4", "nf4 dora"],
)  # fmt: skip
def test_so_it_is_of_adapters(changes):
    """A tied table that is frozen has no gradient to sum."""
    for row in rehearsed_beside_plan({TP: 2, PP: 2, "lora__lora_rank": 8, **changes}):
        assert set(row.sent_ratios) == {"tp", "pp", "dp"}
        check_beside_plan(row)


@pytest.mark.parametrize("changes", [{TP: 2, PP: 2, SP: True}, {TP: 2, PP: 2}], ids=["sp", "whole"])
def test_so_it_is_of_a_scalar_head(monkeypatch, changes):
    needs, make = toys.ROWS["value"]
    monkeypatch.setitem(OBJECTIVES, "value", needs)
    monkeypatch.setitem(LOSSES, "value", make)
    for row in rehearsed_beside_plan({"train__objective": "value", **changes}):
        assert set(row.sent_ratios) == {"tp", "pp", "dp"}
        check_beside_plan(row)


SMALL = {"parallel__ddp_bucket_size": 300000}
"""A few buckets of the model that is rehearsed beside its plan."""
EVERY_LAYER = {
    "parallel__recompute_granularity": "full", "parallel__recompute_method": "uniform",
    "parallel__recompute_num_layers": 1,
}  # fmt: skip
STAGES = {
    "2": {ZERO: 2, BF16: True, UNTIED: True, **SMALL},
    "2 one bucket": {ZERO: 2},
    "2 sp": {ZERO: 2, TP: 2, SP: True, BF16: True, **SMALL},
    "2 pp": {ZERO: 2, TP: 2, PP: 2, SP: True, BF16: True},
    "2 recomputed": {ZERO: 2, **EVERY_LAYER, **SMALL},
    "2 muon": {ZERO: 2, TP: 2, SP: True, "optim__optimizer": "muon"},
    "3": {ZERO: 3, BF16: True},
    "3 fp32": {ZERO: 3, UNTIED: True},
    "3 sp": {ZERO: 3, TP: 2, SP: True},
    "3 pp": {ZERO: 3, TP: 2, PP: 2, SP: True, BF16: True},
    "3 recomputed": {ZERO: 3, **EVERY_LAYER},
    "3 recomputed by two": {ZERO: 3, **EVERY_LAYER, "parallel__recompute_num_layers": 2},
    "3 muon": {ZERO: 3, TP: 2, SP: True, "optim__optimizer": "muon"},
    "3 adapters": {ZERO: 3, UNTIED: True, "lora__lora_rank": 8, "lora__lora_targets": ("all",)},
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["2", "3", *(pytest.param(name, marks=pytest.mark.slow) for name in STAGES if len(name) > 1)],
)
def test_so_it_is_of_every_stage_of_zero(name):
    for row in rehearsed_beside_plan(STAGES[name]):
        assert set(row.sent_ratios) >= {"dp"}
        check_beside_plan(row)


@pytest.mark.parametrize(
    "changes",
    [
        {BF16: True, ZERO: 1},
        *(pytest.param(more, marks=pytest.mark.slow) for more in (
            {BF16: True, "optim__optimizer": "muon"},
            {"optim__optimizer": "adafactor"},
            {BF16: True, ZERO: 1, "parallel__optimizer_offload_fraction": 0.5},
            {"train__use_cpu": True},
            {BF16: True, "train__use_cpu": True},
        )),
    ],
    ids=["adam", "muon", "adafactor", "half", "its own host", "its own host, bf16"],
)  # fmt: skip
def test_what_lies_in_host_memory_is_no_part_of_it(changes):
    for row in rehearsed_beside_plan({TP: 2, PP: 2, HOST: True, **changes}):
        check_beside_plan(row)


def rehearsed_beside_plan(changes):
    """A rank of each kind of eight, beside what the plan says of it."""
    config = tiny_config(
        model__hidden_size=256, model__seq_length=128, model__vocab_size=1000, **changes,
        **{BATCH: 48},
    )  # fmt: skip
    blueprint = draw(config, 8)
    done = list(rehearse(config, 8, one_of_each(blueprint.grid), workers=1))
    asked = PlanInputs(
        config.parallel, config.precision, config.train.micro_batch_size,
        segments=config.data.reset_attention_mask, on_gpu=not config.train.use_cpu,
    )  # fmt: skip
    return beside_plan(
        [RehearsedRank(d.log.rank, d.memory.kinds(), d.sent_bytes()) for d in done],
        blueprint, asked, num_microbatches=num_microbatches(blueprint),
    )  # fmt: skip


def check_beside_plan(row):
    """Memory within a tenth, volume to the byte."""
    assert row.memory_ratio == pytest.approx(1.0, abs=0.10)
    for axis, ratio in row.sent_ratios.items():
        # gradient buffers are padded to 16 elements per parameter, and shares to whole rows
        assert ratio == pytest.approx(1.0, abs=0.03 if axis == "dp" else 1e-4), (row.rank, axis)
