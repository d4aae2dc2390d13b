"""State in host memory: what leaves the device, what the host must hold, how long its update takes."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.cli import plan as plan_tool
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import DEVICES, Cluster, Device
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.offload import BUSY
from megatron_lite.planner.report import Extra, plan_json, to_text
from tests.support.huggingface import tool

RUN = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --seq-length 4096 --swiglu --bf16 "
    "--micro-batch-size 1 --global-batch-size 64 --vocab-size 50000 --lr 1e-4 --train-iters 1 --mock-data "
    "--zero-stage 1 "
)
HOST = "--optimizer-cpu-offload "
A100 = DEVICES["a100-80g"]


def plan(flags: str, device: Device = A100, world: int = 8) -> Forecast:
    config = parse((RUN + flags).split()).config
    blueprint = draw_up(config, world)
    asked = PlanInputs.of(
        config.parallel, config.precision, config.train, config.data, on_gpu=not device.cpu
    )
    return forecast(blueprint, asked, Cluster(device=device, world_size=world, devices_per_node=8))


def test_masters_and_moments_leave_the_device_by_the_share() -> None:
    beside, host, half = plan(""), plan(HOST), plan(HOST + "--optimizer-offload-fraction 0.5")
    (here,), (there,), (both,) = beside.memory, host.memory, half.memory
    assert there.kinds["masters"] == there.kinds["moments"] == 0.0 == here.host
    for kind in ("masters", "moments"):
        assert both.kinds[kind] == here.kinds[kind] / 2
    same = set(here.kinds) - {"masters", "moments", "fragmentation"}
    assert all(here.kinds[kind] == there.kinds[kind] for kind in same)
    # 12 bytes of what a rank owns, and two buffers each way of fp32 gradients and bf16 weights
    owned = beside.blueprint.num_parameters / 8
    assert there.host == pytest.approx(12 * owned + 2 * 2**24 * (4 + 2), rel=1e-3)
    assert both.host == pytest.approx(6 * owned + 2 * 2**24 * (4 + 2), rel=1e-3)
    assert host.host_bytes == 8 * there.host


def test_the_update_takes_as_long_as_the_slowest_of_copies_and_host() -> None:
    owned = plan("").blueprint.num_parameters / 8
    on_device = plan("").seconds["optimizer"]
    slow_link = dataclasses.replace(A100, host_link_gb_s=1.0, host_bandwidth_gb_s=1e6)
    down = owned * 4 / (1e9 * BUSY)
    assert plan(HOST, slow_link).seconds["optimizer"] - on_device == pytest.approx(down, rel=0.1)
    slow_host = dataclasses.replace(A100, host_link_gb_s=1e6, host_bandwidth_gb_s=8.0)
    moved = owned * (2 * 4 + 2 * 4 + 2 * 2 + 16) / (1e9 * BUSY)
    assert plan(HOST, slow_host).seconds["optimizer"] - on_device == pytest.approx(moved, rel=0.1)
    half = plan(HOST + "--optimizer-offload-fraction 0.5", slow_host)
    assert half.seconds["optimizer"] - on_device == pytest.approx(moved / 2, rel=0.1)


def test_a_host_with_too_little_memory_does_not_fit() -> None:
    small = dataclasses.replace(A100, host_memory_gb=64.0)
    lacking = plan(HOST, small)
    assert lacking.worst.total < small.memory_bytes and not lacking.fits
    said = to_text(lacking, Extra())
    lacks = (lacking.host_bytes - 64e9) / 2**30
    assert f"DOES NOT FIT: a node needs {lacks:,.1f} GiB of host memory more than it has" in said
    assert plan(HOST).fits and plan("", small).fits
    not_known = plan(HOST, dataclasses.replace(A100, host_memory_gb=0.0))
    assert not_known.fits and "what it has is not known" in to_text(not_known, Extra())


def test_text_and_json_name_the_hosts_bytes_and_the_flags() -> None:
    found = plan(HOST + "--optimizer-offload-fraction 0.25")
    (rank,) = found.memory
    as_json = plan_json(found, Extra())
    assert as_json["stages"][0]["host_bytes"] == rank.host
    assert as_json["layout"]["flags"].endswith(
        "--optimizer-cpu-offload --optimizer-offload-fraction 0.25"
    )
    said = f"host memory: {rank.host / 2**30:,.1f} GiB per rank, {8 * rank.host / 2**30:,.1f} GiB of a node"
    assert said in to_text(found, Extra())
    assert "host memory" not in to_text(plan(""), Extra())


def test_a_cpu_is_its_own_host() -> None:
    beside, host = plan("", DEVICES["cpu"]), plan(HOST, DEVICES["cpu"])
    assert host.memory[0].kinds["moments"] == beside.memory[0].kinds["moments"]
    assert host.memory[0].kinds["staging"] == pytest.approx(2 * 2**24 * (4 + 2))
    assert host.host_bytes == 0.0


def test_it_is_the_cheapest_change_where_no_layout_fits(monkeypatch, capsys) -> None:
    flags = (
        "--hardware a100-40g --world-size 1 --num-layers 32 --hidden-size 2560 --num-attention-heads 32 "
        "--seq-length 2048 --vocab-size 50257 --bf16 --micro-batch-size 2 --global-batch-size 64 --lr 1e-4 "
        "--train-iters 100"
    )
    assert tool(plan_tool.main, monkeypatch, *flags.split()) == 0
    assert "cheapest change: --optimizer-cpu-offload" in capsys.readouterr().out
    assert tool(plan_tool.main, monkeypatch, *flags.split(), "--optimizer", "apex-adam") == 0
    assert "use more nodes" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, device in DEVICES.items() if not device.cpu])
def test_every_device_names_the_source_of_its_hosts_numbers(name: str) -> None:
    device = DEVICES[name]
    assert device.host_memory_gb and {"host_memory_gb", "host_link_gb_s"} <= set(device.sources)
