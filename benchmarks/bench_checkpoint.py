"""`make bench-checkpoint`: saving and loading 300M parameters with Adam's state, beside what others do.

    bf16 weights, fp32 masters and two moments: 14 bytes per parameter, 4.2 GB, one process

Every way saves the same tensors to the same disk, in turns, and the medians are printed.  `copy` is
the state copied once to host memory that exists already; `raw write` is the same number of bytes
from memory to one file with one fsync.  Needs three times the state in memory, twice on the disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.bench_train import batch_of, our_run
from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.checkpoint.progress import Progress
from megatron_lite.checkpoint.saver import Background
from megatron_lite.checkpoint.snapshot import HostMemory, Snapshot
from megatron_lite.checkpoint.store import KEEP_ALL, Store
from megatron_lite.config.flags.parser import parse
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER, NamedSlice
from megatron_lite.train.step import train_step

Times = dict[str, float]


class State:
    """Tensors of a GPT's names and shapes, of about as many parameters as asked."""

    def __init__(self, millions: float) -> None:
        layers = max(1, round((millions * 1e6 - 51.5e6) / 12.6e6))
        flags = (
            f"--num-layers {layers} --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
            "--vocab-size 50257 --mock-data --micro-batch-size 1 --train-iters 1 --lr 1 --bf16"
        )
        specs = draw_up(parse(flags.split()).config, 1).parameters
        self.weights: list[NamedSlice] = []
        self.optimizer: list[NamedSlice] = []
        random = torch.Generator().manual_seed(1)
        for spec in specs:
            master = torch.randn(spec.shape, generator=random)
            self.weights.append(_slice(spec.name, master.bfloat16()))
            self.optimizer.append(_slice(MASTER + spec.name, master))
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.append(_slice(f"{moment}.{spec.name}", master * 0.01))
        self.tensors = {s.name: s.data for s in (*self.weights, *self.optimizer)}
        self.parameters = sum(s.data.numel() for s in self.weights)
        self.bytes = sum(t.numel() * t.element_size() for t in self.tensors.values())

    def snapshot(self, store: Store, iteration: int) -> Snapshot:
        """All of it."""
        return store.snapshot(
            iteration,
            weights=self.weights,
            optimizer=self.optimizer,
            progress=Progress(iteration, iteration, lr_samples=iteration),
        )


def _slice(name: str, data: torch.Tensor) -> NamedSlice:
    shape = tuple(data.shape)
    return NamedSlice(name, shape, (0,) * len(shape), data)


class Bench:
    """Each way to save, as a function of an empty folder that gives its times."""

    def __init__(self, state: State) -> None:
        self.state = state
        largest = max(state.tensors.values(), key=lambda t: t.numel() * t.element_size())
        self.bytes = largest.reshape(-1).view(torch.uint8).numpy().data
        self.ctx = ParallelContext.serial()
        self.saver = Background.over(Store(Path("unused"), self.ctx), KEEP_ALL, idle=lambda: None)
        self.saver.reserve(state.snapshot(self.saver.store, 0))

    def copy(self, folder: Path) -> Times:
        """The state to host memory that exists."""
        snapshot = self.state.snapshot(Store(folder, self.ctx), 0)
        return _timed(lambda: self.saver.memory.copy(snapshot))

    def raw_write(self, folder: Path) -> Times:
        """As many bytes, one file, one fsync."""

        def write() -> None:
            descriptor = os.open(folder / "raw", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            left = self.state.bytes
            while left:
                for start in range(0, min(left, len(self.bytes)), 16 << 20):
                    left -= os.write(descriptor, self.bytes[start : start + min(left, 16 << 20)])
            os.fsync(descriptor)
            os.close(descriptor)

        return _timed(write)

    def ours(self, folder: Path) -> Times:
        """Store.save: hashed, fsynced, renamed."""
        store = Store(folder, self.ctx)
        return _timed(lambda: store.save(self.state.snapshot(store, 1)))

    def ours_beside(self, folder: Path) -> Times:
        """--async-save."""
        self.saver.store.root = folder
        began = time.perf_counter()
        self.saver.save(self.state.snapshot(self.saver.store, 1))
        stall = time.perf_counter() - began
        self.saver.wait()
        return {"stall": stall, "total": time.perf_counter() - began}

    def torch_save(self, folder: Path) -> Times:
        """torch.save of a dict, and an fsync, which it leaves out."""

        def save() -> None:
            torch.save(self.state.tensors, folder / "state.pt")
            with (folder / "state.pt").open("rb+") as file:
                os.fsync(file.fileno())

        return _timed(save)

    def plain_dcp(self, folder: Path) -> Times:
        """torch.distributed.checkpoint as it comes."""
        writer = dcp.FileSystemWriter(folder / "dcp")
        return _timed(lambda: dcp.save(self.state.tensors, storage_writer=writer))

    def plain_dcp_beside(self, folder: Path) -> Times:
        """Its async_save as it comes."""
        began = time.perf_counter()
        future = dcp.async_save(
            self.state.tensors, storage_writer=dcp.FileSystemWriter(folder / "dcp")
        )
        stall = time.perf_counter() - began
        future.result()
        return {"stall": stall, "total": time.perf_counter() - began}


def _timed(work: Callable[[], object]) -> Times:
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return {"stall": seconds, "total": seconds}


def _forget(folder: Path) -> None:
    """Let the system drop the files from its cache, so that loading reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_saving(bench: Bench, place: Path, rounds: int) -> dict[str, Times]:
    """Medians of every way, in turns."""
    ways = {
        "copy to host memory": bench.copy,
        "raw write + fsync": bench.raw_write,
        "ours": bench.ours,
        "ours, --async-save": bench.ours_beside,
        "torch.save + fsync": bench.torch_save,
        "DCP save": bench.plain_dcp,
        "DCP async_save": bench.plain_dcp_beside,
    }
    found: dict[str, list[Times]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, way in ways.items():
            folder = place / "save"
            folder.mkdir()
            times = way(folder)
            if number:  # the first round finds caches and allocators cold
                found[name].append(times)
            shutil.rmtree(folder)
    return {
        name: {key: statistics.median(t[key] for t in times) for key in ("stall", "total")}
        for name, times in found.items()
    }


def measure_loading(bench: Bench, place: Path, rounds: int) -> dict[str, float]:
    """Seconds to verify and load from the disk, beside torch.load."""
    state, store = bench.state, Store(place / "ours", bench.ctx)
    store.save(state.snapshot(store, 1))
    torch.save(state.tensors, place / "state.pt")
    targets = [_slice(n, torch.empty_like(t).fill_(0)) for n, t in state.tensors.items()]

    def verify() -> None:
        manifest, _ = store.newest_intact()
        assert manifest is not None

    def fill() -> None:
        store.load(manifest, targets)

    def plain() -> None:
        loaded = torch.load(place / "state.pt", weights_only=True)
        for target in targets:
            target.data.copy_(loaded[target.name])

    manifest, _ = store.newest_intact()
    assert manifest is not None
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        _forget(place)
        for name, work in (("ours: verify", verify), ("ours: fill", fill)):
            times[name].append(_timed(work)["total"])
        _forget(place)
        times["torch.load + copy"].append(_timed(plain)["total"])
    for target in targets:
        assert torch.equal(target.data, state.tensors[target.name]), target.name
    shutil.rmtree(place / "ours")
    (place / "state.pt").unlink()
    return {name: statistics.median(found) for name, found in times.items()}


def measure_training(bench: Bench, place: Path) -> tuple[float, float]:
    """Seconds of a small model's step, alone and while a checkpoint is written beside it."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    run = our_run()
    batch = batch_of(0)

    def step() -> float:
        return _timed(lambda: train_step(run, [batch], lr=1e-4, weight_decay=0.1))["total"]

    step()
    alone = statistics.median(step() for _ in range(8))
    folder = place / "beside"
    bench.saver.store.root = folder
    folder.mkdir()
    beside: list[float] = []
    bench.saver.finished()  # of the saves before
    for number in range(3):
        bench.saver.save(bench.state.snapshot(bench.saver.store, number))
        while bench.saver.finished() is None:
            beside.append(step())
        bench.saver.wait()
    shutil.rmtree(folder)
    return alone, statistics.median(beside)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=300.0, help="parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; the system's temporary one")
    asked = parser.parse_args()
    state = State(asked.millions)
    gigabytes = state.bytes / 1e9
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=asked.folder) as name:
        place = Path(name)
        store = dist.FileStore(str(place / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        print(
            f"{state.parameters / 1e6:.0f}M parameters, {gigabytes:.2f} GB, {os.cpu_count()} cores, "
            f"{platform.machine()}, torch {torch.__version__}, medians of {asked.rounds}"
        )
        bench = Bench(state)
        saving = measure_saving(bench, place, asked.rounds)
        copy, raw = saving["copy to host memory"]["total"], saving["raw write + fsync"]["total"]
        print(f"{'':22}{'stall s':>9}{'/ copy':>8}{'total s':>9}{'GB/s':>7}{'/ raw':>7}")
        for way, times in saving.items():
            print(
                f"{way:22}{times['stall']:9.3f}{times['stall'] / copy:8.2f}{times['total']:9.3f}"
                f"{gigabytes / times['total']:7.2f}{raw / times['total']:7.2f}"
            )
        ours, beside = saving["ours"], saving["ours, --async-save"]
        print(
            f"ratio: stall of --async-save {beside['stall'] / copy:.2f} copies (aim 1.5), "
            f"{saving['DCP async_save']['stall'] / beside['stall']:.1f} times shorter than DCP's; "
            f"bandwidth {raw / ours['total']:.2f} of the raw write (aim 0.80), "
            f"{saving['torch.save + fsync']['total'] / ours['total']:.2f} times torch.save's, "
            f"{saving['DCP save']['total'] / ours['total']:.2f} times DCP's"
        )
        alone, while_written = measure_training(bench, place)
        print(
            f"a training step on {torch.get_num_threads()} thread(s): {alone * 1e3:.0f} ms alone, "
            f"{while_written * 1e3:.0f} ms beside a save: ratio {while_written / alone:.2f}"
        )
        bench.saver.memory = HostMemory()  # the loading needs the room
        for way, seconds in measure_loading(bench, place, asked.rounds).items():
            print(f"{way:22}{'':17}{seconds:9.3f}{gigabytes / seconds:7.2f}")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
