"""Peaks by the driver's exact name: what is nearly a known card has no known peak."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.blueprint.devices import (
    ACCELERATORS,
    peak_tflops,
    short_name,
    unknown_peak_line,
)
from megatron_lite.config.errors import ConfigError
from megatron_lite.planner.hardware import DEVICES, find_device
from megatron_lite.train.measuring.device import device_peak, peak_notices

KNOWN = [
    ("NVIDIA A100-SXM4-80GB", 312.0),
    ("A100-SXM4-40GB", 312.0),
    ("NVIDIA A100 80GB PCIe", 312.0),
    ("Tesla V100-SXM2-32GB", 125.0),
    ("Tesla V100-PCIE-32GB", 112.0),
    ("NVIDIA H100 80GB HBM3", 989.0),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 NVL", 835.0),
    ("NVIDIA H20", 148.0),
    ("NVIDIA H200", 989.0),
    ("NVIDIA H200 NVL", 835.0),
    ("NVIDIA GH200 480GB", 989.0),
    ("NVIDIA B200", 2250.0),
    ("NVIDIA A10G", 70.0),
    ("NVIDIA L4", 121.0),
    ("AMD Instinct MI300X", 1307.4),
]
UNKNOWN = [
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA H200 MIG 3g.71gb",
    "NVIDIA A100-SXM4-40GB MIG 7g.40gb",
    "NVIDIA A100-SXM-64GB",  # a chip with more cores, made for one cluster
    "GRID A100-10C",
    "NVIDIA A100-40C",
    "NVIDIA H100L-94C",
    "NVIDIA H200 Something New",
    "NVIDIA H20-3e",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA B200 NVL",
    "cpu",
    "",
]


@pytest.mark.parametrize(("name", "peak"), KNOWN)
def test_a_known_card_has_its_data_sheets_peak(name: str, peak: float) -> None:
    assert peak_tflops(name) == peak
    assert unknown_peak_line(name) is None


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_in_the_table_has_no_peak_and_a_line(name: str) -> None:
    assert peak_tflops(name) is None
    line = unknown_peak_line(name)
    assert line is not None and repr(name) in line
    assert ("slice of a card" in line) == (" MIG " in name)


@pytest.mark.parametrize("name", ["NVIDIA H200 NVL", "NVIDIA H200 MIG 1g.18gb"])
def test_a_run_on_a_gpu_takes_its_exact_peak_or_says_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert device_peak(torch.device("cuda")) == peak_tflops(name)
    assert len(peak_notices(torch.device("cuda"))) == (peak_tflops(name) is None)
    assert peak_notices(torch.device("cpu")) == []


def test_planner_and_telemetry_read_one_table() -> None:
    for name, device in DEVICES.items():
        if not device.cpu:
            assert device.peak_tflops == ACCELERATORS[name].peak_tflops
            assert device.sources["peak_tflops"] == ACCELERATORS[name].source
            for driver_name in ACCELERATORS[name].driver_names:
                assert find_device(driver_name) is device
    names = [name.lower() for one in ACCELERATORS.values() for name in one.driver_names]
    assert len(names) == len(set(names))


def test_a_card_whose_links_are_not_known_cannot_be_planned_for() -> None:
    assert short_name("nvidia  h200 nvl") == "h200-nvl"
    with pytest.raises(
        ConfigError, match=r"H200 NVL: no such device to plan for \(its peak is 835"
    ):
        find_device("NVIDIA H200 NVL")
    with pytest.raises(ConfigError, match="h9000: no such device; there are v100-32g"):
        find_device("h9000")
