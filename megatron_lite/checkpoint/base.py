"""The base of adapters: a checkpoint holds these alone, and says which other checkpoint they belong to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.choice import folder_of
from megatron_lite.checkpoint.manifest import NAME, Manifest
from megatron_lite.checkpoint.schema import checked_int, mapping, word
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import CheckpointError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.reading import read_plain

KEY = "base"
"""Where it stands in a manifest's config."""
_LARGEST = 1 << 30


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint of a run folder; sha256: of its manifest, which has the hashes of its files.

    path: from the run folder of the adapters, so that both may move together; folder: from the root.
    """

    path: str
    folder: str
    iteration: int
    sha256: str

    @classmethod
    def of(cls, root: Path, manifest: Manifest, run: Path) -> Base:
        """The checkpoint of this manifest in root, as a run writing to `run` keeps it."""
        whole = os.path.realpath(root)
        relative = os.path.relpath(whole, os.path.realpath(run))
        return cls(relative, whole, manifest.iteration, _hash(root, manifest.iteration))

    def to_json(self) -> dict[str, Any]:
        """For a manifest's config."""
        return asdict(self)


def base_of(manifest: Manifest, folder: Path) -> Base:
    """What a checkpoint of adapters says; CheckpointError where it does not."""
    try:
        said = mapping(manifest.config.get(KEY), KEY)
        texts = {
            name: word(said.get(name), f"base.{name}") for name in ("path", "folder", "sha256")
        }
        return Base(iteration=checked_int(said.get("iteration"), "base.iteration"), **texts)
    except ValueError as error:
        raise CheckpointError(f"{folder / NAME} is damaged: {error}") from None


def open_base(
    base: Base,
    run: Path,
    ctx: ParallelContext,
    open_store: Callable[[Path, ParallelContext], Store] = Store,
) -> tuple[Store, Manifest]:
    """The base of a run's adapters, verified over all ranks.  Collective over the world.

    Raises CheckpointError where it is gone, damaged, or another one than the adapters were trained on.
    """
    tried = [Path(os.path.normpath(run.absolute() / base.path)), Path(base.folder)]
    roots = [root for root in dict.fromkeys(tried) if (folder_of(root, base.iteration)).is_dir()]
    if not roots:
        raise CheckpointError(
            f"{run} holds adapters alone, and checkpoint {base.iteration} that they were trained beside "
            f"is not in {' nor in '.join(map(str, dict.fromkeys(tried)))}: put it back, or a link to it"
        )
    root = roots[0]
    _require(base, root, base.iteration, run)
    store = open_store(root, ctx)
    meet = store.meet
    store.meet = lambda name: meet(f"base-{name}")  # the adapters' store meets under these names
    manifest, _ = store.newest_intact(base.iteration)
    assert manifest is not None, "a checkpoint that was asked for and is not intact is refused"
    return store, manifest


def require_base(base: Base, root: Path, manifest: Manifest, run: Path) -> None:
    """Raise CheckpointError where another checkpoint is given than a run's adapters were trained beside."""
    _require(base, root, manifest.iteration, run)


def _require(base: Base, root: Path, iteration: int, run: Path) -> None:
    if _hash(root, iteration) != base.sha256:
        raise CheckpointError(
            f"{folder_of(root, iteration)} is another checkpoint than the one that the adapters in "
            f"{run} were trained beside (its manifest has another hash): put that one back"
        )


def _hash(root: Path, iteration: int) -> str:
    path = folder_of(root, iteration) / NAME
    try:
        return hashlib.sha256(read_plain(path, _LARGEST, links=False)).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
