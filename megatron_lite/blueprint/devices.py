"""Accelerators by the names their drivers give: the one table of peaks that everything reads.

A name counts only as it stands here.  Cards of one chip differ (an H200 NVL is slower than an
H200), clouds have chips of their own under a family's name, and a slice of a card (MIG, vGPU)
carries the card's name with something behind it: what is not in the table has no known peak.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of card.

    peak_tflops: dense bf16 or fp16 products (data sheets show twice this "with sparsity").
    driver_names: as the driver writes them, without a leading "NVIDIA".
    """

    peak_tflops: float
    source: str
    driver_names: tuple[str, ...]


_SHEET = "NVIDIA {} data sheet, dense bf16 tensor core"


def _sheet(card: str, peak: float, *names: str) -> Accelerator:
    return Accelerator(peak, _SHEET.format(card), names)


ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType({
    "v100-16g": Accelerator(125, "NVIDIA V100 SXM2 data sheet (fp16; it has no bf16)",
                            ("Tesla V100-SXM2-16GB",)),
    "v100-32g": Accelerator(125, "NVIDIA V100 SXM2 and SXM3 data sheets (fp16; it has no bf16)",
                            ("Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB")),
    "v100-pcie": Accelerator(112, "NVIDIA V100 PCIe data sheet (fp16; it has no bf16)",
                             ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB")),
    "v100s": Accelerator(130, "NVIDIA V100S PCIe data sheet (fp16; it has no bf16)",
                         ("Tesla V100S-PCIE-32GB",)),
    "a100-40g": _sheet("A100", 312, "A100-SXM4-40GB", "A100-PCIE-40GB", "A100 40GB PCIe"),
    "a100-80g": _sheet("A100", 312, "A100-SXM4-80GB", "A100-SXM-80GB", "A100 80GB PCIe",
                       "A100-PCIE-80GB"),
    "a800": _sheet("A800", 312, "A800-SXM4-40GB", "A800-SXM4-80GB", "A800 80GB PCIe",
                   "A800 40GB PCIe", "A800 40GB Active"),
    "h100": _sheet("H100 SXM", 989, "H100 80GB HBM3"),
    "h100-pcie": _sheet("H100 PCIe", 756, "H100 PCIe"),
    "h100-nvl": _sheet("H100 NVL", 835, "H100 NVL"),
    "h800": _sheet("H800 SXM", 989, "H800"),
    "h800-pcie": _sheet("H800 PCIe", 756, "H800 PCIe"),
    "h20": _sheet("H20", 148, "H20"),
    "h200": _sheet("H200 SXM", 989, "H200"),
    "h200-nvl": _sheet("H200 NVL", 835, "H200 NVL"),
    "gh200": _sheet("GH200", 989, "GH200 480GB", "GH200 120GB", "GH200 144G HBM3e"),
    "b200": _sheet("HGX B200", 2250, "B200"),
    "gb200": _sheet("GB200 NVL72", 2500, "GB200"),
    "gb300": _sheet("GB300 NVL72", 2500, "GB300"),
    "l40s": _sheet("L40S", 362, "L40S"),
    "l4": _sheet("L4", 121, "L4"),
    "a10g": _sheet("A10G", 70, "A10G"),
    "a10": _sheet("A10", 125, "A10"),
    "a30": _sheet("A30", 165, "A30"),
    "a40": _sheet("A40", 149.7, "A40"),
    "mi300x": Accelerator(1307.4, "AMD MI300X data sheet, dense bf16", ("AMD Instinct MI300X",)),
    "mi325x": Accelerator(1307.4, "AMD MI325X data sheet, dense bf16", ("AMD Instinct MI325X",)),
})  # fmt: skip
"""Short name -> accelerator; planner/hardware.py adds links and memory to some of them."""


def _plain(name: str) -> str:
    """A driver's name with one spelling of case, spaces and vendor."""
    return re.sub(r"^nvidia ", "", " ".join(name.lower().split()))


_BY_DRIVER_NAME: Mapping[str, str] = MappingProxyType(
    {_plain(name): short for short, one in ACCELERATORS.items() for name in one.driver_names}
)


def short_name(driver_name: str) -> str | None:
    """The table's name of a card as its driver calls it; None where it is not known exactly."""
    return _BY_DRIVER_NAME.get(_plain(driver_name))


def peak_tflops(driver_name: str) -> float | None:
    """Dense bf16 peak of "NVIDIA H100 80GB HBM3", say; None where it is not known.

    A wrong peak is worse than no MFU.
    """
    short = short_name(driver_name)
    return None if short is None else ACCELERATORS[short].peak_tflops


def unknown_peak_line(driver_name: str) -> str | None:
    """Why there will be no MFU, and what can be done; None where the peak is known."""
    if peak_tflops(driver_name) is not None:
        return None
    slice_of = re.search(r"\bMIG\b", driver_name)
    why = "is a slice of a card" if slice_of else "is not in the table of known cards"
    return (
        f"MFU: no peak is known for {driver_name!r}, which {why}; TGS and TFLOP/s are measured, "
        "MFU is shown as -"
    )
