"""FLOPs of training, counted from the matrix products of a model's figure.

Where the 6 in 6N comes from: a parameter that multiplies costs 2 FLOPs (multiply, add) per token in
forward, and backward has two products of the same size (for the input, for the weight): 2 + 4 = 6.
Attention's scores and their product with V have no parameters and are counted apart.

Two conventions live in the field.  "full" counts the whole s x s square of attention (SC21
arXiv:2104.04473, Megatron-DeepSpeed's log line, most MFU figures); "causal" counts the half a
causal model needs (Megatron-LM since 2025).  Hardware peaks are not this file's business.
"""

from __future__ import annotations

from typing import Literal

from megatron_lite.blueprint.figure.heads import VOCABULARY
from megatron_lite.blueprint.figure.parts import Core, Figure, Matrix, Parts
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.config.sections.model import ModelConfig

Attention = Literal["full", "causal"]
Recompute = Literal["full", "selective"]


def layer_forward(layer: Parts, seq_length: int, attention: Attention = "full") -> int:
    """FLOPs of one layer's forward per token."""
    products = sum(2 * matrix.size for matrix in layer.of(Matrix)) + _beside(layer)
    return products + core_forward(layer, seq_length, attention)


def layer_weights(layer: Parts) -> int:
    """FLOPs of its weight gradients per token: none of what is frozen."""
    return sum(2 * matrix.size for matrix in layer.of(Matrix) if not matrix.frozen) + _beside(layer)


def _beside(layer: Parts) -> int:
    """FLOPs of its adapters' forward."""
    return sum(2 * matrix.adapter.size for matrix in layer.of(Matrix) if matrix.adapter)


def core_forward(layer: Parts, seq_length: int, attention: Attention = "full") -> int:
    """FLOPs per token of scores and weighted values alone: 4 * s * n * d, half if causal.

    Of a window w < s full is 4 * w * n * d, and causal what lies in the band: s^2 less (s - w)^2.
    Of groups of S2-attention (while training) full is their squares, and causal half of these.
    """
    return sum(int(_pairs(core, seq_length, attention) * core.queries) for core in layer.of(Core))


def _pairs(core: Core, s: int, attention: Attention) -> float:
    """FLOPs per token and channel: 4 for each token that is seen."""
    if core.group is not None:
        return (4 if attention == "full" else 2) * core.pairs(s) / s
    seen = core.seen(s)
    return 4 * seen if attention == "full" else 2 * (s * s - (s - seen) ** 2) // s


def head_forward(figure: Figure) -> int:
    """FLOPs per token of the output matrix."""
    return 2 * figure.output.size


def head_weights(figure: Figure) -> int:
    """FLOPs per token of its gradient."""
    return 0 if figure.output.frozen else head_forward(figure)


def cores_forward(figure: Figure, seq_length: int, attention: Attention = "full") -> int:
    """Those of all attention cores."""
    return int(figure.total(lambda layer: core_forward(layer, seq_length, attention)))


def flops_per_token(
    model: ModelConfig,
    padded_vocab_size: int,
    *,
    attention: Attention = "full",
    recompute: Recompute | None = None,
    head: str = VOCABULARY,
    figure: Figure | None = None,
    trained: float = 1.0,
) -> int:
    """FLOPs of forward and backward per token; with recompute, of what the hardware really does.

    figure: of what is built and trained, all of the model by default; trained: share of the blocks that
    a step trains.

    full recompute runs every block's forward a second time, selective only the core of attention.
    """
    figure, s = figure or figure_of(model, padded_vocab_size, head), model.seq_length
    layers = int(figure.total(lambda layer: layer_forward(layer, s, attention)))
    cores = cores_forward(figure, s, attention)
    # an input's gradient repeats forward's products, and attention's core has two factors
    inputs, weights = layers + cores, int(trained * figure.total(layer_weights))
    again = {None: 0, "selective": cores, "full": layers}
    heads = 2 * head_forward(figure) + head_weights(figure)
    return layers + inputs + weights + heads + again[recompute]


def flops_per_step(
    model: ModelConfig,
    padded_vocab_size: int,
    global_batch_size: int,
    *,
    attention: Attention = "full",
    recompute: Recompute | None = None,
) -> int:
    """FLOPs of one optimizer step over all ranks."""
    per_token = flops_per_token(model, padded_vocab_size, attention=attention, recompute=recompute)
    return per_token * global_batch_size * model.seq_length
