"""The comparison as text: a line per layout on the terminal, docs/parity.md as a whole."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.parity.compare import ADAM_STEPS, SGD_STEPS, Difference, passes
from tests.parity.kinds import EXACT, HALF, Layout, Tolerance

Found = tuple[Layout, Difference]
TEMPLATE = Path(__file__).with_suffix(".md")


def row(entry: Layout, difference: Difference) -> str:
    """One line of the terminal."""
    return (
        f"{entry.name:42s} {'ok' if passes(entry, difference) else 'FAIL'} {difference.largest:.1e}   "
        f"loss {difference.loss:.1e}  grad norm {difference.grad_norm:.1e}  "
        f"gradients {difference.gradients:.1e}  parameters {difference.parameters:.1e}"
    )


def document(found: Sequence[Found], wrong: Sequence[Found]) -> str:
    """docs/parity.md: what was compared, how far apart it was, and how far apart a mistake is."""
    exact = [each for each in found if each[0].tolerance == EXACT]
    half = [each for each in found if each[0].tolerance == HALF]
    assert len(exact) + len(half) == len(found), "a tolerance that the document does not name"
    return TEMPLATE.read_text(encoding="utf-8").format(
        equal=sum(passes(*each) for each in found),
        count=len(found),
        largest=_short(max((difference.loss for _, difference in exact), default=0.0)),
        sgd=SGD_STEPS,
        adam=ADAM_STEPS,
        torch=torch.__version__,
        python=platform.python_version(),
        processors=os.cpu_count(),
        machine=platform.machine(),
        ranks=max(entry.ranks for entry, _ in found),
        exact_limits=_limits(EXACT),
        exact=_table(exact),
        half_limits=_limits(HALF),
        half=_table(half),
        wrong=_table(wrong),
    )


def _limits(limits: Tolerance) -> str:
    return (
        f"Limits: loss {_short(limits.loss)}, gradient norm {_short(limits.grad_norm)}, "
        f"gradients {_short(limits.gradients)}, parameters {_short(limits.parameters)}."
    )


def _table(found: Sequence[Found]) -> str:
    head = ["layout", "ranks", "loss", "gradient norm", "gradients", "parameters", "equal"]
    rows = [
        [entry.name, str(entry.ranks), _short(d.loss), _short(d.grad_norm), _short(d.gradients),
         _short(d.parameters), "yes" if passes(entry, d) else "**no**"]
        for entry, d in found
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"
