"""What kernels reach on each make of device, and what holds for all GPUs; each number with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

MAMF = "ml-engineering (S. Bekman), table of maximum achievable matmul FLOPS, bf16"
ASSUMED = "not measured by anyone we know: "
_FITTED = "fitted on rows of tests/planner/published_times.tsv"


@dataclass(frozen=True, slots=True)
class DeviceMake:
    """Devices of one make; see the fields of Device of the same names.

    half_length, half_head: of attention.  fitted, measured: sources of sustained and of attention.
    """

    sustained: float
    attention: float
    half_length: float
    half_head: float
    fitted: str
    measured: str

    def like(self, attention: float | None = None, measured: str = "") -> DeviceMake:
        """The same for a device that no run was fitted on."""
        return replace(
            self, fitted="taken from its kin; " + self.fitted,
            attention=attention or self.attention, measured=measured or self.measured,
        )  # fmt: skip


AMPERE = DeviceMake(
    0.815, 0.72, 500, 18, _FITTED + ": 7 of A100",
    "FlashAttention-2, arXiv:2307.08691, figure 4: causal, forward and backward, heads of 64 and 128",
)  # fmt: skip
HOPPER = DeviceMake(
    0.944, 0.69, 600, 62, _FITTED + ": 3 of H100",
    "our H100, docs/benchmarks.md: 262 TFLOP/s at 1024 x 64, 513 at 8192 x 128 (cuDNN)",
)  # fmt: skip
BLACKWELL = DeviceMake(
    0.73, 0.60, 600, 62, _FITTED + ": 2 of GB200", ASSUMED + "60 % of the matmul rate"
)  # fmt: skip
CORES = DeviceMake(0.9, 0.3, 1, 1, "guessed", "guessed")

HALF_INNER = 300.0
OVERLAP = 0.8
SPREAD = 0.005


def half_inner(matmul_tflops: float, bandwidth_gb_s: float) -> float:
    """What a tile loads and stores besides its products takes as many of them as a device is faster at
    these than at moving bytes; an H100 makes 237 FLOPs in the time of a byte."""
    return HALF_INNER * (matmul_tflops / bandwidth_gb_s) / (794.5 / 3350)


GENERAL: Mapping[str, str] = {
    "half_inner": "fitted on those of H100 and A100; of other devices in proportion to their FLOPs per byte",
    "overlap": "chosen by the median error of all rows: 4.6 % at 1, 3.7 % at 0.8; NCCL takes "
    "15 to 24 of 108 to 132 multiprocessors",
    "spread": "chosen by what NVIDIA's steps grow from 8 to 2,304 H100: 0.4 % with each doubling",
    "memory_efficiency": "our H100: GELU, norms and cross entropy of a step at 0.7 to 0.95 of its bandwidth",
    "optimizer_efficiency": "taken from memory_efficiency",
    "link_efficiency": "NCCL's rings in a node: 230 to 240 of 300 GB/s (A100), 360 of 450 (H100)",
    "network_efficiency": "taken from link_efficiency",
    "launch_seconds": ASSUMED + "what a kernel takes to fill the device and to drain",
    "host_seconds": "our layers with tensors so small that only the host counts, on a CPU; about 1,500 "
    "launches took 7 ms on our H100's",
    "dropout_values": "counted: kernels/random.py, tests/planner/test_pieces.py",
}
"""Field of Device -> where the number of all GPUs comes from."""
