"""A crash at every file operation of a save: all states of every optimizer are the old ones or the new ones."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.blueprint.optimizers import OPTIMIZERS
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.store import Store
from megatron_lite.config.errors import StorageError
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk, RecordingDisk, SimulatedCrash
from megatron_lite.train.run import Run
from tests.support.axes import BF16, HOST
from tests.support.checkpoints import assembled, load_and_save_again, train, whole

pytestmark = pytest.mark.usefixtures("no_fsync")

SMALL = {"model__num_layers": 1, "train__global_batch_size": 2}
LISA = {
    "model__num_layers": 2,
    "optim__lisa_layers": 1,
    "optim__lisa_interval": 1,
    "train__seed": 6,
}
ON_A_GPU = ("apex-adam",)
CASES: dict[str, dict[str, Any]] = {
    **{name: {"optim__optimizer": name} for name in OPTIMIZERS if name not in ON_A_GPU},
    "lisa": LISA,
    "on the host": {HOST: True, BF16: True},
}


def save(run: Run, folder: Path, disk: Disk) -> None:
    step = run.progress.step
    store = Store(folder, run.ctx, disk)
    progress = Progress(step, step, lr_samples=step, optimizer_steps=step)
    weights, state = run.engine.weights(owned=True), run.engine.state(owned=True)
    store.save(store.snapshot(step, weights=weights, optimizer=state, progress=progress))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_after_a_crash_all_states_are_those_before_or_after(case, tmp_path) -> None:
    changes = SMALL | CASES[case]
    config, blueprint, run = assembled(0, 1, changes)
    old = tmp_path / "old"
    train(config, blueprint, run, 1)
    save(run, old, Disk())
    train(config, blueprint, run, 1)
    recorded, new = RecordingDisk(), tmp_path / "new"
    shutil.copytree(old, new)
    save(run, new, recorded)
    before, after = whole(old), whole(new)
    assert before != after and len(before) > len(set(run.blueprint.parameters))
    found = []
    for k in range(len(recorded.operations)):
        folder = tmp_path / "crashed"
        shutil.copytree(old, folder)
        with pytest.raises(SimulatedCrash):
            save(run, folder, FaultyDisk(fail_at=k, crash="raise", tear=True))
        loads = whole(folder)
        found.append(loads == after)
        assert loads in (before, after), recorded.operations[k]
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {False, True}  # once new, never old again
    losses = train(config, blueprint, run, 2)
    assert load_and_save_again(0, 1, changes, str(new), str(tmp_path / "again"), 2) == losses


def test_a_full_disk_leaves_state_in_host_memory_as_it_is(tmp_path: Path) -> None:
    """The save fails in words, the older checkpoint stays, and training goes on as if there had been none."""
    changes = SMALL | CASES["on the host"]
    config, blueprint, run = assembled(0, 1, changes)
    train(config, blueprint, run, 1)
    save(run, tmp_path, Disk())
    kept = whole(tmp_path)
    train(config, blueprint, run, 1)
    with pytest.raises(StorageError, match="No space left"):
        save(
            run, tmp_path, FaultyDisk(fail_at=3, error=errno.ENOSPC, kinds=("write",), lasting=True)
        )
    assert whole(tmp_path) == kept
    losses = train(config, blueprint, run, 2)
    again = assembled(0, 1, changes)
    assert train(*again, 4)[2:] == losses
