"""One side of a comparison of two commits: trains steps of a tree's own benchmark when it is told to.

    python benchmarks/serve_steps.py TREE KIND RANK PORT

TREE is the checkout whose `benchmarks` and `megatron_lite` are taken; this file may be of another one.
Each line "CONTESTANT FIRST COUNT" on stdin is answered by one line of JSON: wall and processor
seconds per step, and the last loss.  What a tree must have for it: in benchmarks/bench_train.py
`our_run`, `batch_of`, `train_step`; in benchmarks/bench_parallel.py `OURS`, `our_step`, `batch`, `RANKS`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable

Step = Callable[[int], float]
"""A training step on the batch of this number; its loss."""


def train_steps() -> dict[str, Step]:
    """The one-process benchmark: fp32 and bf16."""
    from benchmarks import bench_train as bench

    def contestant(*flags: str) -> Step:
        run = bench.our_run(*flags)
        return lambda number: float(
            bench.train_step(run, [bench.batch_of(number)], lr=1e-5, weight_decay=0.1).loss
        )

    return {"fp32": contestant(), "bf16": contestant("--bf16")}


def parallel_steps(rank: int, port: int) -> dict[str, Step]:
    """The layouts on two processes; collective over them."""
    import torch.distributed as dist

    from benchmarks import bench_parallel as bench

    store = dist.TCPStore("127.0.0.1", port, bench.RANKS, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=bench.RANKS)

    def contestant(asked: tuple[int, str]) -> Step:
        step = bench.our_step(*asked, rank)
        return lambda number: float(step(bench.batch(number)))

    return {name: contestant(asked) for name, asked in bench.OURS.items()}


def main(tree: str, kind: str, rank: str, port: str) -> int:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a tree prints is not an answer
    sys.path[0] = tree
    warnings.filterwarnings("ignore")
    import torch

    torch.manual_seed(0)
    if kind == "train":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1)
        steps = train_steps()
    else:
        torch.set_num_threads(1)
        steps = parallel_steps(int(rank), int(port))
    print(json.dumps(list(steps)), file=answers)
    for line in sys.stdin:
        name, first, count = line.rstrip("\n").rsplit(" ", 2)
        loss, began, used = 0.0, time.perf_counter(), time.process_time()
        for number in range(int(first), int(first) + int(count)):
            loss = steps[name](number)
        wall, cpu = time.perf_counter() - began, time.process_time() - used
        print(json.dumps([wall / int(count), cpu / int(count), loss]), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
