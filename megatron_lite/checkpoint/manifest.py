"""The manifest: what a checkpoint folder holds; written last, it makes the folder valid."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.hashing import BLOCKS, Hasher
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.schema import checked_int, items, mapping, number, wholes, word
from megatron_lite.checkpoint.tensor_file import TORCH_DTYPES, Written
from megatron_lite.config.errors import CheckpointError
from megatron_lite.storage.reading import NotPlain, read_plain, require_plain

FORMAT, VERSION = "megatron_lite", 2
NAME = "manifest.json"
_READERS = 2  # files at a time: one is read while another's last blocks are hashed
_READ_BYTES = 8 << 20  # at a time: one part is read while the one before is hashed
TOKENIZER = "tokenizer"
_LARGEST = 1 << 30  # bytes of a manifest: sixteen thousand ranks' pieces take a quarter of it
_MOST_DIMS = 8
_FILE_NAME = re.compile(
    rf"(weights|optimizer)-\d{{5}}\.safetensors|{TOKENIZER}/\w[\w.-]{{0,99}}", re.ASCII
)


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """The box [offset, offset + lengths) of a global tensor is tensor `key` of `file`."""

    file: str
    key: str
    offset: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor and the pieces that make it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[StoredPiece, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a loader must know before it opens a tensor file.

    tokenizer, data: what the run read, by name; empty in checkpoints of version 1.
    """

    iteration: int
    progress: Progress
    config: dict[str, Any]
    files: dict[str, Written]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """JSON with a hash over its own content."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "iteration": self.iteration,
            "progress": self.progress.to_json(),
            "config": self.config,
            "tokenizer": self.tokenizer,
            "data": self.data,
            "files": {name: written.to_json() for name, written in self.files.items()},
            "tensors": {
                name: {
                    "shape": t.shape,
                    "dtype": t.dtype,
                    "pieces": [[p.file, p.key, p.offset, p.lengths] for p in t.pieces],
                }
                for name, t in self.tensors.items()
            },
        }
        return json.dumps({"sha256": _hash(body), "body": body}, indent=1).encode()


def _hash(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; raises CheckpointError naming what is wrong.

    Every reader comes through here, so what it gives has the right types, ranges and sums, whatever
    the file holds.  What is in its config is read with description.py.
    """
    path = folder / NAME
    try:
        outer = mapping(json.loads(read_plain(path, _LARGEST, links=False)), "the file")
        body = mapping(outer["body"], "body")
        if outer["sha256"] != _hash(body):
            raise CheckpointError(f"{path} is damaged: its content does not match its hash")
        if body["format"] != FORMAT or checked_int(body["version"], "version", low=1) > VERSION:
            raise CheckpointError(
                f"{path} has format {body['format']} version {body['version']}; this program reads "
                f"{FORMAT} up to version {VERSION}"
            )
        manifest = _manifest(body)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: it was never completed") from None
    except NotPlain as error:
        raise CheckpointError(f"{path} {error.strerror}: it is not opened") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: it has no {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return manifest


def _manifest(body: dict[str, Any]) -> Manifest:
    """The body as a Manifest; KeyError or ValueError where it is none."""
    manifest = Manifest(
        iteration=checked_int(body["iteration"], "iteration"),
        progress=Progress.from_json(body["progress"]),
        config=mapping(body["config"], "config"),
        files={_file(name): Written.from_json(w) for name, w in _named(body, "files")},
        tensors={name: _tensor(name, t) for name, t in _named(body, "tensors")},
        tokenizer=_tokenizer(body.get("tokenizer", {})),
        data=_data(body.get("data", {})),
    )
    if manifest.progress.step != manifest.iteration:
        raise ValueError(
            f"progress.step is {manifest.progress.step} in a checkpoint of iteration "
            f"{manifest.iteration}"
        )
    _require_room(manifest)
    return manifest


def _named(body: dict[str, Any], part: str) -> list[tuple[str, Any]]:
    return list(mapping(body[part], part).items())


def _file(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"it names the file {name!r}, which this version does not know: refused")
    return name


def _tokenizer(stored: object) -> dict[str, Any]:
    """The facts of a tokenizer, each optional."""
    facts = mapping(stored, "tokenizer")
    for name, value in facts.items():
        if name in ("type", "fingerprint"):
            word(value, f"tokenizer.{name}")
        elif name in ("vocab_size", "padded_vocab_size"):
            checked_int(value, f"tokenizer.{name}", low=1)
        elif name == "eod" and value is not None:
            checked_int(value, "tokenizer.eod")
        elif name == "begins":
            wholes(value, "tokenizer.begins")
    return facts


def _data(stored: object) -> dict[str, Any]:
    """What was read: the parts of each split, as data/identity.py writes them."""
    facts = mapping(stored, "data")
    for split in facts.keys() & {"train", "valid", "test"}:
        for part in items(facts[split], f"data.{split}"):
            values, where = mapping(part, f"data.{split}"), f"of data.{split}"
            word(values["prefix"], f"prefix {where}")
            word(values["content"], f"content {where}")
            wholes(values["documents"], f"documents {where}", 2)
            number(values["weight"], f"weight {where}")
            epochs, _ = items(values["epochs"], f"epochs {where}", 2)
            checked_int(epochs, f"epochs {where}")
    return facts


def _tensor(name: str, stored: object) -> StoredTensor:
    values = mapping(stored, name)
    shape = wholes(values["shape"], f"the shape of {name}")
    if len(shape) > _MOST_DIMS:
        raise ValueError(f"{name} has {len(shape)} dims")
    dtype = word(values["dtype"], f"the format of {name}", TORCH_DTYPES)
    pieces = []
    for piece in items(values["pieces"], f"the pieces of {name}"):
        file, key, *place = items(piece, f"a piece of {name}", 4)
        offset, lengths = (wholes(n, f"a piece of {name}", len(shape)) for n in place)
        box = zip(offset, lengths, shape, strict=True)
        if any(o + n > whole for o, n, whole in box):
            raise ValueError(f"a piece of {name} lies outside its shape {list(shape)}")
        what = f"a piece of {name}"
        pieces.append(StoredPiece(word(file, what), word(key, what), offset, lengths))
    held = sum(math.prod(piece.lengths) for piece in pieces)
    if held != math.prod(shape):
        raise ValueError(
            f"the pieces of {name} have {held} elements, its shape {list(shape)} has "
            f"{math.prod(shape)}"
        )
    return StoredTensor(shape, dtype, tuple(pieces))


def _require_room(manifest: Manifest) -> None:
    """Every piece lies in a file that is listed and large enough for all of its pieces."""
    needed = dict.fromkeys(manifest.files, 0)
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            if piece.file not in needed:
                raise ValueError(f"{name} lies in {piece.file!r}, which is not listed")
            needed[piece.file] += math.prod(piece.lengths) * TORCH_DTYPES[tensor.dtype].itemsize
    for file, size in needed.items():
        if size > manifest.files[file].bytes:
            raise ValueError(
                f"{file} is said to have {manifest.files[file].bytes} bytes, its tensors need {size}"
            )


def verify_sizes(folder: Path, manifest: Manifest, *, share: int = 0, shares: int = 1) -> None:
    """Compare the size of every shares-th file; raises CheckpointError naming the first that differs.

    A link is refused: a checkpoint's bytes lie in its folder.
    """
    for name, expected in sorted(manifest.files.items())[share::shares]:
        path = folder / name
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing or no plain file")
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(f"{path} has {size} bytes, its manifest says {expected.bytes}")


def verify_files(
    folder: Path,
    manifest: Manifest,
    *,
    share: int = 0,
    shares: int = 1,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """The same, and then the hash of every shares-th file; seen: told the bytes read, of how many."""
    verify_sizes(folder, manifest, share=share, shares=shares)
    mine = sorted(manifest.files.items())[share::shares]
    total, done, lock = sum(expected.bytes for _, expected in mine), 0, threading.Lock()

    def read(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            seen(done, total)

    with ThreadPoolExecutor(_READERS, "verify") as readers:
        for _ in readers.map(lambda one: _verify_content(folder / one[0], one[1], read), mine):
            pass


def _verify_content(path: Path, expected: Written, read: Callable[[int], None]) -> None:
    try:
        found = hash_file(path, expected.kind, read)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its hash")


def hash_file(
    path: Path, kind: str = BLOCKS, read: Callable[[int], None] = lambda count: None
) -> Written:
    """Size and hash of a file as it lies on the disk; read: told the bytes of every part."""
    size = 0
    require_plain(path, path.stat())  # a named pipe would be waited for
    with path.open("rb", buffering=0) as file, Hasher(kind) as hashed:
        while data := file.read(_READ_BYTES):
            hashed.update(data)
            size += len(data)
            read(len(data))
        return Written(size, hashed.hexdigest(), kind)
