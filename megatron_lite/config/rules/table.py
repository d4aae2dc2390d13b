"""Every rule a config must obey; all run, and all failures are reported together."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megatron_lite.config.errors import ConfigError, all_together
from megatron_lite.config.flags.parser import ParsedFlags
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.rules import (
    engines,
    layout,
    length,
    lora,
    rotary,
    training,
    tuning,
    updating,
)
from megatron_lite.config.rules.ranges import out_of_range
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.run import RunConfig

_TP = "parallel.tensor_model_parallel_size"
_PP = "parallel.pipeline_model_parallel_size"
_CP = "parallel.context_parallel_size"
_WORLD = (_TP, _PP, _CP)
_LAYERS = "model.num_layers"
_HIDDEN = "model.hidden_size"
_HEADS = "model.num_attention_heads"
_GROUPS = "model.num_query_groups"
_CHANNELS = (_HIDDEN, _HEADS, "model.kv_channels", "model.rotary_percent")
_SEQ = "model.seq_length"
_BATCH = (*_WORLD, "train.micro_batch_size", "train.global_batch_size")
_STAGES = (
    _LAYERS,
    _PP,
    "parallel.num_layers_per_virtual_pipeline_stage",
    "parallel.num_virtual_stages_per_pipeline_rank",
    "parallel.decoder_first_pipeline_num_layers",
    "parallel.decoder_last_pipeline_num_layers",
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: yields its problems; not asked while a number it `needs` is out of its range."""

    find: Callable[[RunConfig, int], Iterator[str]]
    needs: tuple[str, ...] = ()


OF_THE_MODEL: tuple[Rule, ...] = (
    Rule(layout.heads_divide_hidden, (_HIDDEN, _HEADS)),
    Rule(layout.query_groups, (_HEADS, _GROUPS)),
    Rule(layout.tensor_parallel_heads, (_TP, _HIDDEN, _HEADS, _GROUPS, "model.ffn_hidden_size")),
    Rule(rotary.rotary_channels, _CHANNELS),
    Rule(rotary.rope_scaling, _CHANNELS),
    Rule(layout.attention_window),
    Rule(layout.shifted_groups, (_SEQ, _HEADS, "model.s2_group_size")),
    Rule(layout.positions, (_SEQ, "model.max_position_embeddings")),
)

OF_SIZES: tuple[Rule, ...] = (
    Rule(layout.world, _WORLD),
    *OF_THE_MODEL,
    Rule(layout.pipeline_stages, _STAGES),
    Rule(layout.whole_groups, (*_STAGES, *_BATCH, "train.rampup_batch_size")),
    Rule(layout.sequence_parallel, (_SEQ, _TP, _CP)),
    Rule(layout.global_batch, _BATCH),
    Rule(layout.ramp_up, (*_BATCH, "train.rampup_batch_size")),
    Rule(layout.step_schedule, (*_BATCH, _SEQ)),
    Rule(length.one_length),
    Rule(training.objective),
    Rule(lora.adapter_settings, ("lora.lora_rank", "lora.lora_alpha")),
    Rule(updating.groups),
    Rule(updating.read_settings),
    Rule(updating.drawn_blocks, (_LAYERS, "optim.lisa_layers", "optim.lisa_interval")),
    Rule(lora.packed_base, (_TP, _HIDDEN, _HEADS, "model.kv_channels", "model.ffn_hidden_size")),
    Rule(layout.one_batch, (*_BATCH, "train.rampup_batch_size", "train.train_samples")),
)
"""What a Blueprint needs to come out."""

CONFIG_RULES: tuple[Rule, ...] = (
    *OF_SIZES,
    Rule(layout.split_backward),
    Rule(training.precision),
    Rule(training.kernels),
    Rule(training.spikes, ("guards.loss_spike_factor", "guards.grad_norm_spike_factor")),
    Rule(training.planning),
    Rule(tuning.own_borders),
    Rule(length.length),
    Rule(length.countable_epochs),
    Rule(training.learning_rate, ("learning_rate.lr",)),
    Rule(length.warm_up),
    Rule(length.stable_decay),
    Rule(length.restarts),
    Rule(training.scheduler_on_resume),
    Rule(training.weight_decay),
    Rule(training.moments),
    Rule(updating.adafactor),
    Rule(updating.state_on_host),
    Rule(training.per_token_loss),
    Rule(training.recompute, (_SEQ, _TP)),
    Rule(training.parameter_gather),
    Rule(engines.deepspeed, (_TP, _PP)),
    Rule(training.data_source),
    Rule(training.tokenizer),
    Rule(training.saving),
    Rule(training.loading),
    Rule(lora.base_of_adapters),
    Rule(training.profiling),
    Rule(training.weights_and_biases),
)


@dataclass(frozen=True, slots=True)
class NotYet:
    """A setting that is understood but not built."""

    flag: str
    asked: Callable[[RunConfig, int], bool]
    instead: str


def _dp_above_one(config: RunConfig, world_size: int) -> bool:
    return (layout.data_parallel_size(config, world_size) or 1) > 1


NOT_YET: tuple[NotYet, ...] = (
    NotYet(
        "--context-parallel-size above 1",
        lambda c, w: c.parallel.cp > 1,
        "use --tensor-model-parallel-size with --sequence-parallel for long sequences",
    ),
)
"""Delete a line when its feature is built."""


def not_yet(config: RunConfig, world_size: int) -> list[str]:
    """What the config asks for that is not implemented, in words; a plan can be made all the same."""
    return [
        f"{row.flag} is not built yet; {row.instead}"
        for row in NOT_YET
        if row.asked(config, world_size)
    ]


def problems(config: RunConfig, world_size: int, *, built: bool = True) -> list[str]:
    """Everything that keeps this config from running on so many ranks, in words.

    built=False: what is only not built yet is no problem (the planner's view).
    """
    ranges = dict(out_of_range(config))
    found = [*ranges.values(), *_broken(CONFIG_RULES, config, world_size, ranges)]
    if built and ranges.keys().isdisjoint(_WORLD):
        found += not_yet(config, world_size)
    return found


def _broken(
    rules: Iterable[Rule], config: RunConfig, world_size: int, bad: Container[str]
) -> Iterator[str]:
    """The problems of all rules but those that need a number out of its range."""
    for rule in rules:
        if not any(key in bad for key in rule.needs):
            yield from rule.find(config, world_size)


def model_problems(model: ModelConfig) -> list[str]:
    """Everything that keeps such a model from being built at all, on one rank, in words."""
    config = RunConfig(model=model)
    found = [problem for key, problem in out_of_range(config) if key.startswith("model.")]
    return found or [problem for rule in OF_THE_MODEL for problem in rule.find(config, 1)]


def lora_problems(asked: LoraConfig, model: ModelConfig) -> list[str]:
    """Everything that keeps such adapters from being built beside a model, in words."""
    config = RunConfig(model=model, lora=asked)
    found = [problem for key, problem in out_of_range(config) if key.startswith("lora.")]
    rules = (lora.adapter_settings, lora.packed_base)
    return found or [problem for rule in rules for problem in rule(config, 1)]


def size_problems(config: RunConfig, world_size: int) -> list[str]:
    """Everything that keeps sizes from coming out even over so many ranks, in words."""
    ranges = dict(out_of_range(config))
    found = [words for key, words in ranges.items() if key.partition(".")[0] in _SIZED]
    return [*found, *_broken(OF_SIZES, config, world_size, ranges)]


_SIZED = ("model", "parallel", "train", "lora", "optim")
"""Sections whose numbers are sizes."""


def check_sizes(config: RunConfig, world_size: int) -> None:
    """Raise one ConfigError that lists every size that does not come out even."""
    _require_ranks(world_size)
    _refuse(size_problems(config, world_size), world_size)


def check_config(config: RunConfig, world_size: int, *, built: bool = True) -> None:
    """Raise one ConfigError that lists every broken rule; pure, so it runs anywhere."""
    _require_ranks(world_size)
    _refuse(problems(config, world_size, built=built), world_size)


def checked(parsed: ParsedFlags, world_size: int) -> ParsedFlags:
    """The flags on so many ranks, all rules obeyed; of what a ds.json says the error names its key, too."""
    parsed = parsed.on(world_size)
    try:
        check_config(parsed.config, world_size)
    except ConfigError as error:
        keys = "".join(f"\n  {line}" for line in parsed.keys_of(str(error)))
        raise ConfigError(f"{error}{keys}") from None
    return parsed


def _require_ranks(world_size: int) -> None:
    if world_size < 1:
        raise ConfigError(f"--world-size: {world_size} ranks; at least 1 is needed")


def _refuse(found: Sequence[str], world_size: int) -> None:
    if found:
        raise all_together(found, f"with this config on {world_size} ranks")


OFF_CHANGES_NOTHING: Mapping[str, str] = MappingProxyType(
    {
        "precision.bias_swiglu_fusion": "bias and SwiGLU are separate kernels in any case",
        "precision.bias_dropout_fusion": "bias, dropout and addition are separate in any case",
        "checkpoint.load_rng": "the random generator is counter-based: there is no RNG state",
        "checkpoint.save_rng": "the random generator is counter-based: there is no RNG state",
    }
)
"""section.field of a bool -> why switching it off changes nothing; nothing else reads the field."""


def notices(config: RunConfig, world_size: int) -> tuple[str, ...]:
    """One line for each setting of a valid config that changes nothing on so many ranks."""
    p = config.parallel
    found: list[str] = []
    for key, why in OFF_CHANGES_NOTHING.items():
        section, name = key.split(".")
        if not getattr(getattr(config, section), name):
            found.append(f"{settings()[key].off[0]}: changes nothing; {why}")
    if not config.precision.bias_gelu_fusion and (
        config.model.swiglu or config.model.gelu == "tanh"
    ):
        why = "--swiglu has no GELU" if config.model.swiglu else "--gelu tanh says its form"
        found.append(f"--no-bias-gelu-fusion: changes nothing; {why}")
    if config.optim.use_precision_aware_optimizer and config.optim.moments == ("fp32", "fp32"):
        found.append(
            "--use-precision-aware-optimizer: changes nothing; moments are fp32 without "
            "--exp-avg-dtype and --exp-avg-sq-dtype"
        )
    if config.optim.optimizer == "galore" and config.optim.galore_rank >= config.model.hidden_size:
        found.append(
            f"--galore-rank {config.optim.galore_rank}: not below --hidden-size "
            f"{config.model.hidden_size}, so that states take more than AdamW's"
        )
    if config.model.add_qkv_bias and config.model.add_bias_linear:
        found.append("--add-qkv-bias: changes nothing; all linear layers have biases")
    if config.data.mock_data and config.data.split is not None:
        found.append(
            f"--split {config.data.split}: ignored, --mock-data's documents are dealt 1,1,1 as "
            "Megatron's are"
        )
    if config.precision.fp16 and config.guards.on_non_finite != "stop":
        found.append("--on-non-finite: changes nothing with --fp16, which skips every overflow")
    if p.sequence_parallel and p.tp == 1:
        found.append("--sequence-parallel: nothing to split at tensor-parallel size 1; off")
    if p.check_collectives and world_size == 1:
        found.append("--check-collectives: one process calls nobody")
    if p.shares_weights and p.engine == "zero":
        for flag, given, why in (
            ("--overlap-param-gather", p.overlap_param_gather, "weights come layer by layer"),
            ("--ddp-bucket-size", p.ddp_bucket_size is not None, "a bucket is a layer"),
        ):
            if given:
                found.append(f"{flag}: changes nothing at --zero-stage 3, where {why}")
    if not _dp_above_one(config, world_size):
        for flag, given in (
            (f"--zero-stage {p.zero_stage}", p.shares_state),
            ("--overlap-param-gather", p.overlap_param_gather),
        ):
            if given:
                found.append(f"{flag}: changes nothing at data-parallel size 1")
    return tuple(found)
