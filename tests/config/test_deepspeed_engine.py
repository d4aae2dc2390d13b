"""--engine deepspeed beside a ds.json: its keys reach DeepSpeed as they are."""

from __future__ import annotations

import pytest

from megatron_lite.config.deepspeed.keys import KEYS
from megatron_lite.config.deepspeed.passed import PASSED, read_passed
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules.table import checked

FILE = """{
  "train_micro_batch_size_per_gpu": 2, "train_batch_size": 4,
  "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": true, "weight_decay": 0.1}},
  "zero_optimization": {
    "stage": 3, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": "auto",
    "offload_param": {"device": "cpu", "pin_memory": true},
    "elastic_checkpoint": true,
  },
}"""


def test_keys_reach_deepspeed_as_they_are(ds) -> None:
    parsed = ds.parse(FILE, "--engine deepspeed")
    assert read_passed(parsed.config.parallel.deepspeed_keys) == {
        "optimizer.type": "AdamW",
        "optimizer.params.torch_adam": True,
        "zero_optimization.reduce_bucket_size": 5e8,
        "zero_optimization.offload_param": {"device": "cpu", "pin_memory": True},
    }
    assert parsed.config.parallel.zero_stage == 3 and parsed.config.learning_rate.lr == 1e-4
    said = "\n".join(parsed.notices)
    assert "reduce_bucket_size" not in said and "torch_adam" not in said
    # "auto" leaves it to us; checkpoints are ours
    assert "stage3_prefetch_bucket_size" in said and "elastic_checkpoint" in said


def test_a_flag_wins_over_the_file(ds) -> None:
    key = "zero_optimization.reduce_bucket_size=1000"
    parsed = ds.parse(FILE, f"--engine deepspeed --deepspeed-keys {key}")
    passed = read_passed(parsed.config.parallel.deepspeed_keys)
    assert passed["zero_optimization.reduce_bucket_size"] == 1000


def test_without_its_engine_nothing_is_passed(ds) -> None:
    assert "offload_param" in ds.refusal(FILE)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--deepspeed-keys zero_optimization.sub_group_size=1", "is about --engine deepspeed; add"),
        ("--engine deepspeed --deepspeed-keys train_batch_size=4", "has a flag, or no say here"),
        ("--engine deepspeed --deepspeed-keys zero_optimization.sub_grup_size=4",
         "no such key; did you mean zero_optimization.sub_group_size?"),
        ("--engine deepspeed --deepspeed-keys zero_optimization.sub_group_size", "write KEY=VALUE"),
        ("--engine deepspeed --deepspeed-keys zero_optimization.sub_group_size=many",
         "write KEY=VALUE"),
    ],
)  # fmt: skip
def test_keys_that_are_not_its_own_are_refused(flags, said) -> None:
    with pytest.raises(ConfigError) as error:
        checked(parse(flags.split()), 2)
    assert said in str(error.value)


def test_every_key_that_is_passed_is_one_of_the_dialect() -> None:
    assert KEYS.keys() >= PASSED
