"""Flags of Megatron-LM and Megatron-DeepSpeed that are no field of ours, as one table.

Each is mapped to fields, accepted with a notice because it changes nothing here, or refused with
the way out.  docs/FLAGS.md is generated from this table and from the sections.
Flags that other spellings of a field cover are aliases in the sections, not rows here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Legacy:
    """What happens to one flag of the Megatron family that is not ours."""

    flag: str
    kind: Literal["mapped", "no-op", "refused"]
    say: str
    """The notice, or the way out of the error."""
    takes_value: bool = False
    values: tuple[str, ...] = ()
    """The values that are accepted; empty for any."""
    sets: Mapping[str, object] = field(default_factory=dict)
    """section.field -> value, as if its own flag had been given."""
    unless_given: Mapping[str, object] = field(default_factory=dict)
    """The same, but a flag of the field itself wins."""
    value_to: str | None = None
    """section.field that receives the value."""
    tokens_to: str | None = None
    """section.field that receives the value, in tokens, as samples (rounded up)."""


def _mapped(flag: str, say: str, **what: object) -> Legacy:
    return Legacy(flag=flag, kind="mapped", say=say, **what)  # type: ignore[arg-type]


def _no_op(flag: str, say: str, *values: str, takes_value: bool = False) -> Legacy:
    takes_value = takes_value or bool(values)
    return Legacy(flag=flag, kind="no-op", say=say, takes_value=takes_value, values=values)


def _refused(flag: str, way_out: str) -> Legacy:
    return Legacy(flag=flag, kind="refused", say=way_out)


_FLASH = {"precision.attention_backend": "flash"}
_FULL = {"parallel.recompute_granularity": "full"}
_ONE_LAYER = {"parallel.recompute_num_layers": 1}

_MAPPED = (
    _mapped(
        "--save-retain-interval",
        "means --keep-every with --keep-last 1",
        takes_value=True,
        value_to="checkpoint.keep_every",
        unless_given={"checkpoint.keep_last": 1},
    ),
    _mapped(
        "--recompute-activations",
        "means --recompute-granularity selective",
        sets={"parallel.recompute_granularity": "selective"},
    ),
    _mapped(
        "--checkpoint-activations",
        "means --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        sets=_FULL,
        unless_given={"parallel.recompute_method": "uniform", **_ONE_LAYER},
    ),
    _mapped(
        "--checkpoint-num-layers",
        "means --recompute-num-layers",
        takes_value=True,
        value_to="parallel.recompute_num_layers",
    ),
    _mapped(
        "--activations-checkpoint-method",
        "means --recompute-granularity full with this --recompute-method, one layer at a time",
        takes_value=True,
        values=("uniform", "block"),
        value_to="parallel.recompute_method",
        sets=_FULL,
        unless_given=_ONE_LAYER,
    ),
    _mapped(
        "--activations-checkpoint-num-layers",
        "means --recompute-num-layers",
        takes_value=True,
        value_to="parallel.recompute_num_layers",
    ),
    _mapped(
        "--distribute-checkpointed-activations",
        "means --distribute-saved-activations",
        sets={"parallel.distribute_saved_activations": True},
    ),
    *(
        _mapped(flag, "means --attention-backend flash", sets=_FLASH)
        for flag in (
            "--use-flash-attn",
            "--use-flash-attn-v1",
            "--use-flash-attn-v2",
            "--use-flash-attn-triton",
            "--use-flash-attn-builder",
        )
    ),
    _mapped(
        "--use-rotary-position-embeddings",
        "means --position-embedding-type rope",
        sets={"model.position_embedding_type": "rope"},
    ),
    _mapped(
        "--openai-gelu",
        "means --gelu tanh, which is the same approximation",
        sets={"model.gelu": "tanh"},
    ),
    _mapped(
        "--num-key-value-heads",
        "means --group-query-attention --num-query-groups",
        takes_value=True,
        value_to="model.num_query_groups",
        sets={"model.group_query_attention": True},
    ),
    _mapped(
        "--no-pipeline-parallel",
        "means --pipeline-model-parallel-size 1",
        sets={"parallel.pipeline_model_parallel_size": 1},
    ),
    _mapped(
        "--check-for-spiky-loss",
        "means --loss-spike-factor 10",
        unless_given={"guards.loss_spike_factor": 10.0},
    ),
    _mapped(
        "--train-tokens",
        "means --train-samples of so many tokens; of both, the smaller counts",
        takes_value=True,
        tokens_to="train.train_samples",
    ),
    _mapped(
        "--lr-decay-tokens",
        "means --lr-decay-samples of so many tokens",
        takes_value=True,
        tokens_to="learning_rate.lr_decay_samples",
    ),
    _mapped(
        "--lr-warmup-tokens",
        "means --lr-warmup-samples of so many tokens",
        takes_value=True,
        tokens_to="learning_rate.lr_warmup_samples",
    ),
)

_NO_OPS = (
    _no_op("--data-impl", "token files are always memory mapped", "mmap", "infer"),
    _no_op("--mmap-warmup", "the operating system reads mapped files as needed"),
    _no_op("--DDP-impl", "there is one data-parallel engine", "local", "torch"),
    _no_op(
        "--transformer-impl",
        "the kernel table chooses; see --attention-backend",
        "local",
        "transformer_engine",
    ),
    _no_op("--use-mcore-models", "there is one implementation of each model"),
    _no_op("--use-legacy-models", "there is one implementation of each model"),
    _no_op("--use-cpu-initialization", "weights do not depend on where they are drawn"),
    _no_op(
        "--no-async-tensor-model-parallel-allreduce", "changes the overlap only, not the result"
    ),
    _no_op("--no-overlap-p2p-communication", "changes the overlap only, not the result"),
    _no_op("--overlap-p2p-communication", "receives are always posted early"),
    _no_op("--no-persist-layer-norm", "the kernel table chooses the norm's kernel"),
    _no_op("--no-rope-fusion", "the kernel table chooses the rotary kernel"),
    _no_op("--cross-entropy-loss-fusion", "the loss never gathers the logits in any case"),
    _no_op("--tp-comm-overlap", "changes the overlap only, not the result"),
    _no_op("--decoupled-weight-decay", "adam is AdamW and sgd's decay is coupled, as in Megatron"),
    _no_op("--create-attention-mask-in-dataloader", "masks are made where attention runs"),
    _no_op("--no-create-attention-mask-in-dataloader", "masks are made where attention runs"),
    _no_op("--attention-mask-in-fp32", "what is masked is minus infinity in every format"),
    _no_op(
        "--deepspeed-activation-checkpointing",
        "recomputation needs no DeepSpeed; --checkpoint-activations or --recompute-* decide",
    ),
    _no_op("--check-for-large-grads", "--grad-norm-spike-factor is on unless it is 0"),
    _no_op("--disable-straggler-on-startup", "the straggler report only reads clocks"),
    _no_op(
        "--straggler-ctrlr-port",
        "no port is opened: --log-straggler says whether there is a report",
        takes_value=True,
    ),
    _no_op("--repeated-dataloader", "training data repeat by themselves"),
    _no_op("--universal-checkpoint", "every checkpoint loads at every parallel layout"),
    _no_op(
        "--log-optimizer-states-to-tensorboard",
        "not written; --log-params-norm and the gradient norm are",
    ),
    _no_op("--use-dist-ckpt", "there is one checkpoint format, for every layout"),
    _no_op("--auto-detect-ckpt-format", "there is one checkpoint format, for every layout"),
    _no_op(
        "--ckpt-format",
        "there is one checkpoint format, for every layout",
        "torch_dist",
        "torch",
        "torch_dcp",
        "fsdp_dtensor",
    ),
    _no_op("--dist-ckpt-format", "there is one checkpoint format", "torch_dist", "zarr"),
    _no_op("--num-experts", "one expert is the dense model", "1"),
    _no_op("--expert-model-parallel-size", "one expert is the dense model", "1"),
    _no_op("--ds-sequence-parallel-size", "1 changes nothing", "1"),
    _no_op("--local-rank", "the launcher's LOCAL_RANK counts", takes_value=True),
)

_REFUSED = (
    _refused("--batch-size", "renamed: use --micro-batch-size"),
    _refused("--warmup", "renamed: use --lr-warmup-fraction"),
    _refused("--model-parallel-size", "renamed: use --tensor-model-parallel-size"),
    _refused(
        "--deepspeed",
        "there is no DeepSpeed here; drop it, with --deepspeed_config, and use "
        "--use-distributed-optimizer to share optimizer state",
    ),
    _refused(
        "--deepspeed-config",
        "there is no DeepSpeed here; say with flags what the file says (--micro-batch-size, "
        "--global-batch-size, --fp16 or --bf16, --clip-grad)",
    ),
    _refused(
        "--zero-stage",
        "stage 0 is the default, stage 1 is --use-distributed-optimizer, 2 and 3 do not exist here",
    ),
    _refused("--no-decoupled-weight-decay", "adam is AdamW here; drop it"),
    _refused("--cpu-optimizer", "the optimizer runs where the weights are; drop it"),
    _refused("--partition-activations", "use --distribute-saved-activations with full recompute"),
    _refused("--checkpoint-in-cpu", "saved activations stay on the device; drop it"),
    _refused(
        "--train-data-exact-num-epochs",
        "say the length with --train-samples (documents' tokens / --seq-length per epoch)",
    ),
    _refused("--load-tag", "use --ckpt-step ITERATION"),
    _refused("--decrease-batch-size-if-needed", "give batch sizes that divide by micro batch * dp"),
    _refused("--train-weighted-split-paths", "use --train-data-path w1 P1 w2 P2 ..."),
    _refused("--valid-weighted-split-paths", "use --valid-data-path w1 P1 w2 P2 ..."),
    _refused("--test-weighted-split-paths", "use --test-data-path w1 P1 w2 P2 ..."),
    _refused("--rotary-interleaved", "rotary pairs are the two halves of a head; drop it"),
    _refused("--rotary-seq-len-interpolation-factor", "not built; use --rotary-base"),
    _refused("--use-rope-scaling", "not built; use --rotary-base"),
    _refused("--rope-scaling-factor", "not built; use --rotary-base"),
    _refused("--apply-layernorm-1p", "not built; --normalization LayerNorm is the plain one"),
    _refused("--squared-relu", "not built; the choices are GELU and --swiglu"),
    _refused("--use-torch-fsdp2", "not built; use --use-distributed-optimizer"),
    _refused("--data-parallel-sharding-strategy", "not built; use --use-distributed-optimizer"),
    _refused("--fp8-format", "not built; use --bf16"),
    _refused("--fp8-recipe", "not built; use --bf16"),
    _refused("--full-validation", "not built; use --eval-iters"),
    _refused("--multi-latent-attention", "not built; use --group-query-attention"),
    _refused("--no-initialization", "weights are always drawn or loaded; drop it"),
)

LEGACY: Mapping[str, Legacy] = MappingProxyType(
    {row.flag: row for row in (*_MAPPED, *_NO_OPS, *_REFUSED)}
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
"""section.field -> Megatron-LM's default, where it is not ours."""

OURS_ONLY = frozenset(
    {
        "parallel.pipeline_schedule",
        "parallel.check_collectives",
        "precision.tf32",
        "precision.loss_scale_patience",
        "model.gelu",
        "guards.on_non_finite",
        "guards.loss_spike_factor",
        "guards.grad_norm_spike_factor",
        "guards.spike_window",
        "guards.on_spike",
        "guards.check_replicas",
        "data.exact_blend_counts",
        "train.dry_run",
        "train.exit_code_on_preemption",
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
