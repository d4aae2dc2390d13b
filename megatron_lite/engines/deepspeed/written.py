"""DeepSpeed's configuration, written from ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig

STATE_NAMES: Mapping[str, Mapping[str, str]] = {
    "adam": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    "sgd": {"momentum": "momentum_buffer"},
    "lion": {"exp_avg": "exp_avg"},
}
"""Optimizers that DeepSpeed's engine runs here; their states' names of ours -> in its optimizers."""


def _optimizer(optim: OptimConfig) -> dict[str, Any]:
    """The section optimizer."""
    match optim.optimizer:
        case "adam":
            kind, own = "AdamW", {
                "betas": [optim.adam_beta1, optim.adam_beta2], "eps": optim.adam_eps,
                "torch_adam": True,
            }  # fmt: skip
        case "sgd":
            kind, own = "SGD", {"momentum": optim.sgd_momentum}
        case _:
            kind, own = "Lion", {"betas": [optim.lion_beta1, optim.lion_beta2]}
    return {"type": kind, "params": {"lr": 0.0, **own}}


def deepspeed_config(
    optim: OptimConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, bucket_size: int
) -> dict[str, Any]:
    """What deepspeed.initialize is given.

    Micro batches are counted, clipped gradients made and losses scaled by this project: a step of
    DeepSpeed is one that it is told.
    """
    in_fp32 = parallel.accumulate_allreduce_grads_in_fp32 or precision.name == "fp32"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "bf16": {"enabled": precision.bf16},
        "data_types": {"grad_accum_dtype": "fp32" if in_fp32 else precision.name},
        "communication_data_type": "fp32" if in_fp32 else precision.name,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket_size,
            "allgather_bucket_size": bucket_size + bucket_size % 2,
        },
        "optimizer": _optimizer(optim),
    }
