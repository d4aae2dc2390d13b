"""The pointwise ops of reference.py through torch.compile: one fused kernel instead of several.

Matrix products and attention stay as they are; compiled pieces need no CUDA toolkit (Triton comes
with torch) and on a CPU a C++ compiler.  Each is compiled on its first call, which takes seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


@functools.cache
def _compiled(op: Callable[_P, _R]) -> Callable[_P, _R]:
    return torch.compile(op, dynamic=False)


def compiled(op: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same op, compiled when it is first called: importing the table starts no compiler."""

    @functools.wraps(op)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return _compiled(op)(*args, **kwargs)

    return run
