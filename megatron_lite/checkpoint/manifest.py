"""The manifest: what a checkpoint folder holds; written last, it makes the folder valid."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.hashing import BLOCKS, Hasher
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.tensor_file import Written
from megatron_lite.config.errors import CheckpointError

FORMAT, VERSION = "megatron_lite", 2
NAME = "manifest.json"
_READERS = 2  # files at a time: one is read while another's last blocks are hashed
_READ_BYTES = 8 << 20  # at a time: one part is read while the one before is hashed
TOKENIZER = "tokenizer"
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
    """Read and check the manifest of a checkpoint folder; raises CheckpointError naming what is wrong."""
    path = folder / NAME
    try:
        outer = json.loads(path.read_bytes())
        body = outer["body"]
        if outer["sha256"] != _hash(body):
            raise CheckpointError(f"{path} is damaged: its content does not match its hash")
        if body["format"] != FORMAT or body["version"] > VERSION:
            raise CheckpointError(
                f"{path} has format {body['format']} version {body['version']}; this program reads "
                f"{FORMAT} up to version {VERSION}"
            )
        manifest = Manifest(
            iteration=int(body["iteration"]),
            progress=Progress.from_json(body["progress"]),
            config=dict(body["config"]),
            files={name: Written.from_json(w) for name, w in body["files"].items()},
            tensors={name: _tensor(name, t, path) for name, t in body["tensors"].items()},
            tokenizer=dict(body.get("tokenizer", {})),
            data=dict(body.get("data", {})),
        )
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {NAME}: it was never completed") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path} names the file {name!r}, which is none of ours: refused")
    for name, tensor in manifest.tensors.items():
        for piece in tensor.pieces:
            if piece.file not in manifest.files:
                raise CheckpointError(f"{path}: {name} lies in {piece.file!r}, which is not listed")
    return manifest


def _tensor(name: str, stored: dict[str, Any], path: Path) -> StoredTensor:
    shape = tuple(int(n) for n in stored["shape"])
    pieces = tuple(
        StoredPiece(str(file), str(key), tuple(map(int, offset)), tuple(map(int, lengths)))
        for file, key, offset, lengths in stored["pieces"]
    )
    for piece in pieces:
        box = zip(piece.offset, piece.lengths, shape, strict=True)
        if any(o < 0 or n < 0 or o + n > whole for o, n, whole in box):
            raise CheckpointError(f"{path}: a piece of {name} lies outside its shape {shape}")
    return StoredTensor(shape, str(stored["dtype"]), pieces)


def verify_files(folder: Path, manifest: Manifest, *, share: int = 0, shares: int = 1) -> None:
    """Compare size and hash of every shares-th file; raises CheckpointError naming the first that differs.

    A link is refused: a checkpoint's bytes lie in its folder.
    """
    mine = sorted(manifest.files.items())[share::shares]
    for name, expected in mine:  # sizes first: they cost nothing
        path = folder / name
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is missing or no plain file")
        size = path.stat().st_size
        if size != expected.bytes:
            raise CheckpointError(f"{path} has {size} bytes, its manifest says {expected.bytes}")
    with ThreadPoolExecutor(_READERS, "verify") as readers:
        for _ in readers.map(lambda one: _verify_content(folder / one[0], one[1]), mine):
            pass


def _verify_content(path: Path, expected: Written) -> None:
    try:
        found = hash_of(path, expected.kind)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if found != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its hash")


def hash_of(path: Path, kind: str = BLOCKS) -> Written:
    """Size and hash of a file as it lies on the disk."""
    size = 0
    with path.open("rb", buffering=0) as file, Hasher(kind) as hashed:
        while data := file.read(_READ_BYTES):
            hashed.update(data)
            size += len(data)
        return Written(size, hashed.hexdigest(), kind)
