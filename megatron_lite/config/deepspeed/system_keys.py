"""Keys of a ds.json that say where things lie and what is logged: ZeRO, offload, layout, monitors."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lite.config.deepspeed.key import (
    DeepSpeedKey,
    apart,
    harmless,
    mapped_key,
    positive,
    real,
    refused_keys,
    truth,
    whole,
)

_BUFFERS = (
    "sizes and copies of DeepSpeed's buffers; here gradients lie in buckets of --ddp-bucket-size "
    "from "
    "the start"
)
_STAGE_3 = "how DeepSpeed's stage 3 gathers; here weights are gathered layer by layer, two ahead of their use"
_OFFLOADED = "has a say only with offload to NVMe, which is refused"
_PINNED = (
    "the buffers through which an offloaded update is copied are pinned, and nothing else need be"
)
NO_NVME = "state lies on the device or in host memory"
_NOT_BUILT = "not built: drop it, or set enabled to false"


def _share(value: object) -> float:
    share = real(value)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"takes a number above 0 and at most 1, got {share:g}")
    return share


def _stage(value: object) -> int:
    stage = whole(value)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"takes 0, 1, 2 or 3, got {stage}")
    return stage


ZERO_KEYS: tuple[DeepSpeedKey, ...] = (
    apart(
        "zero_optimization.stage",
        "means --zero-stage",
        read=_stage,
    ),
    mapped_key("zero_optimization.overlap_comm", "parallel.overlap_grad_reduce", truth),
    *harmless(
        "zero_optimization",
        "contiguous_gradients reduce_scatter reduce_bucket_size allgather_partitions "
        "allgather_bucket_size "
        "use_multi_rank_bucket_allreduce round_robin_gradients parameter_alignment sub_group_size "
        "legacy_stage1 "
        "ignore_unused_parameters",
        _BUFFERS,
    ),
    *harmless(
        "zero_optimization", "compute_grad_norm", "the norm is always computed: guards look at it"
    ),
    *harmless(
        "zero_optimization",
        "load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint",
        "checkpoints hold fp32 masters and load at every layout",
    ),
    *harmless(
        "zero_optimization",
        "stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold "
        "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
        "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params "
        "stage3_allgather_sequential "
        "stage3_partition_stream_chunk_size prefetch_bucket_size param_persistence_threshold "
        "model_persistence_threshold max_live_parameters max_reuse_distance "
        "gather_16bit_weights_on_model_save "
        "module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential "
        "memory_efficient_linear override_module_apply log_trace_cache_warnings "
        "enable_sanity_checks "
        "mics_hierarchical_params_gather zero_quantized_nontrainable_weights "
        "save_muon_momentum_buffer_in_memory",
        _STAGE_3,
    ),
    *harmless("zero_optimization", "leaf_module", _STAGE_3, whole=True),
    *refused_keys("zero_optimization", "zero_hpz_partition_size", "not built: drop it", 1, 0),
    *refused_keys("zero_optimization", "mics_shard_size", "not built: drop it", -1),
    *refused_keys(
        "zero_optimization",
        "zero_quantized_weights zero_quantized_gradients",
        "would change the numbers, and is not built: drop it",
        False,
    ),
    *refused_keys(
        "zero_optimization", "zeropp_loco_param zenflow", "not built: drop it", None, whole=True
    ),
    apart(
        "zero_optimization.offload_optimizer.device",
        f'"cpu" means --optimizer-cpu-offload; "nvme" is refused: {NO_NVME}',
    ),
    apart(
        "zero_optimization.offload_optimizer.ratio",
        "means --optimizer-offload-fraction, at every stage",
        read=_share,
    ),
    *harmless("zero_optimization.offload_optimizer", "pin_memory", _PINNED),
    *harmless(
        "zero_optimization.offload_optimizer",
        "nvme_path buffer_count fast_init pipeline_read pipeline_write",
        _OFFLOADED,
    ),
    *harmless(
        "zero_optimization.offload_optimizer",
        "super_offload cpuadam_cores_perc",
        "an offloaded update has the cores of its host, shared out between the ranks",
    ),
    *refused_keys(
        "zero_optimization",
        "offload_param",
        "weights stay on the device: drop it; --zero-stage 3 shares them between data-parallel ranks",
        None,
        whole=True,
        switch="device",
    ),
    *refused_keys(
        "zero_optimization",
        "cpu_offload_param",
        "weights stay on the device: drop it; --zero-stage 3 shares them between data-parallel ranks",
        False,
        None,
    ),
    apart(
        "zero_optimization.cpu_offload",
        'the old spelling of offload_optimizer {"device": "cpu"}',
        read=truth,
    ),
    *harmless("zero_optimization", "cpu_offload_use_pin_memory", _PINNED),
    *harmless(
        "",
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        "every optimizer here runs with every stage",
    ),
    *harmless("", "aio", _OFFLOADED, whole=True),
)

LAYOUT_KEYS: tuple[DeepSpeedKey, ...] = (
    mapped_key(
        "tensor_parallel.autotp_size",
        "parallel.tensor_model_parallel_size",
        lambda value: max(whole(value), 1),
        say="means --tensor-model-parallel-size; 0 is 1",
    ),
    *harmless(
        "tensor_parallel",
        "preset_model partition_config tp_overlap_comm vocab_parallel_lm_head "
        "use_default_specs layer_specs",
        "the layers of this project know how they are cut",
    ),
    mapped_key("sequence_parallel_size", "parallel.context_parallel_size", positive),
    *refused_keys("", "expert_parallel", _NOT_BUILT, whole=True, switch="enabled"),
    *harmless("", "use_data_before_expert_parallelism", "there are no experts", False),
    mapped_key("pipeline.stages", "parallel.pipeline_model_parallel_size", positive),
    *refused_keys(
        "pipeline",
        "partition",
        "layers are dealt evenly; see --pipeline-model-parallel-layout",
        "best",
        "uniform",
        "parameters",
    ),
    *harmless(
        "pipeline",
        "seed_layers pipe_partitioned grad_partitioned use_reentrant",
        "weights do not depend on the layout, and messages are as large as they must be",
    ),
    *refused_keys(
        "pipeline",
        "activation_checkpoint_interval",
        "use --recompute-granularity full --recompute-num-layers",
        0,
    ),
    mapped_key(
        "activation_checkpointing.partition_activations",
        "parallel.distribute_saved_activations",
        truth,
        say=(
            "means --distribute-saved-activations, where --recompute-granularity is full and tp "
            "is above 1"
        ),
    ),
    *refused_keys(
        "activation_checkpointing",
        "cpu_checkpointing",
        "kept activations stay on the device: drop it",
        False,
    ),
    *harmless(
        "activation_checkpointing",
        "contiguous_memory_optimization number_checkpoints synchronize_checkpoint_boundary profile",
        "--recompute-* says what is recomputed; this is only how",
    ),
)

LOG_KEYS: tuple[DeepSpeedKey, ...] = (
    mapped_key(
        "steps_per_print",
        "telemetry.log_interval",
        positive,
        flag_wins=True,
        say="means --log-interval; that flag wins, as Megatron-DeepSpeed has both",
    ),
    mapped_key(
        "wall_clock_breakdown",
        "telemetry.timing_log_level",
        lambda value: int(truth(value)),
        flag_wins=True,
        say="means --timing-log-level 1; that flag wins",
    ),
    *harmless("", "memory_breakdown", "see --log-memory-interval", False),
    *harmless("", "dump_state", "config.yaml of the run folder holds the whole config", False),
    *harmless("", "log_level", "the log has one level; warnings are marked"),
    apart(
        "tensorboard.enabled",
        "means --tensorboard-dir of output_path and job_name below each other; that flag wins",
        read=truth,
    ),
    apart("tensorboard.output_path", "see tensorboard.enabled"),
    apart("tensorboard.job_name", "see tensorboard.enabled"),
    apart(
        "wandb.enabled",
        "means --wandb-project of project, --wandb-entity of team, --wandb-exp-name of group or "
        "project; flags win",
        read=truth,
    ),
    apart("wandb.project", "see wandb.enabled"),
    apart("wandb.team", "see wandb.enabled"),
    apart("wandb.group", "see wandb.enabled"),
    *harmless(
        "",
        "csv_monitor",
        "metrics.jsonl in the run folder holds all numbers of every step",
        whole=True,
        switch="enabled",
    ),
    *harmless(
        "",
        "comet",
        "nothing is sent there: metrics.jsonl, TensorBoard and Weights & Biases hold the run",
        whole=True,
        switch="enabled",
    ),
    *harmless(
        "",
        "comms_logger",
        "--profile-timeline records messages, tools/plan.py counts their bytes",
        whole=True,
        switch="enabled",
    ),
    *harmless(
        "",
        "flops_profiler",
        "TFLOP/s are in the log line, tools/plan.py has the parts",
        whole=True,
        switch="enabled",
    ),
    *harmless("", "timers", "timers do not make the step wait", whole=True),
    mapped_key("disable_python_gc", "train.manual_gc", truth),
    *harmless("", "dataloader_drop_last", "every step is a whole batch"),
    *harmless("", "vocabulary_size", "--vocab-size and the tokenizer say the vocabulary"),
    *harmless("", "graph_harvesting", "changes the speed only", False),
    *harmless(
        "checkpoint",
        "load_universal tag_validation",
        "every checkpoint loads at every layout, and all ranks agree on its iteration",
    ),
    *harmless(
        "checkpoint",
        "parallel_write writer checkpoint_serialization",
        "every rank writes its part; see --async-save",
        whole=True,
    ),
    *refused_keys(
        "checkpoint",
        "use_node_local_storage",
        "all ranks write into one folder, --save: drop it",
        False,
    ),
)

NOT_BUILT_KEYS: tuple[DeepSpeedKey, ...] = (
    *refused_keys(
        "",
        "hybrid_engine data_efficiency curriculum_learning progressive_layer_drop eigenvalue "
        "quantize_training nebula",
        _NOT_BUILT,
        whole=True,
        switch="enabled",
    ),
    *refused_keys(
        "",
        "compression_training weight_quantization datastates_ckpt",
        "not built: drop it",
        whole=True,
    ),
    *refused_keys("", "sparse_attention", "not built; see --window-size: drop it", whole=True),
    *refused_keys(
        "",
        "elasticity",
        "say the batch itself; a run resumes with any number of ranks as it is",
        whole=True,
        switch="enabled",
    ),
    *refused_keys(
        "",
        "autotuning",
        "tools/plan.py --search ranks all layouts that fit: drop it",
        whole=True,
        switch="enabled",
    ),
    *refused_keys("", "compile", "see --torch-compile: drop it", whole=True, switch="deepcompile"),
)

SYSTEM_KEYS: Sequence[DeepSpeedKey] = (*ZERO_KEYS, *LAYOUT_KEYS, *LOG_KEYS, *NOT_BUILT_KEYS)
