"""A trained model and its tokenizer, from wherever they lie, in the number format they are kept in.

    run folder, iter_N folder ─▶ CheckpointSource ┐
                                                  ├─▶ build_model ─▶ Decoder
    folder of Hugging Face's  ─▶ FolderSource     ┘

`load_model` does it all; a tool that wants to speak in between takes the steps one by one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from megatron_lite.blueprint.batches import padded_vocab_size
from megatron_lite.blueprint.figure.adapters import with_adapters
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.config.errors import ConfigError, NumericsError, all_together
from megatron_lite.config.rules.lora import packing_problems
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.inference.sources import CheckpointSource as CheckpointSource
from megatron_lite.inference.sources import ModelSource as ModelSource
from megatron_lite.inference.sources import beside_checkpoint as beside_checkpoint
from megatron_lite.inference.sources import find_checkpoint as find_checkpoint
from megatron_lite.inference.sources import find_model as find_model
from megatron_lite.inference.sources import is_huggingface as is_huggingface
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.packing import in_turn, packed_weights
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import weight_slices

PRECISIONS = {
    torch.float32: PrecisionConfig(),
    torch.float16: PrecisionConfig(fp16=True),
    torch.bfloat16: PrecisionConfig(bf16=True),
}
"""The number formats in which a model computes."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be used, its tokenizer, and what there was to say about them."""

    model: Decoder
    tokenizer: Tokenizer
    notices: tuple[str, ...]


def load_model(
    path: Path,
    ctx: ParallelContext | None = None,
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
    adapter: Path | None = None,
) -> LoadedModel:
    """The model of a run folder, of one iter_N folder of it, or of a folder of Hugging Face's.

    ctx: whose tp and pp ranks share the model, this process on a CPU by default.  step: that iteration
    of a run, the newest by default.  adapter: a folder of adapters for it.
    dtype: a key of PRECISIONS, by default the format in which the
    folder holds its weights.  Raises CheckpointError for what is no such folder or damaged.
    """
    ctx = ctx or ParallelContext.serial()
    source = find_model(path, ctx, step=step, adapter=adapter)
    tokenizer, said = source.tokenizer()
    return LoadedModel(build_model(source, ctx, dtype=dtype), tokenizer, (*source.notices, *said))


def build_model(
    source: ModelSource, ctx: ParallelContext, *, dtype: torch.dtype | None = None
) -> Decoder:
    """This rank's stage of a model, all of it where there is no pipeline, in that format, or the source's own.

    Peak: the stage, and one tensor of a file.  The ranks of ctx.tp share each matrix, those of ctx.pp
    the layers.  Raises NumericsError for a value that is not finite.
    """
    if dtype not in (None, *PRECISIONS):
        raise ConfigError(f"{dtype}: a model computes in {', '.join(map(str, PRECISIONS))}")
    config = source.config
    assert config.vocab_size is not None
    require_layout(config, ctx.tp.size, ctx.pp.size)
    placed = cut_stages(_even_counts(config.num_layers, ctx.pp.size))[ctx.pp.rank]
    stage = StageContext(
        config,
        ctx,
        padded_vocab_size=padded_vocab_size(
            config.vocab_size, config.make_vocab_size_divisible_by, ctx.tp.size
        ),
        vocab_size=config.vocab_size,
        # formats in which nothing computes (fp64) are rounded
        precision=PRECISIONS.get(dtype or source.dtype, PRECISIONS[torch.float32]),
    )
    if source.adapters is not None:
        if problems := list(packing_problems(source.adapters.lora, config, ctx.tp.size)):
            raise all_together(problems, "with the layout")
        drawn = with_adapters(stage.figure, source.adapters.lora, config)
        stage = dataclasses.replace(stage, drawn=drawn)
    model = Decoder(
        stage, placed.layers, has_embedding=placed.has_embedding, has_head=placed.has_head
    )
    slices = list(weight_slices(local_parameters(model), ctx, owned=False))
    packed = packed_weights(model)
    source.fill(chain([slices], in_turn(packed)))
    for piece in chain(slices, *(one.bits() for one in packed)):
        # the extremes of values with a NaN are NaN; isfinite of all would make two copies
        counts = piece.data.numel() and piece.data.is_floating_point()
        if counts and not all(edge.isfinite() for edge in piece.data.aminmax()):
            raise NumericsError(
                f"{source.where}: {piece.name} holds values that are not finite - take another copy, "
                "or an older checkpoint with --ckpt-step"
            )
    return model.eval()


def require_layout(config: ModelConfig, tp: int, pp: int) -> None:
    """ConfigError where the model's heads and layers cannot be shared by so many ranks."""
    problems = [
        f"{what} {number} cannot be split over --tensor-model-parallel-size {tp}: choose a divisor"
        for what, number in (
            ("attention heads", config.num_attention_heads),
            ("key and value heads", config.num_kv_heads),
            ("feed-forward features", config.ffn_size),
        )
        if number % tp
    ]
    if pp > config.num_layers:
        problems.append(
            f"--pipeline-model-parallel-size {pp}: the model has {config.num_layers} layers, and "
            "every stage wants one"
        )
    if problems:
        raise all_together(problems, "with the layout")


def _even_counts(layers: int, stages: int) -> list[int]:
    """Layers of each stage; those in the middle take what is over, as the ends have the vocabulary."""
    whole, over = divmod(layers, stages)
    first = (stages - over) // 2
    return [whole + (first <= stage < first + over) for stage in range(stages)]
