"""A hostfile as DeepSpeed has it, as flags of torchrun: hosts, ranks of each, and which one this is.

worker-0 slots=8        # the first one holds the rendezvous
worker-1 slots=8
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots\s*=\s*([0-9]+)")
_SAID_BY_IT = ("--nnodes", "--nproc-per-node")


@dataclass(frozen=True, slots=True)
class HostSlots:
    """A host of the file and its ranks."""

    host: str
    slots: int


def with_hostfile(argv: Sequence[str]) -> list[str]:
    """A launcher's words with the flags that --hostfile FILE stands for; the same where it is not there."""
    own = next((n for n, word in enumerate(argv) if word.endswith(".py")), len(argv))
    words, rest = list(argv[:own]), list(argv[own:])
    at = next((n for n, word in enumerate(words) if word.partition("=")[0] == "--hostfile"), None)
    if at is None:
        return list(argv)
    name, equals, path = words[at].partition("=")
    taken = 1 if equals else 2
    path = path if equals else "".join(words[at + 1 : at + 2])
    if not path:
        raise ConfigError(f"{name} takes a file, e.g. {name} hosts")
    words[at : at + taken] = []
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    for flag in _SAID_BY_IT:
        if flag in given:
            raise ConfigError(f"{name} {path} and {flag} say the same thing; give one")
    hosts = read_hostfile(Path(path))
    flags = ["--nnodes", str(len(hosts)), "--nproc_per_node", str(_same_slots(hosts, path))]
    if len(hosts) > 1 and "--node-rank" not in given:
        flags += ["--node_rank", str(_place(hosts, path))]
    if len(hosts) > 1 and "--master-addr" not in given:
        flags += ["--master_addr", hosts[0].host]
    return [*flags, *words, *rest]


def read_hostfile(path: Path) -> list[HostSlots]:
    """The hosts in order; ConfigError with file:line for a line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--hostfile {path}: cannot be read ({reason})") from None
    found: list[HostSlots] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise ConfigError(f"{path}:{number}: {text!r} is no line such as `worker-0 slots=8`")
        if match[1] in [one.host for one in found]:
            raise ConfigError(f"{path}:{number}: {match[1]} stands there twice")
        found.append(HostSlots(match[1], int(match[2])))
    if not found:
        raise ConfigError(f"--hostfile {path}: there is no host in it")
    return found


def _same_slots(hosts: Sequence[HostSlots], path: str) -> int:
    """Every host starts as many ranks as the others."""
    for one in hosts:
        if one.slots != hosts[0].slots:
            raise ConfigError(
                f"{path}: {hosts[0].host} has {hosts[0].slots} slots and {one.host} {one.slots}; "
                f"every host starts "
                f"as many ranks as the others: write {min(h.slots for h in hosts)} for all"
            )
    return hosts[0].slots


def _place(hosts: Sequence[HostSlots], path: str) -> int:
    """Which of the hosts this is, by its name, short or whole."""
    own = {socket.gethostname(), socket.getfqdn()}
    own |= {name.partition(".")[0] for name in own}
    found = [n for n, one in enumerate(hosts) if own & {one.host, one.host.partition(".")[0]}]
    if len(found) != 1:
        raise ConfigError(
            f"{path} does not say which host this is ({socket.gethostname()}); give --node_rank, "
            f"from 0 to "
            f"{len(hosts) - 1}"
        )
    return found[0]
