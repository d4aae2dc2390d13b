"""Read-only memory maps of files, few open at a time: a blend may have a thousand."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from pathlib import Path

from megatron_lite.config.errors import DataError, StorageError
from megatron_lite.storage.reading import open_plain

OPEN_FILES = 256  # a mapped file holds a handle, and `ulimit -n` is 1024 on many machines


class FileMaps:
    """Maps files on demand and lets go of the one not used for longest; safe between threads.

    Arrays over a map that was let go stay valid: the map goes when the last of them does.
    """

    def __init__(self, limit: int = OPEN_FILES) -> None:
        assert limit > 0
        self.limit = limit
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._maps)

    def get(self, path: Path, size: int) -> mmap.mmap:
        """The file's map; DataError if it has not `size` bytes when it is mapped."""
        with self._lock:
            known = self._maps.get(path)
            if known is not None:
                self._maps.move_to_end(path)
                return known
            made = _map(path, size)
            self._maps[path] = made
            while len(self._maps) > self.limit:
                self._maps.popitem(last=False)
            return made


def read_failure(path: Path, error: OSError) -> DataError | StorageError:
    """The failure of a read in words: the user's to mend where permission is missing, else the disk's."""
    what = f"reading {path} failed: {error.strerror}"
    if isinstance(error, PermissionError):
        return DataError(f"{what} - give the user who trains the right to read it, or a copy")
    return StorageError(f"{what} - look at the disk, or copy the data to another one")


def _map(path: Path, size: int) -> mmap.mmap:
    try:
        with open_plain(path) as file:
            made = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # an empty file cannot be mapped
        raise DataError(f"{path} is empty, expected {size} bytes - copy it again") from error
    except OSError as error:
        raise read_failure(path, error) from error
    if len(made) != size:
        raise DataError(
            f"{path} has {len(made)} bytes, but had {size} when it was opened - it changed while "
            "it was in use; start anew"
        )
    return made
