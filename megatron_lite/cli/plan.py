"""Know before you pay: memory, time and cost of a training command line on machines you do not have.

python tools/plan.py --hardware a100-80g --nodes 8 <flags of tools/pretrain_gpt.py>
python tools/plan.py --hardware h100 torchrun --nnodes 8 --nproc_per_node 8 tools/pretrain_gpt.py <flags>
python tools/plan.py --hardware a100-80g examples/gpt3/train_gpt3_175b_distributed.sh       the run of a script
python tools/plan.py --hardware h100 --nodes 8 --search <flags>     all layouts that fit, ranked
python tools/plan.py --advise <flags>               the learning rate's whole curve, and a scaling law's word
python tools/plan.py --list-hardware                                every number with its source

No accelerator, no torch, no data is needed.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shlex
import subprocess
import sys
import zlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_lite.blueprint.batches import batch_schedule
from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.blueprint.length import told_of_epochs
from megatron_lite.blueprint.timeline import Timeline, parse_trace
from megatron_lite.config.errors import ConfigError, DataError, StorageError
from megatron_lite.config.exit import run_tool
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules import table as rules
from megatron_lite.config.rules.length import begins_from_nothing, given_lengths
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.config.sections.train import TrainConfig
from megatron_lite.optim.learning_rate import LearningRateSchedule
from megatron_lite.optim.relative_step import step_factor
from megatron_lite.planner import (
    advice,
    draw,
    hardware,
    launch,
    learning,
    questions,
    ranking,
    report,
    search,
    space,
)
from megatron_lite.planner.corpus import epochs
from megatron_lite.planner.curve import Point, run_curve
from megatron_lite.planner.forecast import Forecast, forecast, measured
from megatron_lite.planner.hardware import Device
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, write_output

DRAWN_AS = {".svg": draw.as_svg, ".json": draw.as_chrome_trace, ".txt": draw.timeline_text}


def main() -> int:
    """Parse, predict, print."""
    own, flags = questions.parser(__doc__ or "").parse_known_args()
    if own.list_hardware:
        print(hardware.table())
        return 0
    _check_outputs(own)
    questions.check_together(own)
    if len(flags) > 1 and flags[0] in ("bash", "sh") and flags[1].endswith(".sh"):
        flags = flags[1:]
    if flags and flags[0].endswith(".sh"):
        flags = _printed(flags)
    launcher, flags = launch.launched(flags)
    parsed = parse(flags)
    device = hardware.find_device(questions.DEVICE if own.hardware is None else own.hardware)
    machines = launch.Machines(own.nodes, own.gpus_per_node, own.link_gb_s, own.network_gb_s)
    cluster = launch.cluster(
        machines, launcher, device, parsed.config.train, parsed.config.parallel
    )
    parsed = parsed.on(cluster.world_size)
    config, notes = _completed(parsed.config, own, cluster.world_size)
    world = cluster.world_size
    notes += rules.not_yet(config, world)
    notes += _assumed(config, own, device, world)

    def variant(parallel: ParallelConfig, micro_batch_size: int) -> Blueprint:
        """The Blueprint of another layout of this run; ConfigError where a rule forbids it."""
        train = dataclasses.replace(config.train, micro_batch_size=micro_batch_size)
        changed = dataclasses.replace(config, parallel=parallel, train=train)
        rules.check_config(changed, world, built=False)
        return draw_up(changed, world)

    asked = PlanInputs.of(
        config.parallel, config.precision, config.train, config.data, on_gpu=not device.cpu
    )
    if own.search:
        _require_model(config, world)
        fixed = space.said(parsed.origin)
        found = search.search(
            variant, asked, cluster, model=config.model, fixed=fixed, top=own.top or questions.TOP
        )
        best = next((plan.asked.parallel for plan in found.ranked), config.parallel)
        notes = [
            *parsed.notices,
            *notes,
            *rules.notices(dataclasses.replace(config, parallel=best), world),
        ]
        ranked = ranking.Ranking(found, asked, config.optim, cluster, notes, fixed=fixed)
        _put(ranked.json() if own.json else ranked.text(), own)
        return 0
    blueprint = variant(config.parallel, config.train.micro_batch_size)
    plan = forecast(blueprint, asked, cluster, given=questions.stage_times(own))
    if own.measured_seconds is not None:
        plan = measured(plan, own.measured_seconds)
    if own.advise:
        outlook = _outlook(parsed.config, config, own, plan, (*parsed.notices, *notes))
        _put(
            learning.outlook_json(outlook, plan)
            if own.json
            else learning.outlook_text(outlook, plan),
            own,
        )
        return 0
    if own.draw is not None:
        _draw(own, plan)
        if own.draw == "-":
            return 0
    notes += told_of_epochs(config.train, blueprint.length)
    notes = [*parsed.notices, *notes, *rules.notices(config, world)]
    extra = _extra(own, config, plan, notes, length=_has_length(parsed.config, config))
    if not plan.fits:
        extra = dataclasses.replace(extra, changes=tuple(advice.cheapest_changes(plan, variant)))
    _put(report.plan_json(plan, extra) if own.json
         else report.to_text(plan, extra, width=_width(own)), own)  # fmt: skip
    return 0


def _assumed(config: RunConfig, own: Namespace, device: Device, world: int) -> list[str]:
    """What is planned otherwise than it was said, or was not said."""
    notes: list[str] = []
    if config.parallel.engine != "zero":
        notes.append(f"--engine {config.parallel.engine}: planned as zero, whose memory and messages "
                     "the planner knows")  # fmt: skip
    if config.train.use_cpu and not device.cpu:
        notes.append(
            f"--use-cpu: planned for {device.name} all the same; --hardware cpu is a host's cores"
        )
    if own.hardware is None:
        notes.append(
            f"--hardware is not given: {questions.DEVICE}, {world} of them (--list-hardware)"
        )
    return notes


def _extra(
    own: Namespace, config: RunConfig, plan: Forecast, notes: Sequence[str], *, length: bool
) -> report.Extra:
    """length: whether the run says its own."""
    blueprint = plan.blueprint
    tokens = own.tokens or (_tokens(blueprint) if length else None)
    questions.check_price(own, tokens)
    return report.Extra(
        notes=tuple(notes),
        tokens=tokens,
        begins=begins_from_nothing(config),
        curve=_curve(config, blueprint) if own.tokens or length else (),
        epochs=epochs(config.data, config.train, blueprint),
        price_per_hour=own.price_per_gpu_hour,
    )


def _printed(words: Sequence[str]) -> list[str]:
    """The command that a training script would run; only one that can print it is started."""
    script = Path(words[0])
    try:
        text = script.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{script}: cannot be read ({error.strerror})") from None
    if "PRINT_COMMAND" not in text:
        # it might start the training
        raise ConfigError(
            f"{script} does not know PRINT_COMMAND=1, so it is not run; give its command line instead"
        )
    env = {**os.environ, "DRY_RUN": "1", "PRINT_COMMAND": "1"}
    done = subprocess.run(["bash", *words], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise ConfigError(f"{script}: {done.stderr.strip() or f'ended with {done.returncode}'}")
    return shlex.split(done.stdout)


def _completed(config: RunConfig, own: Namespace, world: int) -> tuple[RunConfig, list[str]]:
    """The config with what only a real run needs filled in, and a note for each guess."""
    notes: list[str] = []
    config = _with_vocabulary(config, notes)
    train, rate = dataclasses.replace(config.train, dry_run=True), config.learning_rate
    if own.tokens and len(given_lengths(train)) == 1:
        train = _of_tokens(config, own.tokens, world, notes)
    if train.train_epochs is not None:
        train = _counted(config, train, notes)
    if train.train_iters is None and train.samples_asked is None:
        iterations = _iterations(config, own.tokens, world) if own.tokens else 1
        train = dataclasses.replace(train, train_iters=iterations, train_epochs=None)
        if not own.search:  # which asks for no length
            notes.append(
                f"--train-iters is not given: {iterations:,} for --tokens"
                if own.tokens
                else "--train-iters is not given: one iteration is planned; --tokens N says how long"
            )
    if config.optim.rate(rate).lr is None:
        rate = dataclasses.replace(rate, lr=max(1e-4, rate.min_lr, rate.lr_warmup_init))
        if not (own.advise or own.search):  # the one takes the law's, the other has no curve
            notes.append(f"--lr is not given: the curve is of {rate.lr:g}")
    return dataclasses.replace(config, train=train, learning_rate=rate), notes


def _of_tokens(config: RunConfig, tokens: float, world: int, notes: list[str]) -> TrainConfig:
    """The run as long as --tokens says, in the unit of its own length, of which the curve is."""
    train = dataclasses.replace(config.train, dry_run=True)
    ((flag, value),) = given_lengths(train).items()
    none = dataclasses.replace(train, train_iters=None, train_epochs=None, epoch_samples=None)
    if train.train_iters is None:
        # a length that is missing is told with all other problems
        count = max(round(tokens / max(config.model.seq_length, 1)), 1)
        unit, train = "samples", dataclasses.replace(none, train_samples=count)
    else:
        count = _iterations(config, tokens, world)
        unit, train = "iterations", dataclasses.replace(none, train_iters=count)
    notes.append(f"--tokens: {count:,} {unit} instead of {flag} {value}")
    return train


def _counted(config: RunConfig, train: TrainConfig, notes: list[str]) -> TrainConfig:
    """--train-epochs with the samples of one, where the data are here or --epoch-samples says it."""
    # data bring numpy along, which most plans do without
    from megatron_lite.data.sources import uncounted, with_epochs  # noqa: PLC0415

    train = with_epochs(config.data, train, seq_length=config.model.seq_length)
    notes += uncounted(config.data, train)
    return train


def _iterations(config: RunConfig, tokens: float, world: int) -> int:
    """Steps that take the samples of so many tokens, the last one whole."""
    train, parallel = config.train, config.parallel
    dp = max(1, world // parallel.ranks_per_sample)
    # of one replica with micro batches of one, which divide every batch size
    size = train.global_batch_size or train.samples_at_once(dp)
    train = dataclasses.replace(train, micro_batch_size=1, global_batch_size=size)
    one = dataclasses.replace(config, train=train, parallel=ParallelConfig())
    if rules.size_problems(one, 1):
        return 1  # they are told with all the others
    seq = config.model.seq_length
    samples, batches = max(round(tokens / seq), 1), batch_schedule(train, seq_length=seq, dp=1)
    steps = batches.iterations_within(samples)
    return steps + (batches.samples_after(steps) < samples)


def _with_vocabulary(config: RunConfig, notes: list[str]) -> RunConfig:
    """The config with the vocabulary that a run would have."""
    if not config.data.has_vocabulary:
        return config
    # tokenizers bring numpy along, which most plans do without
    from megatron_lite.data.tokenizers.build import planned_vocab_size  # noqa: PLC0415

    size, unread = planned_vocab_size(config.data, config.model.vocab_size)
    notes += unread
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _has_length(said: RunConfig, config: RunConfig) -> bool:
    return said.train.train_iters is not None or config.train.samples_asked is not None


def _tokens(blueprint: Blueprint) -> float | None:
    samples = blueprint.train_samples
    return None if samples is None else float(samples * blueprint.model.seq_length)


def _schedule(config: RunConfig, blueprint: Blueprint) -> LearningRateSchedule:
    given = config.optim.rate(config.learning_rate)
    return LearningRateSchedule.from_config(
        given, config.train, blueprint.batch_schedule.samples_after
    )


def _curve(config: RunConfig, blueprint: Blueprint) -> tuple[Point, ...]:
    schedule, updates = _schedule(config, blueprint), blueprint.batch_schedule.iterations_within

    def rate(samples: int) -> float:
        return schedule.at(samples) * step_factor(config.optim, updates(samples))

    return run_curve(blueprint, rate, bends=schedule.bends())


def _outlook(
    said: RunConfig, config: RunConfig, own: Namespace, plan: Forecast, notes: tuple[str, ...]
) -> learning.Outlook:
    """The run for --advise; said: as the flags have it, without what is assumed."""
    blueprint = plan.blueprint
    if bool(own.tokens) == _has_length(said, config):
        raise ConfigError(
            "--advise needs one length of the run: --train-iters, -samples or -epochs, or --tokens 20B"
        )
    if said.optim.adafactor_relative_step:
        raise ConfigError(
            "--advise is about --lr, and --adafactor-relative-step makes its own steps; leave one out "
            "(the table without --advise has these steps)"
        )
    if said.learning_rate.lr is None:
        rate = learning.law_of(blueprint).learning_rate
        notes = (*notes, f"--lr is not given: the curve is of the law's {rate:.3e}")
        config = dataclasses.replace(
            config, learning_rate=dataclasses.replace(config.learning_rate, lr=rate)
        )
    minutes = config.train.exit_duration_in_mins
    questions.check_times_of_advice(own, minutes)
    return learning.Outlook(
        blueprint=blueprint,
        rates=_schedule(config, blueprint),
        begins=begins_from_nothing(config),
        stop=None if minutes is None else int(60 * minutes / plan.rates.step_seconds),
        notes=notes,
    )


def _require_model(config: RunConfig, world: int) -> None:
    """ConfigError where no layout can help: what is wrong with the run on one rank is wrong on all."""
    one = dataclasses.replace(config, parallel=ParallelConfig())
    rules.check_config(dataclasses.replace(one, train=dataclasses.replace(
        one.train, micro_batch_size=1, world_size=None)), 1)  # fmt: skip


def _draw(own: Namespace, plan: Forecast) -> None:
    asked = own.draw_microbatches or 2 * plan.blueprint.grid.pp
    count = min(asked, plan.blueprint.microbatches())
    drawn = [draw.timeline(plan, count)]
    if own.beside is not None:
        drawn.append(_recorded(Path(own.beside)))
    if own.draw == "-":
        _put(draw.timeline_text(drawn), own)
        return
    write_output(own.draw, DRAWN_AS[Path(own.draw).suffix](drawn).encode(), Disk())


def _recorded(path: Path) -> Timeline:
    """A timeline that the trainer wrote; .gz as well."""
    try:
        data = path.read_bytes()
        text = gzip.decompress(data).decode() if path.suffix == ".gz" else data.decode()
        return parse_trace(text)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: {error}; give a file of --profile-timeline") from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from None


def _width(own: Namespace) -> int | None:
    """Of the terminal that is written to."""
    try:
        return None if own.output else os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return None


def _put(what: str | dict[str, object], own: Namespace) -> None:
    text = what if isinstance(what, str) else json.dumps(what, indent=1)
    if own.output is None:
        print(text)
    else:
        write_output(own.output, (text + "\n").encode(), Disk())


def _check_outputs(own: Namespace) -> None:
    """What will be written, before anything is planned."""
    if own.draw is not None and own.draw != "-" and Path(own.draw).suffix not in DRAWN_AS:
        raise ConfigError(
            f"--draw {own.draw}: give -, a .txt, a .svg or a .json (Chrome trace) file"
        )
    for flag, name in (("--output", own.output), ("--draw", own.draw)):
        if name is not None and (flag, name) != ("--draw", "-"):
            check_outputs(flag, [name], Disk())


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
