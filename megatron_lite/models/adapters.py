"""The adapters of a stage's modules together: their first magnitudes, and merging them into the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from megatron_lite.config.errors import ConfigError
from megatron_lite.layers.embedding import VocabParallelEmbedding
from megatron_lite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_lite.layers.low_rank import LowRankAdapter, TableAdapter
from megatron_lite.layers.packed import PackedWeight, Weight

Adapter = LowRankAdapter | TableAdapter


def adapters(model: nn.Module) -> Iterator[tuple[Adapter, Weight]]:
    """Every adapter with the weight that it adds to."""
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            adapter: Adapter | None = module.adapter
            if adapter is not None:
                yield adapter, module.weight


@torch.no_grad()
def begin_magnitudes(model: nn.Module) -> None:
    """Set the magnitudes to the lengths of the weights' rows, so that adapters begin by changing nothing.

    Collective over tp.
    """
    for adapter, weight in adapters(model):
        if isinstance(adapter, LowRankAdapter) and adapter.part.magnitude:
            adapter.lora_magnitude.copy_(adapter.row_lengths(weight))


def merge_adapters(model: nn.Module) -> None:
    """Add all adapters to their weights, which are then used as they are.  Collective over tp with dora.

    Raises ConfigError where these are packed: there is no room for a sum in 4 bits.
    """
    for adapter, weight in _beside_parameters(model):
        adapter.merge(weight)


def unmerge_adapters(model: nn.Module) -> None:
    """Take them out again."""
    for adapter, weight in _beside_parameters(model):
        adapter.unmerge(weight)


def _beside_parameters(model: nn.Module) -> list[tuple[Adapter, nn.Parameter]]:
    """All of them; ConfigError where a weight is packed."""
    found = []
    for adapter, weight in adapters(model):
        if isinstance(weight, PackedWeight):
            raise ConfigError(
                "--lora-base nf4: a sum has no room in 4 bits; tools/convert.py RUN OUT --merge writes the "
                "merged model"
            )
        found.append((adapter, weight))
    return found
