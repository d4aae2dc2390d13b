"""What is wrong before the first step: told at the start, with its code, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import ConfigError, DistributedError, StorageError
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.data.tokenizers.gpt2_bpe import byte_characters
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.rendezvous import reminder
from megatron_lite.rendezvous.launch import Launch, gather_hosts, read_launch
from megatron_lite.storage.disk import Disk
from megatron_lite.train import alike
from megatron_lite.train.ending.faults import Fault, NoFaults, read_fault
from tests.faults.checkpoints import snapshot
from tests.support.launch import (
    LAUNCHER_NAMES,
    TINY,
    TOOL,
    TORCHRUN,
    WITHOUT_DATA,
    Ended,
    free_port,
    launch,
    set_environment,
    start,
)
from tests.support.rights import needs_namespaces
from tests.support.sizes import with_flags

QUICK = [*TINY, "--distributed-timeout-minutes", "0.05"]

ENVIRONMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "no MASTER_ADDR": ({"MASTER_ADDR": None}, "MASTER_ADDR are not set.*torch.distributed.run"),
    "no MASTER_PORT": ({"MASTER_PORT": None}, "MASTER_PORT are not set.*torch.distributed.run"),
    "no RANK": ({"RANK": None}, "RANK and WORLD_SIZE belong together.*torch.distributed.run"),
    "no WORLD_SIZE": ({"WORLD_SIZE": None}, "RANK and WORLD_SIZE belong together"),
    "rank beyond the world": ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    "rank no number": ({"RANK": "one"}, "RANK='one' in the environment is not a number"),
    "negative rank": ({"RANK": "-1"}, "RANK='-1' in the environment is not a number"),
    "port no number": ({"MASTER_PORT": "http"}, "MASTER_PORT='http' .* is not a number"),
    "port too large": ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port: choose"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_wrong_environment_is_a_usage_error(monkeypatch, name) -> None:
    change, message = ENVIRONMENTS[name]
    set_environment(monkeypatch, TORCHRUN | change)
    with pytest.raises(ConfigError, match=message):
        read_launch()


def test_the_environment_of_torchrun_is_read(monkeypatch) -> None:
    more = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "3"}
    set_environment(monkeypatch, TORCHRUN | more | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    read = read_launch()
    assert (read.rank, read.world_size, read.local_rank, read.attempt) == (1, 2, 0, 3)
    assert (read.host, read.port, read.agent_holds_store) == ("127.0.0.1", 29500, True)


WRONG_FAULTS = {
    "step3": "'' is no rank of 2",
    "step3:2:exit": "'2' is no rank of 2",
    "step3.foward:0:exit": "'step3.foward' is no point; choose step<N>, step<N>.forward",
    "later:0:exit": "'later' is no point",
    "step:0:exit": "'step' is no point",
    "step3:0:explode": "'explode' is no action; choose sigkill",
    "step3:0:sleep": "'sleep' is no action",
    "step3:0:error70": "'error70' is no action",
    "step3:0:nan": "nan is for step<N>.loss, step<N>.gradient",
    "step3:0:flip": "flip names a tensor after =",
    "step3:0:hang=final_norm.weight": "hang names no tensor after =",
}


@pytest.mark.parametrize("text", WRONG_FAULTS)
def test_a_fault_that_does_not_exist_is_a_usage_error(text) -> None:
    with pytest.raises(ConfigError, match=re.escape(WRONG_FAULTS[text])):
        read_fault(text, 0, 2)


def test_a_fault_is_for_one_rank_and_without_one_nothing_is_installed() -> None:
    assert read_fault("step3.forward:1:sleep0.5", 1, 2) == Fault("forward", 3, "sleep0.5")
    assert read_fault("save.begin:0:sigkill", 0, 2) == Fault("save.begin", None, "sigkill")
    assert isinstance(read_fault("step3.forward:1:hang", 0, 2), NoFaults)
    assert isinstance(read_fault(None, 0, 2), NoFaults)


def fatal(ended: list[Ended], code: int) -> str:
    """What the one that spoke for all said; all end with this code and no traceback."""
    assert [rank.rc for rank in ended] == [code] * len(ended), [r.err[-1500:] for r in ended]
    assert sum(rank.err.count("FATAL[") for rank in ended) == 1
    assert all("Traceback" not in rank.err for rank in ended)
    return "".join(rank.fatal for rank in ended)


def test_ranks_that_disagree_are_told_in_what() -> None:
    def argv(rank: int) -> list[str]:
        return [*TINY, "--seed", str(7 + rank), *(["--bf16"] if rank else [])]

    said = fatal(launch(2, argv), 2)
    assert said.count("train.seed: 7 on rank 0, 8 on rank 1") == 1
    assert said.count("precision.bf16: false on rank 0, true on rank 1") == 1
    assert "train.micro_batch_size" not in said and "give every rank the same" in said


def test_ranks_with_other_tokenizer_files_are_told_so(tmp_path) -> None:
    """As many ids, two of them exchanged: nothing else could notice."""
    ids = {name: number for number, name in enumerate([*byte_characters(), "<|endoftext|>"])}
    for rank, (a, b) in enumerate([("a", "b"), ("b", "a")]):
        swapped = json.dumps(ids | {a: ids["a"], b: ids["b"]})
        (tmp_path / f"vocab{rank}.json").write_text(swapped)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")

    def argv(rank: int) -> list[str]:
        files = ["--vocab-file", str(tmp_path / f"vocab{rank}.json"),
                 "--merge-file", str(tmp_path / "merges.txt")]  # fmt: skip
        return with_flags(
            TINY, "--tokenizer-type", "GPT2BPETokenizer", "--vocab-size", "257", *files
        )

    said = fatal(launch(2, argv), 2)
    hashes = r"tokenizer: 257 ids, eod 256, hash (\w{16}) on rank 0, .* hash (\w{16}) on rank 1"
    found = re.search(hashes, said)
    assert found and found[1] != found[2], said


def test_another_version_of_the_code_is_another_fact(tmp_path, monkeypatch) -> None:
    """A node with an older checkout: the hash of the package is compared like every flag."""
    own = alike.facts(RunConfig(), alike.TokenizerFacts(61, None))
    package = Path(alike.__file__).parents[1]
    copied = shutil.copytree(package, tmp_path / "package", ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(alike, "__file__", str(copied / "train" / "alike.py"))
    assert alike.facts(RunConfig(), alike.TokenizerFacts(61, None)) == own
    with (copied / "optim" / "adam.py").open("a") as file:
        file.write("# one line more\n")
    changed = alike.facts(RunConfig(), alike.TokenizerFacts(61, None))
    assert [key for key in own if own[key] != changed[key]] == ["megatron_lite (hash of its code)"]


@pytest.mark.parametrize("only", [0, 1])
def test_a_world_that_never_completes_names_who_is_missing(only) -> None:
    said = fatal(launch(2, QUICK, only=[only], deadline=30), 6)
    missing = "1 of 2 ranks came, missing: rank 1" if only == 0 else "rank 0, .* is missing"
    assert re.search(missing, said) and "within 0.05 minutes" in said and "MASTER_ADDR" in said


def test_two_processes_with_one_rank_and_a_port_in_use_are_named() -> None:
    def env(rank: int) -> dict[str, str | None]:
        return {"RANK": "1"} if rank == 2 else {}

    # a batch that three ranks can share: nothing else is wrong
    ended = launch(3, with_flags(QUICK, "--global-batch-size", "6"), env=env, deadline=30)
    assert sorted(rank.rc for rank in ended) == [2, 6, 6], [rank.err[-500:] for rank in ended]
    (told,) = [rank.fatal for rank in ended if rank.rc == 2]
    assert "two processes say they are rank 1: give every process its own RANK" in told
    assert "2 of 3 ranks came, missing: rank 2" in ended[0].fatal
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = fatal(launch(2, QUICK, env={"MASTER_PORT": port}, only=[0], deadline=30), 6)
    assert f"port {port}" in said and "choose another MASTER_PORT" in said


def test_a_launcher_names_the_hosts_that_do_not_come_and_two_that_are_the_same() -> None:
    here = Launch(0, 3, host="127.0.0.1", port=free_port(), noun="host")
    with pytest.raises(DistributedError, match=r"1 of 3 hosts came, missing: host 1, 2 - start"):
        gather_hosts(here, 0.3)
    with pytest.raises(DistributedError, match="host 0, which holds the store, is missing"):
        gather_hosts(dataclasses.replace(here, rank=1, port=free_port()), 0.3)
    twin = dataclasses.replace(here, port=free_port(), world_size=2)
    with ThreadPoolExecutor(3) as threads:
        ends = [
            threads.submit(gather_hosts, dataclasses.replace(twin, rank=r), 20.0) for r in (0, 1, 1)
        ]
        problems = [end.exception() for end in ends]
    assert problems[0] is None and sum(problem is None for problem in problems) == 2
    (twins,) = filter(None, problems)
    assert isinstance(twins, ConfigError) and "two launchers say they are host 1" in str(twins)


def test_what_a_launcher_waits_for_is_said_at_once_and_again(monkeypatch, capsys) -> None:
    monkeypatch.setattr(reminder, "SECONDS", 0.4)
    here = Launch(0, 9, host="127.0.0.1", port=free_port(), noun="host")
    with ThreadPoolExecutor(2) as threads:
        waiting = [
            threads.submit(gather_hosts, dataclasses.replace(here, rank=r), 1.5) for r in (0, 2)
        ]
        assert all(isinstance(end.exception(), DistributedError) for end in waiting)
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("host 0 waits")
    ]
    assert len(said) >= 3 and f"waits at 127.0.0.1:{here.port}" in said[0]
    assert "hosts present: 0, 2; missing: 1, 3-8 - for up to " in said[-1]
    assert "MASTER_ADDR" in said[0] and "--distributed-timeout-minutes" in said[0]
    alone = dataclasses.replace(here, rank=1, port=free_port())
    with pytest.raises(DistributedError):
        gather_hosts(alone, 0.3)
    assert "host 1 waits at" in (said := capsys.readouterr().out) and "nobody answers" in said


def test_ranks_are_waited_for_in_silence_at_first(capsys) -> None:
    quiet = reminder.Reminder("rank", 0, 4, "node0:1", 600.0, after=5.0)
    quiet.missing(lambda: [1])
    reminder.Reminder("rank", 1, 4, "node0:1", 600.0, silent=True).missing(lambda: [0])
    assert capsys.readouterr().out == ""
    reminder.Reminder("rank", 0, 4, "node0:1", 600.0).missing(lambda: [1, 3])
    assert "ranks present: 0, 2; missing: 1, 3" in capsys.readouterr().out


def test_files_that_are_not_here_are_told_before_anybody_is_waited_for(tmp_path) -> None:
    """One rank of two: the other never comes."""
    gone = with_flags(WITHOUT_DATA, "--data-path", str(tmp_path / "text"), "--vocab-size", "61")
    said = fatal(launch(2, gone, only=[0], deadline=30), 3)
    assert f"data {tmp_path}/text.idx" in said and f"data {tmp_path}/text.bin" in said


def test_a_signal_while_waiting_for_the_others_ends_at_once() -> None:
    running = start(2, TINY, only=[0])
    with running:
        port = int(_listening(running.processes[0].pid))
        assert port
        running.kill(0, signal.SIGTERM)
        ended = running.wait(20)
    assert "stopped by SIGTERM before the first step" in fatal(ended, 143)


def _listening(pid: int) -> int:
    """Waits until the process has a listening socket; returns how many."""
    import time

    end = time.monotonic() + 15
    while time.monotonic() < end:
        inodes = set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except OSError:
                continue
        for table in ("tcp", "tcp6"):
            for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    return 1
        time.sleep(0.02)
    return 0


# -- the place for checkpoints ---------------------------------------------------------------


def a_file_in_place_of_the_folder(folder: Path) -> Path:
    (folder / "taken").write_text("a file")
    return folder / "taken"


def a_file_on_the_way(folder: Path) -> Path:
    (folder / "taken").write_text("a file")
    return folder / "taken" / "run"


@pytest.mark.parametrize("place", [a_file_in_place_of_the_folder, a_file_on_the_way])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_path_that_cannot_be_a_folder_ends_the_start(
    tmp_path: Path, place: Callable[[Path], Path], ranks: int
) -> None:
    save = place(tmp_path)
    ended = launch(ranks, [*TINY, "--save", str(save), "--save-interval", "2"])
    said = fatal(ended, 5)
    assert str(save) in said and "choose another" in said
    assert "iteration        1/" not in ended[-1].out
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


class SmallDisk(Disk):
    """A disk with this much space left."""

    def free_bytes(self, path: str | os.PathLike[str]) -> int:
        return 1000


def test_no_room_for_one_checkpoint_is_found_at_the_start(tmp_path) -> None:
    store = Store(tmp_path / "run", ParallelContext.serial(), SmallDisk())
    with pytest.raises(StorageError, match=r"has 1000 bytes free, .* needs (\d+) bytes") as caught:
        store.prepare(snapshot(store, 1, 1))
    assert "--save" in str(caught.value) and not list((tmp_path / "run").iterdir())
    store = Store(tmp_path / "run", ParallelContext.serial())
    store.prepare(snapshot(store, 1, 1))
    assert not list((tmp_path / "run").iterdir())


MOUNTED = """
set -e
mount -t tmpfs -o size={size}{options} none "$1"
shift
exec "$@"
"""


def in_a_mount(folder: Path, size: str, *, read_only: bool) -> subprocess.CompletedProcess[str]:
    """The tool with --save on a file system of its own, in a namespace of its own."""
    needs_namespaces()
    folder.mkdir()
    script = MOUNTED.format(size=size, options=",ro" if read_only else "")
    flags = [*TINY, "--save", str(folder), "--save-interval", "2"]
    clean = {name: v for name, v in os.environ.items() if name not in LAUNCHER_NAMES}
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(folder), sys.executable, str(TOOL), *flags],
        capture_output=True, text=True, timeout=60, env=clean | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.root
def test_a_full_file_system_is_found_at_the_start(tmp_path) -> None:
    done = in_a_mount(tmp_path / "small", "1m", read_only=False)
    assert done.returncode == 5, done.stderr
    needed = re.search(r"FATAL\[5\] rank=0 step=-: (\S+) has (\d+) bytes free, but a checkpoint "
                       r"needs (\d+) bytes", done.stderr)  # fmt: skip
    assert needed and needed[1] == str(tmp_path / "small")
    assert int(needed[2]) <= 1 << 20 < int(needed[3]) and "iteration        1/" not in done.stdout


@pytest.mark.root
def test_a_read_only_file_system_is_found_at_the_start(tmp_path) -> None:
    done = in_a_mount(tmp_path / "fixed", "1m", read_only=True)
    assert done.returncode == 5, done.stderr
    assert "FATAL[5] rank=0 step=-:" in done.stderr and str(tmp_path / "fixed") in done.stderr
    assert "Read-only file system" in done.stderr and "choose a folder that can be" in done.stderr
    assert "iteration        1/" not in done.stdout and "Traceback" not in done.stderr


def test_the_port_helper_gives_free_ports() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", free_port()))
