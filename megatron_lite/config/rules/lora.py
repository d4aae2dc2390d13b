"""Rules about adapters: what is adapted is there, and there is a model that they are trained beside."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.lora_targets import (
    TARGETS,
    TOKEN_TABLE_TARGET,
    WITHOUT_A_GATE,
    target_modules,
    unknown_targets,
)
from megatron_lite.config.sections.lora import NF4_BLOCK, LoraConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.run import RunConfig


def adapter_settings(config: RunConfig, world_size: int) -> Iterator[str]:
    """Adapters fit the model, and nothing is asked of them without a rank."""
    lora = config.lora
    if lora.on:
        yield from adapter_problems(lora, config.model)
        if lora.lora_variant == "dora" and config.parallel.shares_weights:
            yield (
                "--lora-variant dora with --zero-stage 3: the lengths of a matrix' rows are those of all of "
                "it, at the start too; use --zero-stage 2, or --lora-variant lora"
            )
        return
    default = LoraConfig()
    for flag, given in (
        ("--lora-alpha", lora.lora_alpha != default.lora_alpha),
        ("--lora-dropout", lora.lora_dropout != default.lora_dropout),
        ("--lora-targets", lora.lora_targets != default.lora_targets),
        ("--lora-variant", lora.lora_variant != default.lora_variant),
        ("--lora-base", lora.lora_base != default.lora_base),
        ("--lora-load", lora.lora_load is not None),
    ):
        if given:
            yield f"{flag} needs --lora-rank, which switches adapters on"


def packed_base(config: RunConfig, world_size: int) -> Iterator[str]:
    """See packing_problems."""
    yield from packing_problems(config.lora, config.model, config.parallel.tp)


def packing_problems(lora: LoraConfig, model: ModelConfig, tp: int) -> Iterator[str]:
    """Where blocks of 4-bit numbers would not lie within a row of a tp rank's matrices."""
    if not lora.packs:
        return
    for flag, inputs, ranks in (
        ("--hidden-size", model.hidden_size, 1),
        ("the attention's output", model.num_attention_heads * model.head_size, tp),
        ("--ffn-hidden-size", model.ffn_size, tp),
    ):
        if inputs % (NF4_BLOCK * ranks):
            over = f" over --tensor-model-parallel-size {ranks}" if ranks > 1 else ""
            way = [n for n in range(1, ranks) if not inputs % (NF4_BLOCK * n)]
            yield (
                f"--lora-base nf4: {flag} {inputs}{over} is no multiple of {NF4_BLOCK}, the numbers that "
                f"share a scale; {f'choose tp from {way}' if way else 'use --lora-base bf16'}"
            )


def base_of_adapters(config: RunConfig, world_size: int) -> Iterator[str]:
    """Adapters are trained beside a trained model, and their run resumes with their state."""
    if config.lora.on and config.checkpoint.load is None and not config.train.needs_no_data:
        yield (
            "--lora-rank trains adapters beside a trained model: give its run folder with --load and "
            "--finetune (tools/convert.py makes one of a folder of Hugging Face's)"
        )


def adapter_problems(lora: LoraConfig, model: ModelConfig) -> Iterator[str]:
    """What keeps such adapters from being built beside the model."""
    names = lora.lora_targets
    unknown = unknown_targets(names)
    if unknown or not names:
        yield (
            f"--lora-targets {' '.join(unknown) or 'without a name'}: choose from {', '.join(TARGETS)}"
        )
        return
    for name in names:
        if not model.swiglu and "mlp.gate" in TARGETS[name] and name not in WITHOUT_A_GATE:
            yield f"--lora-targets {name}: without --swiglu there is no gate"
    if model.rope_scaling_type == "clex":
        yield "--lora-rank freezes the model, and --rope-scaling-type clex learns its frequencies; use yarn"
    if TOKEN_TABLE_TARGET not in target_modules(names, model):
        return
    if not model.untie_embeddings_and_output_weights:
        yield (
            "--lora-targets with the embedding: the model's output uses the same table, which would be "
            "another one once merged; use linear, or --untie-embeddings-and-output-weights"
        )
    if lora.lora_variant == "dora":
        yield "--lora-variant dora has no lengths for the rows of a table; use --lora-targets linear"
