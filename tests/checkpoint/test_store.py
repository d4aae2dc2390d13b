"""Checkpoints: any layout loads any other bit by bit; broken ones are found and passed over."""

import os
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.manifest import read_manifest
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.snapshot import Snapshot
from megatron_lite.checkpoint.store import POINTER, Store
from megatron_lite.config.errors import CheckpointError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import NamedSlice
from tests.support.axes import BF16, CHUNKS, PP, SCHEDULE, SP, TP, ZERO
from tests.support.checkpoints import (
    assembled,
    load_and_save_again,
    save,
    train,
    train_and_save,
    whole,
)
from tests.support.spawn import spawn


@pytest.mark.parametrize(
    ("saved", "saved_ranks", "loaded", "loaded_ranks"),
    [
        ({TP: 2, PP: 2}, 4, {}, 1),
        ({}, 1, {TP: 2, PP: 2}, 4),
        ({TP: 2, PP: 2, SP: True}, 4, {TP: 2}, 4),
        ({TP: 4}, 4, {PP: 4}, 4),
        ({PP: 2}, 4, {TP: 2, PP: 2}, 4),
        ({TP: 2, PP: 2, BF16: True}, 4, {PP: 2, BF16: True}, 2),
        ({TP: 2, ZERO: 1}, 4, {PP: 2}, 2),
        ({PP: 2, SCHEDULE: "zb-v"}, 2, {PP: 2, CHUNKS: 2}, 2),
        ({PP: 2, SCHEDULE: "zb-h1", ZERO: 1}, 4, {TP: 2, PP: 2, SCHEDULE: "zb-v"}, 4),
        ({PP: 2}, 2, {ZERO: 1}, 4),
        ({ZERO: 1, BF16: True}, 4, {TP: 2, ZERO: 1, BF16: True}, 4),
    ],
)
def test_any_layout_loads_any_other_bit_by_bit(
    tmp_path, saved, saved_ranks, loaded, loaded_ranks
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    went_on = spawn(train_and_save, saved_ranks, saved, str(first), 2, 2)[0]
    resumed = spawn(load_and_save_again, loaded_ranks, loaded, str(first), str(second), 2)[0]
    assert whole(first) == whole(second)
    tolerance = 2e-3 if BF16 in saved else 1e-6
    assert resumed == pytest.approx(went_on, rel=tolerance)


def test_the_same_layout_resumes_bit_exactly(tmp_path) -> None:
    changes = {TP: 2, PP: 2, "model__hidden_dropout": 0.1}
    went_on = spawn(train_and_save, 4, changes, str(tmp_path / "a"), 2, 3)
    resumed = spawn(load_and_save_again, 4, changes, str(tmp_path / "a"), str(tmp_path / "b"), 3)
    assert resumed == went_on


def test_vocabulary_is_stored_without_padding(tmp_path) -> None:
    spawn(train_and_save, 4, {TP: 4}, str(tmp_path), 1, 0)
    manifest = read_manifest(tmp_path / "iter_0000001")
    assert manifest.tensors["embedding.tokens.weight"].shape == (61, 32)


@pytest.fixture
def two_checkpoints(tmp_path):
    """A folder with iterations 1 and 2, and the store of one process over it."""
    config, blueprint, run = assembled(0, 1, {})
    for step in (1, 2):
        train(config, blueprint, run, 1)
        save(run, tmp_path, Progress(step, step, lr_samples=step))
    return Store(tmp_path, run.ctx)


def _damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
@pytest.mark.parametrize(
    "file", ["weights-00000.safetensors", "optimizer-00000.safetensors", "manifest.json"]
)
def test_a_damaged_checkpoint_is_passed_over_loudly(two_checkpoints, file, how) -> None:
    _damage(two_checkpoints.root / "iter_0000002" / file, how)
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == 1
    assert any("checkpoint 2 is not usable" in line and file in line for line in notices)


def test_no_intact_checkpoint_is_an_error_and_no_folder_is_not(two_checkpoints, tmp_path) -> None:
    for step in (1, 2):
        (two_checkpoints.root / f"iter_{step:07d}" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        two_checkpoints.newest_intact()
    nothing = Store(tmp_path / "nothing", ParallelContext.serial())
    assert nothing.newest_intact() == (None, [])


@pytest.mark.parametrize("text", [b"", b"99\n", b"-1", b"\xff\xfe", b"1e9", b"9" * 40])
def test_a_broken_pointer_gives_the_newest(two_checkpoints, text) -> None:
    (two_checkpoints.root / POINTER).write_bytes(text)
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == 2 and notices


@pytest.mark.parametrize("of_the_newer", ["complete", "cut", "gone"])
def test_a_newer_checkpoint_than_the_pointer_s_is_told_where_it_is_complete(
    two_checkpoints, of_the_newer
) -> None:
    (two_checkpoints.root / POINTER).write_text("1\n")
    newer = two_checkpoints.folder(2)
    if of_the_newer == "cut":
        _damage(newer / "weights-00000.safetensors", "cut")
    elif of_the_newer == "gone":
        (newer / "manifest.json").unlink()
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == 1
    told = [line for line in notices if "--ckpt-step 2 takes that one" in line]
    assert len(told) == (of_the_newer == "complete")
    asked, notices = two_checkpoints.newest_intact(1)
    assert asked is not None and asked.iteration == 1 and notices == []


def _in_the_way(path: Path, what: str) -> None:
    """Something else than a small regular file, in the place of one or where there is none."""
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "terabyte":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif what == "loop":
        path.symlink_to(path.name)


@pytest.mark.parametrize("what", ["pipe", "device", "folder", "terabyte", "loop"])
@pytest.mark.parametrize("file", [POINTER, "iter_0000002/manifest.json"])
def test_what_is_no_small_file_is_passed_over_at_once(two_checkpoints, file, what) -> None:
    _in_the_way(two_checkpoints.root / file, what)
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == (2 if file == POINTER else 1)
    assert any(Path(file).name in line for line in notices), notices
    two_checkpoints.save(snapshot_like(two_checkpoints, 2))  # all gives way to what a save writes
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == 2 and notices == []


@pytest.mark.parametrize("what", ["a link", "a link to nothing", "a file", "a left-over link"])
def test_what_bears_the_name_of_a_checkpoint_blocks_nothing(
    two_checkpoints, tmp_path, what
) -> None:
    folder = two_checkpoints.folder(3)
    if what == "a link":
        folder.symlink_to(two_checkpoints.folder(2))
    elif what == "a link to nothing":
        folder.symlink_to("nowhere")
    elif what == "a file":
        folder.write_text("3")
    else:
        folder.with_name(f".{folder.name}.replaced.partial").symlink_to(two_checkpoints.folder(2))
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == 2
    assert bool(notices) == (what != "a left-over link")
    snapshot = snapshot_like(two_checkpoints, 3)
    two_checkpoints.prepare(snapshot)
    two_checkpoints.save(snapshot)
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == 3 and notices == []
    assert two_checkpoints.iterations() == [3, 2, 1], "what a link named is still there"


def snapshot_like(store: Store, iteration: int) -> Snapshot:
    progress = Progress(iteration, iteration, lr_samples=iteration)
    weights = [NamedSlice("a", (4,), (0,), torch.ones(4))]
    return store.snapshot(iteration, weights=weights, optimizer=(), progress=progress)


def test_a_renamed_folder_is_no_checkpoint_of_that_iteration(two_checkpoints) -> None:
    two_checkpoints.folder(2).rename(two_checkpoints.folder(5))
    manifest, notices = two_checkpoints.newest_intact()
    assert manifest is not None and manifest.iteration == 1
    assert any("is that of iteration 2: the folder was renamed" in line for line in notices)


def damaged_on_rank_1(rank, ranks, folder):
    _, _, run = assembled(rank, ranks, {})
    store = Store(Path(folder), run.ctx)
    with pytest.raises(CheckpointError) as refused:
        store.newest_intact()
    return str(refused.value)


@pytest.mark.ci
def test_damage_that_one_rank_finds_is_named_by_all(two_checkpoints) -> None:
    for step in (1, 2):  # files are dealt out in their order, the weights are the second
        _damage(two_checkpoints.folder(step) / "weights-00000.safetensors", "flip")
    for told in spawn(damaged_on_rank_1, 2, str(two_checkpoints.root)):
        assert told.count("weights-00000.safetensors is damaged") == 2, told


def test_another_shape_is_refused_with_all_names(two_checkpoints) -> None:
    _, _, wider = assembled(0, 1, {"model__ffn_hidden_size": 64})
    manifest, _ = two_checkpoints.newest_intact()
    with pytest.raises(CheckpointError, match="mlp.up.weight: .*128, 32.* there, .*64, 32.* here"):
        two_checkpoints.load(manifest, list(wider.engine.weights(owned=False)))
