"""Whether this host has the memory that --optimizer-cpu-offload is planned to take there."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.config.errors import ConfigError
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.planner.offload import on_host

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Of a container, in version 2 and in version 1 of cgroups: what it may use, and what it uses."""


def available_bytes(meminfo: Path = _MEMINFO, groups: Path = _GROUPS) -> float:
    """Memory that processes of this host, or of this container, can still get; infinite where nothing says."""
    found = [float("inf")]
    for line in _text(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(float(line.split()[1]) * 1024)
    for limit, used in _LIMITS:
        most, now = _text(groups / limit).strip(), _text(groups / used).strip()
        if most.isdigit() and now.isdigit():
            found.append(float(most) - float(now))
    return max(min(found), 0.0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def require_host_memory(blueprint: Blueprint, asked: PlanInputs, ranks_here: int) -> None:
    """ConfigError where so many ranks of this host would keep more there than it has.

    To be asked before any of them has taken some.
    """
    parallel = asked.parallel
    if not parallel.on_host:
        return
    ranks = range(blueprint.grid.pp)
    each = max(on_host(blueprint, parallel, asked.precision, rank).bytes for rank in ranks)
    wanted, room = each * ranks_here, available_bytes()
    if wanted <= room:
        return
    lower = max(0.9 * room / wanted, 0.01) * parallel.on_host
    ways = [f"--optimizer-offload-fraction {lower:.2f}"]
    if not parallel.shares_state and blueprint.replicas > 1:
        ways.insert(0, "--use-distributed-optimizer")
    of = f"the {ranks_here} ranks of this host" if ranks_here > 1 else "this rank"
    raise ConfigError(
        f"--optimizer-cpu-offload: masters and optimizer state of {of} take {wanted / 1e9:.2f} GB of "
        f"host memory, and {room / 1e9:.2f} GB are available; use {' or '.join(ways)}, or more hosts"
    )
