"""A checkpoint whose vocabulary became longer: old rows as they are, new ones their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite.blueprint.parameters import parameter_table
from megatron_lite.blueprint.stages import cut_stages
from megatron_lite.checkpoint.beginning import WeightsFile, write_beginning
from megatron_lite.checkpoint.manifest import Manifest
from megatron_lite.checkpoint.store import Store
from megatron_lite.checkpoint.tensor_file import TORCH_DTYPES, TensorForm
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.parallel.shard import MASTER, NamedSlice
from megatron_lite.storage.disk import Disk


def resize(
    store: Store,
    manifest: Manifest,
    model: ModelConfig,
    root: Path,
    *,
    ids: int,
    rows: int,
    data: Mapping[str, Any],
    tokenizer: Mapping[str, bytes],
    facts: Mapping[str, Any],
    disk: Disk,
) -> ModelConfig:
    """Write the model with `rows` ids as iteration 0 of a new folder; returns its config.

    ids: those that the old tokenizer gave: a row behind them was never trained, and starts anew, too.
    The peak is two tensors.  See write_beginning() for the rest.
    """
    assert model.vocab_size is not None and ids <= model.vocab_size <= rows
    larger = dataclasses.replace(model, vocab_size=rows)
    before, after = _shapes(model), _shapes(larger)
    stored = {n: MASTER + n if MASTER + n in manifest.tensors else n for n in before}
    forms = {
        name: TensorForm(TORCH_DTYPES[manifest.tensors[stored[name]].dtype], shape)
        for name, shape in after.items()
    }

    def tensors() -> Iterator[Tensor]:
        for name, form in forms.items():
            found = torch.empty(before[name], dtype=form.dtype)
            store.load(manifest, [_whole(stored[name], found)])
            yield found if before[name] == form.shape else lengthened(found, ids, rows)

    write_beginning(root, [WeightsFile(forms, tensors())], model=larger, data=data,
                    tokenizer=tokenizer, facts=facts, disk=disk)  # fmt: skip
    return larger


def lengthened(table: Tensor, ids: int, rows: int) -> Tensor:
    """table: [v, h] -> [rows, h]: its first `ids` rows, and their mean in all that follow."""
    mean = table[:ids].double().mean(dim=0).to(table.dtype)
    return torch.cat([table[:ids], mean.expand(rows - ids, -1)])


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert model.vocab_size is not None
    table = parameter_table(
        model, cut_stages([model.num_layers]), padded_vocab_size=model.vocab_size
    )
    return {spec.name: spec.shape for spec in table}


def _whole(name: str, data: Tensor) -> NamedSlice:
    return NamedSlice(name, tuple(data.shape), (0,) * data.dim(), data)
