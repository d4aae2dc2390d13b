"""A new folder of checkpoints that training can start from: iteration 0, weights and a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from megatron_lite.checkpoint.choice import POINTER, folder_of
from megatron_lite.checkpoint.manifest import NAME, TOKENIZER, Manifest, StoredPiece, StoredTensor
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.tensor_file import (
    SAFETENSORS_NAMES,
    TensorForm,
    Written,
    write_bytes,
    write_stream,
)
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.storage.disk import Disk


class WeightsFile(NamedTuple):
    """The canonical tensors of one file, which come one by one in the order of their forms."""

    forms: Mapping[str, TensorForm]
    tensors: Iterable[Tensor]


def write_beginning(
    root: Path,
    weights: Sequence[WeightsFile],
    *,
    model: ModelConfig,
    data: Mapping[str, Any],
    tokenizer: Mapping[str, bytes],
    facts: Mapping[str, Any],
    disk: Disk,
) -> None:
    """Write iteration 0 and the pointer into a new folder of checkpoints.

    data: the data section, which names the tokenizer; tokenizer: its files, which are kept; facts:
    what the manifest says of it.
    root must not be looked for by anybody yet: the caller gives it its name when all is written.
    """
    folder = folder_of(root, 0)
    disk.make_folder(folder)
    files: dict[str, Written] = {}
    tensors: dict[str, StoredTensor] = {}
    for number, one in enumerate(weights):
        name = f"weights-{number:05d}.safetensors"
        files[name] = write_stream(folder / name, one.forms, one.tensors, disk)
        for ours, form in one.forms.items():
            piece = StoredPiece(name, ours, (0,) * len(form.shape), form.shape)
            tensors[ours] = StoredTensor(form.shape, SAFETENSORS_NAMES[form.dtype], (piece,))
    if tokenizer:
        disk.make_folder(folder / TOKENIZER)
    for name, content in tokenizer.items():
        files[f"{TOKENIZER}/{name}"] = write_bytes(folder / TOKENIZER / name, content, disk)
    if tokenizer:
        disk.sync_folder(folder / TOKENIZER)
    config = {"model": asdict(model), "data": dict(data)}
    manifest = Manifest(0, Progress(), config, files, tensors, dict(facts)).to_bytes()
    write_bytes(folder / NAME, manifest, disk)
    disk.sync_folder(folder)
    write_bytes(root / POINTER, b"0\n", disk)


def config_yaml(model: ModelConfig, data: Mapping[str, Any]) -> str:
    """What --config takes: the model and its tokenizer, nothing else."""
    default = asdict(ModelConfig())
    fields = {name: value for name, value in asdict(model).items() if value != default[name]}
    text: str = yaml.safe_dump({"model": fields, "data": dict(data)}, sort_keys=False)
    return text
