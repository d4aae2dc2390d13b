"""Adapters of ours become a folder of PEFT's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite.blueprint.figure.parts import LORA_A, LORA_B, MAGNITUDE
from megatron_lite.checkpoint.adapters import AdapterSet
from megatron_lite.checkpoint.huggingface.conversion import Conversion
from megatron_lite.checkpoint.huggingface.pairs import by_halves, core_of, with_halves
from megatron_lite.checkpoint.huggingface.peft import (
    ADAPTER_FILE,
    ENDS,
    PREFIX,
    adapted_modules,
    holds_table,
)
from megatron_lite.checkpoint.huggingface.rotary_keys import with_plain_base
from megatron_lite.checkpoint.tensor_file import TensorForm, write_stream
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.storage.disk import Disk, write_atomically


def write_peft(
    folder: Path, files: Mapping[str, bytes], tensors: Mapping[str, Tensor], disk: Disk
) -> None:
    """adapter_model.safetensors and the files beside it, into a folder that is there."""
    for name, content in files.items():
        write_atomically(folder / name, content, disk)
    forms = {
        name: TensorForm(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    write_stream(folder / ADAPTER_FILE, forms, tensors.values(), disk, metadata={"format": "pt"})


def peft_tensors(adapters: AdapterSet, model: ModelConfig) -> dict[str, Tensor]:
    """Every tensor of a folder of PEFT's, for the model as tools/convert.py writes it."""
    core, found = core_of(model), {}
    for module, conversion in adapted_modules(with_plain_base(with_halves(model))).items():
        parts = _present(adapters, conversion)
        if not any(parts):
            continue
        name = PREFIX + module
        if holds_table(conversion):
            (a, b, _) = parts[0] or _none()
            found[f"{name}.lora_embedding_A"], found[f"{name}.lora_embedding_B"] = a.t(), b
            continue
        if not all(parts) and adapters.lora.lora_variant == "dora":
            raise CheckpointError(
                f"{module} is one matrix there, and only a part of it has adapters of dora here: PEFT has "
                "no lengths for some rows; use --merge"
            )
        for (canonical, _), part in zip(conversion.ours.items(), parts, strict=True):
            for tensor in part[1:] if part else ():
                if tensor is not None:
                    by_halves(canonical, tensor, core)
        found |= {f"{name}.{end}": tensor for end, tensor in _fused(conversion, parts)}
    return {name: tensor.contiguous() for name, tensor in found.items()}


_Parts = tuple[Tensor, Tensor, Tensor | None]


def _none() -> _Parts:
    raise AssertionError("a table is one piece")


def _present(adapters: AdapterSet, conversion: Conversion) -> list[_Parts | None]:
    """A, B and magnitude of each piece, copies; None for those without."""
    found: list[_Parts | None] = []
    for canonical in conversion.ours:
        module, tensors = canonical.removesuffix(".weight"), adapters.tensors
        a, b, m = (tensors.get(f"{module}.{leaf}") for leaf in (LORA_A, LORA_B, MAGNITUDE))
        own = a is not None and b is not None
        found.append((a.clone(), b.clone(), m if m is None else m.clone()) if own else None)  # type: ignore[union-attr]
    return found


def _fused(conversion: Conversion, parts: Sequence[_Parts | None]) -> Iterator[tuple[str, Tensor]]:
    """A of all pieces below one another, B in blocks: each piece's rows have its own columns alone."""
    own = [part for part in parts if part is not None]
    rank = own[0][0].shape[0]
    width = rank * len(parts)
    rows = [shape[0] for shape in conversion.ours.values()]

    def joined(pieces: Sequence[Tensor]) -> Tensor:
        columns = pieces[0].shape[1]
        ours = {n: (r, columns) for n, r in zip(conversion.ours, rows, strict=True)}
        alike = Conversion("", (sum(rows), columns), False, ours, groups=conversion.groups)

        def fill(places: Sequence[tuple[str, Tensor]]) -> None:
            for (_, place), piece in zip(places, pieces, strict=True):
                place.copy_(piece)

        return alike.join(torch.float32, fill)

    blocks = []
    a = torch.zeros(width, own[0][0].shape[1])
    for n, (part, count) in enumerate(zip(parts, rows, strict=True)):
        block = torch.zeros(count, width)
        if part is not None:
            a[n * rank : (n + 1) * rank] = part[0]
            block[:, n * rank : (n + 1) * rank] = part[1]
        blocks.append(block)
    yield "lora_A.weight", a
    yield "lora_B.weight", joined(blocks)
    lengths = [part[2][:, None] for part in own if part[2] is not None]
    if lengths:
        yield "lora_magnitude_vector", joined(lengths)[:, 0]


def peft_config(
    adapters: AdapterSet, model: ModelConfig, base: str | None, tensors: Mapping[str, Tensor]
) -> bytes:
    """adapter_config.json of these tensors."""
    lora, ranks = adapters.lora, {}
    modules = adapted_modules(with_plain_base(with_halves(model)))
    adapted = {module: one for module, one in modules.items() if _has(tensors, module)}
    for module, conversion in adapted.items():
        ranks[_target(module, adapted, modules)] = len(conversion.ours)
    many = {target: count for target, count in ranks.items() if count > 1}
    power = 0.5 if lora.lora_variant == "rslora" else 1.0
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": _plain(lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": {target: count * (lora.lora_rank or 0) for target, count in many.items()},
        "alpha_pattern": {t: _plain(lora.lora_alpha * count**power) for t, count in many.items()},
        "bias": "none",
        "fan_in_fan_out": any(conversion.transposed for conversion in adapted.values()),
        "use_rslora": lora.lora_variant == "rslora",
        "use_dora": lora.lora_variant == "dora",
        "inference_mode": True,
        "modules_to_save": None,
    }
    return json.dumps(config, indent=2).encode()


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _has(tensors: Mapping[str, Tensor], module: str) -> bool:
    return any(f"{PREFIX}{module}.{end}" in tensors for end in ENDS)


def _target(
    module: str, adapted: Mapping[str, Conversion], modules: Mapping[str, Conversion]
) -> str:
    """The shortest end of its name that no module without adapters shares."""
    words = module.split(".")
    for count in range(1, len(words)):
        end = ".".join(words[-count:])
        if not any(m.endswith(f".{end}") for m in modules if m not in adapted):
            return end
    return module
