"""Flags that Megatron-DeepSpeed and BLOOM's fork of it have beside Megatron-LM's."""

from __future__ import annotations

from megatron_lite.config.flags.legacy_flag import Legacy, mapped, no_op, refused

_VALUE = {"takes_value": True}
_EXPERTS = "has a say only with --num-experts, which is refused above 1"
_SEQUENCE = "has a say only with --ds-sequence-parallel-size, which is refused above 1"
_BUILT = "not built: drop it"
_INDICES = "indices are built from the data and kept; use --data-cache-path"
_GENERATES = "use tools/generate.py or tools/serve.py"

DEEPSPEED_MAPPED: tuple[Legacy, ...] = (
    mapped(
        "--override-lr-scheduler",
        "means --override-opt-param-scheduler",
        sets={"learning_rate.override_opt_param_scheduler": True},
    ),
    mapped(
        "--rotary-position-embeddings-theta",
        "means --rotary-base",
        value_to="model.rotary_base",
        **_VALUE,
    ),
    mapped(
        "--kill-switch-path",
        "means --kill-switch-file",
        value_to="train.kill_switch_file",
        **_VALUE,
    ),
)

DEEPSPEED_NO_OPS: tuple[Legacy, ...] = (
    *(
        no_op(flag, _EXPERTS, **_VALUE)
        for flag in (
            "--moe-expert-parallel-size", "--moe-loss-coeff", "--moe-train-capacity-factor",
            "--moe-eval-capacity-factor", "--moe-min-capacity", "--topk", "--expert-interval",
            "--mlp-type",
        )
    ),
    *(
        no_op(flag, _EXPERTS)
        for flag in (
            "--disable-moe-token-dropping", "--disable-moe-top2-2nd-expert-sampling",
            "--create-moe-param-group", "--enable-expert-tensor-parallelism", "--use-tutel",
        )
    ),
    *(
        no_op(flag, _SEQUENCE)
        for flag in (
            "--force-ds-sequence-parallel", "--ds-sequence-parallel-fpdt",
            "--ds-sequence-parallel-fpdt-offloading",
        )
    ),
    no_op("--ds-sequence-parallel-fpdt-chunk-size", _SEQUENCE, **_VALUE),
    no_op("--ds-fused-adam", "how the update is computed, not what it is"),
    no_op("--cpu-torch-adam", "how the update is computed, not what it is"),
    no_op("--mem-efficient-ln", "the kernel table chooses the norm's kernel", **_VALUE),
    no_op("--custom-token-counting", "every sample has --seq-length tokens"),
    no_op("--enable-zbh1-exact-semantics", "every schedule gives the numbers of 1f1b"),
    no_op("--sync-tp-duplicated-parameters", "what tp ranks hold twice gets one summed gradient"),
    no_op("--abort-on-unmet-fused-kernel-constraints", "the kernel table chooses what is usable"),
    no_op("--log-level", "the log has one level; warnings are marked", **_VALUE),
    no_op("--log-level-replica", "the log has one level; warnings are marked", **_VALUE),
)  # fmt: skip

DEEPSPEED_REFUSED: tuple[Legacy, ...] = (
    *(
        refused(flag, _BUILT)
        for flag in (
            "--curriculum-learning-legacy", "--data-efficiency-curriculum-learning", "--random-ltd",
            "--compression-training", "--kd", "--mos", "--kd-alpha-ce", "--kd-beta-ce", "--kd-temp",
            "--num-layers-teacher", "--hidden-size-teacher", "--num-attention-heads-teacher",
            "--num-experts-teacher", "--load-teacher", "--use-dataset-only", "--embed-layernorm",
        )
    ),
    *(
        refused(flag, _INDICES)
        for flag in (
            "--train-idx-path", "--train-desc-path", "--train-doc-idx-path",
            "--train-sample-idx-path", "--train-shuffle-idx-path",
        )
    ),
    refused("--return-data-index", "samples have no index of their own in a batch: drop it"),
    refused("--inference", _GENERATES),
    refused("--ds-inference", _GENERATES),
    refused("--profile-name", "use --profile and --save"),
    refused("--reset-iteration", "use --finetune: weights alone, from step 0"),
    refused("--no-load-lr-state", "use --override-opt-param-scheduler: flags say the curve"),
    refused("--enable-each-rank-log", "use --save: each rank's failure is in errors/"),
    refused("--pad-vocab-size-to", "use --vocab-size and --make-vocab-size-divisible-by"),
)  # fmt: skip
