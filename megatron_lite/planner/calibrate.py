"""Short real runs of the trainer, and the device numbers under which the plan explains them.

    measure(["--num-layers", ...], ranks=2, tool=...)      median seconds of a step, by real processes
    fit(device, trials)                                    the device with its rates fitted

What is fitted are the few rates of a device that no data sheet has; the rest stays as it was given.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import Cluster, Device
from megatron_lite.planner.memory import PlanInputs

FITTED = (
    "sustained", "attention", "memory_efficiency", "optimizer_efficiency", "link_efficiency",
    "link_latency_seconds", "launch_seconds", "host_seconds", "dropout_values", "half_inner",
)  # fmt: skip
"""Fields of a Device that trials decide; what no trial shows stays where it was."""

_SHARES = ("sustained", "attention", "memory_efficiency", "optimizer_efficiency", "link_efficiency")
_PULL = 0.003
"""Weight of a fitted number's distance (log squared) from its start: decides what trials leave open."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A short run: its flags, ranks on one machine, and the seconds of a step that were measured."""

    name: str
    flags: str
    ranks: int = 1
    seconds: float = math.nan


def measure_trial(
    trial: Trial, *, tool: Path, steps: int, environment: Mapping[str, str], deadline: float = 300.0
) -> Trial:
    """The trial with the median time of its steps but the first two, run by real processes.

    tool: tools/pretrain_gpt.py; environment: of the processes.  Raises ConfigError with the
    run's own words where it fails.
    """
    flags = [
        *trial.flags.split(), "--train-iters", str(steps), "--lr", "1e-4", "--mock-data",
        "--log-interval", "1", "--eval-iters", "0",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                str(trial.ranks)] if trial.ranks > 1 else []  # fmt: skip
    env = {**environment, "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or "1"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *launcher, str(tool), *flags],
            cwd=folder, env=env, capture_output=True, text=True, timeout=deadline, check=False,
        )  # fmt: skip
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "FATAL[" in line]
            what = said[0] if said else done.stderr[-500:]
            raise ConfigError(f"the trial {trial.name!r} ended with {done.returncode}: {what}")
        (metrics,) = Path(folder).glob("runs/*/metrics.jsonl")
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    seconds = [record["seconds_per_iteration"] for record in records if record["kind"] == "train"]
    return dataclasses.replace(trial, seconds=statistics.median(seconds[2:]))


def plan_trial(trial: Trial, device: Device) -> Forecast:
    """What a trial needs on this device, all its ranks in one node."""
    blueprint, asked = _drawn(trial.flags, trial.ranks, device.cpu)
    cluster = Cluster(
        device=device,
        world_size=trial.ranks,
        devices_per_node=max(trial.ranks, device.devices_per_node),
    )
    return forecast(blueprint, asked, cluster)


def error(trial: Trial, device: Device) -> float:
    """Predicted over measured step time, minus one."""
    return plan_trial(trial, device).rates.step_seconds / trial.seconds - 1


@cache
def _drawn(flags: str, ranks: int, cpu: bool) -> tuple[Blueprint, PlanInputs]:
    config = parse(f"{flags} --train-iters 1 --lr 1e-4 --dry-run".split()).config
    return draw_up(config, ranks), PlanInputs.of(
        config.parallel, config.precision, config.train, config.data, on_gpu=not cpu
    )


def fit_device(start: Device, trials: Sequence[Trial], *, rounds: int = 60) -> Device:
    """The device whose predictions come closest to the trials, in the mean of squared log errors.

    Pattern search, one number at a time by ever smaller factors: a dozen smooth unknowns need no more.
    """
    best = dataclasses.replace(start)
    cost, factor = _cost(best, start, trials), 2.0
    for _ in range(rounds):
        better = False
        for name in FITTED:
            for step in (factor, 1 / factor):
                value = getattr(best, name) * step
                if name in _SHARES and value > 1.0:
                    continue
                tried = dataclasses.replace(best, **{name: value})
                now = _cost(tried, start, trials)
                if now < cost:
                    best, cost, better = tried, now, True
        if not better:
            factor = math.sqrt(factor)
            if factor < 1.005:
                break
    sources = {name: f"fitted on {len(trials)} trials" for name in FITTED}
    return dataclasses.replace(best, sources={**start.sources, **sources})


def _cost(device: Device, start: Device, trials: Sequence[Trial]) -> float:
    off = sum(math.log1p(error(trial, device)) ** 2 for trial in trials) / len(trials)
    moved = sum(math.log(getattr(device, n) / getattr(start, n)) ** 2 for n in FITTED)
    return off + _PULL * moved / len(trials)


def as_yaml(device: Device) -> str:
    """A --hardware file of all the device's numbers, with the source of each behind it."""
    lines = []
    for field in dataclasses.fields(Device):
        value = getattr(device, field.name)
        if field.name == "sources":
            continue
        text = str(value).lower() if isinstance(value, bool) else value
        shown = _decimal(value) if isinstance(value, float) else text
        source = device.sources.get(field.name)
        lines.append(f"{field.name}: {shown}" + (f"  # {source}" if source else ""))
    return "\n".join(lines) + "\n"


def _decimal(value: float) -> str:
    """Six digits; YAML takes 1e-05 for a word and 1.0e-05 for a number."""
    text = f"{value:.6g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
