"""Which settings make trained weights another model; every field of every section is decided here.

    COMPARED    what a weight means depends on it: held against the checkpoint's whenever one is loaded
    ELSEWHERE   compared too, by those who know more of it than its value
    FREE        may differ from run to run: the same weights mean the same

A test walks all fields: a new one must be put into one of the three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_lite.config.flags.settings import settings
from megatron_lite.config.sections.model import SCALING, ModelConfig


@dataclass(frozen=True, slots=True)
class Trait:
    """A field of ModelConfig that is part of what the weights mean.

    of: the value that counts, whichever way it was asked for; None where it has no say.
    before: its value where a checkpoint does not name it, which is the default of the versions that
    did not know it and stays so when the default changes; REQUIRED where every version names it.
    then: what holds after --allow-model-change with its name; "" where no wish can make it work.
    """

    name: str
    of: Callable[[ModelConfig], object]
    before: object
    then: str = ""


REQUIRED = object()


def _scaling(name: str, before: object) -> Trait:
    """A parameter of --rope-scaling-type, which counts where the type has it."""

    def of(model: ModelConfig) -> object:
        rope = model.position_embedding_type == "rope"
        return getattr(model, name) if rope and model.rope_scaling_type in SCALING[name] else None

    return Trait(name, of, before, _OTHER_SCALE)


_OTHER_SCALE = (
    "channels turn at other speeds, as lengths beyond the trained one need; the loss is worse until "
    "the model was trained on"
)


def _if_rope(value: Callable[[ModelConfig], object]) -> Callable[[ModelConfig], object]:
    return lambda m: value(m) if m.position_embedding_type == "rope" else None


COMPARED: tuple[Trait, ...] = (
    Trait("num_layers", lambda m: m.num_layers, REQUIRED),
    Trait("hidden_size", lambda m: m.hidden_size, REQUIRED),
    Trait("num_attention_heads", lambda m: m.num_attention_heads, REQUIRED),
    Trait("kv_channels", lambda m: m.head_size, None),
    Trait("num_query_groups", lambda m: m.num_kv_heads, None),
    Trait("ffn_hidden_size", lambda m: m.ffn_size, None),
    Trait(
        "seq_length",
        lambda m: m.seq_length,
        REQUIRED,
        "samples have the new length; beyond the old one the model meets positions it has never seen",
    ),
    Trait(
        "max_position_embeddings",
        lambda m: m.num_positions if m.position_embedding_type == "learned_absolute" else None,
        None,
    ),
    Trait(
        "position_embedding_type",
        lambda m: m.position_embedding_type,
        "learned_absolute",
        "a learned table is left out; attention has to learn positions of the new kind",
    ),
    Trait(
        "rotary_base",
        _if_rope(lambda m: m.rotary_base),
        10000.0,
        "every channel turns at another speed: long contexts come into reach, and the loss is worse "
        "until the model was trained on",
    ),
    Trait(
        "rotary_percent",
        _if_rope(lambda m: m.rotary_percent),
        1.0,
        "other channels of a head are turned; the loss is worse until the model was trained on",
    ),
    Trait(
        "rotary_interleaved",
        _if_rope(lambda m: m.rotary_interleaved),
        False,
        "other channels of a head turn together; the loss is worse until the model was trained on",
    ),
    Trait("rope_scaling_type", _if_rope(lambda m: m.rope_scaling_type), "none", _OTHER_SCALE),
    _scaling("rope_scaling_factor", 8.0),
    _scaling("rope_original_length", 8192),
    _scaling("rope_low_freq_factor", 1.0),
    _scaling("rope_high_freq_factor", 4.0),
    _scaling("rope_beta_fast", 32.0),
    _scaling("rope_beta_slow", 1.0),
    _scaling("rope_whole_channels", True),
    Trait(
        "rope_attention_factor",
        _if_rope(lambda m: m.rotary_scale),
        None,
        "attention is sharper or flatter; the loss is worse until the model was trained on",
    ),
    _scaling("rope_short_factors", None),
    _scaling("rope_long_factors", None),
    _scaling("rope_clex_width", 1),
    Trait(
        "window_size",
        lambda m: f"{m.window - 1},0" if m.window else "-1,0",
        None,
        "attention sees fewer tokens, or some that it has never seen; the loss is worse until the "
        "model was trained on",
    ),
    Trait("normalization", lambda m: m.normalization, "LayerNorm"),
    Trait(
        "norm_epsilon",
        lambda m: m.norm_epsilon,
        1e-5,
        "norms of small activations come out differently; felt most in fp16 and bf16",
    ),
    Trait("qk_layernorm", lambda m: m.qk_layernorm, False),
    Trait("apply_layernorm_1p", lambda m: m.apply_layernorm_1p, False),
    Trait(
        "layernorm_bias",
        lambda m: m.layernorm_bias if m.normalization == "LayerNorm" else None,
        True,
    ),
    Trait("swiglu", lambda m: m.swiglu, False),
    Trait(
        "gelu",
        lambda m: None if m.swiglu else m.gelu,
        "tanh",
        "the two forms differ by less than 0.001 of an activation; the loss hardly moves",
    ),
    Trait("parallel_residual", lambda m: m.parallel_residual, False),
    Trait("add_bias_linear", lambda m: m.add_bias_linear, True),
    Trait("add_qkv_bias", lambda m: None if m.add_bias_linear else m.add_qkv_bias, False),
    Trait(
        "untie_embeddings_and_output_weights",
        lambda m: m.untie_embeddings_and_output_weights,
        False,
    ),
)

_HOW = {"group_query_attention": False}  # how num_query_groups counts
"""Further fields the compared ones are derived from, with their value where a checkpoint has none."""

_FOLLOWING = ("kv_channels", "num_query_groups", "ffn_hidden_size", "rope_attention_factor")
"""Those that follow from the others unless given."""

CHANGEABLE: Mapping[str, str] = MappingProxyType({t.name: t.then for t in COMPARED if t.then})
"""What --allow-model-change takes, and what then holds."""

_SCHEDULES, _DATA = (
    "train/schedules.py: the curves",
    "train/compatibility.py: the samples and their order",
)

ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "model.group_query_attention": "with num_query_groups",
        "model.vocab_size": "train/compatibility.py: the tokenizer's ids",
        "optim.optimizer": "train/resume.py: the state that is there",
        "optim.param_groups": "train/resume.py: as the schedules of which they are a part",
        "train.objective": "train/compatibility.py: what was optimised, and the head it needs",
        **dict.fromkeys(
            (
                "optim.weight_decay",
                "optim.start_weight_decay",
                "optim.end_weight_decay",
                "optim.weight_decay_incr_style",
                *(f"learning_rate.{name}" for name in (
                    "lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_decay_style",
                    "lr_decay_iters", "lr_decay_samples", "lr_restarts",
                    "lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init",
                    "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples",
                )),
            ),
            _SCHEDULES,
        ),
        **dict.fromkeys(
            ("train.seed", *(f"data.{name}" for name in (
                "data_path", "split", "data_args_path", "train_data_path", "valid_data_path",
                "test_data_path", "per_split_data_args_path", "mock_data", "dataloader_type",
                "data_sharding",
                "mid_level_dataset_surplus", "exact_blend_counts",
            ))),
            _DATA,
        ),
        **dict.fromkeys(
            (f"data.{name}" for name in (
                "tokenizer_type", "vocab_file", "merge_file", "tokenizer_model", "tiktoken_pattern",
                "tiktoken_num_special_tokens", "tiktoken_special_tokens", "chatglm_special_tokens",
            )),
            "train/compatibility.py: the tokenizer",
        ),
        **dict.fromkeys(
            ("lora.lora_rank", "lora.lora_alpha", "lora.lora_targets", "lora.lora_variant"),
            "train/compatibility.py: the adapters",
        ),
        "lora.lora_base": "train/adapters.py: told",  # the same weights, rounded otherwise
    }
)  # fmt: skip
"""section.field -> where it is compared."""

FREE: Mapping[str, str] = MappingProxyType({
    # only new weights and training steps notice; scores divided by the layer are multiplied again
    "model": """make_vocab_size_divisible_by hidden_dropout attention_dropout init_method_std
        apply_query_key_layer_scaling attention_softmax_in_fp32 s2_attention s2_group_size""",
    # numbers do not depend on the layout
    "parallel": """tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
        sequence_parallel pipeline_schedule num_layers_per_virtual_pipeline_stage
        num_virtual_stages_per_pipeline_rank decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split pipeline_model_parallel_layout use_tp_pp_dp_mapping
        zero_stage overlap_grad_reduce overlap_param_gather ddp_bucket_size
        optimizer_cpu_offload optimizer_offload_fraction
        accumulate_allreduce_grads_in_fp32 recompute_granularity recompute_method
        recompute_num_layers recompute_modules distribute_saved_activations logits_chunk_mib distributed_backend
        engine deepspeed_keys check_collectives distributed_timeout_minutes""",
    # values are converted, from fp32 masters where there are any
    "precision": """fp16 bf16 loss_scale initial_loss_scale min_loss_scale loss_scale_window
        hysteresis loss_scale_patience attention_backend kernel masked_softmax_fusion bias_gelu_fusion
        bias_swiglu_fusion bias_dropout_fusion gradient_accumulation_fusion torch_compile tf32""",
    "optim": """adam_beta1 adam_beta2 adam_eps sgd_momentum lion_beta1 lion_beta2 clip_grad sophia_beta1
        sophia_beta2 sophia_rho sophia_hessian_interval sophia_hessian_fraction
        sophia_clip_hessian_grad lisa_layers lisa_interval
        adafactor_scale_parameter adafactor_relative_step adafactor_warmup_init adafactor_beta1
        adafactor_decay_rate adafactor_clip_threshold adafactor_eps1 adafactor_eps2
        adam8bit_block_size use_precision_aware_optimizer
        exp_avg_dtype exp_avg_sq_dtype
        muon_momentum muon_nesterov muon_scale_mode muon_extra_scale_factor muon_num_ns_steps
        muon_coefficient_type muon_fp32_matmul_prec
        galore_rank galore_update_proj_gap galore_scale galore_proj_type""",
    "learning_rate": "override_opt_param_scheduler use_checkpoint_opt_param_scheduler",
    # dropout is a way of training; whose adapters were the first ones is past
    "lora": "lora_dropout lora_load",
    # masks and positions within samples are a way of training, as dropout is
    "data": """data_cache_path num_workers reset_position_ids reset_attention_mask eod_mask_loss
        sft_packing verify_data mmap_bin_files allow_tokenizer_mismatch""",
    "train": """micro_batch_size global_batch_size rampup_batch_size step_batch_size_schedule
        train_iters train_samples train_epochs epoch_samples neftune_alpha deterministic_mode
        eval_interval eval_iters exit_interval exit_duration_in_mins exit_signal_handler
        kill_switch_file exit_code_on_preemption skip_train manual_gc manual_gc_interval
        calculate_per_token_loss dry_run rehearse all_ranks world_size use_cpu print_state_hash""",
    "guards": """check_for_nan_in_loss_and_grad on_non_finite rerun_mode loss_spike_factor
        grad_norm_spike_factor spike_window on_spike check_replicas""",
    "checkpoint": """save load save_interval save_checkpoints ckpt_step finetune keep_optim load_optim load_rng
        save_optim save_rng exit_on_missing_checkpoint allow_data_change allow_model_change keep_last keep_every
        async_save save_failure overwrite_run""",
    "telemetry": """log_interval log_format tensorboard_dir tensorboard_log_interval tensorboard_queue_size
        log_throughput log_params_norm log_num_zeros_in_grad log_timers_to_tensorboard
        log_batch_size_to_tensorboard log_learning_rate_to_tensorboard
        log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard log_memory_to_tensorboard
        log_world_size_to_tensorboard log_straggler straggler_minmax_count log_memory_interval
        timing_log_level timing_log_option wandb_project wandb_exp_name wandb_save_dir wandb_entity
        profile profile_step_start profile_step_end profile_ranks profile_timeline
        use_pytorch_profiler""",
})  # fmt: skip
"""section -> its fields that say nothing of what a trained weight means."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A trait that two models do not share."""

    trait: Trait
    before: object
    now: object

    def __str__(self) -> str:
        flag = settings()[f"model.{self.trait.name}"].flag
        return f"{flag}: {_show(self.before)} -> {_show(self.now)}"


def model_differences(before: ModelConfig, now: ModelConfig) -> list[Difference]:
    """What makes weights of the one mean something else in the other."""
    found = []
    for trait in COMPARED:
        old, new = trait.of(before), trait.of(now)
        if old == new or old is None or new is None:
            continue
        asked = (getattr(before, trait.name), getattr(now, trait.name))
        if trait.name in _FOLLOWING and asked == (None, None):
            continue  # it only follows from another one, which is told
        found.append(Difference(trait, old, new))
    return found


def defaults_before() -> dict[str, object]:
    """Field -> its value where a checkpoint does not name it; those that it must name are left out."""
    return {t.name: t.before for t in COMPARED if t.before is not REQUIRED} | _HOW


def named(text: str | None) -> list[str]:
    """The fields of --allow-model-change: names as in files or as flags, with commas between."""
    words = (word.strip() for word in (text or "").split(","))
    return [word.removeprefix("--").replace("-", "_") for word in words if word]


def not_changeable(names: Iterable[str]) -> list[str]:
    """Those of the names that --allow-model-change cannot take."""
    return [name for name in names if name not in CHANGEABLE]


def _show(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)
