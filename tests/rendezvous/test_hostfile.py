"""A hostfile of DeepSpeed is torchrun's flags, and DeepSpeed's launcher's environment is understood."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.rendezvous.hostfile import with_hostfile
from megatron_lite.rendezvous.launch import read_launch
from tests.support.launch import set_environment

SCRIPT = ["tools/pretrain_gpt.py", "--hostfile", "of the script"]


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(socket, "gethostname", lambda: "worker-1")
    monkeypatch.setattr(socket, "getfqdn", lambda: "worker-1.cluster.example")
    path = tmp_path / "hosts"
    path.write_text(
        "# two hosts\nworker-0 slots=8\n\nworker-1.cluster.example slots=8  # the other\n"
    )
    return path


def test_it_says_nodes_ranks_place_and_first_host(hosts) -> None:
    flags = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "8",
        "--node_rank",
        "1",
        "--master_addr",
        "worker-0",
    ]
    for words in (["--hostfile", str(hosts)], [f"--hostfile={hosts}"]):
        assert with_hostfile([*words, "--max_restarts", "3", *SCRIPT]) == [
            *flags, "--max_restarts", "3", *SCRIPT
        ]  # fmt: skip


def test_what_is_given_wins_and_without_it_nothing_changes(hosts) -> None:
    words = ["--hostfile", str(hosts), "--node_rank", "0", "--master-addr=first", *SCRIPT]
    assert with_hostfile(words)[:4] == ["--nnodes", "2", "--nproc_per_node", "8"]
    assert with_hostfile(words)[4:] == ["--node_rank", "0", "--master-addr=first", *SCRIPT]
    assert with_hostfile(["--nnodes", "2", *SCRIPT]) == ["--nnodes", "2", *SCRIPT]


def test_one_host_needs_no_address(tmp_path) -> None:
    (tmp_path / "h").write_text("localhost slots=2\n")
    assert with_hostfile(["--hostfile", str(tmp_path / "h")]) == [
        "--nnodes",
        "1",
        "--nproc_per_node",
        "2",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worker-0\n", ":1: 'worker-0' is no line such as `worker-0 slots=8`"),
        ("worker-0 slots=0\n", ":1: 'worker-0 slots=0' is no line"),
        ("a slots=2\na slots=2\n", ":2: a stands there twice"),
        ("# nobody\n", "there is no host in it"),
        ("worker-1 slots=8\nworker-2 slots=4\n", "worker-1 has 8 slots and worker-2 4; every host starts"),
        ("a slots=2\nb slots=2\n", "does not say which host this is (worker-1); give --node_rank, from 0 to 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_line(hosts, text, words) -> None:
    hosts.write_text(text)
    with pytest.raises(ConfigError) as caught:
        with_hostfile(["--hostfile", str(hosts), *SCRIPT])
    assert words in str(caught.value)


def test_a_second_word_on_the_same_is_refused(hosts) -> None:
    with pytest.raises(ConfigError, match="--nnodes say the same thing; give one"):
        with_hostfile(["--hostfile", str(hosts), "--nnodes", "2", *SCRIPT])
    with pytest.raises(ConfigError, match="--hostfile takes a file"):
        with_hostfile(["--hostfile"])
    with pytest.raises(ConfigError, match="none: cannot be read"):
        with_hostfile(["--hostfile", "none", *SCRIPT])


def test_the_environment_of_deepspeeds_launcher_is_understood(monkeypatch) -> None:
    said = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "worker-0",
        "MASTER_PORT": "29500",
    }
    set_environment(monkeypatch, dict(said))
    for name, value in {"LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    launch = read_launch()
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (
        3,
        4,
        1,
        2,
    )
    assert not launch.agent_holds_store
