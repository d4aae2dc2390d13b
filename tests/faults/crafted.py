"""Crafted checkpoints: their hashes are true and their content is hostile."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.manifest import NAME, _hash, hash_file
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import CheckpointError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk
from tests.faults.checkpoints import NEW, OLD, loaded, save
from tests.faults.kills import Counted, Tell


def reseal(folder: Path, body: dict[str, Any]) -> None:
    """A manifest with true hashes, as an attacker who may write would leave it."""
    for name in list(body["files"]):
        path = folder / name
        if path.is_file() and not path.is_symlink():
            written = hash_file(path)
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
    "more inherited updates than updates": _manifest(
        lambda b: b["progress"].update(inherited_steps=99)
    ),
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
        reseal(newest, body)
        began = time.monotonic()
        try:
            counted.note(refused(root))
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
            counted.note(refused(root))
        except Exception as error:
            counted.wrong.append(f"manifest {what}: {type(error).__name__}: {error}")
    return counted


def refused(root: Path) -> str:
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
