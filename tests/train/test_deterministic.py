"""Two runs are equal to the last bit: always on a CPU, with --deterministic-mode anywhere."""

from __future__ import annotations

import pytest
import torch

from tests.support.launch import start
from tests.support.sizes import with_flags
from tests.train.runs import alone, argv, curve, steps

WIDE = [
    "--mock-data", "--hidden-size", "256", "--seq-length", "64", "--micro-batch-size", "4",
    "--global-batch-size", "16", "--hidden-dropout", "0.1", "--attention-dropout", "0.1",
]  # fmt: skip
LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]),
    "bf16 tp2 pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
                         "--bf16"]),
}  # fmt: skip


@pytest.fixture
def threads():
    """More than one thread in every operator, and no deterministic mode left behind."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


@pytest.mark.ci
def test_two_runs_with_threads_are_equal(threads, tmp_path) -> None:
    found = []
    for name, flags in (("a", []), ("b", []), ("c", ["--deterministic"])):
        saving = ["--save", str(tmp_path / name), "--save-interval", "9"]
        run = alone(*WIDE, *flags, *saving)
        assert run.rc == 0, run.err
        assert torch.are_deterministic_algorithms_enabled() == (name == "c")
        losses = [record.loss.hex() for record in steps(tmp_path / name)]
        found.append((run.state_hash, losses, curve(steps(tmp_path / name))))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0][1])) == 4


@pytest.mark.ci
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_parallel_runs_are_equal(layout, tmp_path) -> None:
    ranks, flags = LAYOUTS[layout]
    command = argv(*WIDE, *flags, "--deterministic-mode")
    running = [
        start(ranks, with_flags(command, "--save", str(tmp_path / name), "--save-interval", "9"))
        for name in ("a", "b")
    ]
    found = []
    for name, run in zip(("a", "b"), running, strict=True):
        ended = run.wait(120)
        assert {rank.rc for rank in ended} == {0}, [rank.err for rank in ended]
        hashes = [line for line in ended[0].out.splitlines() if "state hash" in line]
        found.append((hashes, curve(steps(tmp_path / name))))
    assert len(found[0][0]) == 1 and found[0] == found[1]
