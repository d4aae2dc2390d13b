"""Damage to files: seeded bit flips of every kind of file; and the table of all such campaigns.

Each function is a campaign (count, seed, folder, tell) -> Counted, as in kills.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from megatron_lite.checkpoint.store import POINTER, Store
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk
from tests.faults.checkpoints import NEW, OLD, loaded, save
from tests.faults.crafted import crafted
from tests.faults.kept import cache, pair
from tests.faults.kills import Counted, Tell
from tests.faults.planted import pickles


def _flip(path: Path, random: Random) -> str:
    data = bytearray(path.read_bytes())
    at, bit = random.randrange(len(data)), random.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {at}"


def _of_a_checkpoint(file: str) -> Callable[[Path], Callable[[Path], str]]:
    def make(folder: Path) -> Callable[[Path], str]:
        save(folder, OLD, 1, Disk())
        save(folder, NEW, 2, Disk())

        def check(flipped: Path) -> str:
            store = Store(folder, ParallelContext.serial())
            _, notices = store.newest_intact()
            found = loaded(folder)  # every bit of what loads is compared
            if found == OLD:
                assert any("not usable" in line for line in notices), "fell back without a word"
                return "found: the older one loads"
            return "found: told, the newest loads" if notices else "no effect"

        return check

    make.file = file  # type: ignore[attr-defined]
    return make


FLIPPED: dict[str, tuple[Callable[[Path], Callable[[Path], str]], str]] = {
    "weights": (_of_a_checkpoint("weights"), "iter_0000002/weights-*"),
    "optimizer": (_of_a_checkpoint("optimizer"), "iter_0000002/optimizer-*"),
    "manifest": (_of_a_checkpoint("manifest"), "iter_0000002/manifest.json"),
    "pointer": (_of_a_checkpoint("pointer"), POINTER),
    ".bin": (pair, "*.bin"),
    ".idx": (pair, "*.idx"),
    ".meta.json": (pair, "*.meta.json"),
    "index cache": (cache, "cache/*.arrays"),
    "its description": (cache, "cache/*.json"),
}
"""kind -> (makes the files and gives a check, which file is flipped)."""


def flips(kind: str) -> Callable[[int, int, Path, Tell], Counted]:
    """L2, I3: every flip is found, or what is read is what was written."""

    def campaign(count: int, seed: int, folder: Path, tell: Tell) -> Counted:
        random, counted = Random(f"{seed} {kind}"), Counted()
        make, pattern = FLIPPED[kind]
        place = folder / "place"
        place.mkdir()
        check = make(place)
        shutil.copytree(place, folder / "good")
        for number in range(count):
            (path,) = place.glob(pattern)
            what = _flip(path, random)
            try:
                counted.note(check(path))
            except (AssertionError, Exception) as error:
                counted.wrong.append(f"{what}: {type(error).__name__}: {error}")
            shutil.rmtree(place)
            shutil.copytree(folder / "good", place)
            if number % 20 == 19:
                tell(f"{number + 1}/{count}")
        return counted

    return campaign


CAMPAIGNS: dict[str, Callable[[int, int, Path, Tell], Counted]] = {
    **{kind: flips(kind) for kind in FLIPPED},
    "crafted": crafted,
    "pickles": pickles,
}
