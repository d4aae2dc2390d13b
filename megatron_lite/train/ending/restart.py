"""Whether a run may restart by itself: torchrun --max-restarts, or a scheduler that requeues.

<run folder>/ended.json            how the last run ended: exit code, reason, iteration
<run folder>/errors/rank<r>.json   how its ranks failed (failures.py)
<run folder>/errors/earlier.json   one line about each earlier attempt of the same launch

A crash that comes again at the same place is not tried a third time, and a run that was asked to
stop is not restarted: torchrun knows neither, it only sees an exit code that is not 0.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.store import POINTER
from megatron_lite.config.errors import PREEMPTED, ConfigError, MegatronLiteError
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.storage.reading import read_plain

ENDED = "ended.json"
EARLIER = "earlier.json"
SAME_FAILURES = 2
"""The same failure this often, with no checkpoint in between, and the run is not started again."""
_LARGEST = 1 << 24  # bytes of a file about how a run ended; one may hold a long traceback
GAVE_UP = "not started again: "


class Refused(MegatronLiteError):
    """This attempt must not start; ends with the exit code of what stopped the ones before.

    told: an attempt before has said so already, and the launcher does not listen.
    """

    def __init__(self, what: str, exit_code: int, *, told: bool = False) -> None:
        super().__init__(what)
        self.exit_code, self.told = exit_code, told


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended by itself."""

    exit_code: int
    reason: str
    iteration: int


@dataclass(frozen=True, slots=True)
class Crash:
    """What an attempt failed of: the first rank's own words, and the newest checkpoint then."""

    exit_code: int
    what: str
    checkpoint: str

    def same_as(self, other: Crash) -> bool:
        """Whether nothing but times and lines of code differ, and no checkpoint came in between."""
        mine, theirs = (_without_times(crash.what) for crash in (self, other))
        return (self.exit_code, mine, self.checkpoint) == (
            other.exit_code, theirs, other.checkpoint,
        )  # fmt: skip


def _without_times(what: str) -> str:
    first = what.splitlines()[0] if what else ""
    return re.sub(r"\d+\.\d+", "#", first.partition(" - last finished step")[0])


def last_crash(folder: Path) -> Crash | None:
    """The failure that made the others fail: not "rank 1 failed first", not a lost rank if one spoke.

    After a refusal it is that.
    """
    found = []
    for path in sorted((folder / "errors").glob("rank*.json")):
        entry = _read(path)
        if {"exit_code", "error", "time"} <= entry.keys():
            found.append(entry)
    if not found:
        return None
    first = min(found, key=_importance)
    return Crash(int(first["exit_code"]), str(first["error"]), _newest(folder))


def _importance(entry: dict[str, Any]) -> tuple[bool, bool, float]:
    return not str(entry["error"]).startswith(GAVE_UP), entry["exit_code"] == 6, entry["time"]


def refusal(train: TrainConfig, folder: Path | None, *, attempt: int) -> Refused | None:
    """Why this attempt (0: not a restart) must not start, or None.  For rank 0, which tells the others."""
    if folder is not None and attempt > 0:
        found = _hopeless(folder)
        if found is not None:
            return found
    switch = train.kill_switch_file
    if switch is not None and os.path.exists(switch):
        return Refused(
            f"--kill-switch-file {switch} exists: somebody asked the runs that look at it to stop - "
            "remove it to train",
            ConfigError.exit_code,
        )
    return None


def _hopeless(folder: Path) -> Refused | None:
    crash = last_crash(folder)
    if crash is not None and crash.what.startswith(GAVE_UP):
        return Refused(crash.what, crash.exit_code, told=True)
    ended = _read(folder / ENDED)
    if ended.get("exit_code") == PREEMPTED:
        return Refused(
            f"{GAVE_UP}the run was asked to stop ({ended.get('reason')}) and has saved iteration "
            f"{ended.get('iteration')} - start it again yourself to resume",
            PREEMPTED,
        )
    if crash is None:
        return None
    same = 1 + sum(crash.same_as(before) for before in _earlier(folder))
    if same < SAME_FAILURES:
        return None
    return Refused(
        f"{GAVE_UP}{same} attempts ended with the same failure and no checkpoint in between: "
        f"{crash.what.splitlines()[0]} - mend it, then start again",
        crash.exit_code,
    )


def begin_attempt(folder: Path, disk: Disk, *, attempt: int) -> None:
    """Clear away how the last run ended; a restart keeps one line about each attempt before.

    First of all: what an earlier launch left must not be taken for this one's.
    """
    crash = last_crash(folder) if attempt else None
    kept = [*_earlier(folder), crash] if crash is not None else []
    disk.remove_tree(folder / "errors")
    if os.path.lexists(folder / ENDED):
        disk.remove(folder / ENDED)
    if kept:
        disk.make_folder(folder / "errors")
        text = json.dumps({"attempts": [asdict(entry) for entry in kept]}, indent=1)
        write_atomically(folder / "errors" / EARLIER, (text + "\n").encode(), disk)


def write_ended(folder: Path, ended: Ended, disk: Disk) -> None:
    """Record how the run ended, for a launcher, a scheduler, a person."""
    write_atomically(folder / ENDED, (json.dumps(asdict(ended)) + "\n").encode(), disk)


def _earlier(folder: Path) -> list[Crash]:
    entries = _read(folder / "errors" / EARLIER).get("attempts", [])
    return [Crash(e["exit_code"], e["what"], e["checkpoint"]) for e in entries]


def _newest(folder: Path) -> str:
    try:
        return read_plain(folder / POINTER, _LARGEST).decode().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty where there is none or it is no such thing."""
    try:
        value = json.loads(read_plain(path, _LARGEST))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
