"""The planned memory beside what one real training step keeps alive on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags import parse
from megatron_lite.planner.memory import Asked, memory
from megatron_lite.train.assemble import Run, assemble
from megatron_lite.train.step import train_step
from tests.support.tiny import context, make_batches

MODEL = (
    "--num-layers 8 --hidden-size 768 --num-attention-heads 8 --vocab-size 8000 --seq-length 256 "
    "--micro-batch-size 8 --global-batch-size 16 --lr 1e-4 --train-iters 1 --mock-data"
)
NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


class Alive(TorchDispatchMode):
    """Bytes of all storages that live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self.sizes:
            return
        self.sizes[name] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, name)

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


def see_static(alive: Alive, run: Run) -> None:
    """What exists before the step: weights, masters, moments, accumulators."""
    for local in run.parameters:
        alive.see(local.parameter.data)
    for part in run.engine.state(owned=False):
        alive.see(part.data)
    for _, accumulator in run.engine.accumulators():
        alive.see(accumulator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--bf16",
        f"--bf16 {NO_DROPOUT}",
        f"--bf16 {NO_DROPOUT} {FULL}",
        f"--bf16 {NO_DROPOUT} --swiglu --normalization RMSNorm --position-embedding-type rope",
        "--recompute-granularity selective",
    ],
)
def test_the_plan_is_within_a_tenth_of_a_real_step(flags: str) -> None:
    """63 million parameters; the same kinds by the same rules, no measured number goes in."""
    config = parse(f"{MODEL} {flags}".split()).config
    blueprint = draw_up(config, 1)
    assert blueprint.num_parameters > 50e6
    run = assemble(config, blueprint, context(blueprint, 0))
    batches = make_batches(config, blueprint, 0, 0)
    alive = Alive()
    see_static(alive, run)
    with alive:
        train_step(run, batches, lr=1e-4, weight_decay=0.01)
    asked = Asked(
        config.parallel, config.precision, config.optim, config.train.micro_batch_size, on_gpu=False
    )
    (planned,) = memory(blueprint, asked)
    assert planned.allocated == pytest.approx(alive.peak, rel=0.10)
