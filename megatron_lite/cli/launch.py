"""torchrun, ending with the exit code of the ranks.

python tools/launch.py --nproc_per_node 4 tools/pretrain_gpt.py ...     torchrun's flags, then the script's
python tools/launch.py --nproc_per_node 4 --max_restarts 3 tools/pretrain_gpt.py ... --save RUN --load RUN
python tools/launch.py --hostfile HOSTS tools/pretrain_gpt.py ...     on every host of DeepSpeed's hostfile

torchrun ends with 1 whatever happened to its ranks, and with a traceback after SIGTERM.  This is
torchrun in one process with five things added:

- what is wrong on the command line of tools/pretrain_gpt.py is told once, before any rank is started
- the exit code is that of the rank of this host that failed first by itself, 6 where a rank was lost,
  75 where the run was asked to stop (0 where --exit-code-on-preemption says so, and of tools/serve.py)
- a host that does not come within --distributed-timeout-minutes is named, and so are two that
  think they are the same; every host must start as many ranks as the others
- --hostfile says nodes, ranks per node, this node's number and the first host: `worker-0 slots=8` a line
- SIGUSR1 and SIGXCPU reach the ranks as SIGTERM does; SIGHUP not under nohup
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import config_from_args, parse_args, run

from megatron_lite.config.errors import PREEMPTED, ConfigError, DistributedError
from megatron_lite.config.exit import run_tool
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules import table as rules
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.data.present import require_local_files
from megatron_lite.rendezvous.copies import one_of_many
from megatron_lite.rendezvous.hostfile import with_hostfile
from megatron_lite.rendezvous.launch import Launch, gather_hosts
from megatron_lite.train.ending.stop import stop_signals

USUAL_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
LOST = DistributedError.exit_code
TRAINER, SERVER = "pretrain_gpt.py", "serve.py"
SERVER_ENDS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run torchrun and translate how it ended."""
    argv = with_hostfile(sys.argv[1:])
    os.environ.setdefault("TORCH_ELASTIC_WORKER_IDENTICAL", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # our one line says more than its traces
    asked = _parsed(argv)
    if getattr(asked, "signals_to_handle", None) == USUAL_SIGNALS:
        asked.signals_to_handle = ",".join(number.name for number in stop_signals())
    _check_numbers(asked)
    config = script_config(asked)
    quieten()
    folder = Path(config.checkpoint.save) if config is not None and config.checkpoint.save else None
    minutes = (config or RunConfig()).parallel.distributed_timeout_minutes
    seconds = max(minutes * 60.0, 1.0)
    before = _stamp(folder)
    try:
        _require_a_launcher_of_its_own(asked)
        hosts = _hosts(asked, argv)
        if config is not None and not config.train.needs_no_data:
            require_local_files(config.data)  # before waiting for other hosts
        store = gather_hosts(hosts, seconds) if hosts is not None else None
        _run(asked)
        del store  # until here the other hosts need it
    except ChildFailedError as failed:
        return exit_code(failure.exitcode for failure in failed.failures.values())
    except SignalException as stopped:
        if folder is not None and _stamp(folder) != before:
            return int(json.loads((folder / "ended.json").read_bytes())["exit_code"])
        if Path(asked.training_script).name == SERVER and stopped.sigval in SERVER_ENDS:
            return 0  # that is how a server ends
        return 128 + int(stopped.sigval)
    except DistError as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise DistributedError(
            f"the launcher of host {asked.node_rank} lost the store of host 0: {first} - look at its "
            "last lines and its node"
        ) from error
    return 0


def _parsed(argv: list[str]) -> argparse.Namespace:
    """torchrun's own parser, whose page of usage becomes a ConfigError's line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args(argv)
    except SystemExit as ended:
        if not ended.code:
            raise  # --help
        raise _refused(ValueError(said.getvalue().rpartition("error: ")[2])) from None


def _check_numbers(asked: argparse.Namespace) -> None:
    """Raise ConfigError for what torchrun would end at with a traceback, or would wait for in silence."""
    fewest, colon, most = asked.nnodes.partition(":")
    sizes = [fewest, most] if colon else [fewest]
    nodes = [int(size) for size in sizes if size.isascii() and size.isdigit()]
    if len(nodes) < len(sizes) or nodes[0] < 1 or nodes[-1] < nodes[0]:
        raise ConfigError(
            f"--nnodes {asked.nnodes} (PET_NNODES) is no number of nodes from 1 on, nor a range MIN:MAX"
        )
    if nodes[0] < nodes[-1] and asked.rdzv_backend == "static":
        raise ConfigError(
            f"--nnodes {asked.nnodes} is a range, which needs --rdzv_backend c10d and --rdzv_endpoint "
            f"HOST:PORT; without them give one number, e.g. --nnodes {nodes[-1]}"
        )
    if not 0 <= asked.node_rank < nodes[-1]:
        raise ConfigError(
            f"--node_rank {asked.node_rank} (NODE_RANK) is not below --nnodes {asked.nnodes}: nodes count "
            "from 0"
        )
    ranks = str(asked.nproc_per_node)
    if ranks.removeprefix("-").isdigit() and int(ranks) < 1:
        raise ConfigError(f"--nproc_per_node {ranks} (GPUS_PER_NODE) must be at least 1")
    if not 0 <= (asked.master_port or 0) < 1 << 16:
        raise ConfigError(
            f"--master_port {asked.master_port} is no port: choose one from 1024 to 65535"
        )
    if not (asked.module or asked.no_python or Path(asked.training_script).is_file()):
        raise ConfigError(
            f"{asked.training_script} is not there - name the script behind torchrun's flags"
        )
    try:
        config_from_args(asked)
    except (ValueError, AssertionError) as error:
        raise _refused(error) from error


def _run(asked: argparse.Namespace) -> None:
    try:
        run(asked)
    except (ValueError, AssertionError) as error:
        raise _refused(error) from error
    except RendezvousError as error:
        raise DistributedError(
            f"torchrun's rendezvous failed: {error} - look at --rdzv_backend and --rdzv_endpoint"
        ) from error


def _refused(error: Exception) -> ConfigError:
    """What torchrun says of a flag of its own with which it starts no rank."""
    first = (str(error).splitlines() or [""])[0] or "a number of them cannot be"
    return ConfigError(f"torchrun's flags: {first} - see tools/launch.py --help")


def _hosts(asked: argparse.Namespace, argv: Sequence[str]) -> Launch | None:
    """This host among the others, or None where torchrun's own rendezvous was asked for or is local."""
    if not asked.nnodes.isdigit() or int(asked.nnodes) == 1 or asked.rdzv_backend != "static":
        return None
    endpoint = asked.rdzv_endpoint or _master(asked, argv)
    address, _, port = endpoint.rpartition(":")
    if not port.isdigit():
        return None
    return Launch(
        asked.node_rank, int(asked.nnodes), host=address.strip("[]"), port=int(port), noun="host"
    )


def _master(asked: argparse.Namespace, argv: Sequence[str]) -> str:
    """Where host 0 is: as given, or as MASTER_ADDR and MASTER_PORT say, which torchrun does not read."""
    ours = argv[: len(argv) - len(asked.training_script_args)]
    if not any(word.replace("_", "-").startswith("--master-addr") for word in ours):
        if "MASTER_ADDR" not in os.environ and "PET_MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"{asked.nnodes} nodes and no MASTER_ADDR: name the host of node 0 as the others reach it, "
                "the same on every node (MASTER_ADDR=node0 or --master_addr node0), or start one node "
                "(NUM_NODES=1, --nnodes 1)"
            )
        asked.master_addr = os.environ.get("MASTER_ADDR", asked.master_addr)
        if not asked.master_port:
            port = os.environ.get("MASTER_PORT") or "29500"
            if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
                raise ConfigError(f"MASTER_PORT={port} is no port: choose one from 1024 to 65535")
            asked.master_port = int(port)
    return f"{asked.master_addr}:{asked.master_port or 29500}"


def _require_a_launcher_of_its_own(asked: argparse.Namespace) -> None:
    """Raise ConfigError where several of these were started and each thinks that it is alone."""
    others = one_of_many(of_torchrun=False) if asked.nnodes in ("1", "1:1") else None
    if others is not None:
        raise ConfigError(
            f"{others}, and this launcher was told of one node: each would train alone, into one folder - "
            "give every launcher --nnodes N and its own --node_rank (one per node: srun "
            "--ntasks-per-node 1, NODE_RANK=$SLURM_NODEID), or start one"
        )


def exit_code(codes: Iterable[int]) -> int:
    """Of the ranks' codes the one that explains the others; negative: ended by that signal.

    >>> exit_code([6, 3]), exit_code([-9, 6]), exit_code([75, 75]), exit_code([143, 143])
    (3, 6, 75, 143)
    """
    seen = list(codes)
    told = [c for c in seen if c > 0 and c not in (LOST, PREEMPTED) and c < 128]
    if told:
        return told[0]
    if all(c == PREEMPTED for c in seen):
        return PREEMPTED
    for number in stop_signals():
        if all(c in (128 + number, -number) for c in seen):
            return 128 + number
    return LOST


def script_config(asked: argparse.Namespace) -> RunConfig | None:
    """What our trainer's arguments ask for; None for another program, of which we know nothing.

    Raises ConfigError for what every rank would say of them.
    """
    if Path(asked.training_script).name != TRAINER:
        return None
    parsed = parse(asked.training_script_args)
    fewest, _, most = asked.nnodes.partition(":")
    sizes = (fewest, asked.nproc_per_node)
    known = all(size.isdigit() for size in sizes) and most in ("", fewest)
    if known and not parsed.config.train.needs_no_data:
        world_size = int(sizes[0]) * int(sizes[1])
        parsed = rules.checked(parsed, world_size)
    return parsed.config


def quieten() -> None:
    """Let torchrun say of a rank only what the rank cannot: that a signal killed it.

    A rank of this project that fails has said why; that the others are then ended is no news.
    """

    def speaks(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        code = re.search(r"failed \(exitcode: (-?\d+)\)", text)
        return int(code[1]) < 0 if code else "closing signal" not in text

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(speaks)


def _stamp(folder: Path | None) -> tuple[int, int] | None:
    """Which ended.json there is: it tells a new one from that of an earlier run."""
    if folder is None:
        return None
    try:
        status = (folder / "ended.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main))


if __name__ == "__main__":
    start()
