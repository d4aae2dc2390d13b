"""What a real training step keeps alive on a rank, by kind, beside what the planner says it does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.memory import PlanInputs, memory
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import train_step
from tests.support.tiny import context, make_batches

STATIC = ("weights", "gradients", "masters", "moments")


class Alive(TorchDispatchMode):
    """Bytes of all storages that live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: torch.Tensor) -> int:
        """Count a tensor's storage, once; returns its bytes if it is new."""
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self.sizes:
            return 0
        self.sizes[name] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, name)
        return storage.nbytes()

    def _gone(self, name: int) -> None:
        self.now -= self.sizes.pop(name)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return made


def see_static(alive: Alive, run: Run) -> dict[str, int]:
    """What exists before the step, counted by kind."""
    found = dict.fromkeys(STATIC, 0)
    for local in run.parameters:
        found["weights"] += alive.see(local.parameter.data)
    for part in run.engine.state(owned=False):
        found["masters" if part.name.startswith("master.") else "moments"] += alive.see(part.data)
    for _, accumulator in run.engine.accumulators():
        found["gradients"] += alive.see(accumulator)
    return found


@dataclass(frozen=True, slots=True)
class Compared:
    """Bytes of one rank: (planned, measured) of each kind; working is all that is not static."""

    pp_rank: int
    static: dict[str, tuple[float, int]]
    working: tuple[float, int]
    total: tuple[float, int]

    def errors(self) -> dict[str, float]:
        """Kind -> planned over measured, minus one."""
        pairs = {**self.static, "working": self.working, "total": self.total}
        return {kind: planned / real - 1 for kind, (planned, real) in pairs.items() if real}


def compare(rank: int, ranks: int, flags: str) -> Compared:
    """One step of this rank under the counter; collective where ranks > 1."""
    config = parse(flags.split()).config
    blueprint = draw_up(config, ranks)
    at = blueprint.grid.coords(rank)
    run = assemble(config, blueprint, context(blueprint, rank))
    batches = make_batches(config, blueprint, at.dp, 0)
    alive = Alive()
    static = see_static(alive, run)
    before = alive.now
    with alive:
        train_step(run, batches, lr=1e-4, weight_decay=0.01)
    asked = PlanInputs(
        config.parallel, config.precision, config.train.micro_batch_size, on_gpu=False
    )
    planned = memory(blueprint, asked)[at.pp]
    return Compared(
        pp_rank=at.pp,
        static={kind: (planned.kinds[kind], static[kind]) for kind in STATIC},
        working=(
            planned.allocated - sum(planned.kinds[kind] for kind in STATIC),
            alive.peak - before,
        ),
        total=(planned.allocated, alive.peak),
    )
