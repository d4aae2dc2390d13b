"""Parallel equals serial: how a layout is trained for a few steps and compared with one process.

    loss            every step, |a - b| / |b|: 10 SGD steps, then 5 of Adam from anew, or of what
                    the layout's settings say
    gradient norm   of the SGD steps, likewise
    gradients       of step 1, all tensors in canonical order, |a - b| / |b| in the L2 norm
    parameters      after 10 SGD steps, likewise

Under Adam a parameter whose gradient is mathematically zero (the key bias) takes full steps of
rounding noise: after 5 steps norms differ by 1e-4 where they differ by 2e-7 under SGD.  So only
losses are compared under Adam.  Masks are ragged
and hidden dropout is 0.1, so that token counts and random numbers must agree as well.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_lite.config.rules import table as rules
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.engines.base import Update
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.parallel.shard import NamedSlice
from megatron_lite.train.assemble import assemble
from megatron_lite.train.run import Run
from megatron_lite.train.step import train_step
from tests.parity.kinds import Layout
from tests.support.engines import counted
from tests.support.spawn import spawn
from tests.support.tiny import context, draw, make_batches, tiny_config

SGD_STEPS, ADAM_STEPS = 10, 5
ALWAYS = {"model__hidden_dropout": 0.1}
SGD = {"optim__optimizer": "sgd", "optim__clip_grad": 0.0}

Part = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]
"""name, global shape, offset, values of one rank's slice."""


@dataclass
class Curve:
    """What one rank saw."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: list[Part] = field(default_factory=list)
    parameters: list[Part] = field(default_factory=list)


def train_layout(
    rank: int, ranks: int, engine: str, changes: dict[str, Any], compile_by: str | None = None
) -> Curve:
    """The curve of one rank: SGD, then Adam; its pieces compiled by a backend of torch.compile."""
    torch.set_num_threads(1)
    curve = Curve()
    changes = changes | {"parallel__engine": engine}
    if compile_by is not None:
        changes |= {"precision__torch_compile": "on"}
    plain = {name: value for name, value in changes.items() if not name.startswith("optim__")}
    for config, steps, keep in (
        (tiny_config(**plain | SGD), SGD_STEPS, True),
        (tiny_config(**changes), ADAM_STEPS, False),
    ):
        compiler = Compiler(compile_by or "none")
        _train(rank, ranks, config, steps, curve, compiler, keep=keep)
        assert compiler.failure is None
        assert bool(compiler.pieces) == (compile_by is not None)
    return curve


def _train(
    rank: int, ranks: int, config: RunConfig, steps: int, curve: Curve, compiler: Compiler,
    *, keep: bool,
) -> None:  # fmt: skip
    rules.check_config(config, ranks)
    blueprint = draw(config, ranks)
    run = assemble(config, blueprint, context(blueprint, rank), compiler=compiler)
    first_gradients: list[Part] = []
    if keep:
        _record_gradients(run, first_gradients)
    lr = 0.05 if keep else 1e-2
    for step in range(steps):
        run.progress.step = step
        batches = make_batches(config, blueprint, run.ctx.dp.rank, step, ragged=True)
        result = train_step(run, batches, lr=lr, weight_decay=0.1)
        assert not result.update.skipped, "an fp16 step without an update compares nothing"
        curve.losses.append(result.loss.item())
        if keep:
            curve.grad_norms.append(result.update.grad_norm.item())
    if keep:
        curve.gradients = first_gradients
        curve.parameters = [_part(s) for s in counted(run.engine.weights(owned=True), run.ctx)]


def _part(piece: NamedSlice) -> Part:
    return piece.name, piece.shape, piece.offset, piece.data.float().numpy().copy()


def _record_gradients(run: Run, into: list[Part]) -> None:
    """Copy the reduced gradients of the first update, as the update rule will see them."""
    apply = run.engine.apply

    def record(norm: Tensor, **rates: Any) -> Update:
        if not into:
            into.extend(_part(s) for s in counted(run.engine.gradients(owned=True), run.ctx))
        return apply(norm, **rates)

    run.engine.apply = record  # type: ignore[method-assign, assignment]


def _whole(parts: list[Part]) -> dict[str, np.ndarray]:
    """Slices of all ranks -> global tensors."""
    whole: dict[str, np.ndarray] = {}
    for name, shape, offset, values in parts:
        target = whole.setdefault(name, np.full(shape, np.nan, dtype=np.float32))
        target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return whole


@functools.cache
def _serial(engine: str, shared: tuple[tuple[str, Any], ...]) -> Curve:
    (curve,) = spawn(train_layout, 1, engine, ALWAYS | dict(shared))
    return curve


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of a layout from the serial run."""

    loss: float
    grad_norm: float
    gradients: float
    parameters: float

    @property
    def largest(self) -> float:
        """The largest of them."""
        return max(dataclasses.astuple(self))


def compare(layout: Layout, engine: str = "zero", compile_by: str | None = None) -> Difference:
    """Train the layout and the serial run of the same settings; every rank's curve is compared.

    compile_by: what compiles the layout's pieces; nothing does the serial run's.
    """
    shared = ALWAYS | layout.shared
    reference = _serial(engine, tuple(sorted(layout.shared.items())))
    # eight ranks on two busy cores
    curves = spawn(
        train_layout, layout.ranks, engine, shared | layout.changes, compile_by, deadline=600.0
    )
    return Difference(
        loss=max(_relative(c.losses, reference.losses) for c in curves),
        grad_norm=max(_relative(c.grad_norms, reference.grad_norms) for c in curves),
        gradients=_largest(curves, [reference], "gradients"),
        parameters=_largest(curves, [reference], "parameters"),
    )


def _relative(ours: list[float], serial: list[float]) -> float:
    assert len(ours) == len(serial)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, serial, strict=True))


def _largest(curves: list[Curve], reference: list[Curve], what: str) -> float:
    ours = _whole([part for curve in curves for part in getattr(curve, what)])
    serial = _whole([part for curve in reference for part in getattr(curve, what)])
    assert ours.keys() == serial.keys(), ours.keys() ^ serial.keys()
    scale = max(float(np.linalg.norm(values)) for values in serial.values())
    # a tensor that is zero but for rounding (the key bias' gradient) is held against the largest
    return max(
        float(np.linalg.norm(ours[name] - values))
        / max(float(np.linalg.norm(values)), 1e-3 * scale)
        for name, values in serial.items()
    )


def passes(layout: Layout, difference: Difference) -> bool:
    """Whether every difference is within the layout's tolerance."""
    limits = dataclasses.asdict(layout.tolerance)
    return all(value <= limits[name] for name, value in dataclasses.asdict(difference).items())
