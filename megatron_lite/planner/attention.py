"""Seconds of an attention core: by a fused kernel, or by products whose scores go through memory."""

from __future__ import annotations

from megatron_lite.blueprint.figure.parts import Core
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.planner.activations import element_bytes, uses_flash
from megatron_lite.planner.hardware import Device
from megatron_lite.planner.memory import PlanInputs

FORWARD_OF_ATTENTION = 1.15
"""A fused forward's rate beside that of forward and backward together (arXiv:2307.08691, figures 4 to 6)."""

_FUSED_MASK = 0.5
"""Values that a dropout mask takes in one kernel with its softmax, written and read."""


def core_seconds(
    core: Core, model: ModelConfig, asked: PlanInputs, device: Device, *,
    squares: float, tokens: float, slow: float,
) -> tuple[float, float]:  # fmt: skip
    """(forward, backward) of a micro batch on a rank.

    squares: scores of each of the model's heads, on this rank; slow: of fp32 products.
    """
    scores = squares * core.heads
    if uses_flash(model, asked.precision, on_gpu=asked.on_gpu):
        return _fused(core, model, asked, device, scores=scores, tokens=tokens, slow=slow)
    return _unfused(core, model, asked, device, scores=scores, slow=slow)


def _fused(
    core: Core, model: ModelConfig, asked: PlanInputs, device: Device, *,
    scores: float, tokens: float, slow: float,
) -> tuple[float, float]:  # fmt: skip
    # a mask, on a CPU and for dropout, spares nothing outside of a window
    masked = not asked.on_gpu or model.attention_dropout > 0.0
    window = model.seq_length if masked else core.seen(model.seq_length)
    rate = device.attention_flops(min(core.group or window, tokens), core.head_size) / slow
    band = 1.0 - (1.0 - window / model.seq_length) ** 2
    causal = 2.0 * scores * core.head_size * band
    forward = causal / (rate * FORWARD_OF_ATTENTION)
    backward = 3.5 * causal / rate - forward
    return forward + device.launch_seconds, backward + 2 * device.launch_seconds


def _unfused(
    core: Core, model: ModelConfig, asked: PlanInputs, device: Device, *, scores: float, slow: float
) -> tuple[float, float]:
    """Two batched products, softmax and dropout: as Megatron-LM's fused softmax has it on a GPU."""

    def moving(values: float) -> float:
        return device.moving_seconds(scores * values * element_bytes(asked.precision))

    # the products' inner dimensions are a head and the sequence, or a group of it
    seen = core.group or model.seq_length
    reached = (device.efficiency(core.head_size) + device.efficiency(seen)) / 2
    flops = 4.0 * scores * core.head_size
    products = max(flops / (device.matmul_tflops * 1e12 * reached) * slow, moving(2.0))
    # the softmax reads and writes; dropout reads, writes and makes a mask that backward reads
    forward, backward = products + moving(2.0), 2 * products + moving(3.0)
    if model.attention_dropout > 0.0:
        forward += moving(2.0 + (_FUSED_MASK if asked.on_gpu else device.dropout_values))
        backward += moving(2.5)
    return forward, backward
