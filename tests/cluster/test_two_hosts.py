"""Several hosts, each with its own network, train by the GPT-3 script; then a cable is cut."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.telemetry.record import StepRecord, read_metrics
from tests.support.gpt3 import GPT3, PATHS, make_folder, script_env
from tests.support.hosts import CABLE, Command, Hosts, no_hosts_here, wait_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.root,
    pytest.mark.skipif(no_hosts_here() is not None, reason=str(no_hosts_here())),
]

SCRIPT = ["bash", str(GPT3 / "train_gpt3_175b_distributed.sh"), *PATHS]
PER_HOST = 2
TIMEOUT_SECONDS = 12.0
LONG = {"TRAIN_ITERS": "1000000", "LR_DECAY_ITERS": "1000000", "EVAL_ITERS": "0"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("cluster") / "inputs")


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A folder of this test's own with the corpora in it."""
    return Path(shutil.copytree(inputs, tmp_path / "shared"))


def start(hosts: Hosts, folder: Path, **env: str) -> list[Command]:
    """The script on every host, as examples/gpt3/README.md says."""
    places = {
        "NUM_NODES": str(hosts.number),
        "GPUS_PER_NODE": str(PER_HOST),
        "MASTER_ADDR": hosts.address(0),
        "GLOO_SOCKET_IFNAME": CABLE,
    }
    return [
        hosts.start(host, SCRIPT, script_env(NODE_RANK=str(host), **(places | env)), folder)
        for host in range(hosts.number)
    ]


def steps(folder: Path) -> list[StepRecord]:
    path = folder / "run/metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return [record for record in records if isinstance(record, StepRecord)]


LAYOUTS = {
    "tp in a host, pp between two": (2, {"TP": "2", "PP": "2"}),
    "tp in a host, dp between two": (2, {"TP": "2", "PP": "1"}),
    "tp in a host, pp and dp between four": (4, {"TP": "2", "PP": "2"}),
    "pp in a host, distributed optimizer between two": (
        2,
        {"TP": "1", "PP": "2", "EXTRA_ARGS": "--use-tp-pp-dp-mapping --use-distributed-optimizer"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_hosts_train_as_one_does(name: str, folder: Path, inputs: Path, tmp_path: Path) -> None:
    number, layout = LAYOUTS[name]
    with Hosts(number, tmp_path) as hosts:
        commands = start(hosts, folder, **layout)
        for command in commands:
            assert command.wait(240) == 0, command.err[-3000:]
        assert not any(hosts.processes(host) for host in range(number))
    alone = Path(shutil.copytree(inputs, tmp_path / "alone"))
    one = script_env(NUM_NODES="1", GPUS_PER_NODE=str(number * PER_HOST), **layout)
    done = subprocess.run(SCRIPT, cwd=alone, env=one, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    losses, expected = ([(r.iteration, r.loss) for r in steps(f)] for f in (folder, alone))
    assert len(losses) == 4 and losses == expected


CUTS: dict[str, tuple[int, Callable[[Hosts, int], None]]] = {
    "cable pulled": (1, Hosts.unplug),
    "packets lost": (1, Hosts.silence),
    "power lost": (1, Hosts.end_processes),
    "cable of the store's host pulled": (0, Hosts.unplug),
    "packets of the store's host lost": (0, Hosts.silence),
    "power of the store's host lost": (0, Hosts.end_processes),
}


def failures(folder: Path) -> dict[int, dict[str, Any]]:
    """errors/rank<r>.json of all ranks that left one."""
    found = [json.loads(path.read_text()) for path in (folder / "run/errors").glob("rank*.json")]
    return {failure["rank"]: failure for failure in found}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_cable_ends_every_host_in_time(name: str, folder: Path, tmp_path: Path) -> None:
    """Tensor parallel inside each host, pipeline over the wire."""
    lost, cut = CUTS[name]
    extra = f"--distributed-timeout-minutes {TIMEOUT_SECONDS / 60}"
    with Hosts(2, tmp_path) as hosts:
        commands = start(hosts, folder, TP="2", PP="2", EXTRA_ARGS=extra, **LONG)
        wait_until("three steps", lambda: len(steps(folder)) >= 3, 120, alive=commands)
        cut(hosts, lost)
        survivors = (0, 1) if cut is not Hosts.end_processes else (1 - lost,)
        for host in survivors:
            assert commands[host].wait(TIMEOUT_SECONDS + 30) == 6
        wait_until("no process is left", lambda: not any(map(hosts.processes, (0, 1))), 10)
    told = failures(folder)
    for host in survivors:
        others = "rank 0's host" if host == 1 else "rank 2 was|rank 3 was|ranks 2, 3 were"
        for rank in (PER_HOST * host, PER_HOST * host + 1):
            assert told[rank]["exit_code"] == 6, told[rank]
            assert re.search(rf"FATAL\[6\] rank={rank} step=\d+: .*({others})", told[rank]["fatal"])
            assert told[rank]["fatal"] in commands[host].err
        assert commands[host].err.count("FATAL[") == PER_HOST


def test_the_loss_of_one_of_three_hosts_is_told_by_the_two_others(
    folder: Path, tmp_path: Path
) -> None:
    extra = f"--distributed-timeout-minutes {TIMEOUT_SECONDS / 60}"
    sizes = {"TP": "1", "PP": "1", "GPUS_PER_NODE": "1", "GLOBAL_BATCH_SIZE": "3"}
    with Hosts(3, tmp_path) as hosts:
        commands = start(hosts, folder, **sizes, **LONG, EXTRA_ARGS=extra)
        wait_until("three steps", lambda: len(steps(folder)) >= 3, 120, alive=commands)
        hosts.silence(2)
        for command in commands:
            assert command.wait(TIMEOUT_SECONDS + 30) == 6
        wait_until("no process is left", lambda: not any(map(hosts.processes, (0, 1, 2))), 10)
    told = {rank: failure["fatal"] for rank, failure in failures(folder).items()}
    assert all(f"FATAL[6] rank={rank} " in told[rank] for rank in (0, 1, 2)), told
    assert "rank 2 was lost" in told[0] and "rank 2 was lost" in told[1]
    assert "rank 0's host (10.77.0.1)" in told[2]


def test_hosts_leave_nothing_behind_when_a_test_fails(tmp_path: Path) -> None:
    before = set(Path("/run/netns").iterdir()) if Path("/run/netns").exists() else set()
    with pytest.raises(ZeroDivisionError), Hosts(2, tmp_path) as hosts:
        sleeper = hosts.start(1, ["sleep", "100"], dict(os.environ), Path.cwd())
        wait_until("it runs", lambda: hosts.processes(1), 10)
        made = set(Path("/run/netns").iterdir()) - before
        assert sum(f"-{os.getpid()}-" in path.name for path in made) == 3
        raise ZeroDivisionError
    assert sleeper.process.poll() == -9
    assert not any(f"-{os.getpid()}-" in path.name for path in Path("/run/netns").iterdir())


def test_a_host_that_never_comes_is_named_by_the_others(folder: Path, tmp_path: Path) -> None:
    extra = "--distributed-timeout-minutes 0.1"
    with Hosts(4, tmp_path) as hosts:
        begin = [("0", 0), ("1", 1), ("1", 2)]  # host 2 thinks it is 1, and 3 sleeps
        for node, host in begin:
            env = script_env(
                NUM_NODES="4", GPUS_PER_NODE="1", TP="1", PP="1", NODE_RANK=node,
                MASTER_ADDR=hosts.address(0), GLOO_SOCKET_IFNAME=CABLE, EXTRA_ARGS=extra,
            )  # fmt: skip
            hosts.start(host, SCRIPT, env, folder)
        codes = [command.wait(90) for command in hosts.commands]
    said = [command.err for command in hosts.commands]
    assert codes[0] == 6 and "2 of 4 hosts came, missing: host 2, 3" in said[0], said[0]
    assert sorted(codes[1:]) == [2, 6], said[1:]
    assert any("two launchers say they are host 1" in text for text in said[1:])


def test_hosts_without_the_first_name_it(folder: Path, tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        env = script_env(
            NUM_NODES="2", TP="2", PP="1", NODE_RANK="1", MASTER_ADDR=hosts.address(0),
            EXTRA_ARGS="--distributed-timeout-minutes 0.1",
        )  # fmt: skip
        command = hosts.start(1, SCRIPT, env, folder)
        assert command.wait(90) == 6
    assert command.err.startswith("FATAL[6]") and command.err.count("\n") == 1, command.err
    assert "host 1 of 2 could not join at 10.77.0.1:6000 within 0.1 minutes" in command.err
    assert "host 0, which holds the store, is missing" in command.err


def test_a_signal_on_one_host_saves_and_stops_all(folder: Path, tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        commands = start(hosts, folder, TP="2", PP="2", **LONG)
        wait_until("three steps", lambda: len(steps(folder)) >= 3, 120, alive=commands)
        commands[1].process.send_signal(signal.SIGTERM)
        assert [command.wait(90) for command in commands] == [75, 75], commands[0].err
        wait_until("no process is left", lambda: not any(map(hosts.processes, (0, 1))), 10)
    saved = (folder / "run/latest_checkpointed_iteration.txt").read_text().strip()
    assert int(saved) == steps(folder)[-1].iteration


def test_hosts_restart_after_a_killed_rank_and_go_on_from_the_checkpoint(
    folder: Path, inputs: Path, tmp_path: Path
) -> None:
    layout = {"TP": "2", "PP": "2", "SAVE_INTERVAL": "1"}
    fault = {"MLITE_FAULT": "step4.backward:2:sigkill:once", "MAX_RESTARTS": "2"}
    with Hosts(2, tmp_path) as hosts:
        commands = start(hosts, folder, **layout, **fault)
        assert [command.wait(240) for command in commands] == [0, 0], commands[0].err[-3000:]
    assert "loaded checkpoint from run at iteration 3" in commands[0].out
    alone = Path(shutil.copytree(inputs, tmp_path / "alone"))
    one = script_env(NUM_NODES="1", GPUS_PER_NODE="4", **layout)
    subprocess.run(SCRIPT, cwd=alone, env=one, capture_output=True, timeout=240, check=True)
    curves = [[(r.iteration, r.loss, r.grad_norm) for r in steps(f)] for f in (folder, alone)]
    assert len(curves[0]) == 4 and curves[0] == curves[1]
