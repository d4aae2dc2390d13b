"""Every documented key of a ds.json has its row, and each row does what it says."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from megatron_lite.config.deepspeed.key import DeepSpeedKey
from megatron_lite.config.deepspeed.keys import KEYS, SECTIONS
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.settings import settings
from tests.config.ds_files import DsFolder
from tests.config.ds_keys import DOCUMENTED


def rows(kind: str) -> list[DeepSpeedKey]:
    return [row for row in KEYS.values() if row.kind == kind]


def nested(**values: Any) -> dict[str, Any]:
    """An object whose keys have dots (or two underscores) between the levels."""
    root: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.replace("__", ".").split(".")
        functools.reduce(lambda inner, key: inner.setdefault(key, {}), path, root)[last] = value
    return root


def test_every_documented_key_has_a_row() -> None:
    whole = {row.name for row in KEYS.values() if row.whole}
    missing = [
        name
        for name in DOCUMENTED
        if name not in KEYS and not any(name.startswith(f"{one}.") for one in whole)
    ]
    assert missing == [] and len(DOCUMENTED) > 300


def beside(row: DeepSpeedKey, value: object) -> dict[str, Any]:
    """A file with the key, and with what must be there for it to be read."""
    config = nested(**{row.name: value})
    if row.name.startswith("optimizer."):
        config["optimizer"].setdefault("type", "AdamW")
        config["optimizer"].setdefault("params", {}).setdefault("weight_decay", 0.01)
    return config


@pytest.mark.parametrize("row", rows("harmless"), ids=lambda row: row.name)
def test_what_is_harmless_changes_nothing_and_is_told_once(ds, row: DeepSpeedKey) -> None:
    value = {row.switch or "a": True} if row.whole else 7
    parsed = ds.parse(beside(row, value))
    without = ds.parse(
        beside(KEYS["optimizer.legacy_fusion"], False) if "optimizer" in row.name else {}
    )
    assert parsed.config == without.config
    (said,) = (line for line in parsed.notices if row.name in line)
    assert said.endswith(f"accepted, changes nothing: {row.say}")


@pytest.mark.parametrize("row", rows("refused"), ids=lambda row: row.name)
def test_what_is_refused_has_its_line_and_is_not_where_it_asks_for_nothing(ds, row) -> None:
    value = {row.switch or "a": "on"} if row.whole else "something"
    said = ds.refusal(beside(row, value))
    assert f"{row.name} " in said and row.say in said and "ds.json:" in said
    off = [{row.switch: False}] if row.switch else [{}] if row.whole else [*row.off]
    for nothing in off:
        if not row.name.endswith(
            ("nesterov", "dampening", "last_batch_iteration")
        ):  # beside others
            said = ds.parse(beside(row, nothing)).notices
            assert not [line for line in said if row.name in line]


MAPPED: dict[str, tuple[object, dict[str, object]]] = {
    "fp16.enabled": (True, {"precision.fp16": True}),
    "bf16.enabled": (True, {"precision.bf16": True}),
    "bfloat16.enabled": (True, {"precision.bf16": True}),
    "optimizer.params.eps": (1e-5, {"optim.adam_eps": 1e-5}),
    "optimizer.params.weight_decay": (0.25, {"optim.weight_decay": 0.25}),
    "optimizer.params.betas": ([0.8, 0.9], {"optim.adam_beta1": 0.8, "optim.adam_beta2": 0.9}),
    "optimizer.params.lr": (2e-3, {"learning_rate.lr": 2e-3, "learning_rate.lr_decay_style": "constant"}),
    "optimizer.type": ("Adam", {"optim.optimizer": "adam", "optim.weight_decay": 0.01}),
    "gradient_clipping": (0.25, {"optim.clip_grad": 0.25}),
    "zero_optimization.stage": (2, {"parallel.zero_stage": 2}),
    "zero_optimization.overlap_comm": (False, {"parallel.overlap_grad_reduce": False}),
    "zero_optimization.cpu_offload": (True, {"parallel.optimizer_cpu_offload": True}),
    "tensor_parallel.autotp_size": (2, {"parallel.tensor_model_parallel_size": 2}),
    "sequence_parallel_size": (2, {"parallel.context_parallel_size": 2}),
    "pipeline.stages": (2, {"parallel.pipeline_model_parallel_size": 2}),
    "steps_per_print": (7, {"telemetry.log_interval": 7}),
    "wall_clock_breakdown": (True, {"telemetry.timing_log_level": 1}),
    "disable_python_gc": (True, {"train.manual_gc": True}),
    "data_types.grad_accum_dtype": ("fp32", {"parallel.accumulate_allreduce_grads_in_fp32": True}),
    "train_micro_batch_size_per_gpu": (3, {"train.micro_batch_size": 3}),
    "train_batch_size": (6, {"train.global_batch_size": 6}),
}  # fmt: skip
TOGETHER = {
    "fp16": ({"enabled": True, "loss_scale": 128, "initial_scale_power": 4, "loss_scale_window": 9,
              "hysteresis": 3, "min_loss_scale": 2},
             {"precision.loss_scale": 128.0, "precision.initial_loss_scale": 16.0,
              "precision.loss_scale_window": 9, "precision.hysteresis": 3,
              "precision.min_loss_scale": 2.0}),
    "optimizer": ({"type": "SGD", "params": {"lr": 0.5, "momentum": 0.7}},
                  {"optim.optimizer": "sgd", "optim.sgd_momentum": 0.7, "optim.weight_decay": 0.0}),
    "zero_optimization.offload_optimizer": (
        {"device": "cpu", "ratio": 0.5},
        {"parallel.optimizer_cpu_offload": True, "parallel.optimizer_offload_fraction": 0.5}),
    "tensorboard": ({"enabled": True, "output_path": "logs/", "job_name": "one"},
                    {"telemetry.tensorboard_dir": "logs/one"}),
    "wandb": ({"enabled": True, "project": "p", "team": "t", "group": "g"},
              {"telemetry.wandb_project": "p", "telemetry.wandb_entity": "t",
               "telemetry.wandb_exp_name": "g"}),
    "scheduler": ({"type": "WarmupDecayLR", "params": {"warmup_min_lr": 1e-5, "warmup_max_lr": 1e-4,
                   "warmup_num_steps": 3, "total_num_steps": 9, "warmup_type": "linear"}},
                  {"learning_rate.lr": 1e-4, "learning_rate.lr_warmup_init": 1e-5,
                   "learning_rate.lr_decay_iters": 9, "learning_rate.lr_warmup_iters": 3,
                   "learning_rate.lr_decay_style": "linear"}),
}  # fmt: skip
ELSEWHERE = {
    "gradient_accumulation_steps", "scheduler.params.warmup_min_ratio", "scheduler.params.cos_min_ratio",
    "activation_checkpointing.partition_activations",
}  # fmt: skip
"""Tried in a test of their own."""


@pytest.mark.parametrize("name", [*MAPPED, *TOGETHER])
def test_what_is_mapped_sets_its_fields(ds, name) -> None:
    value, expected = MAPPED[name] if name in MAPPED else TOGETHER[name]
    config = nested(**{name: value})
    if name.startswith("optimizer."):
        config = beside(KEYS[name], value)
    parsed = ds.parse(config)
    for key, wanted in expected.items():
        section, field = key.split(".")
        assert getattr(getattr(parsed.config, section), field) == wanted, key
        assert parsed.origin[key].startswith(f"file {ds.file}")


def test_every_mapped_key_is_tried() -> None:
    inside = {f"{n}.{k}" for n, (value, _) in TOGETHER.items() for k in value}
    inside |= {
        f"{n}.params.{k}" for n, (value, _) in TOGETHER.items() for k in value.get("params", {})
    }
    assert {row.name for row in rows("mapped")} <= {*MAPPED, *inside, *ELSEWHERE}


@pytest.mark.parametrize("row", [r for r in rows("mapped") if r.to], ids=lambda row: row.name)
def test_auto_of_a_mapped_key_names_its_flag_unless_it_is_a_switch(ds, row: DeepSpeedKey) -> None:
    config = beside(row, "auto")
    if row.under:
        config |= nested(**{row.under: True}) | {
            "fp16": {"enabled": True, row.name.split(".")[1]: "auto"}
        }
    flags = [settings()[field] for field in row.to]
    if all(flag.kind is bool for flag in flags):
        assert ds.parse(config).config == parse([]).config
        return
    said = ds.refusal(config)
    assert all(f'{row.name} "auto" takes the value of {flag.flag}' in said for flag in flags)


def test_partitioned_activations_have_a_say_with_recomputation_over_tp(ds) -> None:
    config = nested(activation_checkpointing__partition_activations=True)
    assert not ds.parse(config).config.parallel.distribute_saved_activations
    flags = "--recompute-granularity full --tensor-model-parallel-size 2"
    assert ds.parse(config, flags).config.parallel.distribute_saved_activations


def test_gradients_are_accumulated_in_fp32_or_in_the_parameters_format(ds) -> None:
    config = nested(data_types__grad_accum_dtype="bf16")
    assert not ds.parse(config, "--bf16").config.parallel.accumulate_allreduce_grads_in_fp32
    assert 'data_types.grad_accum_dtype "bf16": takes "fp32"' in ds.refusal(config, "--fp16")


def test_keys_of_fp16_that_is_off_are_told_once(ds) -> None:
    parsed = ds.parse(nested(fp16__enabled=False, fp16__hysteresis=9))
    assert parsed.config == parse([]).config
    assert [line.endswith("has a say only with fp16.enabled") for line in parsed.notices] == [True]


NAMES = st.sampled_from([*KEYS, *SECTIONS, "nothing", "zero_optimization.nothing"])
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 2, 3, 8, -1, 0.5, 1e300, 5e8])
    | st.sampled_from(["auto", "cpu", "fp32", "", "AdamW", "SGD", "Lion", "linear"])
    | st.sampled_from(["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["enabled", "device", "type", "params"]), inner, max_size=2
        )
    ),
    max_leaves=3,
)


@effort(max_examples=60, deadline=None)
@given(
    st.dictionaries(NAMES, VALUES, max_size=6),
    st.sampled_from(["", "--lr 1e-4 --clip-grad 1", "--bf16 --train-samples 9"]),
)
def test_any_file_is_read_or_refused(
    tmp_path_factory, values: dict[str, object], flags: str
) -> None:
    ds = DsFolder(tmp_path_factory.getbasetemp())
    config: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        at: Any = config
        for key in path:
            at = at.setdefault(key, {}) if isinstance(at, dict) else {}
        if isinstance(at, dict):
            at[last] = value
    try:
        ds.parse(config, flags).on(4)
    except ConfigError as error:
        assert str(error)
