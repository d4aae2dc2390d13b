"""Short names of what many tests change in tiny_config: `{TP: 2, SP: True}`."""

from __future__ import annotations

TP, PP = "parallel__tensor_model_parallel_size", "parallel__pipeline_model_parallel_size"
SP, ZERO = "parallel__sequence_parallel", "parallel__zero_stage"
HOST = "parallel__optimizer_cpu_offload"
SCHEDULE = "parallel__pipeline_schedule"
CHUNKS = "parallel__num_virtual_stages_per_pipeline_rank"
BF16 = "precision__bf16"
UNTIED = "model__untie_embeddings_and_output_weights"
BF16_MOMENTS = {
    "optim__use_precision_aware_optimizer": True,
    "optim__exp_avg_dtype": "bf16", "optim__exp_avg_sq_dtype": "bf16",
}  # fmt: skip
FULL = {
    "parallel__recompute_granularity": "full", "parallel__recompute_method": "uniform",
    "parallel__recompute_num_layers": 1,
}  # fmt: skip
"""Every block computed again."""
