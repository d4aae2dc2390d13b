"""The config that a manifest keeps, read as strictly as a command line: types, ranges, rules, tensors.

A manifest may match its hash and still describe what cannot exist.  Code that builds something from
it checks here first: nothing is allocated before the stored tensors confirm it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from megatron_lite.blueprint.figure.adapters import with_adapters
from megatron_lite.blueprint.figure.heads import VOCABULARY
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.parameters import table_of
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.checkpoint.manifest import NAME, Manifest
from megatron_lite.checkpoint.schema import mapping
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.flags.values import from_yaml
from megatron_lite.config.objectives import LANGUAGE_MODEL, OBJECTIVES
from megatron_lite.config.rules.model_identity import COMPARED, defaults_before
from megatron_lite.config.rules.table import lora_problems, model_problems
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.parallel.shard import MASTER

Section = TypeVar("Section")
_SHOWN = 5
_MOST_LAYERS = 10_000  # of a model with adapters, which may be fewer tensors than layers


def saved_section(manifest: Manifest, kind: type[Section], name: str, folder: Path) -> Section:
    """A config section as it was saved; fields that this program does not know are left out.

    Raises CheckpointError, naming the manifest in folder, for a value of another type.
    """
    return kind(**_values(manifest, kind, name, folder / NAME))


def saved_objective(manifest: Manifest, folder: Path) -> str:
    """What the weights were trained on; a language model where the manifest is older than the choice.

    Raises CheckpointError where this program has no such objective.
    """
    path = folder / NAME
    name = _stored(manifest, "train", path).get("objective", LANGUAGE_MODEL)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise CheckpointError(
            f"{path}: the weights were trained on --objective {name}, which this program does not know "
            f"(it has {', '.join(OBJECTIVES)}): name the file that has it with --extend"
        )
    return name


def saved_adapters(manifest: Manifest, folder: Path) -> LoraConfig:
    """What of --lora-* the weights are; all off where they are a whole model."""
    return saved_section(manifest, LoraConfig, "lora", folder)


def saved_model(manifest: Manifest, folder: Path, *, head: str | None = VOCABULARY) -> ModelConfig:
    """The model whose weights these are, vocab_size included.

    head: a row of HEADS, the only one of use to whoever asks; None: any.
    Raises CheckpointError, naming the manifest in folder, where it leaves out what every version
    says, names something that this program would not compute, or describes no model or another one
    than that of the stored tensors, or one with another head.
    """
    objective = saved_objective(manifest, folder)
    saved_head = OBJECTIVES[objective].head
    if head not in (None, saved_head):
        raise CheckpointError(
            f"{folder / NAME}: these weights, trained on --objective {objective}, have a {saved_head} "
            f"head; what is asked for needs a {head} head: take a checkpoint that has one"
        )
    path, stored = folder / NAME, _stored(manifest, "model", folder / NAME)
    values: dict[str, Any] = defaults_before() | _values(manifest, ModelConfig, "model", path)
    strange = {k: v for k, v in stored.items() if k not in values and v not in (None, False)}
    if strange:
        listed = ", ".join(f"{name} {value!r}" for name, value in strange.items())
        raise CheckpointError(
            f"{path}: the model has {listed}, which this program does not know: use the version of "
            "the program that wrote it"
        )
    missing = [t.name for t in COMPARED if t.name not in values]
    if missing:
        raise CheckpointError(f"{path} does not say its model's {', '.join(missing)}")
    model = ModelConfig(**values)
    if model.vocab_size is None:
        raise CheckpointError(f"{path} does not say its model's vocab_size")
    lora = saved_adapters(manifest, folder)
    problems = model_problems(model) or (lora_problems(lora, model) if lora.on else [])
    problems = problems or list(_misfits(model, lora, manifest, saved_head))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if problems[_SHOWN:] else ""
        raise CheckpointError(
            f"{path} describes a model that these weights cannot be of: "
            f"{'; '.join(problems[:_SHOWN])}{more} - take another checkpoint with --ckpt-step"
        )
    return model


def _values(manifest: Manifest, kind: type, name: str, path: Path) -> dict[str, Any]:
    """The section's known fields, each of its type."""
    stored = _stored(manifest, name, path)
    found: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in stored:
            continue
        try:
            found[field.name] = from_yaml(settings()[f"{name}.{field.name}"], stored[field.name])
        except ValueError as error:
            raise CheckpointError(f"{path}: {name}.{field.name} {error}") from None
    return found


def _stored(manifest: Manifest, name: str, path: Path) -> dict[str, Any]:
    try:
        return mapping(manifest.config.get(name, {}), name)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _misfits(model: ModelConfig, lora: LoraConfig, manifest: Manifest, head: str) -> Iterator[str]:
    """Weights that are missing, too many, or of another shape than the model's, or its adapters'."""
    few = 0 if lora.on else len(manifest.tensors)  # a table alone may have adapters
    if model.num_layers > max(
        few, _MOST_LAYERS * lora.on
    ):  # before a table is made of what it claims
        yield f"num_layers {model.num_layers}, but {len(manifest.tensors)} tensors are stored"
        return
    assert model.vocab_size is not None
    figure = with_adapters(figure_of(model, model.vocab_size, head), lora, model)
    table = table_of(figure, tuple(cut_stages([model.num_layers])))
    shapes = {spec.name: spec.shape for spec in table if not (lora.on and spec.tensor.frozen)}
    for name, shape in shapes.items():
        stored = manifest.tensors.get(name) or manifest.tensors.get(MASTER + name)
        if stored is None:
            yield f"{name} is not stored"
        elif stored.shape != shape:
            yield f"{name} is stored as {list(stored.shape)}, by the model it is {list(shape)}"
    for name in manifest.tensors:
        if name not in shapes and name.partition(".")[2] not in shapes:
            yield f"{name} is stored, which the model does not have"
