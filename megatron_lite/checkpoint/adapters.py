"""Adapters in host memory, whole and by canonical name, from wherever they lie; they are small."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_lite.blueprint.figure.adapters import with_adapters
from megatron_lite.blueprint.figure.parts import LORA_A, LORA_B, MAGNITUDE
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.parameters import table_of
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.checkpoint.description import saved_adapters
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import CheckpointError
from megatron_lite.config.sections.lora import LoraConfig
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.models.packing import packed_values
from megatron_lite.parallel.shard import MASTER, NamedSlice, exact_slices


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """All adapters of a model in fp32; where: for messages.

    copies: tensors of the base that lie with them; these must be the base's.
    """

    where: str
    lora: LoraConfig
    tensors: Mapping[str, Tensor]
    copies: Mapping[str, Tensor] = field(default_factory=dict)

    def fill(self, wanted: Iterable[NamedSlice]) -> None:
        """Copy into slices of them, in place, converting their format."""
        for piece in wanted:
            piece.data.copy_(self.tensors[piece.name.removeprefix(MASTER)][_box(piece)])

    def check_base(self, filled: Iterable[NamedSlice]) -> None:
        """Raise CheckpointError where the base's tensors are others than those that lie here, too."""
        for piece in filled:
            copy = self.copies.get(piece.name)
            if copy is None or not piece.data.numel():
                continue
            same = copy.shape == piece.shape
            if not same or not torch.equal(
                copy[_box(piece)].to(piece.data.dtype), piece.data.cpu()
            ):
                raise CheckpointError(
                    f"{self.where} holds another {piece.name} than the model it is used with: it was "
                    "trained beside another one; take that one"
                )

    def merge(self, name: str, weight: Tensor) -> None:
        """Add what is trained beside this canonical tensor, in place; nothing where that is nothing."""
        self.check_base([NamedSlice(name, tuple(weight.shape), (0,) * weight.dim(), weight)])
        module = name.removesuffix(".weight")
        if self.lora.packs:
            packed_values(name, weight)  # what they were trained beside
        a, b = (self.tensors.get(f"{module}.{leaf}") for leaf in (LORA_A, LORA_B))
        if a is None or b is None or module == name:
            return
        table = (
            a.shape[0] == weight.shape[0] and a.shape[1] == b.shape[1]
        )  # else A is [rank, inputs]
        if table and module.startswith("embedding."):
            a, b = b.t(), a
        merged = torch.addmm(weight.float(), b, a, alpha=self.lora.scale)
        magnitude = self.tensors.get(f"{module}.{MAGNITUDE}")
        if magnitude is not None:
            merged *= (magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]
        weight.copy_(merged)


def _box(piece: NamedSlice) -> tuple[slice, ...]:
    """Of the whole tensor, what a slice is."""
    ends = zip(piece.offset, piece.data.shape, strict=True)
    return tuple(slice(start, start + length) for start, length in ends)


def adapter_shapes(lora: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of such adapters by canonical name, whole, without padding."""
    assert model.vocab_size is not None
    figure = with_adapters(figure_of(model, model.vocab_size), lora, model)
    table = table_of(figure, tuple(cut_stages([model.num_layers])))
    return {spec.name: spec.shape for spec in table if not spec.tensor.frozen}


def kept_adapters(store: Store, manifest: Manifest, model: ModelConfig) -> AdapterSet:
    """Those of a checkpoint of ours.  Collective over the store's ranks, each of which has all of them."""
    folder = store.folder(manifest.iteration)
    lora = saved_adapters(manifest, folder)
    tensors = {name: torch.empty(shape) for name, shape in adapter_shapes(lora, model).items()}
    whole = [NamedSlice(n, tuple(t.shape), (0,) * t.dim(), t) for n, t in tensors.items()]
    store.load(manifest, exact_slices(whole, manifest.tensors))
    return AdapterSet(str(folder), lora, tensors)
