"""Compiles what stands between two matrix products; what a compiler cannot do runs as it is.

A piece is a row of the kernel table that is `fusible`.  The linear layers around it are no part of
one: how they accumulate, overlap and defer their weight gradients is none of the compiler's business.
One graph serves all layers, steps and masks, since these are told apart by tensors alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import _StopRecomputationError

from megatron_lite.kernels.memoryless import run_fused

MOST_GRAPHS = 64
"""Of one piece: a run's few shapes and number formats, training or not, with dropout or without."""


_NOT_THE_COMPILERS = (torch.OutOfMemoryError, _StopRecomputationError)
"""The second is how torch's checkpoint ends a forward that has made again all it was asked for."""


def warn_on_stderr(line: str) -> None:
    """A warning where nobody else listens."""
    print(f"WARNING: {line}", file=sys.stderr, flush=True)


def _trial(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x) * weight


class Compiler:
    """Compiles pieces by a backend of torch.compile, until one fails: from then on all run without it.

    warn: told of that, once.  failure: why nothing is compiled any more.  pieces: their names.
    """

    def __init__(
        self, backend: str = "inductor", *, warn: Callable[[str], None] = warn_on_stderr
    ) -> None:
        self.backend, self.warn = backend, warn
        self.failure: str | None = None
        self.pieces: list[str] = []
        self._made: dict[Callable[..., Any], Callable[..., Any]] = {}

    def try_on(self, device: torch.device) -> str | None:
        """Compile a small piece, forward and backward: what went wrong, so that it is told at the start."""
        x, weight = (torch.ones(64, device=device, requires_grad=True) for _ in range(2))
        try:
            self._compile(_trial)(x, weight).sum().backward()
        except Exception as error:  # whatever a compiler fails with, no run ends by it
            return in_words(error)
        return None

    def piece(
        self, name: str, run: Callable[..., Any], uncompiled: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """run(...), a function of tensors, compiled when it is first called.

        uncompiled: what takes its place where nothing is compiled any more; run itself by default.
        """
        if name not in self.pieces:
            self.pieces.append(name)
        if run not in self._made:
            self._made[run] = self._piece(name, run, uncompiled or run)
        return self._made[run]

    def give_up(self, failure: str) -> None:
        """From now on nothing is compiled; told once."""
        self.failure = f"{self.backend} failed {failure}"
        self.warn(
            f"--torch-compile: {self.failure}; nothing is compiled from here on, which costs speed alone "
            "- see that a C++ compiler and, on a GPU, Triton work, or say --no-torch-compile"
        )

    def _piece(
        self, name: str, run: Callable[..., Any], uncompiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        compiled: Callable[..., Any] | None = None

        @functools.wraps(run)
        def call(*inputs: Any) -> Any:
            nonlocal compiled
            if inputs[0].is_meta:
                return run_fused(name, run, inputs)
            if self.failure is not None:
                return uncompiled(*inputs)
            try:
                compiled = compiled or self._compile(run)
                return compiled(*inputs)
            except _NOT_THE_COMPILERS:
                raise
            except Exception as error:
                result = uncompiled(*inputs)  # what is not the compiler's fault fails here, too
                self.give_up(f"on {name}: {in_words(error)}")
                return result

        return call

    def _compile(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return compiled(run, self.backend)


def compiled(run: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """run(...) as one graph for each of its shapes, by a compiler that works at the first call."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    # backward, too, at the first call: once autograd runs it, nobody could go back
    torch._functorch.config.force_non_lazy_backward_lowering = True
    options = _alike_everywhere() if backend == "inductor" else None
    return torch.compile(run, backend=backend, dynamic=False, fullgraph=True, options=options)


def in_words(error: Exception) -> str:
    """Type and first line of what went wrong inside."""
    error = getattr(error, "inner_exception", error)
    said = next(
        (line.strip() for line in str(error).splitlines() if line.strip()), "no reason given"
    )
    return f"{type(error).__name__}: {said}"


def _alike_everywhere() -> dict[str, str | int | bool | Callable[..., Any]]:
    """Options by which a kernel adds in one order, wherever and whenever it is tuned.

    What several ranks compute alike would drift apart otherwise, and a resumed run from the first.
    """
    known = hasattr(torch._inductor.config, "deterministic")
    return {"deterministic": True} if known else {}
