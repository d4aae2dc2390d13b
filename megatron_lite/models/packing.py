"""The frozen matrices of a stage that are kept in 4 bits: filled one at a time, and their bits by name.

Codes and scales do not depend on the layout: a block never crosses the ranks of tp, and what is packed are
the most exact values there are, in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.config.lora_targets import LINEAR
from megatron_lite.config.sections.lora import NF4_BLOCK
from megatron_lite.kernels import nf4
from megatron_lite.layers.packed import PackedWeight
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import canonical_pieces
from megatron_lite.parallel.shard import NamedSlice, ParameterPiece

CODES, ABSMAX = "codes", "absmax"


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One of them with its canonical pieces."""

    weight: PackedWeight
    pieces: tuple[ParameterPiece, ...]

    def bits(self) -> Iterator[NamedSlice]:
        """Codes and scales of each piece, `<name>.codes` and `<name>.absmax`."""
        for piece in self.pieces:
            (rows, columns), (row, column) = piece.shape, piece.offset
            for name, data, share in (
                (CODES, self.weight.codes, 2), (ABSMAX, self.weight.absmax, NF4_BLOCK)
            ):  # fmt: skip
                yield NamedSlice(
                    f"{piece.name}.{name}", (rows, columns // share), (row, column // share),
                    piece.of(data),
                )  # fmt: skip


def packed_weights(model: Decoder) -> list[Packed]:
    """Those of a stage, in order of definition."""
    return [
        Packed(module, tuple(canonical_pieces(model, name, module.shape)))
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
    ]


def packed_values(name: str, weight: Tensor) -> None:
    """Replace a canonical tensor, in place, by what unpacking it gives; nothing where it is not packed."""
    module = re.sub(r"^blocks\.\d+\.", "", name)
    if module not in {f"{matrix}.weight" for matrix in LINEAR}:
        return
    codes, absmax = nf4.pack(weight, NF4_BLOCK)
    weight.copy_(nf4.unpack(codes, absmax, nf4.quantile_pairs(weight.device), weight.dtype))


def in_turn(packed: Iterable[Packed]) -> Iterator[Sequence[NamedSlice]]:
    """The slices of one matrix after the other, in fp32, to be filled before the next is asked for.

    So a matrix at a time is in memory, and not the model.
    """
    for one in packed:
        codes = one.weight.codes
        whole = torch.empty(one.weight.shape, dtype=torch.float32, device=codes.device)
        yield [piece.slice(whole) for piece in one.pieces]
        one.weight.pack(whole)
