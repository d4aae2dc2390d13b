"""The curvature that Sophia-G divides by: a second pass with drawn labels, its gradients' squares kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_lite.blueprint.optimizers import CURVATURE, FIRST_MOMENT, State
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.engines.base import Engine
from megatron_lite.kernels.random import key
from megatron_lite.optim.sophia import count_below, observe
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.train.health.guards import StepNumbers
from megatron_lite.train.objectives.drawn_labels import DrawnLabels
from megatron_lite.train.run import Run
from megatron_lite.train.second_pass import SecondPass, Used

_NAME = "curvature"
"""Before the names of its numbers."""


def add_curvature(run: Run, config: RunConfig) -> None:
    """Give a run the pass, where a rule of its optimizer needs it."""
    every = run.blueprint.curvature_interval
    if not every:
        return
    curvature = Curvature(run, config.optim, config.train.seed)
    run.second_passes.append(
        SecondPass(
            _NAME,
            curvature.objective,
            every,
            curvature.use,
            curvature.measure,
            run.blueprint.curvature_microbatches,
        )
    )


class _Place(NamedTuple):
    """Rows of a canonical tensor, by which its gradient and its states are found."""

    name: str
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Curvature:
    """What the second pass of a run with Sophia-G does."""

    run: Run
    optim: OptimConfig
    seed: int

    def objective(self, step: int) -> DrawnLabels:
        """With labels that nothing but seed, step and place decides: a resumed run draws the same."""
        made = torch.tensor(key(self.seed, step, _NAME))
        device = self.run.ctx.device
        if device.type == "cuda":
            made = made.pin_memory()
        return DrawnLabels(key=made.to(device, non_blocking=True))

    def use(self, engine: Engine, seen: StepNumbers, weight: float) -> Used:
        """Take the squares in, unless they are no numbers or of nothing."""
        if seen.empty:
            return Used()
        if not seen.finite:
            return Used(
                warning=f"the gradient of drawn labels is not finite (loss {seen.loss:g}, gradient "
                f"norm {seen.grad_norm:g}): the curvature stays as it was"
            )
        hessians = _of(CURVATURE, engine, owned=False)
        found = {
            _Place(piece.name, piece.offset): piece.data for piece in engine.gradients(owned=False)
        }
        if hessians:
            gradients = [found[place].to(h) for place, h in hessians.items()]  # on its device
            tokens = weight * self._clipped(seen.grad_norm) ** 2
            observe([*hessians.values()], gradients, beta2=self.optim.sophia_beta2, tokens=tokens)
        return Used({"grad_norm": seen.grad_norm})

    def _clipped(self, norm: float) -> float:
        """The factor on a gradient of this norm."""
        largest = self.optim.sophia_clip_hessian_grad
        return min(1.0, largest / (norm + 1e-6)) if largest else 1.0

    def measure(self, engine: Engine) -> dict[str, Tensor]:
        """The share of coordinates whose step is not clipped.  Collective over the world."""
        counted = torch.zeros(2, dtype=torch.float64, device=self.run.ctx.device)
        momenta = _of(FIRST_MOMENT, engine, owned=True)
        for place, hessian in _of(CURVATURE, engine, owned=True).items():
            counted[0] += count_below(momenta[place], hessian, rho=self.optim.sophia_rho)
            counted[1] += hessian.numel()
        below, number = all_reduce(counted, self.run.ctx.world)
        return {"win_rate": below / number}


def _of(state: State, engine: Engine, *, owned: bool) -> dict[_Place, Tensor]:
    """A state of all tensors that this rank updates; owned: of its primary copies."""
    prefix = f"{state.name}."
    return {
        _Place(piece.name.removeprefix(prefix), piece.offset): piece.data
        for piece in engine.state(owned=owned)
        if piece.name.startswith(prefix)
    }
