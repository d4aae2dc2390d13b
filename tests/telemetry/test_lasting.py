"""A log that fails costs a warning; its records come later, or are counted."""

from __future__ import annotations

import errno
import types
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.config.errors import StorageError
from megatron_lite.config.sections.telemetry import TelemetryConfig
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.faults import FaultyDisk
from megatron_lite.telemetry import lasting
from megatron_lite.telemetry.lasting import Lasting
from megatron_lite.telemetry.record import TelemetryRecord, read_metrics
from megatron_lite.telemetry.writers import JsonLines, TensorBoard, WeightsAndBiases
from tests.telemetry.records import STEP
from tests.telemetry.tensorboard import read_events


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Memory:
    """A writer that fails while `broken`."""

    name = "memory"

    def __init__(self) -> None:
        self.broken, self.opened, self.kept = False, 0, list[TelemetryRecord]()

    def open(self) -> None:
        self.opened += 1
        if self.broken:
            raise ConnectionError("the server is away")

    def write(self, record: TelemetryRecord) -> None:
        if self.broken:
            raise ConnectionError("the server is away")
        self.kept.append(record)

    def close(self) -> None:
        if self.broken:
            raise ConnectionError("the server is away")


def step(iteration: int) -> TelemetryRecord:
    return replace(STEP, iteration=iteration)


STEPS = [step(iteration) for iteration in range(1, 9)]


def test_records_wait_for_a_writer_that_comes_back() -> None:
    said: list[str] = []
    memory, clock = Memory(), Clock()
    log = Lasting(memory, said.append, clock=clock)
    log.open()
    for number, record in enumerate(STEPS):
        clock.now += 0.6
        memory.broken = 2 <= number < 5
        log.write(record)
    log.close()
    assert memory.kept == STEPS
    assert said == [
        "memory takes no more records, training continues and tries again: the server is away",
        "memory works again",
    ]


def test_it_is_tried_again_ever_more_seldom_and_what_is_lost_is_counted(monkeypatch) -> None:
    monkeypatch.setattr(lasting, "WAITING_RECORDS", 5)
    said: list[str] = []
    memory, clock = Memory(), Clock()
    log = Lasting(memory, said.append, clock=clock)
    memory.broken = True
    log.open()
    for number in range(7200):
        clock.now = float(number)
        log.write(step(number + 1))
    assert memory.opened < 25
    log.close()
    assert said[1:] == ["memory: 7200 records were lost (the server is away)"]


@pytest.mark.parametrize("tear", [False, True])
@pytest.mark.parametrize("fail_at", range(4))
def test_metrics_have_every_record_once_after_a_full_disk(
    tmp_path: Path, fail_at: int, tear: bool
) -> None:
    """Half a line that got onto the disk is cut off before the record is written again."""
    said: list[str] = []
    clock = Clock()
    disk = FaultyDisk(fail_at=fail_at, error=errno.ENOSPC, kinds=("write",), tear=tear)
    writer = JsonLines(tmp_path / "metrics.jsonl", resumed_iteration=0, disk=disk)
    log = Lasting(writer, said.append, clock=clock)
    log.open()
    for record in STEPS:
        clock.now += 10.0
        log.write(record)
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == STEPS
    assert disk.failed and len(said) == 2 and "No space left" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_disk_that_stays_full_or_fails_at_the_end_raises_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    disk = FaultyDisk(fail_at=3, error=errno.ENOSPC, kinds=("write",), lasting=True)
    path = tmp_path / "metrics.jsonl"
    log = Lasting(JsonLines(path, resumed_iteration=0, disk=disk), said.append)
    log.open()
    for record in STEPS:
        log.write(record)
    log.close()
    assert read_metrics(path) == STEPS[:3] and said[-1].startswith(f"{path}: 5 records were")
    disk = FaultyDisk(fail_at=1, error=errno.EIO, kinds=("fsync",))
    log = Lasting(JsonLines(path, resumed_iteration=0, disk=disk), said.append)
    log.open()
    log.close()
    assert "could not be closed" in said[-1]


def test_at_the_start_a_wrong_path_is_an_error_and_a_full_disk_is_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    writer = JsonLines(tmp_path / "file" / "metrics.jsonl", resumed_iteration=0, disk=Disk())
    with pytest.raises(StorageError):
        Lasting(writer, said.append).open()
    disk = FaultyDisk(fail_at=0, error=errno.ENOSPC)
    writer = JsonLines(tmp_path / "metrics.jsonl", resumed_iteration=0, disk=disk)
    Lasting(writer, said.append).open()
    assert len(said) == 1


def test_tensorboard_begins_a_new_file_with_what_the_old_one_lost(tmp_path: Path) -> None:
    """Its thread dies of the full disk; the file it wrote to stays behind."""
    said: list[str] = []
    clock = Clock()
    writer = TensorBoard(tmp_path, config=TelemetryConfig(), disk=Disk())
    log = Lasting(writer, said.append, clock=clock)
    log.open()
    log.write(STEPS[0])
    broken, writer._events = writer._events, Memory()
    writer._events.add_scalar = None  # calling it raises
    log.write(STEPS[1])
    broken.close()
    clock.now += 5.0
    log.write(STEPS[2])
    log.close()
    assert [iteration for iteration, _ in read_events(tmp_path)["lm loss"]][-3:] == [1, 2, 3]
    assert len(said) == 2


def test_wandb_goes_on_with_the_same_run(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []
    module = types.ModuleType("wandb")
    failing = [True]

    class Run:
        id = "abc"

        def log(self, points: dict[str, float], step: int) -> None:
            if failing.pop() if failing else False:
                raise BrokenPipeError("its service is gone")

        def finish(self) -> None:
            pass

    module.init = lambda **settings: asked.append(settings) or Run()  # type: ignore[attr-defined]
    config = TelemetryConfig(wandb_project="p")
    clock = Clock()
    said: list[str] = []
    log = Lasting(
        WeightsAndBiases(module, config=config, fallback_folder=tmp_path), said.append, clock=clock
    )
    log.open()
    for record in STEPS[:2]:
        clock.now += 10.0
        log.write(record)
    log.close()
    assert "id" not in asked[0] and (asked[1]["id"], asked[1]["resume"]) == ("abc", "allow")
    assert "its service is gone" in said[0] and said[1].endswith("works again")
