"""State of the optimizer in host memory: its bytes there, and the seconds of its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.blueprint.buckets import HOST_PORTION
from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.planner.activations import element_bytes
from megatron_lite.planner.hardware import Device
from megatron_lite.planner.sharing import shared_by

BUSY = 0.7
"""Share of a host's memory bandwidth and of a link that copies and updates reach; assumed."""

NODE_TFLOPS = 3.0
"""fp32 products of a node's cores, for updates of whole matrices: two usual processors, assumed."""


@dataclass(frozen=True, slots=True)
class OnHost:
    """What a rank keeps in host memory and updates there.

    share: of masters and states; masters: elements that have one there; updated: of them, what a step
    changes; states: bytes; flops: of products of their update; largest: elements of a tensor that is
    updated whole; wide, low: bytes of a gradient and of a weight.
    """

    share: float
    masters: float
    updated: float
    states: float
    flops: float
    largest: int
    wide: int
    low: int

    @property
    def portion(self) -> float:
        """Elements that are updated at a time."""
        return min(self.updated, max(HOST_PORTION, self.largest))

    @property
    def buffers(self) -> float:
        """Bytes through which gradients come and weights go, two of each."""
        return 2 * self.portion * (self.wide + self.low)

    @property
    def bytes(self) -> float:
        """Masters, those of fp32 weights too, states and buffers."""
        return 4 * self.masters + self.states + self.buffers

    def beside(self, static: Mapping[str, float], *, on_gpu: bool) -> dict[str, float]:
        """What of the static bytes stays on the device; a CPU is its own host, with buffers and copies."""
        kinds = dict(static)
        if on_gpu:
            for kind in ("masters", "moments"):
                kinds[kind] *= 1.0 - self.share
        elif self.share:
            kinds["staging"] = self.buffers + 4 * self.masters * (self.low == 4)
        return kinds

    def seconds(self, device: Device, ranks: int) -> float:
        """Of the update by so many ranks of a host: copies both ways beside its work, but for the ends."""
        link = device.host_link_gb_s * 1e9 * BUSY
        down, up = self.updated * self.wide / link, self.updated * self.low / link
        # a gradient is written and read, master and states read and written, the weight written and read
        moved = self.updated * (2 * self.wide + 2 * 4 + 2 * self.low) + 2 * self.states
        memory = device.host_bandwidth_gb_s * 1e9 * BUSY / ranks
        products = self.flops / (NODE_TFLOPS * 1e12 / ranks)
        ends = self.portion * (self.wide + self.low) / link
        return max(down, up, moved / memory + products) + ends


def on_host(
    blueprint: Blueprint, parallel: ParallelConfig, precision: PrecisionConfig, pp_rank: int
) -> OnHost:
    """What a rank of a pp rank keeps and updates in host memory."""
    held, owners = blueprint.held(pp_rank), shared_by(parallel, blueprint.replicas).state
    low, share = element_bytes(precision), parallel.on_host
    part = share / owners
    return OnHost(
        share,
        masters=held.num_trained * part,
        updated=held.accumulated * part,
        states=held.state_bytes * part,
        # no rank has less than a matrix
        flops=share * max(held.update_flops / owners, held.largest_flops),
        largest=held.largest_matrix,
        wide=4 if parallel.accumulate_allreduce_grads_in_fp32 else low,
        low=low,
    )
