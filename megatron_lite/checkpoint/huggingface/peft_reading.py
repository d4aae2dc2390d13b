"""A folder of PEFT's becomes adapters of ours; every tensor of it is accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lite.blueprint.figure.parts import LORA_A, LORA_B, MAGNITUDE, TOKENS
from megatron_lite.checkpoint.adapters import AdapterSet, adapter_shapes
from megatron_lite.checkpoint.huggingface.config_file import ConfigFile
from megatron_lite.checkpoint.huggingface.conversion import Conversion
from megatron_lite.checkpoint.huggingface.folder import read_config_file, read_tensors
from megatron_lite.checkpoint.huggingface.pairs import core_of
from megatron_lite.checkpoint.huggingface.peft import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    ENDS,
    PREFIX,
    adapted_modules,
    holds_table,
)
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.lora_targets import TARGETS
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.model import ModelConfig

_SHOWN = 20
_LARGEST = 1 << 36  # bytes of adapters
_HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "peft_type",
    "task_type", "layers_pattern", "layers_to_transform", "exclude_modules", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config",
)  # fmt: skip
"""Keys that change no number of adapters that lie there whole."""


@dataclass(frozen=True, slots=True)
class _Of:
    """What a folder holds for one module: A and B in PEFT's shapes, the magnitude, and its scale."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scale: float
    own_rank: bool = False
    """Whether rank_pattern gives it another rank than r, as ours of fused modules have."""


def open_peft(path: Path, model: ModelConfig) -> AdapterSet:
    """The adapters of a folder for this model, every tensor accounted for.

    Raises CheckpointError naming what is missing, too many, of another shape, or asked for in a way that
    is not computed here.
    """
    if core_of(model).interleaved:
        raise CheckpointError(
            f"{path}: PEFT's adapters are for models whose rotary pairs are halves of a head, and this "
            "one's are neighbours (--rotary-interleaved): export it with tools/convert.py first"
        )
    file = path / ADAPTER_CONFIG
    config = ConfigFile(read_config_file(file), file, "LoRA of PEFT's")
    said = _config_in(config)
    stored = read_tensors(path / ADAPTER_FILE, _LARGEST, instead=_no_safetensors(path))
    modules = adapted_modules(model)
    # peft keeps the token table where it is adapted
    copies = {
        name: stored.pop(one)
        for module, conversion in modules.items() if holds_table(conversion)
        for name in conversion.ours
        for one in (f"{PREFIX}{module}.base_layer.weight", f"{PREFIX}{module}.weight")
        if one in stored
    }  # fmt: skip
    per_module = _per_module(path, config, said, stored, modules)
    parts: dict[str, _Of] = {}
    for module, found in per_module.items():
        parts |= _pieces(modules[module], found)
    return replace(_as_one(path, said, parts, model), copies=copies)


def _config_in(config: ConfigFile) -> LoraConfig:
    """Rank, alpha, dropout and variant; the targets follow from the tensors."""
    if config.get("peft_type") != "LORA":
        config.refuse(f"peft_type {config.get('peft_type')!r}: only 'LORA' is read here")
    config.must_be({"bias": "none"}, otherwise="is read here")
    config.must_be({"task_type": "CAUSAL_LM"}, otherwise="is a language model's")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        config.refuse(f"init_lora_weights {start!r}: it changes the base's weights, too")
    rank, alpha = config.size("r"), config.number("lora_alpha", 8.0)
    dropout = config.share("lora_dropout", 0.0)
    stabilised, magnitudes = (
        config.flag(name, default=False) for name in ("use_rslora", "use_dora")
    )
    if stabilised and magnitudes:
        config.refuse("use_rslora and use_dora together: --lora-variant is one of them")
    for key in ("rank_pattern", "alpha_pattern", "target_modules"):
        config.get(key)
    config.refuse_unknown(_HARMLESS)
    config.require_sound()
    variant: Literal["lora", "rslora", "dora"]
    variant = "dora" if magnitudes else "rslora" if stabilised else "lora"
    return LoraConfig(lora_rank=rank, lora_alpha=alpha, lora_dropout=dropout, lora_variant=variant)


def _no_safetensors(path: Path) -> str:
    if (path / "adapter_model.bin").is_file():
        return (
            "it has adapter_model.bin, a pickle, which could run any program and is never opened: save "
            "it with PEFT's save_pretrained(NEW, safe_serialization=True) where you trust it"
        )
    return "copy the whole folder"


def _per_module(
    path: Path,
    config: ConfigFile,
    said: LoraConfig,
    stored: Mapping[str, Tensor],
    modules: Mapping[str, Conversion],
) -> dict[str, _Of]:
    """The folder's tensors by module; all must belong to one, and be all that it has."""
    wrong: list[str] = []
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, end = _split(name)
        if module not in modules or end is None:
            wrong.append(f"{name}: no adapter of this model")
        else:
            found.setdefault(module, {})[ENDS[end]] = tensor.float()
    needed = {LORA_A, LORA_B} | ({MAGNITUDE} if said.lora_variant == "dora" else set())
    for module, tensors in found.items():
        wrong += [f"{module}: {leaf} is missing" for leaf in sorted(needed - tensors.keys())]
        wrong += [f"{module}: {leaf} is not asked for" for leaf in sorted(tensors.keys() - needed)]
    asked = config.values.get("target_modules")
    for target in asked if isinstance(asked, list) else ():
        if not any(module == target or module.endswith(f".{target}") for module in found):
            wrong.append(f"target_modules {target!r}: it has no tensor")
    made: dict[str, _Of] = {}
    if not wrong:
        for module, tensors in found.items():
            rank = tensors[LORA_A].shape[0]
            shapes = _shapes(modules[module], rank)
            wrong += [
                f"{module}: {leaf} is {list(tensors[leaf].shape)}, not {list(shapes[leaf])}"
                for leaf in sorted(needed)
                if tuple(tensors[leaf].shape) != shapes[leaf]
            ]
            expected = _by_pattern(config, "rank_pattern", module, said.lora_rank)
            if rank != expected:
                wrong.append(f"{module}: rank {rank}, {ADAPTER_CONFIG} says {expected}")
            alpha = _by_pattern(config, "alpha_pattern", module, said.lora_alpha)
            scale = replace(said, lora_rank=rank, lora_alpha=alpha).scale
            made[module] = _Of(
                tensors[LORA_A],
                tensors[LORA_B],
                tensors.get(MAGNITUDE),
                scale,
                rank != said.lora_rank,
            )
    if wrong or not found:
        more = f"\n  ... and {len(wrong) - _SHOWN} more" if wrong[_SHOWN:] else ""
        listed = "\n  ".join(wrong[:_SHOWN] or ["no tensors"])
        raise CheckpointError(
            f"{path / ADAPTER_FILE} does not hold the adapters that {ADAPTER_CONFIG} describes, or they "
            f"are another model's ({len(wrong)} tensors)\n  {listed}{more}"
        )
    for name, tensor in stored.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path / ADAPTER_FILE}: {name} holds values that are not finite")
    return made


def _split(name: str) -> tuple[str, str | None]:
    """A tensor's module, and its end; no end where it is none of an adapter."""
    for end in ENDS:
        if name.startswith(PREFIX) and name.endswith(f".{end}"):
            return name.removeprefix(PREFIX).removesuffix(f".{end}"), end
    return name, None


def _shapes(conversion: Conversion, rank: int) -> dict[str, tuple[int, ...]]:
    shape = conversion.shape[::-1] if conversion.transposed else conversion.shape
    rows, columns = shape
    if holds_table(conversion):
        return {LORA_A: (rank, rows), LORA_B: (columns, rank)}
    return {LORA_A: (rank, columns), LORA_B: (rows, rank), MAGNITUDE: (rows,)}


def _by_pattern(config: ConfigFile, key: str, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT reads them."""
    patterns = config.values.get(key) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"[\w.]+", pattern) or type(value) not in (int, float) or value <= 0:
            raise CheckpointError(f"{config.path}: {key} {pattern!r}: {value!r} is not read here")
        if module == pattern or module.endswith(f".{pattern}"):
            return value
    return otherwise


def _pieces(conversion: Conversion, found: _Of) -> dict[str, _Of]:
    """By canonical module; a fused one's pieces share its A, or have a share of it where B is in blocks."""
    modules = [name.removesuffix(".weight") for name in conversion.ours]
    if holds_table(conversion):
        return {modules[0]: _Of(found.a.t(), found.b, None, found.scale)}
    whole = _rows_of(conversion, found.b)
    lengths: list[Tensor | None] = [None] * len(modules)
    if found.magnitude is not None:
        lengths = [part[:, 0] for part in _rows_of(conversion, found.magnitude[:, None])]
    ranks = found.a.shape[0] // len(modules)
    blocks = [slice(n * ranks, (n + 1) * ranks) for n in range(len(modules))]
    apart = found.own_rank and len(modules) > 1 and ranks * len(modules) == found.a.shape[0]
    for n, part in enumerate(whole):
        others = [part[:, block] for m, block in enumerate(blocks) if m != n]
        apart = apart and not any(other.any() for other in others)
    made = {}
    for module, part, length, block in zip(modules, whole, lengths, blocks, strict=True):
        a, b = (found.a[block], part[:, block]) if apart else (found.a, part)
        if not apart or b.any() or a.any():  # pieces that have none go out as zeros
            made[module] = _Of(a, b, length, found.scale)
    return made


def _rows_of(conversion: Conversion, matrix: Tensor) -> list[Tensor]:
    """A matrix with the rows of a fused module -> its pieces' rows."""
    width = matrix.shape[1]
    ours = {name: (shape[0], width) for name, shape in conversion.ours.items()}
    alike = Conversion(
        conversion.theirs, tuple(matrix.shape), False, ours, groups=conversion.groups
    )
    return [part for _, part in alike.parts(matrix)]


def _as_one(
    path: Path, said: LoraConfig, parts: Mapping[str, _Of], model: ModelConfig
) -> AdapterSet:
    """One rank and scale for all: smaller ranks are filled up with zeros, other scales go into B."""
    targets = {re.sub(r"^blocks\.\d+\.", "", module) for module in parts}
    rank = max(_rank(module, of) for module, of in parts.items())
    alpha = said.lora_alpha
    scales = {of.scale for of in parts.values()}
    if len(scales) == 1:
        root = said.lora_variant == "rslora"
        alpha = scales.pop() * (math.sqrt(rank) if root else rank)
        alpha = round(alpha, 9)
    lora = replace(said, lora_rank=rank, lora_alpha=alpha, lora_targets=_named(targets, model))
    tensors: dict[str, Tensor] = {}
    shapes = adapter_shapes(lora, model)
    missing = sorted({name.rpartition(".")[0] for name in shapes} - parts.keys())
    if missing:
        raise CheckpointError(
            f"{path}: {', '.join(missing[:3])} has no adapter, other layers' have one: all layers have "
            "adapters beside the same matrices here"
        )
    for module, of in parts.items():
        table = module == TOKENS
        b = of.b if math.isclose(of.scale, lora.scale) else of.b * (of.scale / lora.scale)
        for leaf, tensor in ((LORA_A, of.a), (LORA_B, b), (MAGNITUDE, of.magnitude)):
            if tensor is not None:
                whole = torch.zeros(shapes[f"{module}.{leaf}"])
                by_rows = leaf == LORA_A and not table
                (whole[: tensor.shape[0]] if by_rows else whole[..., : tensor.shape[-1]]).copy_(
                    tensor
                )
                tensors[f"{module}.{leaf}"] = whole
    return AdapterSet(str(path), lora, tensors)


def _rank(module: str, of: _Of) -> int:
    return of.a.shape[1 if module == TOKENS else 0]


def _named(targets: set[str], model: ModelConfig) -> list[str]:
    """The shortest way to ask for these modules."""
    linear = {name for name in TARGETS["linear"] if model.swiglu or name != "mlp.gate"}
    for word, means in (("linear", linear), ("all", linear | {TOKENS}), ("embedding", {TOKENS})):
        if targets == means:
            return [word]
    return sorted(targets)
