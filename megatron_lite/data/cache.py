"""Index arrays cached between runs: keyed by content, whole or absent, memory-mapped when read.

    <asked>-<data>.arrays    all arrays of a split, one after the other, each at a whole 64 bytes
    <asked>-<data>.json      where each begins, the key, their digest, and a hash of all this; written last

One file for all arrays of all datasets: a blend of a thousand costs one file handle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_lite.data.digest import digest_of
from megatron_lite.storage.disk import Disk, DiskFile, temporary_name, write_atomically
from megatron_lite.storage.reading import open_plain, read_plain

FORMAT = 3  # part of the key: arrays of another format are not found
ALIGNMENT = 64
Arrays = dict[str, npt.NDArray[Any]]
Build = Callable[[], Iterable[tuple[str, npt.NDArray[Any]]]]

_LARGEST_DESCRIPTION = 1 << 28
_SAMPLES, _SAMPLE_BYTES = 16, 4096

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """Arrays by name, and 64 bits that are equal where all of them are."""

    arrays: Arrays
    digest: int


def build_or_load(
    folder: str | os.PathLike[str] | None,
    asked: Mapping[str, Any],
    build: Build,
    disk: Disk,
    *,
    data: Mapping[str, Any] | None = None,
    verify: bool = False,
) -> Kept:
    """The arrays `build` gives, from the cache folder if they are there; no folder builds anew.

    asked and data name everything the arrays depend on: what the user wrote, and what the files
    held (fingerprints).  Arrays for the same words but other files are reported and built anew.
    verify: read what is found whole, and build it anew where its digest is another.
    One rank per node should call it first and the others after it; ranks that come at the same
    time do the same work and write the same bytes.
    """
    if folder is None:
        arrays = dict(build())
        return Kept(arrays, _digest(arrays))
    place = Path(folder)
    key = {"format": FORMAT, "asked": dict(asked), "data": dict(data or {})}
    name = f"{_hash(key['format'], key['asked'])}-{_hash(key['data'])}"
    found = _load(place, name, verify)
    if found is not None:
        return found
    _report_other_data(place, name, dict(data or {}))
    _save(place, name, key, build, disk)
    made = _load(place, name, verify)
    assert made is not None, f"{place / name} was written, but cannot be read"
    return made


def _digest(arrays: Arrays) -> int:
    digest = 0
    for values in arrays.values():
        digest = digest_of(values, digest)
    return digest


def _hash(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sources(data: Any) -> list[Any]:
    """What names the files' content; a --split or a length only chooses from it."""
    return [file["source"] for file in data["files"]]


def _report_other_data(folder: Path, name: str, data: Mapping[str, Any]) -> None:
    asked = name.partition("-")[0]
    other = sorted(p for p in folder.glob(f"{asked}-*.json") if p.stem != name)
    for path in other:
        try:
            if _sources(json.loads(path.read_text())["body"]["data"]) == _sources(data):
                return  # of the same files, but for another --split or length
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a broken one tells nothing, or the data are not described by files
    if other:
        _log.warning(
            "the data changed since its index was built (%s was for other files of the same "
            "names); building the index anew", other[-1],
        )  # fmt: skip


def _save(folder: Path, name: str, key: Mapping[str, Any], build: Build, disk: Disk) -> None:
    disk.make_folder(folder)
    path = folder / f"{name}.arrays"
    temporary = temporary_name(path)
    described: dict[str, Any] = {}
    digest = 0
    try:
        with disk.create(temporary) as file:
            for part, values in build():
                described[part] = {
                    "dtype": str(values.dtype),
                    "shape": list(values.shape),
                    "offset": _append(file, values),
                }
                digest = digest_of(values, digest)
            size = file.size
            file.fsync()
        with open_plain(temporary) as written:
            sample = _sample(written, size)
        _clear_the_way(path, disk)
        disk.rename(temporary, path)
    finally:
        disk.remove(temporary)
    # the description comes last: where it stands, every array is complete
    body = {
        **key, "size": size, "digest": f"{digest:016x}", "sample": sample, "arrays": described,
    }  # fmt: skip
    text = json.dumps({"hash": _hash(body), "body": body})
    _clear_the_way(folder / f"{name}.json", disk)
    write_atomically(folder / f"{name}.json", text.encode(), disk)


def _clear_the_way(path: Path, disk: Disk) -> None:
    """A folder cannot be renamed over; nothing else than a cache has such a name in a cache folder."""
    if os.path.isdir(path) and not os.path.islink(path):
        disk.remove_tree(path)


def _sample(file: BinaryIO, size: int) -> str:
    """Hash of some bytes from all over the file: a file of zeros, or of another moment, has another."""
    digest = hashlib.blake2b(digest_size=16)
    for part in range(_SAMPLES):
        file.seek(max(size - _SAMPLE_BYTES, 0) * part // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _append(file: DiskFile, values: npt.NDArray[Any]) -> int:
    """Write the array at a whole multiple of the alignment; returns where it begins."""
    file.write(bytes(-file.size % ALIGNMENT))
    begin = file.size
    if values.size:
        file.write(np.ascontiguousarray(values).data)
    return begin


def _load(folder: Path, name: str, verify: bool) -> Kept | None:
    try:
        outer = json.loads(read_plain(folder / f"{name}.json", _LARGEST_DESCRIPTION))
        described = outer["body"]
        if outer["hash"] != _hash(described):
            raise ValueError("its description does not match its hash")
        size = described["size"]
        path = folder / f"{name}.arrays"
        buffer: bytes | mmap.mmap = b""
        with open_plain(path) as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise ValueError(f"{path} has {actual} bytes, expected {size}")
            if described.get("sample", None) not in (None, _sample(file, size)):
                raise ValueError(f"{path} holds something else than was written")
            if size:
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays: Arrays = {}
        for part, at in described["arrays"].items():
            count = int(np.prod(at["shape"], dtype=np.int64))
            if count == 0:
                arrays[part] = np.empty(at["shape"], at["dtype"])
                continue
            flat = np.frombuffer(buffer, np.dtype(at["dtype"]), count, at["offset"])
            arrays[part] = flat.reshape(at["shape"])
        kept = Kept(arrays, int(described["digest"], 16))
        if verify and _digest(arrays) != kept.digest:
            raise ValueError(f"{path} is damaged: its content does not match its digest")
        return kept
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("index cache %s/%s is broken (%s); building it anew", folder, name, error)
        return None
