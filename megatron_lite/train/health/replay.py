"""Replay: a step run again from the same weights finds the first bad value and tells a fault from a bug.

Nothing has been updated when a guard asks for it, and the random generator is counter-based, so the second run
computes what the first did.  If it does not, the machine is to blame; if it does, the data or the
code.  While it runs, every layer's output and every micro batch's gradient are looked at, and no
gradient is summed over ranks, so that the rank is known, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.pipeline.executor import Executor
from megatron_lite.pipeline.stage import MicroBatch, Scored, Stage
from megatron_lite.train.health.culprit import (
    GRADIENT,
    HEAD,
    OUTPUT,
    SUMMED,
    WEIGHT,
    NonFiniteOrigin,
    bad_tensors,
    deepest,
    name_ranks,
    name_samples,
    position,
)
from megatron_lite.train.run import Run


@dataclass(slots=True)
class Watched:
    """What this rank saw during a replay: its first suspect."""

    run: Run
    first: NonFiniteOrigin | None = None
    samples: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    microbatch: int = 0
    _hooks_fired: int = 0
    _bad_gradients: set[str] = field(default_factory=set)

    def note(self, order: tuple[int, ...], text: str) -> None:
        """Keep it if nothing came before it."""
        suspect = NonFiniteOrigin(order, text)
        if self.first is None or suspect < self.first:
            self.first = suspect

    def look_at_weights(self) -> None:
        """A weight that is not finite explains everything after it."""
        run = self.run
        bad = bad_tensors(chain(run.engine.weights(owned=False), run.bits()))
        if bad:
            name = min(bad, key=position)
            self.note((WEIGHT, position(name)), f"the weight {name} on rank {run.ctx.rank} itself "
                      f"is not finite (of {len(bad)} such)")  # fmt: skip

    def look_at_state(self) -> None:
        """Masters and moments, too: what a checkpoint brings besides weights."""
        bad = bad_tensors(self.run.engine.state(owned=False))
        if bad:
            self.note((WEIGHT, HEAD + 1), f"{bad[0]} on rank {self.run.ctx.rank} is not finite "
                      f"(of {len(bad)} such)")  # fmt: skip

    def look_at_output(self, name: str, output: object) -> None:
        """After a module's forward."""
        self._hooks_fired += 1
        made = output if isinstance(output, tuple) else (output,)  # a norm that adds first: both
        if any(isinstance(part, Tensor) and not torch.isfinite(part).all() for part in made):
            self.note(
                (OUTPUT, self.microbatch, position(name), self._hooks_fired),
                f"the output of {name} on rank {self.run.ctx.rank} for {name_samples(self.samples)} "
                "is the first that is not finite",
            )

    def look_at_loss(self, scored: Scored) -> None:
        """After the objective."""
        if not torch.isfinite(scored.total):
            self.note(
                (OUTPUT, self.microbatch, HEAD, 1 << 40),  # behind every hook's number
                f"the loss of {name_samples(self.samples)} on rank {self.run.ctx.rank} is the first "
                "value that is not finite, the last layer's output still is",
            )

    def look_at_gradients(self) -> None:
        """After a micro batch's backward: backward comes from the head, so the deepest is the first."""
        gradients = list(self.run.engine.gradients(owned=False))
        bad = bad_tensors(gradients)
        new = [name for name in bad if name not in self._bad_gradients]
        if new:
            name = deepest(new)
            place = [piece.name for piece in gradients].index(name)
            self.note(
                (GRADIENT, self.microbatch, -position(name), -place),
                f"the gradient of {name} on rank {self.run.ctx.rank}, from "
                f"{name_samples(self.samples)}, is the first that is not finite "
                f"(of {len(bad)} there)",
            )
        self._bad_gradients.update(bad)

    @contextmanager
    def hooks(self, stages: Sequence[Stage]) -> Iterator[None]:
        """Look at the output of every layer of these stages."""
        handles = []
        for stage in stages:
            for name, module in stage.module.named_modules():
                # the stage itself has no name, and its output is its last layer's
                if name and not isinstance(module, nn.ModuleDict):
                    handles.append(module.register_forward_hook(self._hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        return lambda module, inputs, output: self.look_at_output(name, output)


@dataclass(slots=True)
class WatchedStage(Stage):
    """A stage, with its own module and loss, whose results are watched."""

    watched: Watched = field(kw_only=True)
    _samples: dict[int, Tensor] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, stage: Stage, watched: Watched) -> WatchedStage:
        """The same stage, watched."""
        return cls(**{f.name: getattr(stage, f.name) for f in fields(Stage)}, watched=watched)

    def forward(
        self, microbatch: int, batch: MicroBatch, received: Tensor | None, scale: Tensor | None
    ) -> Tensor | None:
        """As Stage.forward."""
        # kept by micro batch: a pipeline runs others between a forward and its backward
        self._samples[microbatch] = batch.positions.samples
        self._begin(microbatch)
        y = Stage.forward(self, microbatch, batch, received, scale)
        if self.is_last:
            self.watched.look_at_loss(self.totals[-1])
        return y

    def backward(
        self, microbatch: int, received: Tensor | None, *, defer_wgrads: bool = False
    ) -> Tensor | None:
        """As Stage.backward."""
        self._begin(microbatch)
        dx = Stage.backward(self, microbatch, received, defer_wgrads=defer_wgrads)
        self.watched.look_at_gradients()
        return dx

    def weight_gradients(self, microbatch: int) -> None:
        """As Stage.weight_gradients."""
        self._begin(microbatch)
        Stage.weight_gradients(self, microbatch)
        self.watched.look_at_gradients()

    def _begin(self, microbatch: int) -> None:
        self.watched.microbatch, self.watched.samples = microbatch, self._samples[microbatch]


@contextmanager
def watched_pipeline(run: Run) -> Iterator[tuple[Executor, Watched]]:
    """An executor over the same stages that finds this rank's first suspect and reduces nothing."""
    watched = Watched(run)
    run.engine.wait_for_param_gather()
    watched.look_at_weights()
    stages: dict[int, Stage] = {
        n: WatchedStage.of(stage, watched) for n, stage in run.pipeline.stages.items()
    }
    # unreduced: a sum over replicas would spread a nan to all of them and hide whose it was
    with watched.hooks(list(stages.values())), run.engine.unreduced():
        yield replace(run.pipeline, stages=stages), watched


def summed_suspect(run: Run, finite: Tensor) -> NonFiniteOrigin | None:
    """Of an attempt whose gradients were already summed: the parameter, and the ranks of the sum.

    finite: which of them were, as squared_norm() says; they themselves may be gone.
    """
    names = [piece.name for piece in run.engine.gradients(owned=False)]
    bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
    if not bad:
        return None
    name = deepest(bad)
    ranks = run.ctx.replicas.ranks if run.ctx.replicas.size > 1 else (run.ctx.rank,)
    return NonFiniteOrigin(
        (SUMMED, -position(name)),
        f"the gradient of {name}, summed over {name_ranks(ranks)}, is not finite "
        f"(of {len(bad)} such)",
    )


def changed_suspect(
    run: Run, first: Sequence[Scored], second: Sequence[Scored], micro: Sequence[Any]
) -> NonFiniteOrigin | None:
    """The first micro batch whose loss differed the second time, on the last stage's ranks."""
    for number, (a, b, batch) in enumerate(zip(first, second, micro, strict=False)):
        before, after = ((s.total / s.count.clamp(min=1)).item() for s in (a, b))
        if repr(before) != repr(after):  # two nan are the same answer, but nan != nan
            return NonFiniteOrigin(
                (OUTPUT, number),
                f"the loss of {name_samples(batch.positions.samples)} on rank {run.ctx.rank} was "
                f"{before:g} and then {after:g}",
            )
    return None
