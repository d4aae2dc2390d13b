"""A model of Hugging Face's or of another program becomes iteration 0 of a new run folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_lite.checkpoint.beginning import WeightsFile, write_beginning
from megatron_lite.checkpoint.huggingface.conversion import Conversion, in_files
from megatron_lite.checkpoint.tensor_file import TensorForm
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
    """Write it, as write_beginning() does.  The peak is one tensor of the source and one canonical tensor."""

    def file_of(group: Sequence[Conversion]) -> WeightsFile:
        forms = {
            ours: TensorForm(source.form(c).dtype, shape)
            for c in group
            for ours, shape in c.ours.items()
        }
        return WeightsFile(forms, (part for c in group for _, part in source.parts(c)))

    groups = in_files(source.conversions, lambda c: source.form(c).bytes, shard_bytes)
    write_beginning(
        root, [file_of(group) for group in groups], model=source.model, data=data,
        tokenizer=tokenizer, facts=facts, disk=disk,
    )  # fmt: skip
