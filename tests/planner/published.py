"""Published steps as command lines of tools/plan.py, with what was measured: published_times.tsv.

What a source does not say, and what was therefore assumed, stands in the table beside the row.
"""

from __future__ import annotations

import csv
import dataclasses
from argparse import ArgumentParser
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import Cluster, find_device
from megatron_lite.planner.memory import PlanInputs

TABLE = Path(__file__).with_name("published_times.tsv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One published measurement: a line of the table."""

    name: str
    confidence: str
    use: str
    trainer: str
    source: str
    unit: str
    value: float
    flags: str
    why: str

    @property
    def fitted(self) -> bool:
        """Whether numbers of planner/hardware.py were fitted on it."""
        return self.use == "fitted"


def _read() -> tuple[Run, ...]:
    lines = [ln for ln in TABLE.read_text(encoding="utf-8").splitlines() if not ln.startswith("#")]
    return tuple(
        Run(**{**row, "value": float(row["value"])})
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    )


RUNS = _read()


def like(start: str) -> tuple[Run, ...]:
    """The rows whose names begin so."""
    return tuple(run for run in RUNS if run.name.startswith(start))


def named(name: str) -> Run:
    """The one row of this name."""
    (run,) = (run for run in RUNS if run.name == name)
    return run


def plan(run: Run) -> Forecast:
    """What we predict for it."""
    return forecast(*drawn(run.flags))


def error(run: Run, predicted: Forecast) -> float:
    """Predicted over measured step time, or memory, minus one."""
    rates = predicted.rates
    if run.unit == "GiB":
        return predicted.worst.allocated / 2**30 / run.value - 1
    if run.unit == "s":
        return rates.step_seconds / run.value - 1
    found = {
        "TGS": rates.tgs,
        "TF/GPU": rates.tflops_hardware,
        "% MFU": rates.mfu * 100,
        "samp/s": rates.tgs / predicted.blueprint.model.seq_length,
    }
    return run.value / found[run.unit] - 1


@cache
def drawn(flags: str) -> tuple[Blueprint, PlanInputs, Cluster]:
    """A row's flags as tools/plan.py reads them."""
    own, rest = _machines().parse_known_args(flags.split())
    config = parse([*rest, "--train-iters", "1", "--lr", "1e-4", "--dry-run"]).config
    device = find_device(own.hardware)
    if own.network_gb_s is not None:
        device = dataclasses.replace(device, network_gb_s=own.network_gb_s)
    asked = PlanInputs.of(config.parallel, config.precision, config.train, config.data, on_gpu=True)
    cluster = Cluster(device=device, world_size=own.world_size, devices_per_node=own.gpus_per_node)
    return draw_up(config, own.world_size), asked, cluster


def _machines() -> ArgumentParser:
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True)
    parser.add_argument("--network-gb-s", type=float)
    return parser
