"""Noise on the token embedding while a model is tuned (NEFTune, arXiv:2310.05914).

e + u alpha / sqrt(L h), u uniform in [-1, 1]: L the tokens of a sample, without what fills its row.
u is a function of seed, step, sample, token and feature, as dropout is: the same in every layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lite.kernels.random import feature_bits, key, signed_uniform, token_numbers
from megatron_lite.layers.contexts import ForwardContext, StageContext, StepNoise
from megatron_lite.parallel.collectives import local_slice


def step_noise(context: StageContext, step: int) -> StepNoise | None:
    """The noise of a training step for all its micro batches; None without --neftune-alpha."""
    if context.neftune_alpha == 0.0:
        return None
    device = context.ctx.device
    made = torch.tensor(key(context.seed, step, "neftune"))
    if device.type == "cuda":
        made = made.pin_memory()
    features = feature_bits(torch.arange(context.model.hidden_size, device=device))
    return StepNoise(context.neftune_alpha, made.to(device, non_blocking=True), features)


def with_noise(x: Tensor, at: ForwardContext, context: StageContext) -> Tensor:
    """x: [s/tp, b, h] with sequence parallelism, else [s, b, h]; as it is in evaluation."""
    if at.noise is None:
        return x
    numbers = token_numbers(at.samples, at.index)
    lengths = numbers.new_full(numbers.shape, len(at.index))
    if at.segments is not None:
        lengths = at.segments.lengths.t().contiguous()
    if context.sequence_parallel:
        numbers, lengths = (local_slice(each, context.tp) for each in (numbers, lengths))
    size = at.noise.alpha * (lengths.float() * len(at.noise.features)).rsqrt()
    drawn = signed_uniform(at.noise.key, numbers, at.noise.features)
    return x + (drawn * size[..., None]).to(x.dtype)
