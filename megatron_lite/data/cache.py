"""Index arrays kept between runs: keyed by content, whole or absent, mapped when read."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.storage.disk import Disk, temporary_name, write_atomically

FORMAT = 1  # part of the key: arrays of another format are not found
Arrays = dict[str, npt.NDArray[Any]]

log = logging.getLogger(__name__)


def build_or_load(
    folder: str | os.PathLike[str] | None,
    key: Mapping[str, Any],
    build: Callable[[], Arrays],
    disk: Disk,
) -> Arrays:
    """The arrays `build` gives, from the cache folder if they are there; no folder builds anew.

    Everything the arrays depend on must be in `key`, the data's fingerprint included: a changed
    file then has another key.  One rank per node should call it first and the others after a
    barrier; ranks that come at the same time do the same work and write the same bytes.
    """
    if folder is None:
        return build()
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    found = _load(Path(folder), name)
    if found is not None:
        return found
    arrays = build()
    _save(Path(folder), name, text, arrays, disk)
    return _load(Path(folder), name) or arrays


def _save(folder: Path, name: str, key: str, arrays: Arrays, disk: Disk) -> None:
    disk.make_folder(folder)
    for part, values in arrays.items():
        temporary = temporary_name(folder / f"{name}-{part}.npy")
        try:
            with disk.create(temporary) as file:
                file.write(_npy_header(values))
                if values.size:
                    file.write(np.ascontiguousarray(values).data)
                file.fsync()
            disk.rename(temporary, folder / f"{name}-{part}.npy")
        finally:
            disk.remove(temporary)
    # the description comes last: where it stands, every array is complete
    described = {
        "key": json.loads(key),
        "arrays": {
            part: {"dtype": str(values.dtype), "shape": list(values.shape)}
            for part, values in arrays.items()
        },
    }
    write_atomically(folder / f"{name}.json", json.dumps(described, indent=1).encode(), disk)


def _npy_header(values: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(values))
    return buffer.getvalue()


def _load(folder: Path, name: str) -> Arrays | None:
    try:
        described = json.loads((folder / f"{name}.json").read_text())
        arrays: Arrays = {}
        for part, expected in described["arrays"].items():
            path = folder / f"{name}-{part}.npy"
            if 0 in expected["shape"]:  # nothing to map
                values = np.load(path, allow_pickle=False)
            else:
                values = np.load(path, mmap_mode="r", allow_pickle=False)
            if str(values.dtype) != expected["dtype"] or list(values.shape) != expected["shape"]:
                raise ValueError(f"{path} holds {values.dtype} {values.shape}")
            arrays[part] = values
        return arrays
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("index cache %s/%s is broken (%s); building it anew", folder, name, error)
        return None
