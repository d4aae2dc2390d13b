"""Damage to files: seeded bit flips of every kind of file, crafted files with true hashes, planted pickles.

Each function is a campaign (count, seed, folder, tell) -> Counted, as in kills.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from megatron_lite.checkpoint.manifest import NAME, _hash, hash_of
from megatron_lite.checkpoint.store import POINTER, Store
from megatron_lite.config.errors import CheckpointError, DataError
from megatron_lite.config.flags.files import load as load_yaml
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.cache import build_or_load
from megatron_lite.data.preparing.check import verify_blends
from megatron_lite.data.preparing.preprocess import preprocess
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk
from tests.cli.test_preprocess_data import job, numbers
from tests.faults.kills import Counted, Tell
from tests.faults.test_power_cut import arrays
from tests.faults.test_save_crashes import NEW, OLD, loaded, save

# -- bit flips ----------------------------------------------------------------------------------


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


def _pair(folder: Path) -> Callable[[Path], str]:
    source = numbers(folder / "a.jsonl", 40)
    preprocess(job(append_eod=True), inputs=[source], output_prefix=str(folder / "x"), workers=1,
               disk=Disk())  # fmt: skip
    config = DataConfig(data_path=[str(folder / "x_text_document")])
    verify_blends(config, vocab_size=1001)
    names = ("bin", "idx")
    whole = {k: (folder / f"x_text_document.{k}").read_bytes() for k in names}

    def check(flipped: Path) -> str:
        try:
            verify_blends(config, vocab_size=1001)
        except DataError as error:
            assert str(folder / "x_text_document") in str(error)
            return "found: exit 3 names the file"
        same = {k: (folder / f"x_text_document.{k}").read_bytes() for k in names} == whole
        assert same, "verified although damaged"
        return "no effect"

    return check


def _cache(folder: Path) -> Callable[[Path], str]:
    build_or_load(folder / "cache", {"seed": 1}, arrays, Disk())

    def check(flipped: Path) -> str:
        built = []

        def build() -> Any:
            built.append(1)
            return arrays()

        kept = build_or_load(folder / "cache", {"seed": 1}, build, Disk(), verify=True)
        for name, values in arrays():
            assert np.array_equal(kept.arrays[name], values)
        return "found: built anew" if built else "no effect"

    return check


FLIPPED: dict[str, tuple[Callable[[Path], Callable[[Path], str]], str]] = {
    "weights": (_of_a_checkpoint("weights"), "iter_0000002/weights-*"),
    "optimizer": (_of_a_checkpoint("optimizer"), "iter_0000002/optimizer-*"),
    "manifest": (_of_a_checkpoint("manifest"), "iter_0000002/manifest.json"),
    "pointer": (_of_a_checkpoint("pointer"), POINTER),
    ".bin": (_pair, "*.bin"),
    ".idx": (_pair, "*.idx"),
    ".meta.json": (_pair, "*.meta.json"),
    "index cache": (_cache, "cache/*.arrays"),
    "its description": (_cache, "cache/*.json"),
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


# -- crafted checkpoints ------------------------------------------------------------------------


def _reseal(folder: Path, body: dict[str, Any]) -> None:
    """A manifest with true hashes, as an attacker who may write would leave it."""
    for name in list(body["files"]):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            written = hash_of(path)
            body["files"][name] = written.to_json()
    text = json.dumps({"sha256": _hash(body), "body": body})
    (folder / NAME).write_text(text)


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], None]:
    """The weights' file with another header, its length and hashes true."""

    def craft(folder: Path, body: dict[str, Any]) -> None:
        (path,) = folder.glob("weights-*")
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        made = change(header)
        text = made if isinstance(made, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return craft


def _raw(make: Callable[[bytes], bytes]) -> Callable[[Path, dict[str, Any]], None]:
    def craft(folder: Path, body: dict[str, Any]) -> None:
        (path,) = folder.glob("weights-*")
        path.write_bytes(make(path.read_bytes()))

    return craft


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return header[next(name for name in header if name != "__metadata__")]


def _twice(header: dict[str, Any]) -> bytes:
    """The second one points at another tensor's bytes."""
    first, second = list(header)[:2]
    return (json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[second])}' + "}").encode()


def _length(value: int) -> Callable[[Path, dict[str, Any]], None]:
    return _raw(lambda data: struct.pack("<Q", value) + data[8:])


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, dict[str, Any]], None]:
    return lambda folder, body: change(body) and None


def _tensor(body: dict[str, Any]) -> dict[str, Any]:
    return body["tensors"]["a.weight"]


def _moved(name: str) -> Callable[[Path, dict[str, Any]], None]:
    """The weights under another name, outside the folder."""

    def craft(folder: Path, body: dict[str, Any]) -> None:
        (path,) = folder.glob("weights-*")
        outside = folder.parent / "outside.safetensors"
        shutil.move(path, outside)
        used = name.format(outside=outside)
        body["files"][used] = body["files"].pop(path.name)
        for tensor in body["tensors"].values():
            for piece in tensor["pieces"]:
                piece[0] = used if piece[0] == path.name else piece[0]

    return craft


def _linked(folder: Path, body: dict[str, Any]) -> None:
    (path,) = folder.glob("weights-*")
    shutil.move(path, folder.parent / "outside.safetensors")
    path.symlink_to(folder.parent / "outside.safetensors")


def _pieces(*boxes: tuple[list[int], list[int]]) -> Callable[[Path, dict[str, Any]], None]:
    def craft(folder: Path, body: dict[str, Any]) -> None:
        tensor = _tensor(body)
        file, key, _, _ = tensor["pieces"][0]
        tensor["pieces"] = [[file, key, offset, lengths] for offset, lengths in boxes]

    return craft


DEEP = "[" * 100_000
CRAFTED: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "header length 2^63": _length(1 << 63),
    "header length 2^64 - 1": _length((1 << 64) - 1),
    "header length 0": _length(0),
    "header length beyond the file": _length(1 << 40),
    "header is no JSON": _header(lambda h: b"{" * 64),
    "header is no UTF-8": _header(lambda h: b'{"\xff\xfe": 1}'),
    "header nested 100,000 deep": _header(lambda h: DEEP.encode()),
    "header is a list": _header(lambda h: b"[]"),
    "overlapping offsets": _header(lambda h: _first(h).update(data_offsets=[8, 56])),
    "offsets beyond the file": _header(lambda h: _first(h).update(data_offsets=[0, 1 << 50])),
    "negative offsets": _header(lambda h: _first(h).update(data_offsets=[-48, 0])),
    "offsets backwards": _header(lambda h: _first(h).update(data_offsets=[48, 0])),
    "offsets that are floats": _header(lambda h: _first(h).update(data_offsets=[0.0, 48.0])),
    "a shape that overflows": _header(lambda h: _first(h).update(shape=[1 << 40, 1 << 40])),
    "a negative shape": _header(lambda h: _first(h).update(shape=[-4, -3])),
    "another shape of the same size": _header(lambda h: _first(h).update(shape=[3, 4])),
    "an unknown format": _header(lambda h: _first(h).update(dtype="PICKLE")),
    "another format of the same size": _header(lambda h: _first(h).update(dtype="I32")),
    "a key twice": _header(_twice),
    "a missing tensor": _header(lambda h: h.pop(next(iter(h)))),
    "no header at all": _raw(lambda data: b""),
    "seven bytes": _raw(lambda data: data[:7]),
    "a hole behind the tensors": _raw(lambda data: data + b"\0" * 64),
    "a way up: ../": _moved("../outside.safetensors"),
    "an absolute path": _moved("{outside}"),
    "a way up behind a good name": _moved("tokenizer/../../outside.safetensors"),
    "a link in place of a file": _linked,
    "a file that is not listed": _manifest(lambda b: b["files"].clear()),
    "a file that is not there": _manifest(
        lambda b: b["files"].update({"weights-00007.safetensors": {"bytes": 1, "sha256": ""}})
    ),
    "a folder as a file": lambda folder, body: (
        next(folder.glob("weights-*")).unlink(),
        (folder / "weights-00000.safetensors").mkdir(),
    ),
    "a shape of 10^30": _manifest(lambda b: _tensor(b).update(shape=[10**30, 3])),
    "a shape of words": _manifest(lambda b: _tensor(b).update(shape=["four", 3])),
    "a shape that is null": _manifest(lambda b: _tensor(b).update(shape=None)),
    "a piece outside the shape": _pieces(([3, 0], [4, 3])),
    "a piece before the shape": _pieces(([-1, 0], [4, 3])),
    "a piece of other dims": _pieces(([0], [4])),
    "half a tensor": _pieces(([0, 0], [2, 3])),
    "one half twice": _pieces(([0, 0], [2, 3]), ([0, 0], [2, 3])),
    "no pieces": _pieces(),
    "an iteration of words": _manifest(lambda b: b.update(iteration="two")),
    "a later version": _manifest(lambda b: b.update(version=99)),
    "another format's name": _manifest(lambda b: b.update(format="torch")),
    "a version of words": _manifest(lambda b: b.update(version="one")),
    "no tensors": _manifest(lambda b: b.pop("tensors")),
    "tensors as a list": _manifest(lambda b: b.update(tensors=[])),
    "progress as a list": _manifest(lambda b: b.update(progress=[1])),
    "a shape of a million dims": _manifest(lambda b: _tensor(b).update(shape=[1 << 60] * 10**6)),
    "a tensor of 2^60 bytes": lambda folder, body: (
        _tensor(body).update(shape=[1 << 40, 1 << 18]),
        _pieces(([0, 0], [1 << 40, 1 << 18]))(folder, body),
    ),
    "another iteration's number": _manifest(
        lambda b: (b.update(iteration=1), b["progress"].update(step=1))
    ),
    "an iteration that is true": _manifest(lambda b: b.update(iteration=True)),
    "steps that are not the iteration": _manifest(lambda b: b["progress"].update(step=3)),
    "fewer tokens than samples": _manifest(lambda b: b["progress"].update(tokens=1)),
    "negative samples": _manifest(lambda b: b["progress"].update(samples=-1)),
    "half a sample": _manifest(lambda b: b["progress"].update(samples=10.5)),
    "samples that are not those learnt from": _manifest(
        lambda b: b["progress"].update(samples=10**12)
    ),
    "no samples in two steps": _manifest(lambda b: b["progress"].update(samples=0, lr_samples=0)),
    "more skipped steps than steps": _manifest(lambda b: b["progress"].update(skipped_steps=3)),
    "more updates than steps": _manifest(lambda b: b["progress"].update(optimizer_steps=10**9)),
    "2^63 tokens": _manifest(lambda b: b["progress"].update(tokens=1 << 63)),
    "a loss scale that is no number": _manifest(
        lambda b: b["progress"].update(loss_scale={"scale": float("inf")})
    ),
    "spikes of words": _manifest(lambda b: b["progress"].update(recent={"loss": ["high"]})),
    "a config that is a list": _manifest(lambda b: b.update(config=[])),
    "a vocabulary of -1": _manifest(lambda b: b.update(tokenizer={"vocab_size": -1})),
    "data as a number": _manifest(lambda b: b.update(data={"train": 5})),
    "data without documents": _manifest(
        lambda b: b.update(data={"train": [{"prefix": "a", "content": "b"}]})
    ),
    "files as numbers": _manifest(lambda b: b.update(files={"weights-00000.safetensors": 3})),
}  # fmt: skip


def crafted(count: int, seed: int, folder: Path, tell: Tell) -> Counted:
    """L20: hashes are true, the content is hostile; refused in words and at once, the older one loads.

    count and seed have no say: every crafted file is tried once.
    """
    counted = Counted()
    for number, (what, craft) in enumerate(CRAFTED.items()):
        root = folder / str(number)
        save(root, OLD, 1, Disk())
        save(root, NEW, 2, Disk())
        newest = root / "iter_0000002"
        body = json.loads((newest / NAME).read_text())["body"]
        craft(newest, body)
        _reseal(newest, body)
        began = time.monotonic()
        try:
            counted.note(_refused(root))
        except Exception as error:
            counted.wrong.append(f"{what}: {type(error).__name__}: {error}")
        if time.monotonic() - began > 10:
            counted.wrong.append(f"{what}: took {time.monotonic() - began:.0f} s")
        tell(f"{number + 1}/{len(CRAFTED)}: {what}")
    for what, text in {
        "deep": DEEP.encode(), "a bare number": b"1", "no JSON": b"\x80\x02cos\nsystem\n",
        "nan": b'{"sha256": NaN, "body": NaN}', "empty": b"",
    }.items():  # fmt: skip
        root = folder / what
        save(root, OLD, 1, Disk())
        save(root, NEW, 2, Disk())
        (root / "iter_0000002" / NAME).write_bytes(text)
        try:
            counted.note(_refused(root))
        except Exception as error:
            counted.wrong.append(f"manifest {what}: {type(error).__name__}: {error}")
    return counted


def _refused(root: Path) -> str:
    """Refused when the manifest is read, or when the tensors are."""
    store = Store(root, ParallelContext.serial())
    manifest, notices = store.newest_intact()
    assert manifest is not None
    if manifest.iteration == 1:
        assert notices and "checkpoint 2 is not usable" in notices[-1], notices
        assert loaded(root) == OLD
        return "refused: the older one loads"
    try:
        loaded(root)
    except CheckpointError:
        return "refused while loading: exit 4"
    raise AssertionError("it was loaded")


# -- planted pickles ----------------------------------------------------------------------------


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
            _reseal(root / "iter_0000002", body)
            check(f"in place of {name}, hashes true", _refused(root))
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
    _pair(place)
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
    _cache(folder)
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


CAMPAIGNS: dict[str, Callable[[int, int, Path, Tell], Counted]] = {
    **{kind: flips(kind) for kind in FLIPPED},
    "crafted": crafted,
    "pickles": pickles,
}
