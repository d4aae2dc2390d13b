"""Keys of a ds.json that DeepSpeed itself gets as they are, where --engine deepspeed runs it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from megatron_lite.config.deepspeed.keys import KEYS, near_key
from megatron_lite.config.errors import ConfigError

PASSED_FIELD = "parallel.deepspeed_keys"
ENGINE_FIELD, DEEPSPEED = "parallel.engine", "deepspeed"


def _within(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


PASSED = frozenset(
    [
        *_within(
            "zero_optimization",
            "contiguous_gradients reduce_scatter reduce_bucket_size allgather_partitions "
            "allgather_bucket_size use_multi_rank_bucket_allreduce sub_group_size "
            "ignore_unused_parameters stage3_max_live_parameters stage3_max_reuse_distance "
            "stage3_prefetch_bucket_size stage3_param_persistence_threshold "
            "stage3_model_persistence_threshold stage3_use_all_reduce_for_fetch_params "
            "stage3_allgather_sequential prefetch_bucket_size param_persistence_threshold "
            "model_persistence_threshold max_live_parameters max_reuse_distance "
            "use_all_reduce_for_fetch_params allgather_sequential log_trace_cache_warnings "
            "offload_param",
        ),
        *_within("zero_optimization.offload_optimizer", "pin_memory ratio cpuadam_cores_perc"),
        *_within("optimizer", "type params.torch_adam params.fused params.foreach"),
        "comms_logger",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "communication_data_type",
        "memory_breakdown",
        "dump_state",
        "log_level",
    ]
)
"""What decides how DeepSpeed's engine works; numbers of the run are the flags' in any case."""


def passed_key(name: str, value: object) -> str:
    """As --deepspeed-keys has it."""
    return f"{name}={json.dumps(value)}"


def read_passed(texts: Iterable[str]) -> dict[str, object]:
    """KEY=VALUE, values in JSON, by key; ConfigError for what DeepSpeed's engine does not take."""
    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in PASSED:
            why = (
                "has a flag, or no say here; docs/guides/deepspeed.md lists which keys are passed on"
                if name in KEYS
                else f"no such key{near_key(name)}"
            )
            raise ConfigError(f"--deepspeed-keys {text}: {why}")
        try:
            if not equals:
                raise ValueError
            found[name] = json.loads(value)
        except ValueError:
            raise ConfigError(
                f"--deepspeed-keys {text}: write KEY=VALUE, the value as a ds.json has it"
            ) from None
    return found
