"""State in host memory at the start of a run: too little of it is told before a step, and by which flags."""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

import pytest
import torch

from megatron_lite.config.errors import ConfigError, OutOfMemory
from megatron_lite.planner import room
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.room import available_bytes, require_host_memory
from megatron_lite.train.assemble import assemble
from megatron_lite.train.measuring import device
from megatron_lite.train.measuring.device import share_cores
from tests.support.axes import BF16, HOST
from tests.support.tiny import context, draw, tiny_config
from tests.train.runs import alone


def test_what_is_available_is_the_hosts_or_the_containers(tmp_path: Path) -> None:
    meminfo, groups = tmp_path / "meminfo", tmp_path / "groups"
    assert available_bytes(meminfo, groups) == float("inf")
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert available_bytes(meminfo, groups) == 4000 * 1024
    (groups / "memory").mkdir(parents=True)
    (groups / "memory/memory.limit_in_bytes").write_text("3000000\n")
    (groups / "memory/memory.usage_in_bytes").write_text("1000000\n")
    assert available_bytes(meminfo, groups) == 2e6
    (groups / "memory.max").write_text("1500000\n")
    (groups / "memory.current").write_text("1600000\n")
    assert available_bytes(meminfo, groups) == 0.0
    (groups / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, groups) == 2e6


def test_ranks_of_a_host_need_their_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(**{HOST: True, BF16: True})
    blueprint = draw(config, 4)
    asked = PlanInputs(config.parallel, config.precision, config.train.micro_batch_size)
    one = blueprint.num_parameters * (12 + 2 * (4 + 2))  # all of it is a portion
    for ranks in (1, 4):
        monkeypatch.setattr(room, "available_bytes", lambda ranks=ranks: 1.01 * ranks * one)
        require_host_memory(blueprint, asked, ranks)
        monkeypatch.setattr(room, "available_bytes", lambda ranks=ranks: 0.99 * ranks * one)
        with pytest.raises(ConfigError, match="--optimizer-offload-fraction 0.89") as caught:
            require_host_memory(blueprint, asked, ranks)
        assert "use --use-distributed-optimizer or" in str(caught.value)
    without = dataclasses.replace(config.parallel, optimizer_cpu_offload=False)
    require_host_memory(blueprint, dataclasses.replace(asked, parallel=without), 4)


def test_a_run_that_its_host_has_no_room_for_is_refused_before_it_begins() -> None:
    """32 billion parameters: nothing of them is made."""
    size = ("--num-layers", "40", "--hidden-size", "8192", "--num-attention-heads", "64")
    ended = alone("--mock-data", *size, "--optimizer-cpu-offload")
    assert ended.rc == 2, ended.err
    assert "FATAL[2]" in ended.err
    assert "GB are available; use --optimizer-offload-fraction" in ended.err


def test_an_allocation_that_fails_names_the_flag_and_the_ways_out() -> None:
    config = tiny_config(model__hidden_size=512, model__num_layers=8, **{HOST: True, BF16: True})
    blueprint = draw(config, 1)
    assert 25e6 < blueprint.num_parameters < 26e6
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = 26_000_000 * (2 + 4 + 4)  # weights, gradients, masters: none for moments
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        with pytest.raises(OutOfMemory) as caught:
            assemble(config, blueprint, context(blueprint, 0))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    said = str(caught.value)
    assert "--optimizer-cpu-offload: the host gives no more memory" in said
    assert "--use-distributed-optimizer, lower --optimizer-offload-fraction" in said


def test_beside_a_gpu_a_rank_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: set(range(64)))
    share_cores(8, torch.device("cpu"))
    assert given == []
    share_cores(8, torch.device("cuda", 0))
    share_cores(128, torch.device("cuda", 0))
    assert given == [8, torch.get_num_threads()]
