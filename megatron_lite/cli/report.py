"""Draw the loss curves of one or several run folders, or sum up their speed (--tgs)."""

from __future__ import annotations

import argparse
import importlib
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extras import how_to_install
from megatron_lite.config.objectives import LM_LOSS
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, write_output
from megatron_lite.telemetry.record import (
    EvaluationRecord,
    StepRecord,
    TelemetryRecord,
    read_metrics,
)
from megatron_lite.telemetry.summary import (
    describe_losses,
    evaluation_records,
    measure_speed,
    smoothed,
    train_records,
)
from megatron_lite.telemetry.writers import METRICS_FILE

COLOURS = ("#2f6db3", "#d9722b", "#3a923a", "#8d5bb8", "#b8434e", "#6b6b6b")
INK = "#33373d"
GRID = "#e3e6ea"
SMOOTH_FROM = 40
"""Curves with fewer points are drawn as they are."""


@dataclass(frozen=True, slots=True)
class Story:
    """One run folder as the drawing needs it."""

    name: str
    colour: str
    steps: list[StepRecord]
    validation: list[EvaluationRecord]
    test: list[EvaluationRecord]

    @property
    def iterations(self) -> list[int]:
        """The steps' numbers, the x axis."""
        return [step.iteration for step in self.steps]

    @property
    def resumed_at(self) -> list[int]:
        """Iterations at which a process took over from a checkpoint."""
        return [step.iteration for step in self.steps[1:] if step.warmup]


def parse_arguments() -> argparse.Namespace:
    """Run folders, and what to make of them."""
    parser = ToolParser(prog="report.py", description=__doc__)
    add = parser.add_argument
    add("run_folder", nargs="+", help="folders with a metrics.jsonl; several are overlaid")
    add("--output", help="the PNG; loss.png in the first run folder by default")
    add("--tgs", action="store_true", help="print the speed after warm-up and draw nothing")
    arguments: argparse.Namespace = parser.parse_args()
    return arguments


def main() -> int:
    """Read, sum up, draw."""
    arguments = parse_arguments()
    folders = [Path(folder) for folder in arguments.run_folder]
    output = Path(arguments.output) if arguments.output else folders[0] / "loss.png"
    if not arguments.tgs:
        if output.suffix != ".png":
            raise ConfigError(f"--output {output}: give a file that ends in .png")
        check_outputs("--output", [output], Disk())
        _matplotlib()
    records = [read_metrics(folder / METRICS_FILE) for folder in folders]
    for folder, of_run in zip(folders, records, strict=True):
        if len(folders) > 1:
            print(f"{folder}:")
        if arguments.tgs:
            print(measure_speed(of_run, source=str(folder / METRICS_FILE)))
        else:
            print("\n".join(describe_losses(of_run)))
    if arguments.tgs:
        return 0
    names = _short_names(folders)
    stories = [
        _story(name, COLOURS[number % len(COLOURS)], of_run)
        for number, (name, of_run) in enumerate(zip(names, records, strict=True))
    ]
    write_output(output, draw(stories), Disk())
    print(f"loss curve: {output}")
    return 0


def draw(stories: list[Story]) -> bytes:
    """Losses on top, learning rate and speed below, as the bytes of a PNG."""
    matplotlib = _matplotlib()
    style = {
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#b9bec5",
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = importlib.import_module("matplotlib.figure").Figure(
            figsize=(9.0, 7.2), dpi=130, layout="constrained"
        )
        loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 1.0, 1.0))
        for story in stories:
            _draw_losses(loss, story, alone=len(stories) == 1)
            rates = [step.learning_rate for step in story.steps]
            rate.plot(story.iterations, rates, color=story.colour, linewidth=1.4)
            _draw_speed(speed, story)
        _finish(figure, loss, rate, speed, stories)
        image = io.BytesIO()
        figure.savefig(image, format="png")
    return image.getvalue()


def _draw_losses(axes: Any, story: Story, *, alone: bool) -> None:
    """Training loss, faint and smoothed where there are many points; validation; test."""
    x, losses = story.iterations, [step.loss for step in story.steps]
    label = "training" if alone else story.name
    dark = COLOURS[1] if alone else story.colour
    if len(x) >= SMOOTH_FROM:
        window = max(5, len(x) // 40)
        axes.plot(x, losses, color=story.colour, linewidth=0.8, alpha=0.3)
        axes.plot(
            x, smoothed(losses, window=window), color=story.colour, linewidth=1.8, label=label
        )
    else:
        axes.plot(x, losses, color=story.colour, linewidth=1.6, marker=".", label=label)
    lost = [step.iteration for step in story.steps if not math.isfinite(step.loss)]
    if lost:
        at_the_bottom = axes.get_xaxis_transform()
        axes.plot(lost, [0.02] * len(lost), "x", color="#c0262d", transform=at_the_bottom,
                  label=f"not finite ({len(lost)})")  # fmt: skip
    if story.validation:
        axes.plot(
            [record.iteration for record in story.validation],
            [record.loss for record in story.validation],
            color=dark, linewidth=1.2, linestyle="--", marker="o", markersize=4.5,
            markerfacecolor="white", label="validation" if alone else f"{story.name}, validation",
        )  # fmt: skip
    if story.test:
        end = story.test[-1]
        axes.plot(
            [end.iteration], [end.loss], linestyle="none", color=dark, marker="*", markersize=12,
            label=f"test {end.loss:.3f}" if alone else f"{story.name}, test {end.loss:.3f}",
        )  # fmt: skip


def _draw_speed(axes: Any, story: Story) -> None:
    """Tokens per second and rank of the steps after warm-up."""
    steady = [step for step in story.steps if not step.warmup]
    x = [step.iteration for step in steady]
    rates = [step.tokens_per_second_per_gpu for step in steady]
    if len(x) >= SMOOTH_FROM:
        axes.plot(x, rates, color=story.colour, linewidth=0.7, alpha=0.3)
        window = max(5, len(x) // 40)
        axes.plot(x, smoothed(rates, window=window), color=story.colour, linewidth=1.4)
    else:
        axes.plot(x, rates, color=story.colour, linewidth=1.4, marker=".")


def _finish(figure: Any, loss: Any, rate: Any, speed: Any, stories: list[Story]) -> None:
    """Titles, legends, limits, and for language models a second scale in perplexity."""
    names = {step.loss_name for story in stories for step in story.steps}
    words = names == {LM_LOSS}
    loss.set_ylabel("loss per token (nats)" if words else " and ".join(sorted(names)))
    finite = [s.loss for story in stories for s in story.steps if math.isfinite(s.loss)]
    if words and finite and max(finite) < 20:
        perplexity = loss.secondary_yaxis("right", functions=(_to_perplexity, _to_loss))
        perplexity.set_ylabel("perplexity")
        perplexity.set_yscale("log")
        ticker = importlib.import_module("matplotlib.ticker")
        perplexity.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        perplexity.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        perplexity.yaxis.set_minor_locator(ticker.NullLocator())
    loss.legend(loc="upper right")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_ylim(0.0, 1.08 * max(rate.get_ylim()[1], 1e-9))
    speed.set_ylabel("TGS")
    speed.set_ylim(0.0, 1.15 * max(speed.get_ylim()[1], 1e-9))
    speed.set_xlabel("iteration       (TGS: tokens per second and rank)")
    speed.xaxis.get_major_locator().set_params(integer=True)
    for story in stories:
        for iteration in story.resumed_at:
            for axes in (loss, rate, speed):
                axes.axvline(iteration - 0.5, color="#9aa1aa", linewidth=0.9, linestyle=":")
            loss.annotate(
                "resumed", (iteration - 0.5, 0.0), xycoords=("data", "axes fraction"),
                xytext=(4, 5), textcoords="offset points", fontsize=8, color="#7a818a",
            )  # fmt: skip
    figure.align_ylabels()
    title = " and ".join(story.name for story in stories)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12)


def _to_perplexity(loss: Any) -> Any:
    return importlib.import_module("numpy").exp(loss)


def _to_loss(perplexity: Any) -> Any:
    numpy = importlib.import_module("numpy")
    return numpy.log(numpy.maximum(perplexity, 1e-9))


def _story(name: str, colour: str, records: list[TelemetryRecord]) -> Story:
    return Story(
        name=name,
        colour=colour,
        steps=train_records(records),
        validation=evaluation_records(records, "validation"),
        test=evaluation_records(records, "test"),
    )


def _short_names(folders: list[Path]) -> list[str]:
    """Folder names, with their parents where two would be alike."""
    last = [folder.resolve().name for folder in folders]
    if len(set(last)) == len(last):
        return last
    return [str(folder) for folder in folders]


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError(
            f"drawing needs matplotlib, which is not installed: {how_to_install('plot')}; "
            "--tgs works without it"
        ) from error


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
