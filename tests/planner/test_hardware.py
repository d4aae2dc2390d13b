"""Devices: every number has a source, files are read with care, rings follow their formula."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.planner.hardware import DEVICES, Cluster, find_device

NUMBERS = (
    "peak_tflops", "matmul_tflops", "sustained", "attention", "memory_gb", "bandwidth_gb_s",
    "link_gb_s", "network_gb_s", "devices_per_node",
)  # fmt: skip


@pytest.mark.parametrize("name", list(DEVICES))
def test_every_number_has_a_source_and_is_possible(name: str) -> None:
    device = DEVICES[name]
    assert set(NUMBERS) <= set(device.sources)
    assert device.matmul_tflops < device.peak_tflops
    assert device.link_gb_s * 1e9 < device.bandwidth_gb_s * 1e9


def test_a_file_changes_what_it_names_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text("base: h100\nnetwork_gb_s: 12.5\n")
    device = find_device(str(path))
    assert (device.name, device.network_gb_s, device.peak_tflops) == ("ours", 12.5, 989)
    assert device.sources["network_gb_s"] == "given in ours.yaml"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: h100\nnetwerk: 3\n", "netwerk: no such field"),
        ("base: h100\nmemory_gb: -1\n", "must be a number above 0"),
        ("base: h100\nsustained: 1.5\n", "a share; at most 1"),
        ("peak_tflops: 100\n", "without `base: <device>` it needs"),
        ("base: [\n", "not valid YAML"),
        ("- 1\n", "holds no `field: value` lines"),
        ("base: h9000\n", "no such device"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        find_device(str(path))


def test_a_ring_inside_a_node_moves_its_share_over_the_link() -> None:
    device = find_device("a100")
    cluster = Cluster(device=device, world_size=64, devices_per_node=8)
    seconds = cluster.ring_seconds(8e9, 8, stride=1, passes=2)
    assert seconds == pytest.approx(2 * 7 / 8 * 8e9 / (300e9 * 0.8), rel=0.01)
    assert cluster.ring_seconds(8e9, 1, stride=1, passes=2) == 0.0
    assert cluster.ring_seconds(8e9, 8, stride=8, passes=2) > 9 * seconds
