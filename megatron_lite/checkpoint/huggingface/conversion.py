"""One Hugging Face tensor <-> the canonical tensor, or the several fused, that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.blueprint.parameters import parameter_table
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.checkpoint.huggingface.names import Names, Source
from megatron_lite.config.sections.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Conversion:
    """One Hugging Face tensor and the canonical ones that it is.

    shape: Hugging Face's, [in, out] where transposed; ours: canonical name -> shape, in parts' order.
    groups: see names.Source.
    """

    theirs: str
    shape: tuple[int, ...]
    transposed: bool
    ours: Mapping[str, tuple[int, ...]]
    groups: int = 1

    def parts(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The canonical tensors by name: views of it, copies where the parts come in groups."""
        for view, (name, shape) in zip(self._views(whole), self.ours.items(), strict=True):
            yield name, view.reshape(shape)

    def join(
        self, dtype: torch.dtype, fill: Callable[[Sequence[tuple[str, Tensor]]], None]
    ) -> Tensor:
        """The Hugging Face tensor, of parts that fill is handed, by name, to write into."""
        whole = torch.empty(self.shape, dtype=dtype)
        parts = list(self.parts(whole))
        fill(parts)
        if self.groups > 1:
            for view, (_, part) in zip(self._views(whole), parts, strict=True):
                view.copy_(part.view_as(view))
        return whole

    def _views(self, whole: Tensor) -> Sequence[Tensor]:
        """Each part's rows in that tensor, [groups, rows / groups, ...] where they come in groups."""
        turned = whole.t() if self.transposed else whole
        rows = [shape[0] for shape in self.ours.values()]
        if self.groups == 1:
            return turned.split(rows)
        grouped = turned.unflatten(0, (self.groups, -1))
        return grouped.split([n // self.groups for n in rows], dim=1)


def conversions(names: Names, model: ModelConfig) -> list[Conversion]:
    """Every tensor of the model, in the order of its definition."""
    assert model.vocab_size is not None
    table = parameter_table(
        model, cut_stages([model.num_layers]), padded_vocab_size=model.vocab_size
    )
    members: dict[str, list[tuple[Source, str, tuple[int, ...]]]] = {}
    for spec in table:
        source = names.source(spec.name, model)
        members.setdefault(source.name, []).append((source, spec.name, spec.shape))
    found = []
    for theirs, parts in members.items():
        parts.sort(key=lambda part: part[0].part or 0)
        ours = {name: shape for _, name, shape in parts}
        source, _, (_, *columns) = parts[0]
        shape = (sum(rows for rows, *_ in ours.values()), *columns)
        assert all(rows % source.groups == 0 for rows, *_ in ours.values()), (theirs, ours)
        found.append(
            Conversion(
                theirs, shape[::-1] if source.transposed else shape, source.transposed, ours,
                source.groups,
            )
        )  # fmt: skip
    return found


def in_files(
    wanted: Iterable[Conversion], size: Callable[[Conversion], int], shard_bytes: int
) -> list[list[Conversion]]:
    """In order, each file of at most so many bytes; one tensor that is larger by itself stands alone."""
    groups: list[list[Conversion]] = [[]]
    held = 0
    for conversion in wanted:
        needed = size(conversion)
        if groups[-1] and held + needed > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(conversion)
        held += needed
    return groups
