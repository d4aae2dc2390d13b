"""The parameters of a stage's modules, each with its canonical pieces and its place in the ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from megatron_lite.blueprint.figure.parts import (
    TOKENS,
    LowRank,
    Matrix,
    Norm,
    Slowing,
    Table,
    Tensor,
)
from megatron_lite.layers.contexts import StageContext
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.shard import LocalParameter, ParameterPiece

TOKEN_TABLE = f"{TOKENS}.weight"


def local_parameters(model: Decoder) -> list[LocalParameter]:
    """Every parameter of the stage with its canonical pieces, in order of definition."""
    context = model.context
    found = []
    for name, parameter in model.named_parameters():
        if name in model.borrowed:
            continue
        specs = list(_specs(model, name))
        tied = name == TOKEN_TABLE and model.tied
        twin = tied and context.ctx.tied.size > 1
        found.append(
            LocalParameter(
                parameter=parameter,
                pieces=tuple(canonical_pieces(model, name, tuple(parameter.shape))),
                grad_summed_over=tuple(_shared_over(specs[0], context)),
                tied_across_stages=twin,
                replica=(twin and not model.has_embedding)
                or (specs[0].stages and context.ctx.pp.rank > 0),
                grads_per_backward=_grads_per_backward(model) if tied and not twin else 1,
                late=specs[0].stages,
            )
        )
    return found


def _shared_over(tensor: Tensor, context: StageContext) -> Iterator[str]:
    """The axes whose ranks have a tensor whole, and of its gradient a share each."""
    if tensor.stages and context.ctx.pp.size > 1:
        yield "pp"
    share = (tensor.sequence and context.sequence_parallel) or tensor.heads
    if share and context.tp.size > 1:
        yield "tp"


def _grads_per_backward(model: Decoder) -> int:
    """Gradients one backward adds to a tied table.

    maxsize where another stage of this rank uses it too, so that its bucket is not reduced early.
    """
    return 2 if model.has_head else sys.maxsize


def _specs(model: Decoder, name: str) -> Iterator[Tensor]:
    """The canonical tensors fused in a parameter; every module that holds one knows its part."""
    path, _, leaf = name.rpartition(".")
    part = model.get_submodule(path).part
    assert isinstance(part, Norm | Matrix | Table | Slowing | LowRank), path
    prefix = path.removesuffix(part.name)
    for tensor in part.tensors():
        if tensor.name.endswith(f".{leaf}"):
            yield tensor.below(prefix)


def canonical_pieces(model: Decoder, name: str, shape: tuple[int, ...]) -> Iterator[ParameterPiece]:
    """The canonical pieces of what has this name in the modules, and this shape on this rank."""
    context = model.context
    tp, start = context.tp, 0
    for spec in _specs(model, name):
        local = spec.local(tp.size)
        offset = tuple(n * tp.rank if dim == spec.tp_dim else 0 for dim, n in enumerate(local))
        piece = ParameterPiece(spec, start, start + local[0], spec.shape, offset)
        yield _trimmed(piece, context.vocab_size) if spec.vocabulary else piece
        start += local[0]
    assert start == shape[0], (name, start, shape)


def _trimmed(piece: ParameterPiece, vocab_size: int) -> ParameterPiece:
    """The piece without the padding rows of the vocabulary (possibly no rows at all)."""
    stop = min(piece.stop, piece.start + max(vocab_size - piece.offset[0], 0))
    offset = (min(piece.offset[0], vocab_size), *piece.offset[1:])
    return ParameterPiece(piece.spec, piece.start, stop, (vocab_size, *piece.shape[1:]), offset)
