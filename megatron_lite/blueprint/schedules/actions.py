"""The vocabulary of pipeline schedules: what a rank does with one stage and one micro batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from megatron_lite.blueprint.stages import Placement


class ScheduleError(ValueError):
    """A schedule that cannot be carried out as it stands: a bug of its generator."""


class Op(str, Enum):
    """What to do; the values are the text form of torch.distributed.pipelining."""

    F = "F"
    """Forward of a stage."""
    B = "B"
    """Whole backward."""
    I = "I"  # noqa: E741 - torch's name
    """Backward for the input only: dgrad (zero bubble)."""
    W = "W"
    """Backward for the weights only: wgrad (zero bubble)."""
    SEND_F = "SEND_F"
    """Activation to stage + 1."""
    RECV_F = "RECV_F"
    """Activation from stage - 1."""
    SEND_B = "SEND_B"
    """Gradient to stage - 1."""
    RECV_B = "RECV_B"
    """Gradient from stage + 1."""
    REDUCE = "REDUCE_GRAD"
    """The stage's last backward comes next: gradients may be reduced as they become ready."""

    __hash__ = str.__hash__  # Enum's own is Python code, and every set of actions calls it


COMPUTE = frozenset({Op.F, Op.B, Op.I, Op.W})
SENDS = frozenset({Op.SEND_F, Op.SEND_B})
MESSAGES = SENDS | {Op.RECV_F, Op.RECV_B}


class Action(NamedTuple):
    """One thing a rank does; written 2F0: forward of stage 2 on micro batch 0."""

    op: Op
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action written as `text`, e.g. 1SEND_B3."""
        match = re.fullmatch(r"(\d+)([A-Z_]+)(\d+)", text)
        if match is None or match[2] not in {op.value for op in Op}:
            raise ScheduleError(f"{text!r} is not an action such as 2F0 or 1SEND_B3")
        return cls(Op(match[2]), int(match[1]), int(match[3]))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Compute only: lists[r] is what pp rank r does in order; placement[stage] is its pp rank."""

    lists: tuple[tuple[Action, ...], ...]
    placement: Placement


Generator = Callable[[Placement, int], Schedule]
"""(placement, number of micro batches) -> Schedule; a pure function."""

ActionGroup = tuple[Action, ...]
"""One compute action, one REDUCE, or the sends and receives that meet at one point."""

Lowered = tuple[tuple[ActionGroup, ...], ...]
"""lowered[r] is the list of groups of pp rank r."""
