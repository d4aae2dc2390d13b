"""What a node's host has for its devices; each number with its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Host(NamedTuple):
    """memory: GB of a node; bandwidth: of that memory, GB/s; link: to each device, GB/s in one direction."""

    memory: float
    bandwidth: float
    link: float
    source: str

    @property
    def fields(self) -> dict[str, float]:
        """Its numbers as a Device names them."""
        return {
            "host_memory_gb": self.memory,
            "host_bandwidth_gb_s": self.bandwidth,
            "host_link_gb_s": self.link,
        }


_PCIE = {3: 16.0, 4: 32.0, 5: 64.0}
"""GB/s of 16 lanes in one direction, by the generation."""

_DGX2 = Host(
    1500, 256, _PCIE[3], "NVIDIA DGX-2 data sheet: 1.5 TB, 2 x 6 channels of DDR4-2666, PCIe 3"
)
_DGX_A100 = "NVIDIA DGX A100 data sheet: {} TB, 2 x 8 channels of DDR4-3200, PCIe 4"
_DGX_H100 = Host(
    2000, 614, _PCIE[5], "NVIDIA DGX H100 data sheet: 2 TB, 2 x 8 channels of DDR5-4800, PCIe 5"
)
_GRACE = "NVIDIA Grace data sheet: 480 GB of LPDDR5X at 500 GB/s for {}, NVLink-C2C of 450 GB/s"
_MI300X = Host(
    2304, 922, _PCIE[5], "AMD MI300X platform: 2 x 12 channels of DDR5-4800 (usual), PCIe 5"
)

HOSTS: Mapping[str, Host] = {
    "v100-32g": _DGX2,
    "a100-40g": Host(1000, 410, _PCIE[4], _DGX_A100.format(1)),
    "a100-80g": Host(2000, 410, _PCIE[4], _DGX_A100.format(2)),
    "h100": _DGX_H100, "h800": _DGX_H100, "h200": _DGX_H100,
    "b200": Host(2000, 717, _PCIE[5], "NVIDIA DGX B200 data sheet: 2 TB, 2 x 8 channels of DDR5-5600, PCIe 5"),
    "gh200": Host(4 * 480, 4 * 500, 450, _GRACE.format("a GPU")),
    "gb200": Host(36 * 480, 36 * 500, 225, _GRACE.format("two GPUs")),
    "gb300": Host(36 * 480, 36 * 500, 225, _GRACE.format("two GPUs")),
    "mi300x": _MI300X, "mi325x": _MI300X,
}  # fmt: skip
"""Name of a device -> the host that it is usually sold with."""
