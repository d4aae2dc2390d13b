"""The grid in numbers: mean and spread over the seeds, what Sophia-G's loss differs from AdamW's, a picture.

A run lies in OUT/runs/OPTIMIZER_RATE_SEED.  Spread: standard deviation over the seeds; a difference is taken
between runs of the same rate and seed, which have the same first weights and read the same samples.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.telemetry.record import EvaluationRecord, StepRecord, read_metrics

NAMES = {"adam": "AdamW", "sophiag": "Sophia-G"}
COLOURS = {"adam": "#2f6db3", "sophiag": "#d9722b"}
PARTS = {"val": "held out", "seen": "of the training text"}
LEAST = 20_000
"""Tokens that a loss must be of."""
WINS = "curvature/win_rate"
"""Share of the coordinates whose step Sophia-G does not clip, as the trainer logs it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One point of the grid: losses by part, and those held out along the training."""

    optimizer: str
    rate: float
    seed: int
    folder: Path
    losses: dict[str, float]
    steps: tuple[int, ...]
    curve: tuple[float, ...]
    wins: tuple[float, ...]
    learned: bool

    @property
    def key(self) -> tuple[float, int]:
        """What two runs that are compared share."""
        return self.rate, self.seed


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean and the standard deviation around it; of one value the latter is unknown."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan
        )

    def text(self, form: str) -> str:
        """`3.512 ± 0.004`."""
        around = "" if math.isnan(self.deviation) else f" ± {self.deviation:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{around}"


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="verdict.py", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder that run.sh has written to")
    return parser.parse_args()


def read_run(folder: Path) -> Run:
    """A run that is over; DataError where a loss is of too few tokens."""
    optimizer, rate, seed = folder.name.split("_")
    measured: dict[str, Any] = json.loads((folder / "losses.json").read_bytes())
    for result in measured["results"]:
        if result["tokens"] < LEAST:
            raise DataError(
                f"{folder}: a loss over {result['tokens']:,} tokens says little; measure {LEAST:,} or more"
            )
    records = read_metrics(folder / "metrics.jsonl")
    along = [r for r in records if isinstance(r, EvaluationRecord) and not r.final]
    trained = [r for r in records if isinstance(r, StepRecord)]
    steps = [r.loss for r in trained]
    return Run(
        optimizer, float(rate), int(seed), folder,
        {Path(r["file"]).name: float(r["loss"]) for r in measured["results"]},
        tuple(r.iteration for r in along), tuple(r.loss for r in along),
        tuple(r.metrics[WINS] for r in trained if WINS in r.metrics),
        learned=all(map(math.isfinite, steps)) and steps[-1] < steps[0],
    )  # fmt: skip


def differences(runs: Sequence[Run], part: str) -> dict[float, Spread]:
    """Rate -> Sophia-G's loss over AdamW's less one, in percent."""
    ours = {run.key: run.losses[part] for run in runs if run.optimizer == "sophiag"}
    theirs = {run.key: run.losses[part] for run in runs if run.optimizer == "adam"}
    found: dict[float, list[float]] = {}
    for key in sorted(ours.keys() & theirs.keys()):
        found.setdefault(key[0], []).append(100 * (ours[key] / theirs[key] - 1))
    return {rate: Spread.of(values) for rate, values in found.items()}


def table(runs: Sequence[Run], part: str) -> Iterator[str]:
    """Markdown: a row for each rate, a column for each optimizer, what they differ by."""
    names = [name for name in NAMES if any(run.optimizer == name for run in runs)]
    apart = differences(runs, part)
    yield f"| `--lr` | {' | '.join(NAMES[name] for name in names)} | difference in % |"
    yield f"|---|{'---|' * len(names)}---|"
    for rate in sorted({run.rate for run in runs}):
        cells = [
            Spread.of(values).text(".4f") if values else "-"
            for name in names
            for values in [[r.losses[part] for r in runs if (r.optimizer, r.rate) == (name, rate)]]
        ]
        differs = apart[rate].text("+.2f") if rate in apart else "-"
        yield f"| {rate:g} | {' | '.join(cells)} | {differs} |"
    best = {name: best_rate(runs, name) for name in names}
    if len(best) == 2:
        by_seed = {
            name: {r.seed: r.losses[part] for r in runs if (r.optimizer, r.rate) == (name, rate)}
            for name, rate in best.items()
        }
        seeds = by_seed["adam"].keys() & by_seed["sophiag"].keys()
        last = [100 * (by_seed["sophiag"][s] / by_seed["adam"][s] - 1) for s in sorted(seeds)]
        each = " | ".join(f"at {best[name]:g}" for name in names)
        yield f"| each at its best | {each} | {Spread.of(last).text('+.2f')} |"


def win_rates(runs: Sequence[Run]) -> Iterator[str]:
    """How much of Sophia-G's steps the curvature decides, over the second half of each run."""
    for rate in sorted({run.rate for run in runs if run.wins}):
        halves = [r.wins[len(r.wins) // 2 :] for r in runs if r.rate == rate and r.wins]
        mean = statistics.fmean(statistics.fmean(half) for half in halves)
        yield f"Sophia-G at {rate:g}: {mean:.1%} of its coordinates are not clipped"


def best_rate(runs: Sequence[Run], optimizer: str) -> float:
    """The one with the lowest mean loss of what was held out."""
    own = [run for run in runs if run.optimizer == optimizer]
    return min(
        {run.rate for run in own},
        key=lambda rate: statistics.fmean(r.losses["val"] for r in own if r.rate == rate),
    )


def draw(runs: Sequence[Run], path: Path) -> None:
    """Held-out loss along the training, each at its best rate, and at the end over the rates."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(
            figsize=(9.0, 3.4), dpi=100, layout="constrained"
        )
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    along, over = figure.subplots(1, 2)
    for name in NAMES:
        own = [run for run in runs if run.optimizer == name]
        if not own:
            continue
        rate, colour = best_rate(runs, name), COLOURS[name]
        curves = [run.curve for run in own if run.rate == rate]
        points = list(zip(*curves, strict=True))
        steps = own[0].steps
        along.plot(steps, [statistics.fmean(at) for at in points], color=colour,
                   label=f"{NAMES[name]}, lr {rate:g}")  # fmt: skip
        along.fill_between(
            steps, list(map(min, points)), list(map(max, points)), color=colour, alpha=0.25
        )
        rates = sorted({run.rate for run in own})
        ends = [Spread.of([run.losses["val"] for run in own if run.rate == r]) for r in rates]
        over.errorbar(rates, [end.mean for end in ends], [end.deviation for end in ends], color=colour,
                      marker="o", capsize=3, label=NAMES[name])  # fmt: skip
    along.set(xlabel="iteration", ylabel="held-out loss (nats per token)")
    over.set(xlabel="learning rate", xscale="log", ylabel="held-out loss at the end")
    rates = sorted({run.rate for run in runs})
    over.set_xticks(rates, [f"{rate:g}" for rate in rates])
    over.set_xticks([], minor=True)
    for axes in (along, over):
        axes.legend(frameon=False)
        axes.grid(color="#e3e6ea")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    print(f"picture: {path}")


def main() -> int:
    out = parse_arguments().out
    runs = [read_run(path.parent) for path in sorted(out.glob("runs/*/losses.json"))]
    if not runs:
        raise DataError(f"{out}/runs holds no run that is over: start run.sh")
    lines = []
    for part, name in PARTS.items():
        lines += [f"Loss {name}, mean ± standard deviation over {len({r.seed for r in runs})} seeds:", "",
                  *table(runs, part), ""]  # fmt: skip
    lines += win_rates(runs)
    print("\n".join(lines))
    write_atomically(out / "table.md", "\n".join(lines).encode(), Disk())
    draw(runs, out / "curves.png")
    best = min(runs, key=lambda run: run.losses["val"])
    write_atomically(out / "best", f"{best.folder}\n".encode(), Disk())
    lost = [str(run.folder) for run in runs if not run.learned]
    print(f"runs that have not learned: {len(lost)} of {len(runs)} {' '.join(lost)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(run_tool(main, results=True))
