"""Keys of a ds.json that say how a step is made: batch, precision, optimizer, scheduler, gradients."""

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

SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
"""Types of a scheduler that have a curve here."""


def _scale(value: object) -> float | None:
    """A loss scale; 0 is the dynamic one."""
    number = real(value)
    return number or None


def _power(value: object) -> float:
    power = whole(value)
    if not 0 <= power <= 64:
        raise ValueError(f"takes the power of two of the first loss scale, 0 to 64, got {power}")
    return 2.0**power


_COPIES = "the engine of this project keeps gradients and weights in buffers of its own"
_MEAN = "gradients are summed in fp32 and divided once, by the step's tokens"
_BATCH = (
    "train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x dp; two give "
    "the third"
)
_LIKE_TORCH = "how the update is computed, not what it is"

BATCH_KEYS = (
    apart("train_batch_size", f"means --global-batch-size; {_BATCH}"),
    apart("train_micro_batch_size_per_gpu", f"means --micro-batch-size; {_BATCH}"),
    apart("gradient_accumulation_steps", f"micro batches per step and dp rank; {_BATCH}"),
)

PRECISION_KEYS: tuple[DeepSpeedKey, ...] = (
    mapped_key("fp16.enabled", "precision.fp16", truth),
    mapped_key(
        "fp16.loss_scale",
        "precision.loss_scale",
        _scale,
        under="fp16.enabled",
        say="means --loss-scale; 0 is the dynamic one",
    ),
    mapped_key(
        "fp16.initial_scale_power",
        "precision.initial_loss_scale",
        _power,
        under="fp16.enabled",
        say=(
            "means --initial-loss-scale of two to this; 16, as in DeepSpeed, where fp16 is "
            "enabled without it"
        ),
    ),
    mapped_key(
        "fp16.loss_scale_window", "precision.loss_scale_window", positive, under="fp16.enabled"
    ),
    mapped_key("fp16.hysteresis", "precision.hysteresis", positive, under="fp16.enabled"),
    mapped_key("fp16.min_loss_scale", "precision.min_loss_scale", real, under="fp16.enabled"),
    *harmless(
        "fp16", "auto_cast fused_mode", "inputs are token ids: there is nothing to cast", False
    ),
    *refused_keys(
        "fp16",
        "consecutive_hysteresis",
        "hysteresis is refilled where the scale is raised: drop it",
        False,
    ),
    *refused_keys("fp16", "fp16_master_weights_and_grads", "masters are fp32: drop it", False),
    mapped_key("bf16.enabled", "precision.bf16", truth),
    mapped_key("bfloat16.enabled", "precision.bf16", truth, say="the old spelling of bf16.enabled"),
    *harmless(
        "bf16",
        "immediate_grad_update check_grad_overflow",
        "gradients are accumulated at once, in fp32; guards look at their norm",
    ),
    *refused_keys("bf16", "bf16_master_weights_and_grads", "masters are fp32: drop it", False),
    *refused_keys(
        "bf16",
        "bf16_optimizer_states",
        "masters are fp32; Adam's moments in bf16 are --use-precision-aware-optimizer "
        "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16",
        False,
    ),
    *refused_keys("", "amp", "use fp16 or bf16", whole=True, switch="enabled"),
    *refused_keys(
        "", "torch_autocast", "use bf16, whose masters are fp32", whole=True, switch="enabled"
    ),
    apart(
        "data_types.grad_accum_dtype",
        "fp32 means --accumulate-allreduce-grads-in-fp32, the default; the format of the "
        "parameters means its opposite",
    ),
    *refused_keys(
        "data_types",
        "param_dtype buffer_dtype",
        "fp16 and bf16 say the parameters' format: drop it",
        None,
    ),
)

OPTIMIZER_KEYS: tuple[DeepSpeedKey, ...] = (
    apart(
        "optimizer.type",
        "means --optimizer: Adam and AdamW are adam, SGD is sgd, Lion lion; others are refused by name",
    ),
    apart("optimizer.params.lr", "means --lr; without a scheduler it is constant"),
    apart(
        "optimizer.params.betas",
        "means --adam-beta1 --adam-beta2, of Lion --lion-beta1 --lion-beta2 (0.9 and 0.99, as in DeepSpeed, "
        "where it is given without)",
    ),
    mapped_key("optimizer.params.eps", "optim.adam_eps", real),
    mapped_key(
        "optimizer.params.weight_decay",
        "optim.weight_decay",
        real,
        say=(
            "means --weight-decay, of matrices: biases and norms have none; 0, as in DeepSpeed, "
            "where an optimizer is given without it"
        ),
    ),
    mapped_key(
        "optimizer.params.momentum",
        "optim.sgd_momentum",
        real,
        say="means --sgd-momentum; 0, as in torch, where SGD is given without it",
    ),
    *harmless(
        "optimizer.params",
        "torch_adam fused foreach capturable differentiable set_grad_none fp32_optimizer_states",
        _LIKE_TORCH,
    ),
    *harmless("optimizer", "legacy_fusion", _LIKE_TORCH),
    *refused_keys(
        "optimizer.params",
        "adam_w_mode",
        "adam is AdamW here, with decoupled weight decay: drop it, or use weight_decay 0",
        True,
    ),
    *refused_keys(
        "optimizer.params", "bias_correction", "Adam corrects its bias here: drop it", True
    ),
    *refused_keys("optimizer.params", "amsgrad nesterov maximize", "not built: drop it", False),
    *refused_keys("optimizer.params", "dampening", "not built: drop it", 0, 0.0),
    *refused_keys(
        "optimizer.params",
        "max_grad_norm",
        "write gradient_clipping, at the top of the file",
        0,
        0.0,
    ),
    *refused_keys(
        "optimizer.params",
        "freeze_step cuda_aware comm_backend_name coeff_beta factor_max factor_min "
        "factor_threshold max_coeff min_coeff var_freeze_step var_update_scaler local_step_scaler "
        "local_step_clipper muon_lr adam_lr ns_method per_head_muon",
        "belongs to an optimizer that is not built: drop it",
    ),
)


def _of(types: str, say: str) -> str:
    return f"of {types}: {say}"


SCHEDULER_KEYS: tuple[DeepSpeedKey, ...] = (
    apart(
        "scheduler.type",
        "WarmupLR is --lr-decay-style constant, WarmupDecayLR linear to 0, WarmupCosineLR cosine; "
        "OneCycle and "
        "LRRangeTest are refused",
    ),
    apart(
        "scheduler.params.warmup_min_lr", _of("WarmupLR, WarmupDecayLR", "means --lr-warmup-init")
    ),
    apart(
        "scheduler.params.warmup_max_lr",
        _of(
            "WarmupLR, WarmupDecayLR",
            "means --lr, and is the peak itself, no factor of the optimizer's",
        ),
    ),
    apart(
        "scheduler.params.warmup_num_steps",
        "means --lr-warmup-iters (of --train-samples: as many steps' samples)",
    ),
    apart(
        "scheduler.params.warmup_type",
        'the warm-up is linear; without the key DeepSpeed\'s is "log": a line says so; "log" itself is refused',
    ),
    apart(
        "scheduler.params.total_num_steps",
        _of("WarmupDecayLR, WarmupCosineLR", "means --lr-decay-iters"),
    ),
    apart(
        "scheduler.params.warmup_min_ratio",
        _of("WarmupCosineLR", "means --lr-warmup-init of this share of --lr"),
    ),
    apart(
        "scheduler.params.cos_min_ratio",
        _of("WarmupCosineLR", "means --min-lr of this share of --lr"),
    ),
    *refused_keys(
        "scheduler.params", "last_batch_iteration", "a checkpoint knows where it is: drop it", -1
    ),
    *refused_keys(
        "scheduler.params",
        "cycle_min_lr cycle_max_lr cycle_first_step_size cycle_second_step_size "
        "cycle_first_stair_count cycle_second_stair_count cycle_momentum cycle_min_mom "
        "cycle_max_mom "
        "decay_step_size decay_lr_rate decay_mom_rate",
        "belongs to OneCycle, which is not built; WarmupDecayLR with the same peak is nearest",
    ),
    *refused_keys(
        "scheduler.params",
        "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate "
        "lr_range_test_staircase",
        "belongs to LRRangeTest, which looks for a learning rate and trains nothing: use some "
        "runs of --train-iters",
    ),
)

GRADIENT_KEYS: tuple[DeepSpeedKey, ...] = (
    mapped_key("gradient_clipping", "optim.clip_grad", real),
    *harmless("", "prescale_gradients gradient_predivide_factor", _MEAN, False, 1.0, 1),
    *refused_keys(
        "", "gradient_allreduce_op", "the loss is a mean over the step's tokens: drop it", "mean"
    ),
    *harmless("", "sparse_gradients", "gradients of the embedding are dense: the same sums", False),
    *refused_keys(
        "",
        "communication_data_type seq_parallel_comm_data_type",
        "gradients are reduced in the format they are accumulated in; see "
        "data_types.grad_accum_dtype",
        None,
        "fp32",
        "none",
    ),
    *refused_keys(
        "",
        "managed_gradient_accumulation",
        "this program counts micro batches itself: drop it",
        True,
    ),
    *harmless("", "disable_allgather", _COPIES, False),
)

TRAINING_KEYS: Sequence[DeepSpeedKey] = (
    *BATCH_KEYS,
    *PRECISION_KEYS,
    *OPTIMIZER_KEYS,
    *SCHEDULER_KEYS,
    *GRADIENT_KEYS,
)
