"""The range of every numeric setting, as one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_lite.config.flags.settings import FlagSetting, settings
from megatron_lite.config.sections.run import RunConfig


@dataclass(frozen=True, slots=True)
class ValueRange:
    """Numbers from `low` to `high`, without the ends that are `open_low`, `open_high`."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether value lies inside; NaN never does."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def words(self) -> str:
        """How a message says it: `at least 1 and below 2`."""
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'below' if self.open_high else 'at most'} {_number(self.high)}"
        return f"{low} and {high}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and value < 1e15 else f"{value:g}"


_SIZE = ValueRange(1, 2**31 - 1)
_COUNT = ValueRange(0, 2**31 - 1)
_SAMPLES = ValueRange(1, 2**48)
_SAMPLES_OR_NONE = ValueRange(0, 2**48)
_SHARE = ValueRange(0.0, 1.0, open_high=True)
_POSITIVE = ValueRange(0.0, 1e38, open_low=True)
_NOT_NEGATIVE = ValueRange(0.0, 1e38)
_BELOW_ONE = ValueRange(0.0, 1.0, open_low=True, open_high=True)

RANGES: Mapping[str, ValueRange] = {
    "model.num_layers": ValueRange(1, 100_000),
    "model.hidden_size": _SIZE,
    "model.num_attention_heads": _SIZE,
    "model.seq_length": _SIZE,
    "model.max_position_embeddings": _SIZE,
    "model.ffn_hidden_size": _SIZE,
    "model.kv_channels": _SIZE,
    "model.num_query_groups": _SIZE,
    "model.s2_group_size": _SIZE,
    "model.vocab_size": _SIZE,
    "model.make_vocab_size_divisible_by": _SIZE,
    "model.rotary_base": _POSITIVE,
    "model.rotary_percent": ValueRange(0.0, 1.0, open_low=True),
    "model.rope_scaling_factor": ValueRange(1.0, 1e6),
    "model.rope_original_length": ValueRange(2, 2**31 - 1),
    "model.rope_low_freq_factor": _POSITIVE,
    "model.rope_high_freq_factor": _POSITIVE,
    "model.rope_beta_fast": _POSITIVE,
    "model.rope_beta_slow": _POSITIVE,
    "model.rope_attention_factor": _POSITIVE,
    "model.rope_clex_width": _SIZE,
    "model.norm_epsilon": _BELOW_ONE,
    "model.hidden_dropout": _SHARE,
    "model.attention_dropout": _SHARE,
    "model.init_method_std": _POSITIVE,
    "parallel.tensor_model_parallel_size": _SIZE,
    "parallel.pipeline_model_parallel_size": _SIZE,
    "parallel.context_parallel_size": _SIZE,
    "parallel.num_layers_per_virtual_pipeline_stage": _SIZE,
    "parallel.num_virtual_stages_per_pipeline_rank": _SIZE,
    "parallel.decoder_first_pipeline_num_layers": _SIZE,
    "parallel.decoder_last_pipeline_num_layers": _SIZE,
    "parallel.optimizer_offload_fraction": ValueRange(0.0, 1.0, open_low=True),
    "parallel.ddp_bucket_size": _SAMPLES,
    "parallel.recompute_num_layers": _SIZE,
    "parallel.logits_chunk_mib": _POSITIVE,
    "parallel.distributed_timeout_minutes": ValueRange(0.0, 1e6, open_low=True),
    "precision.loss_scale": _POSITIVE,
    "precision.initial_loss_scale": _POSITIVE,
    "precision.min_loss_scale": _POSITIVE,
    "precision.loss_scale_window": _SIZE,
    "precision.hysteresis": _SIZE,
    "precision.loss_scale_patience": _SIZE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.start_weight_decay": _NOT_NEGATIVE,
    "optim.end_weight_decay": _NOT_NEGATIVE,
    "optim.adam_beta1": _SHARE,
    "optim.adam_beta2": _SHARE,
    "optim.adam_eps": _POSITIVE,
    "optim.sophia_beta1": _SHARE,
    "optim.sophia_beta2": _SHARE,
    "optim.sophia_rho": _POSITIVE,
    "optim.sophia_hessian_interval": _SIZE,
    "optim.sophia_hessian_fraction": ValueRange(0.0, 1.0, open_low=True),
    "optim.sophia_clip_hessian_grad": _NOT_NEGATIVE,
    "optim.lion_beta1": _SHARE,
    "optim.lion_beta2": _SHARE,
    "optim.sgd_momentum": _SHARE,
    "optim.adam8bit_block_size": ValueRange(8, 1 << 20),
    "optim.adafactor_beta1": _SHARE,
    "optim.adafactor_decay_rate": ValueRange(-1.0, 0.0, open_high=True),
    "optim.adafactor_clip_threshold": _POSITIVE,
    "optim.adafactor_eps1": _POSITIVE,
    "optim.adafactor_eps2": _NOT_NEGATIVE,
    "optim.clip_grad": _NOT_NEGATIVE,
    "optim.muon_momentum": _SHARE,
    "optim.muon_extra_scale_factor": _POSITIVE,
    "optim.muon_num_ns_steps": _SIZE,
    "optim.galore_rank": _SIZE,
    "optim.galore_update_proj_gap": _SIZE,
    "optim.galore_scale": _POSITIVE,
    "optim.lisa_layers": _SIZE,
    "optim.lisa_interval": _SIZE,
    "learning_rate.lr": _POSITIVE,
    "learning_rate.min_lr": _NOT_NEGATIVE,
    "learning_rate.decoupled_lr": _POSITIVE,
    "learning_rate.decoupled_min_lr": _NOT_NEGATIVE,
    "learning_rate.lr_decay_iters": _SIZE,
    "learning_rate.lr_decay_samples": _SAMPLES,
    "learning_rate.lr_restarts": _COUNT,
    "learning_rate.lr_warmup_fraction": _SHARE,
    "learning_rate.lr_warmup_iters": _COUNT,
    "learning_rate.lr_warmup_samples": _SAMPLES_OR_NONE,
    "learning_rate.lr_warmup_init": _NOT_NEGATIVE,
    "learning_rate.lr_wsd_decay_iters": _SIZE,
    "learning_rate.lr_wsd_decay_samples": _SAMPLES,
    "lora.lora_rank": _SIZE,
    "lora.lora_alpha": _POSITIVE,
    "lora.lora_dropout": _SHARE,
    "data.mid_level_dataset_surplus": ValueRange(0.0, 1.0),
    "data.tiktoken_num_special_tokens": ValueRange(7, 1 << 20),
    "data.num_workers": ValueRange(0, 1024),
    "train.micro_batch_size": _SIZE,
    "train.global_batch_size": _SIZE,
    "train.rampup_batch_size": _SAMPLES_OR_NONE,
    "train.train_iters": _SIZE,
    "train.train_samples": _SAMPLES,
    "train.train_epochs": ValueRange(1, 10**6),  # each is shuffled at the start
    "train.epoch_samples": _SAMPLES,
    "train.neftune_alpha": ValueRange(0.0, 1e3),
    "train.seed": _COUNT,
    "train.world_size": _SIZE,
    "train.eval_interval": _SIZE,
    "train.eval_iters": _COUNT,
    "train.exit_interval": _SIZE,
    "train.exit_duration_in_mins": ValueRange(0.0, 1e9, open_low=True),
    "train.manual_gc_interval": _COUNT,
    "guards.loss_spike_factor": _NOT_NEGATIVE,
    "guards.grad_norm_spike_factor": _NOT_NEGATIVE,
    "guards.spike_window": ValueRange(2, 100_000),
    "guards.check_replicas": _COUNT,
    "checkpoint.save_interval": _COUNT,
    "checkpoint.ckpt_step": _COUNT,
    "checkpoint.keep_last": _SIZE,
    "checkpoint.keep_every": _SIZE,
    "telemetry.log_interval": _SIZE,
    "telemetry.log_memory_interval": _SIZE,
    "telemetry.straggler_minmax_count": _SIZE,
    "telemetry.tensorboard_log_interval": _SIZE,
    "telemetry.tensorboard_queue_size": _SIZE,
    "telemetry.profile_step_start": _COUNT,
    "telemetry.profile_step_end": _COUNT,
    "telemetry.profile_ranks": _COUNT,
}
"""section.field -> the values that can work at all."""


def out_of_range(config: RunConfig) -> Iterator[tuple[str, str]]:
    """section.field and the problem, for every number outside its range."""
    for key, allowed in RANGES.items():
        setting = settings()[key]
        value = getattr(getattr(config, setting.section), setting.name)
        if setting.required and value == setting.default:
            yield key, f"{setting.flag} is required, at least 1; give it, or a model with --preset"
            continue
        for item in value if isinstance(value, list) else [value]:
            if item is not None and not _fits(setting, item, allowed):
                yield key, f"{setting.flag} {item} must be {allowed.words()}"


def _fits(setting: FlagSetting, value: object, allowed: ValueRange) -> bool:
    """bool is an int in Python, and a config made in code may hold anything."""
    kinds = (int,) if setting.kind is int else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and allowed.holds(value)
