"""The machines of a run: what the plan is asked for, and what a launcher's command says."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence
from typing import NoReturn

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import spellings
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.planner.hardware import Cluster, Device


@dataclasses.dataclass(frozen=True, slots=True)
class Machines:
    """Nodes and devices of a node, and rates of their links; None: not said."""

    nodes: int | None = None
    per_node: int | None = None
    link_gb_s: float | None = None
    network_gb_s: float | None = None


class _Launcher(ArgumentParser):
    """Of a launcher's command line; says what is wrong as other commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"before pretrain_gpt.py: {message}; a plan is of one number of machines: --nodes, --gpus-per-node"
        )


def at_least_one(text: str) -> int:
    """What argparse takes as a number of nodes or devices."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


_NODES = ("--nnodes", "--nodes", "--num_nodes")
_PER_NODE = ("--nproc_per_node", "--nproc-per-node", "--num_gpus", "--num_accelerators")

UNREAD = ("srun", "mpirun", "mpiexec", "accelerate", "horovodrun", "ray")
"""Launchers whose numbers of machines have other names, and other meanings."""


def launched(words: Sequence[str]) -> tuple[Machines, list[str]]:
    """What a launcher in front of pretrain_gpt.py says of the machines, and the run's own flags."""
    at = next((n for n, word in enumerate(words) if word.endswith("pretrain_gpt.py")), None)
    if at is None:
        for name in (word.partition("=")[0] for word in words):
            if name in _NODES + _PER_NODE and name not in spellings():
                raise ConfigError(
                    f"{name} is a launcher's: put it and pretrain_gpt.py in front of the run's flags, or give "
                    "--nodes and --gpus-per-node"
                )
        return Machines(), list(words)
    before = list(words[:at])
    for n, word in enumerate(before):
        name = word.partition("=")[0]
        if name in spellings() or (n == 0 and name.startswith("-")):
            raise ConfigError(
                f"{name} stands before pretrain_gpt.py, where no run reads it: put the run's flags behind"
            )
        if word.rpartition("/")[2] in UNREAD:
            raise ConfigError(
                f"{word}: its numbers of machines are not read; leave out what stands before pretrain_gpt.py, "
                "and give --nodes and --gpus-per-node"
            )
    parser = _Launcher(add_help=False, allow_abbrev=False)
    parser.add_argument(*_NODES, type=at_least_one)
    parser.add_argument(*_PER_NODE, type=at_least_one)
    said, _ = parser.parse_known_args(before)
    return Machines(said.nnodes, said.nproc_per_node), list(words[at + 1 :])


def cluster(
    asked: Machines, launch: Machines, device: Device, train: TrainConfig, parallel: ParallelConfig
) -> Cluster:
    """The devices of the run; ConfigError where two say different numbers of them."""
    if asked.nodes and launch.nodes and asked.nodes != launch.nodes:
        raise ConfigError(
            f"--nodes {asked.nodes} contradicts the launcher's --nnodes {launch.nodes}; leave one out"
        )
    if asked.per_node and launch.per_node and asked.per_node % launch.per_node:
        raise ConfigError(
            f"--gpus-per-node {asked.per_node} contradicts the launcher's --nproc_per_node "
            f"{launch.per_node}; leave one out, or give an NVLink domain of whole nodes"
        )
    rates = {"link_gb_s": asked.link_gb_s, "network_gb_s": asked.network_gb_s}
    given = {name: rate for name, rate in rates.items() if rate is not None}
    sources = {**device.sources, **dict.fromkeys(given, "given on the command line")}
    device = dataclasses.replace(device, **given, sources=sources)  # type: ignore[arg-type]
    joined = asked.per_node or launch.per_node or device.devices_per_node
    nodes, world = asked.nodes or launch.nodes, train.world_size
    if nodes is not None:
        ranks = launch.per_node or joined
        if world not in (None, nodes * ranks):
            raise ConfigError(
                f"--world-size {world} contradicts {nodes} nodes of {ranks} = {nodes * ranks}; "
                "leave one out"
            )
        world = nodes * ranks
    if world is None:
        # a size of 0 or less is told with all other problems
        world = launch.per_node or asked.per_node or max(parallel.ranks_per_sample, 1)
    return Cluster(device=device, world_size=world, devices_per_node=joined)
