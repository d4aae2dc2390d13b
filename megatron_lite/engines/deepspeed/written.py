"""DeepSpeed's configuration, written from ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.config.deepspeed.passed import read_passed
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig

STATE_NAMES: Mapping[str, Mapping[str, str]] = {
    "adam": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "sgd": {"momentum": "momentum_buffer"},
}
"""Optimizers that DeepSpeed's engine runs here; their states' names of ours -> in its optimizers."""


def deepspeed_config(
    optim: OptimConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    bucket_size: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """What deepspeed.initialize is given; keys of --deepspeed-keys come last.

    Micro batches are counted, gradients clipped and learning rates made by this project: a step of
    DeepSpeed is one that it is told.
    """
    in_fp32 = parallel.accumulate_allreduce_grads_in_fp32 or precision.name == "fp32"
    passed = read_passed(parallel.deepspeed_keys)
    written: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "bf16": {"enabled": precision.bf16},
        "data_types": {"grad_accum_dtype": "fp32" if in_fp32 else precision.name},
        "communication_data_type": "fp32" if in_fp32 else precision.name,
        "zero_optimization": _zero(parallel, bucket_size, on_gpu=on_gpu),
        "optimizer": _optimizer(optim, torchs="optimizer.type" not in passed),
    }
    for name, value in passed.items():
        *sections, key = name.split(".")
        place = written
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return written


def _zero(parallel: ParallelConfig, bucket_size: int, *, on_gpu: bool) -> dict[str, Any]:
    """The section zero_optimization."""
    found: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": parallel.overlap_grad_reduce,
        "reduce_bucket_size": bucket_size,
        "allgather_bucket_size": bucket_size + bucket_size % 2,
    }
    if parallel.optimizer_cpu_offload:
        found["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if parallel.zero_stage == 3:
            found["offload_optimizer"]["ratio"] = parallel.on_host
    return found


def _optimizer(optim: OptimConfig, *, torchs: bool) -> dict[str, Any]:
    """The section optimizer; torchs: Adam by torch's fused kernel, not one that DeepSpeed compiles first."""
    if optim.optimizer == "sgd":
        return {"type": "SGD", "params": {"lr": 0.0, "momentum": optim.sgd_momentum}}
    params = {"lr": 0.0, "betas": [optim.adam_beta1, optim.adam_beta2], "eps": optim.adam_eps}
    own = {"torch_adam": True, "fused": True} if torchs else {}
    return {"type": "AdamW", "params": {**params, **own}}
