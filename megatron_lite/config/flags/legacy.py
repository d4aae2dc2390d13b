"""Flags of Megatron-LM and Megatron-DeepSpeed that are no config field here, as one table.

Each is mapped to fields, accepted with a notice because it changes nothing here, or refused with
the way out.  docs/FLAGS.md is generated from this table and from the sections.
Flags that other spellings of a field cover are aliases in the sections, not rows here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megatron_lite.config.flags.accepted import NO_OPS
from megatron_lite.config.flags.legacy_flag import Legacy, mapped
from megatron_lite.config.flags.megatron_deepspeed import (
    DEEPSPEED_MAPPED,
    DEEPSPEED_NO_OPS,
    DEEPSPEED_REFUSED,
)
from megatron_lite.config.flags.refused import REFUSED

_FLASH = {"precision.attention_backend": "flash"}
_FULL = {"parallel.recompute_granularity": "full"}
_ONE_LAYER = {"parallel.recompute_num_layers": 1}

_MAPPED = (
    mapped(
        "--save-retain-interval",
        "means --keep-every with --keep-last 1",
        takes_value=True,
        value_to="checkpoint.keep_every",
        unless_given={"checkpoint.keep_last": 1},
    ),
    mapped(
        "--recompute-activations",
        "means --recompute-granularity selective",
        sets={"parallel.recompute_granularity": "selective"},
    ),
    mapped(
        "--checkpoint-activations",
        "means --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        sets=_FULL,
        unless_given={"parallel.recompute_method": "uniform", **_ONE_LAYER},
    ),
    mapped(
        "--checkpoint-num-layers",
        "means --recompute-num-layers",
        takes_value=True,
        value_to="parallel.recompute_num_layers",
    ),
    mapped(
        "--activations-checkpoint-method",
        "means --recompute-granularity full with this --recompute-method, one layer at a time",
        takes_value=True,
        values=("uniform", "block"),
        value_to="parallel.recompute_method",
        sets=_FULL,
        unless_given=_ONE_LAYER,
    ),
    mapped(
        "--activations-checkpoint-num-layers",
        "means --recompute-num-layers",
        takes_value=True,
        value_to="parallel.recompute_num_layers",
    ),
    mapped(
        "--distribute-checkpointed-activations",
        "means --distribute-saved-activations",
        sets={"parallel.distribute_saved_activations": True},
    ),
    *(
        mapped(flag, "means --attention-backend flash", sets=_FLASH)
        for flag in (
            "--use-flash-attn",
            "--use-flash-attn-v1",
            "--use-flash-attn-v2",
            "--use-flash-attn-triton",
            "--use-flash-attn-builder",
        )
    ),
    mapped(
        "--use-rotary-position-embeddings",
        "means --position-embedding-type rope",
        sets={"model.position_embedding_type": "rope"},
    ),
    mapped(
        "--use-rope-scaling",
        "means --rope-scaling-type llama3",
        sets={"model.rope_scaling_type": "llama3"},
    ),
    mapped(
        "--rotary-seq-len-interpolation-factor",
        "means --rope-scaling-type linear with this --rope-scaling-factor",
        takes_value=True,
        value_to="model.rope_scaling_factor",
        sets={"model.rope_scaling_type": "linear"},
    ),
    mapped(
        "--openai-gelu",
        "means --gelu tanh, which is the same approximation",
        sets={"model.gelu": "tanh"},
    ),
    mapped(
        "--grad-reduce-in-bf16",
        "means --no-accumulate-allreduce-grads-in-fp32",
        unless_given={"parallel.accumulate_allreduce_grads_in_fp32": False},
        needs={"precision.bf16": (True,)},
        otherwise="it is about --bf16, which is not given",
    ),
    mapped(
        "--encoder-num-layers",
        "means --num-layers",
        takes_value=True,
        value_to="model.num_layers",
    ),
    mapped(
        "--enable-zbh1-pipeline",
        "means --pipeline-schedule zb-h1",
        sets={"parallel.pipeline_schedule": "zb-h1"},
    ),
    mapped(
        "--num-key-value-heads",
        "means --group-query-attention --num-query-groups",
        takes_value=True,
        value_to="model.num_query_groups",
        sets={"model.group_query_attention": True},
    ),
    mapped(
        "--no-pipeline-parallel",
        "means --pipeline-model-parallel-size 1",
        sets={"parallel.pipeline_model_parallel_size": 1},
    ),
    mapped(
        "--check-for-spiky-loss",
        "means --loss-spike-factor 10",
        unless_given={"guards.loss_spike_factor": 10.0},
    ),
    mapped(
        "--train-tokens",
        "means --train-samples of so many tokens; of both, the smaller counts",
        takes_value=True,
        tokens_to="train.train_samples",
    ),
    mapped(
        "--lr-decay-tokens",
        "means --lr-decay-samples of so many tokens",
        takes_value=True,
        tokens_to="learning_rate.lr_decay_samples",
    ),
    mapped(
        "--lr-warmup-tokens",
        "means --lr-warmup-samples of so many tokens",
        takes_value=True,
        tokens_to="learning_rate.lr_warmup_samples",
    ),
)

LEGACY: Mapping[str, Legacy] = MappingProxyType(
    {
        row.flag: row
        for rows in (
            (*_MAPPED, *NO_OPS, *REFUSED),
            (*DEEPSPEED_MAPPED, *DEEPSPEED_NO_OPS, *DEEPSPEED_REFUSED),
        )
        for row in rows
    }
)
"""Flag, with dashes -> what happens to it."""

MEGATRON_DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "model.seq_length": "required",
        "model.max_position_embeddings": "required",
        "model.num_query_groups": "1 (ours: needed with --group-query-attention)",
        "model.attention_softmax_in_fp32": "off",
        "model.apply_query_key_layer_scaling": "off (Megatron-DeepSpeed: on)",
        "parallel.accumulate_allreduce_grads_in_fp32": "off, on with --bf16",
        "parallel.zero_stage": "0 or 1, by --use-distributed-optimizer (Megatron-DeepSpeed: the same flag)",
        "parallel.distributed_backend": "nccl",
        "parallel.overlap_grad_reduce": "off",
        "train.micro_batch_size": "required",
        "train.eval_interval": "none (Megatron-DeepSpeed: 1000)",
        "train.exit_signal_handler": "off",
        "train.calculate_per_token_loss": "off",
        "guards.rerun_mode": "validate_results",
        "data.tokenizer_type": "none (pretrain_gpt sets GPT2BPETokenizer)",
        "telemetry.log_throughput": "off",
        "telemetry.use_pytorch_profiler": "off",
    }
)
"""section.field -> Megatron-LM's default, where it differs from this project's."""

OURS_ONLY = frozenset(
    {
        "parallel.pipeline_schedule",
        "parallel.check_collectives",
        "precision.torch_compile",
        "parallel.engine",
        "parallel.deepspeed_keys",
        "parallel.logits_chunk_mib",
        "precision.tf32",
        "precision.loss_scale_patience",
        "model.gelu",
        "model.rope_scaling_type",
        "model.rope_original_length",
        "model.rope_low_freq_factor",
        "model.rope_high_freq_factor",
        "model.rope_attention_factor",
        "model.rope_short_factors",
        "model.rope_long_factors",
        "model.rope_clex_width",
        "model.parallel_residual",
        "guards.on_non_finite",
        "guards.loss_spike_factor",
        "guards.grad_norm_spike_factor",
        "guards.spike_window",
        "guards.on_spike",
        "guards.check_replicas",
        "data.exact_blend_counts",
        "train.dry_run",
        "train.exit_code_on_preemption",
        "train.objective",
        "train.rehearse",
        "train.all_ranks",
        "train.world_size",
        "train.use_cpu",
        "train.print_state_hash",
        "checkpoint.allow_data_change",
        "checkpoint.keep_last",
        "checkpoint.keep_every",
        "checkpoint.save_failure",
    }
)
"""Fields Megatron has no flag for."""
