"""Planted pickles, under every name that a loader of some trainer opens."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.checkpoint.manifest import NAME
from megatron_lite.checkpoint.store import POINTER, Store
from megatron_lite.config.errors import CheckpointError, DataError
from megatron_lite.config.flags.files import load as load_yaml
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.cache import build_or_load
from megatron_lite.data.preparing.check import verify_blends
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk
from tests.faults.checkpoints import NEW, OLD, loaded, save
from tests.faults.crafted import refused, reseal
from tests.faults.kept import arrays, cache, pair
from tests.faults.kills import Counted, Tell


class Canary:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def plant(root: Path, canary: Path) -> int:
    """Hostile pickles under every name that a loader of some trainer opens; how many."""
    hostile = pickle.dumps(Canary(canary))
    step = root / "iter_0000002"
    names = [
        root / "common.pt", root / "model.pt", root / ".metadata", root / "optim.npy",
        *(step / n for n in (".metadata", "__0_0.distcp", "common.pt", "model.pt", "metadata.json",
                             "pytorch_model.bin", "model_optim_rng.pt", "weights-00000.pt",
                             "manifest.pkl", "rng_state.pth", "tokenizer.pkl")),
        step / "mp_rank_00" / "model_optim_rng.pt",
        step / "tokenizer" / "tokenizer.pkl",
    ]  # fmt: skip
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hostile)
    with zipfile.ZipFile(step / "archive.pt", "w") as archive:  # torch's own form
        archive.writestr("archive/data.pkl", hostile)
        archive.writestr("archive/version", "3\n")
    np.save(step / "objects.npy", np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return len(names) + 2


def pickles(count: int, seed: int, folder: Path, tell: Tell) -> Counted:
    """L18: beside a good checkpoint, in place of one, as token files, as an index, as a tokenizer."""
    counted, canary = Counted(), folder / "canary"
    hostile = pickle.dumps(Canary(canary))

    def check(what: str, outcome: str) -> None:
        counted.note(outcome)
        if canary.exists():
            counted.wrong.append(f"{what}: a pickle was executed")
            shutil.rmtree(canary)
        tell(what)

    root = folder / "beside"
    save(root, OLD, 1, Disk())
    save(root, NEW, 2, Disk())
    planted = plant(root, canary)
    assert loaded(root) == NEW
    check(f"{planted} files beside a good checkpoint", "the good one loads")
    for name in ("weights-00000.safetensors", "optimizer-00000.safetensors", NAME):
        root = folder / name
        save(root, OLD, 1, Disk())
        save(root, NEW, 2, Disk())
        (root / "iter_0000002" / name).write_bytes(hostile)
        outcome = "refused: the older one loads" if loaded(root) == OLD else "loaded"
        check(f"in place of {name}", outcome)
        if name != NAME:  # and with hashes that are true
            body = json.loads((root / "iter_0000002" / NAME).read_text())["body"]
            reseal(root / "iter_0000002", body)
            check(f"in place of {name}, hashes true", refused(root))
    only = folder / "only" / "iter_0000002"
    only.mkdir(parents=True)
    plant(only.parent, canary)
    (only.parent / POINTER).write_text("2\n")
    try:
        Store(only.parent, ParallelContext.serial()).newest_intact()
        counted.wrong.append("a folder of pickles alone was taken for a checkpoint")
    except CheckpointError:
        check("a folder of pickles alone", "refused: exit 4")
    check = _data_pickles(folder, hostile, check)
    return counted


def _data_pickles(
    folder: Path, hostile: bytes, check: Callable[[str, str], None]
) -> Callable[[str, str], None]:
    place = folder / "data"
    place.mkdir()
    pair(place)
    for kind in ("bin", "idx"):
        path = place / f"x_text_document.{kind}"
        good = path.read_bytes()
        path.write_bytes(hostile)
        try:
            verify_blends(DataConfig(data_path=[str(place / "x_text_document")]), vocab_size=1001)
            raise AssertionError(f"a pickle as .{kind} was taken")
        except DataError:
            check(f"in place of .{kind}", "refused: exit 3")
        path.write_bytes(good)
    cache(folder)
    (described,) = (folder / "cache").glob("*.json")
    (kept,) = (folder / "cache").glob("*.arrays")
    for path in (described, kept):
        path.write_bytes(hostile)
        made = build_or_load(folder / "cache", {"seed": 1}, arrays, Disk())
        assert all(np.array_equal(made.arrays[name], values) for name, values in arrays())
        check(f"in place of the index cache's {path.suffix}", "refused: built anew")
    text = json.loads(described.read_text())
    text["body"]["arrays"]["a"]["dtype"] = "|O"
    from megatron_lite.data.cache import _hash as cache_hash

    described.write_text(json.dumps({"hash": cache_hash(text["body"]), "body": text["body"]}))
    made = build_or_load(folder / "cache", {"seed": 1}, arrays, Disk())
    check("object arrays in the index cache", "refused: built anew")
    yaml = folder / "config.yaml"
    yaml.write_text(f"model: !!python/object/apply:os.mkdir ['{folder / 'canary'}']\n")
    try:
        load_yaml(str(yaml))
        raise AssertionError("a YAML tag was taken")
    except Exception as error:
        assert type(error).__name__ == "ConfigError", error
        check("a YAML tag that calls", "refused: exit 2")
    return check
