"""Where a predicted step time is a range, and why: what measured steps of its kind were off by.

The bounds of each doubt are those of the rows of tests/planner/published_times.tsv that have it, or
say that there are none; a test holds the table against them.  Without doubts nine of ten measured
steps were within 15 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lite.blueprint.figure.parts import Matrix
from megatron_lite.planner.activations import uses_flash
from megatron_lite.planner.forecast import Forecast


@dataclass(frozen=True, slots=True)
class Trusted:
    """Seconds of a step, from and to; why: what is in doubt, or nothing."""

    low: float
    high: float
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Doubt:
    """low, high: measured steps as multiples of the predicted, where `holds`.

    attention: what high has besides, in times of the attention's share.
    """

    holds: Callable[[Forecast], bool]
    low: float
    high: float
    why: str
    attention: float = 0.0

    def longest(self, plan: Forecast) -> float:
        """high, of this plan."""
        return self.high + self.attention * _share(plan, "attention")


def trusted(plan: Forecast) -> Trusted | None:
    """The range of a plan's step, or None where its number stands, or where its times were measured."""
    if plan.costs.given is not None:
        return None
    doubts = [doubt for doubt in _DOUBTS if doubt.holds(plan)]
    if not doubts:
        return None
    step = sum(plan.seconds.values())
    low, high = min(d.low for d in doubts), max(d.longest(plan) for d in doubts)
    why = tuple(doubt.why.format(device=plan.cluster.device.name) for doubt in doubts)
    return Trusted(low * step, high * step, why)


def range_json(plan: Forecast) -> dict[str, Any]:
    """A plan's range as plain values."""
    range_ = trusted(plan)
    if range_ is None:
        return {"range_seconds": None, "in_doubt": []}
    return {"range_seconds": [range_.low, range_.high], "in_doubt": list(range_.why)}


def _share(plan: Forecast, kind: str) -> float:
    return plan.seconds[kind] / sum(plan.seconds.values())


def _fast(plan: Forecast) -> bool:
    return not plan.cluster.device.cpu and plan.cluster.device.matmul_tflops > 500


def _small_on_fast(plan: Forecast) -> bool:
    return _fast(plan) and plan.cluster.world_size > 1 and plan.blueprint.num_parameters < 10e9


def _small_on_slow(plan: Forecast) -> bool:
    device = plan.cluster.device
    return not device.cpu and not _fast(plan) and plan.blueprint.num_parameters < 1e9


def _unfitted(plan: Forecast) -> bool:
    return not plan.cluster.device.cpu and not plan.cluster.device.is_fitted


def _guessed_cores(plan: Forecast) -> bool:
    return plan.cluster.device.cpu and not plan.cluster.device.is_fitted


def _leaves_node(plan: Forecast) -> bool:
    return plan.blueprint.grid.tp > plan.cluster.devices_per_node


def _unfused(plan: Forecast) -> bool:
    model, asked = plan.blueprint.model, plan.asked
    return asked.on_gpu and not uses_flash(model, asked.precision, on_gpu=True)


def _frozen(plan: Forecast) -> bool:
    layers = plan.blueprint.figure.kinds(range(plan.blueprint.model.num_layers))
    return any(matrix.frozen for layer in layers for matrix in layer.of(Matrix))


def _whole_matrices(plan: Forecast) -> bool:
    ranks = range(plan.blueprint.grid.pp)
    updated = any(plan.blueprint.held(rank).update_flops for rank in ranks)
    return updated and _share(plan, "optimizer") > 0.1


def _on_host(plan: Forecast) -> bool:
    """Whether updates in host memory take a part of the step worth doubting."""
    return (
        plan.asked.on_gpu and plan.asked.parallel.on_host > 0 and _share(plan, "optimizer") > 0.05
    )


_DOUBTS = (
    _Doubt(_unfitted, 0.75, 1.3,
           "no measured step on {device} was fitted: what its products and kernels reach is its kin's"),
    _Doubt(_guessed_cores, 0.3, 3.0, "the rates of these cores are a guess; tools/calibrate.py measures them"),
    _Doubt(_small_on_fast, 0.95, 1.5,
           "a model below 10B parameters on several devices as fast as an H100: others' took 1.1 to 1.5 times "
           "as long (ours on one H100 were within 14 %)"),
    _Doubt(_small_on_slow, 0.8, 1.9,
           "a model below 1B parameters: trainers differ by more than twice (0.8 to 1.9 times)"),
    _Doubt(lambda plan: plan.cluster.world_size > 4096, 0.95, 1.25,
           "more than 4,096 devices: their networks took 1.1 to 1.2 times as long"),
    _Doubt(_leaves_node, 0.95, 1.5, "tp leaves the node: the one measured step took 1.3 times as long"),
    _Doubt(lambda plan: _share(plan, "attention") > 0.4, 0.85, 1.75,
           "attention is most of the step: measured ones took 1.0 to 1.7 times as long"),
    _Doubt(lambda plan: _share(plan, "host") > 0.05, 0.75, 1.4,
           "the device waits for its host, whose speed is not known"),
    _Doubt(_unfused, 0.85, 1.1,
           "attention is not fused: counted are Megatron-LM's kernels on 16-bit scores; ours, in fp32 "
           "(kernels/reference.py), move up to three times as much", attention=2.0),
    _Doubt(lambda plan: plan.asked.on_gpu and plan.asked.precision.name == "fp32", 0.7, 1.5,
           "no measured step in fp32 or TF32"),
    _Doubt(_whole_matrices, 0.8, 1.5, "no measured step whose update multiplies whole matrices"),
    _Doubt(_on_host, 0.8, 1.5,
           "no measured step of a GPU with updates in host memory: 70 % of its links and memory are assumed"),
    _Doubt(lambda plan: plan.blueprint.grid.cp > 2, 0.9, 1.3, "no measured step of more than cp 2"),
    _Doubt(_frozen, 0.8, 1.4, "no measured step with frozen weights"),
)  # fmt: skip
