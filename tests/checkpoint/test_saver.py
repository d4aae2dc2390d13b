"""Saving beside the training: what is copied is what is written, and no failure is lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.saver import Background, Foreground, Saver
from megatron_lite.checkpoint.store import KEEP_ALL, Keep, Store
from megatron_lite.checkpoint.tensor_file import write_tensors
from megatron_lite.config.errors import NumericsError, StorageError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.storage.disk import Disk, Operation
from megatron_lite.storage.faults import FaultyDisk
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, tiny_config

SHAPE = (64, 3)


class GatedDisk(Disk):
    """Waits at the first write of a file until the gate is opened."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()

    def _operate(self, operation: Operation, action):  # type: ignore[no-untyped-def]
        if operation.kind == "write":
            self.reached.set()
            assert self.gate.wait(30)
        return super()._operate(operation, action)


def slices(value: float) -> list[NamedSlice]:
    return [NamedSlice("a.weight", SHAPE, (0, 0), torch.full(SHAPE, value))]


def snapshot(store: Store, step: int, weights: list[NamedSlice], progress: Progress | None = None):
    return store.snapshot(
        step,
        weights=weights,
        optimizer=(),
        progress=progress or Progress(step, step, lr_samples=step),
    )


def background(folder: Path, disk: Disk, keep: Keep = KEEP_ALL) -> Background:
    store = Store(folder, ParallelContext.serial(), disk)
    return Background.over(store, keep, idle=lambda: None)


def stored(folder: Path) -> tuple[int, float]:
    """Iteration and the one value of the newest intact checkpoint."""
    store = Store(folder, ParallelContext.serial())
    manifest, _ = store.newest_intact()
    assert manifest is not None
    found = slices(float("nan"))
    store.load(manifest, found)
    (value,) = set(found[0].data.flatten().tolist())
    return manifest.iteration, value


def test_training_goes_on_while_the_writer_writes_what_was(tmp_path: Path) -> None:
    disk = GatedDisk()
    saver, weights, progress = (
        background(tmp_path, disk),
        slices(1.0),
        Progress(step=1, samples=7, lr_samples=7),
    )
    saver.save(snapshot(saver.store, 1, weights, progress))
    assert disk.reached.wait(30) and saver.finished() is None and not saver.failed
    weights[0].data.fill_(2.0)  # the next step
    progress.samples = 8
    progress.loss_scale["scale"] = 5.0
    assert not (tmp_path / "iter_0000001").exists()
    disk.gate.set()
    saver.wait()
    saved = saver.finished()
    assert saved is not None and saved.iteration == 1 and saver.finished() is None
    assert stored(tmp_path) == (1, 1.0)
    kept = read_manifest(tmp_path / "iter_0000001").progress
    assert (kept.samples, kept.loss_scale) == (7, {})


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    disk = GatedDisk()
    saver, weights = background(tmp_path, disk), slices(1.0)
    saver.save(snapshot(saver.store, 1, weights))
    assert disk.reached.wait(30)
    weights[0].data.fill_(2.0)
    second = threading.Thread(target=lambda: saver.save(snapshot(saver.store, 2, weights)))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "its copy would overwrite what the first still writes"
    disk.gate.set()
    second.join(30)
    saver.wait()
    assert stored(tmp_path) == (2, 2.0)
    assert (tmp_path / "iter_0000001" / "manifest.json").exists()


def test_a_failing_writer_is_heard_once_and_the_next_save_works(tmp_path: Path) -> None:
    background(tmp_path, Disk()).store.save(
        snapshot(Store(tmp_path, ParallelContext.serial()), 1, slices(1.0))
    )
    saver = background(tmp_path, FaultyDisk(fail_at=0, error=errno.ENOSPC, kinds=("fsync",)))
    saver.save(snapshot(saver.store, 2, slices(2.0)))
    with pytest.raises(StorageError, match="No space left"):
        saver.wait()
    assert not saver.failed and saver.finished() is None
    saver.wait()
    assert stored(tmp_path) == (1, 1.0)
    saver.save(snapshot(saver.store, 3, slices(3.0)))  # the disk fails only once
    saver.wait()
    assert stored(tmp_path) == (3, 3.0)


def one_rank_s_disk_fails(rank: int, ranks: int, folder: str, way: str, bad: int) -> list[str]:
    """What a rank hears of a save that fails on one of them, while both go on computing together."""
    blueprint = draw(tiny_config(), ranks)
    ctx = context(blueprint, rank)
    disk = FaultyDisk(fail_at=0, error=errno.ENOSPC, kinds=("fsync",)) if rank == bad else Disk()
    store = Store(Path(folder), ctx, disk)
    saver: Saver = Foreground(store, KEEP_ALL)
    if way == "beside":
        saver = Background.over(store, KEEP_ALL, idle=lambda: None)
    heard = []
    for step in (1, 2):
        try:
            saver.save(snapshot(store, step, slices(float(step))))
            votes = torch.zeros(1)
            while not votes.item():  # steps go on; all learn in the same one
                votes[0] = float(saver.failed or saver.finished() is not None)
                torch.distributed.all_reduce(votes)
            saver.wait()
            heard.append("saved")
        except StorageError as error:
            heard.append(str(error))
    return heard


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("way", ["at once", "beside"])
def test_all_ranks_hear_of_one_rank_s_failure_and_meet_again_in_the_next(
    tmp_path: Path, way: str, bad: int
) -> None:
    heard = spawn(one_rank_s_disk_fails, 2, str(tmp_path), way, bad)
    assert "No space left" in heard[bad][0] and str(tmp_path) in heard[bad][0]
    assert "another rank could not write" in heard[1 - bad][0]
    assert heard[0][1] == heard[1][1] == "saved"
    assert stored(tmp_path) == (2, 2.0) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(last=1), [6]),
        (Keep(last=2), [5, 6]),
        (Keep(last=2, every=3), [3, 5, 6]),
        (Keep(last=1, every=2), [2, 4, 6]),
        (KEEP_ALL, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_which_checkpoints_stay(tmp_path: Path, keep: Keep, left: list[int]) -> None:
    store = Store(tmp_path, ParallelContext.serial())
    for step in range(1, 7):
        store.save(snapshot(store, step, slices(float(step))), keep)
    assert store.iterations() == left[::-1]
    assert stored(tmp_path) == (6, 6.0)


class LyingDisk(Disk):
    """Says that it has written, and holds something else."""

    def rename(self, a: str | os.PathLike[str], b: str | os.PathLike[str]) -> None:
        for file in Path(a).glob("weights*"):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        super().rename(a, b)


def test_no_older_one_is_removed_before_the_new_one_reads_back(tmp_path: Path) -> None:
    store = Store(tmp_path, ParallelContext.serial())
    store.save(snapshot(store, 1, slices(1.0)))
    bad = Store(tmp_path, ParallelContext.serial(), LyingDisk())
    with pytest.raises(StorageError, match="does not read back"):
        bad.save(snapshot(bad, 2, slices(2.0)), Keep(last=1))
    assert stored(tmp_path) == (1, 1.0)


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path: Path) -> None:
    store = Store(tmp_path, ParallelContext.serial())
    store.save(snapshot(store, 1, slices(1.0)))
    stuck = Store(
        tmp_path,
        ParallelContext.serial(),
        FaultyDisk(fail_at=2, error=errno.EACCES, kinds=("rename",)),
    )
    saved = stuck.save(snapshot(stuck, 2, slices(2.0)), Keep(last=1))
    assert len(saved.warnings) == 1 and "iter_0000001" in saved.warnings[0]
    assert store.iterations() == [2, 1] and stored(tmp_path) == (2, 2.0)


def test_a_save_folder_that_other_nodes_do_not_share_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_lite.checkpoint.store._SEEN_WITHIN_SECONDS", 0.1)
    elsewhere = ParallelContext(device=torch.device("cpu"), rank=1)  # its rank 0 wrote on its node
    with pytest.raises(StorageError, match="all nodes share"):
        Store(tmp_path / "own disk", elsewhere).prepare(
            snapshot(Store(tmp_path, elsewhere), 0, slices(1.0))
        )


def test_no_room_for_the_copy_is_found_when_it_is_made(tmp_path: Path) -> None:
    saver = background(tmp_path, Disk())
    shape = (1 << 40, 1 << 10)  # no machine has so much
    wide = NamedSlice("a.weight", shape, (0, 0), torch.empty(1).expand(shape))
    with pytest.raises(StorageError, match=r"--async-save wants \d+\.\d{3} GB of host memory"):
        saver.reserve(snapshot(saver.store, 0, [wide]))


@pytest.mark.parametrize("make", [Foreground, None], ids=["at once", "beside"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_never_kept_and_cost_no_older_one(
    tmp_path: Path, make: type[Foreground] | None, bad: float
) -> None:
    keep = Keep(1)
    store = Store(tmp_path, ParallelContext.serial())
    saver: Saver = Foreground(store, keep) if make else background(tmp_path, Disk(), keep)
    saver.save(snapshot(store, 1, slices(1.0)))
    saver.wait()
    weights = slices(2.0)
    weights[0].data[63, 2] = bad
    with pytest.raises(NumericsError, match="iteration 2 is not kept: a.weight of rank 0 hold"):
        saver.save(snapshot(store, 2, weights))
        saver.wait()
    assert stored(tmp_path) == (1, 1.0)
    assert not list(tmp_path.glob(".*.partial"))
    saver.save(snapshot(store, 3, slices(3.0)))
    saver.wait()
    assert stored(tmp_path) == (3, 3.0) and store.iterations() == [3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(tmp_path: Path, dtype) -> None:
    """In a tensor of several writes, among others of formats that shift it off its alignment."""
    count = (16 << 20) // dtype.itemsize + 5
    tensors = {
        "bytes": torch.zeros(3, dtype=torch.uint8), "good": torch.zeros(count, dtype=dtype),
        "bad": torch.zeros(count, dtype=dtype), "none": torch.zeros(0, dtype=dtype),
        "numbers": torch.full((5,), -1, dtype=torch.int64),
    }  # fmt: skip
    tensors["bad"][-1] = float("nan")
    found: list[str] = []
    write_tensors(tmp_path / "a", tensors, Disk(), not_finite=found)
    assert found == ["bad"]
    with pytest.raises(NumericsError, match="bad holds values that are not finite"):
        write_tensors(tmp_path / "b", tensors, Disk())
