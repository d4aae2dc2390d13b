"""A model of Hugging Face's or of another program becomes iteration 0 of a new run folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_lite.checkpoint.choice import POINTER, folder_of
from megatron_lite.checkpoint.huggingface.conversion import Conversion, in_files
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


class WeightSource(Protocol):
    """What is imported: a model that was looked through but for its tensors."""

    @property
    def model(self) -> ModelConfig:
        """Its sizes, vocab_size included."""
        ...

    @property
    def conversions(self) -> Sequence[Conversion]:
        """Every tensor of it."""
        ...

    def form(self, conversion: Conversion) -> TensorForm:
        """How a tensor is stored."""
        ...

    def parts(self, conversion: Conversion) -> Iterator[tuple[str, Tensor]]:
        """Canonical tensors by name, from one tensor that is read for them."""
        ...


def import_folder(
    source: WeightSource,
    root: Path,
    *,
    data: dict[str, Any],
    tokenizer: Mapping[str, bytes],
    facts: Mapping[str, Any],
    shard_bytes: int,
    disk: Disk,
) -> None:
    """Write iteration 0 and the pointer into a new folder of checkpoints.

    data: the data section, which names the tokenizer; tokenizer: its files, which are kept; facts:
    what the manifest says of it.
    root must not be looked for by anybody yet: the caller gives it its name when all is written.
    The peak is one tensor of the source and one canonical tensor.
    """
    folder = folder_of(root, 0)
    disk.make_folder(folder)
    groups = in_files(source.conversions, lambda c: source.form(c).bytes, shard_bytes)
    files: dict[str, Written] = {}
    tensors: dict[str, StoredTensor] = {}
    for number, group in enumerate(groups):
        name = f"weights-{number:05d}.safetensors"
        forms = {
            ours: TensorForm(source.form(c).dtype, shape)
            for c in group
            for ours, shape in c.ours.items()
        }
        parts = (part for c in group for _, part in source.parts(c))
        files[name] = write_stream(folder / name, forms, parts, disk)
        for ours, form in forms.items():
            piece = StoredPiece(name, ours, (0,) * len(form.shape), form.shape)
            tensors[ours] = StoredTensor(form.shape, SAFETENSORS_NAMES[form.dtype], (piece,))
    if tokenizer:
        disk.make_folder(folder / TOKENIZER)
    for name, content in tokenizer.items():
        files[f"{TOKENIZER}/{name}"] = write_bytes(folder / TOKENIZER / name, content, disk)
    if tokenizer:
        disk.sync_folder(folder / TOKENIZER)
    config = {"model": asdict(source.model), "data": data}
    manifest = Manifest(0, Progress(), config, files, tensors, dict(facts)).to_bytes()
    write_bytes(folder / NAME, manifest, disk)
    disk.sync_folder(folder)
    write_bytes(root / POINTER, b"0\n", disk)
