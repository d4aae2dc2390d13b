"""Train a GPT-like model: what torchrun starts, and what runs alone in one process.

python tools/pretrain_gpt.py --preset gpt2-124m --mock-data --train-iters 10 --lr 6e-4 ...
python -m torch.distributed.run --nproc_per_node 4 tools/pretrain_gpt.py ...
python tools/pretrain_gpt.py ... --dry-run --world-size 64      plans only: no torch, no data
python tools/pretrain_gpt.py ... --rehearse --world-size 64     runs its ranks here, without memory or data
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

try:
    from megatron_lite.blueprint.draw_up import Blueprint, draw_up
    from megatron_lite.blueprint.length import sample_counts, told_of_epochs
    from megatron_lite.blueprint.plan import describe
    from megatron_lite.config.blend import data_sources
    from megatron_lite.config.errors import ConfigError
    from megatron_lite.config.exit import asks_for_text, failed
    from megatron_lite.config.flags.parser import ParsedFlags, parse
    from megatron_lite.config.objectives import SFT
    from megatron_lite.config.rules import table as rules
    from megatron_lite.config.sections.parallel import ParallelConfig
    from megatron_lite.config.sections.run import RunConfig
    from megatron_lite.config.streams import ReaderGone, outlive_output, settle_output
    from megatron_lite.data.present import require_local_files
    from megatron_lite.data.provenance import end_of_document, made_with
    from megatron_lite.data.sources import uncounted, what_counts, with_epochs
    from megatron_lite.data.taught import NOT_TAUGHT, files_with, taught
    from megatron_lite.data.tokenizers.build import (
        build_tokenizer,
        model_vocab_size,
        planned_vocab_size,
    )
    from megatron_lite.data.tokenizers.kept import files_to_keep
    from megatron_lite.planner.memory import PlanInputs, RankMemory, memory
    from megatron_lite.planner.rehearsed import RehearsedRank, beside_plan, rehearsal_tables
    from megatron_lite.planner.room import require_host_memory
    from megatron_lite.planner.shortage import beside_the_plan
    from megatron_lite.rendezvous.copies import alone_among_many
    from megatron_lite.train.schedules import Schedules
except ModuleNotFoundError as missing:  # a bare python: the first thing many try is a dry run
    print(f"FATAL[2] rank=- step=-: {sys.executable} lacks the package {missing.name}; `make setup` "
          "makes .venv with everything: activate it, or name a python that has it with PYTHON=",
          file=sys.stderr)  # fmt: skip
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from megatron_lite.rendezvous.launch import Launch
    from megatron_lite.train.ending.failures import Failures


def main(argv: Sequence[str]) -> int:
    """Parse, check, and plan, rehearse or train; returns the exit code."""
    parsed = parse(argv)
    if parsed.config.train.dry_run:
        return _plan(parsed)
    if parsed.config.train.rehearse:
        return _rehearse(parsed)
    # when a rank is lost, our one line says so; torch's C++ stack traces of it say less
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch is imported only now: a plan needs none
    from megatron_lite.rendezvous.launch import read_launch  # noqa: PLC0415
    from megatron_lite.train.ending.failures import Failures, end_process, stop_at_once  # noqa: PLC0415

    stop_at_once()
    launch = read_launch()
    save = parsed.config.checkpoint.save if not parsed.config.train.skip_train else None
    failures = Failures(
        launch.rank,
        folder=Path(save) if save else None,
        debug="--debug" in argv,
        speaks_first=launch.local_rank == 0,
    )
    try:
        return _train(parsed, launch, failures)
    except BaseException as error:
        code = failures.report(error)
        if launch.world_size > 1:
            end_process(code)
        return code


def _plan(parsed: ParsedFlags) -> int:
    config, world_size = _checked(parsed)
    blueprint = _drawn(config, world_size)
    print(describe(blueprint, config.learning_rate, zero_stage=config.parallel.zero_stage))
    for line in told_of_epochs(config.train, blueprint.length):
        print(f"  {line}")
    for line in _what_counts(config, blueprint):
        print(line)
    print("dry run: every rule holds; nothing was started")
    return 0


def _drawn(config: RunConfig, world_size: int) -> Blueprint:
    """Its Blueprint; ConfigError where no curve can be made of its rates, as at a start."""
    blueprint = draw_up(config, world_size)
    if blueprint.length is not None:
        Schedules.from_config(
            config.learning_rate, config.optim, config.train, blueprint.batch_schedule
        )
    return blueprint


def _what_counts(config: RunConfig, blueprint: Blueprint) -> Sequence[str]:
    """How many tokens of the samples count, where a mask says so and its files are named."""
    if config.train.objective != SFT or not data_sources(config.data) or blueprint.length is None:
        return []
    counts = sample_counts(config.train, blueprint.batch_schedule)
    return what_counts(
        config.data, seq_length=config.model.seq_length, seed=config.train.seed, **counts
    )


def _checked(parsed: ParsedFlags) -> tuple[RunConfig, int]:
    """The config of a world that is not there, its vocabulary filled in; prints notes."""
    world_size = parsed.config.train.world_size or parsed.config.parallel.ranks_per_sample
    parsed = rules.checked(parsed, world_size)
    config = parsed.config
    size, notes = planned_vocab_size(config.data, config.model.vocab_size)
    notes = [*parsed.notices, *notes]
    others = alone_among_many()
    if others is not None:
        notes.append(f"a start would be refused here: {others}")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    config = _with_epochs(config, world_size)
    notes += uncounted(config.data, config.train)
    for line in (*notes, *rules.notices(config, world_size)):
        print(f"NOTE: {line}")
    return config, world_size


def _with_epochs(config: RunConfig, world_size: int) -> RunConfig:
    """The config, whose length is known where the data are."""
    train = with_epochs(config.data, config.train, seq_length=config.model.seq_length)
    counted = dataclasses.replace(config, train=train)
    if counted != config:
        rules.check_config(counted, world_size)
    return counted


def _rehearse(parsed: ParsedFlags) -> int:
    # torch is imported only now: a plan needs none
    from megatron_lite.rehearsal import rehearse  # noqa: PLC0415

    began = time.perf_counter()
    config, world_size = _checked(parsed)
    blueprint = _drawn(config, world_size)
    if config.model.vocab_size is None:
        model = dataclasses.replace(config.model, vocab_size=blueprint.vocab_size)
        config = dataclasses.replace(config, model=model)
    every = config.train.all_ranks
    ranks = range(world_size) if every else rehearse.one_of_each(blueprint.grid)
    count, full = rehearse.num_microbatches(blueprint), blueprint.microbatches()
    blueprint.actions(full)  # raises where a list of the whole step is not sound
    print(f"rehearsing {len(ranks)} of {world_size} ranks on {count:,} of {full:,} micro batches; the "
          f"lists of all {full:,} passed the schedule check", flush=True)  # fmt: skip
    if len(ranks) < world_size:
        print("  of each stage the first rank, the last over tp and the last over dp; --all-ranks "
              "takes every rank")  # fmt: skip
    if blueprint.schedule == "gpipe" and count < full:
        print(
            f"  gpipe keeps every micro batch: a step of {full:,} needs more memory than these {count}"
        )
    done = []
    for one in rehearse.rehearse(config, world_size, ranks):
        print(f"  {one.describe()}", flush=True)
        done.append(one)
    measured = [RehearsedRank(one.log.rank, one.memory.kinds(), one.sent_bytes())
                for one in done if one.memory is not None]  # fmt: skip
    if not measured:  # each broke off: there is no memory to show, and this says where
        rehearse.require_agreement([one.log for one in done])
    asked = _plan_inputs(config)
    rows = beside_plan(measured, blueprint, asked, num_microbatches=count)
    print("", rehearsal_tables(rows), "", sep="\n")
    agreement = rehearse.require_agreement([one.log for one in done])
    print(agreement)
    print(f"took {time.perf_counter() - began:.0f} s and at most "
          f"{max(one.process_bytes for one in done) / 2**30:.2f} GiB of memory per process")  # fmt: skip
    print("rehearsal: the ranks fit together; nothing was started")
    return 0


def _plan_inputs(config: RunConfig) -> PlanInputs:
    return PlanInputs.of(
        config.parallel,
        config.precision,
        config.train,
        config.data,
        on_gpu=not config.train.use_cpu,
    )


def _train(parsed: ParsedFlags, launch: Launch, failures: Failures) -> int:
    from megatron_lite.train.program import train  # noqa: PLC0415
    from megatron_lite.train.reading import TokenizerFacts  # noqa: PLC0415

    config = parsed.config
    asked = config.train.world_size
    if asked is not None and asked != launch.world_size:
        raise ConfigError(
            f"--world-size {asked}, but {launch.world_size} processes were started; the flag is "
            "for --dry-run and --rehearse: leave it out"
        )
    parsed = rules.checked(parsed, launch.world_size)
    config = parsed.config
    failures.plan = functools.partial(_beside_the_plan, config, launch.world_size, launch.rank)
    require_local_files(config.data)
    notices = list(parsed.notices)

    def open_tokens() -> tuple[RunConfig, TokenizerFacts]:
        tokenizer = build_tokenizer(config.data, vocab_size=config.model.vocab_size)
        way = taught(config.data) if config.train.objective == SFT else None
        if way is None and config.train.objective == SFT:
            notices.append(NOT_TAUGHT)
        tokens = TokenizerFacts(
            vocab_size=model_vocab_size(tokenizer.vocab_size, config.model.vocab_size),
            eod=tokenizer.eod,
            asked=config.model.vocab_size,
            made_with=made_with(tokenizer, config.data),
            end_of_document=end_of_document(tokenizer),
            files=files_with(
                files_to_keep(config.data),
                way,
                [tokenizer.eod],
            ),
        )
        model = dataclasses.replace(config.model, vocab_size=tokens.vocab_size)
        filled = _with_epochs(dataclasses.replace(config, model=model), launch.world_size)
        notices.extend(rules.notices(filled, launch.world_size))
        if filled.parallel.on_host:
            require_host_memory(
                draw_up(filled, launch.world_size), _plan_inputs(filled), launch.local_world_size
            )
        rows, own = tokens.asked, tokenizer.vocab_size
        if rows is not None and rows < own and config.data.tokenizer_type != "NullTokenizer":
            notices.append(
                f"--vocab-size {rows}: the tokenizer has {own} ids, so many rows are made"
            )
        return filled, tokens

    return train(config, launch, open_tokens, notices, failures)


def _beside_the_plan(
    config: RunConfig,
    world_size: int,
    rank: int,
    missing: float,
    *,
    on_gpu: bool,
    room: float = 0.0,
) -> str:
    """What to say of a rank's plan where so many bytes were missing."""

    def planned(parallel: ParallelConfig, micro_batch_size: int) -> RankMemory:
        train = dataclasses.replace(config.train, micro_batch_size=micro_batch_size)
        changed = dataclasses.replace(config, parallel=parallel, train=train)
        rules.check_config(changed, world_size)
        blueprint = draw_up(changed, world_size)
        asked = PlanInputs.of(
            changed.parallel, changed.precision, changed.train, changed.data, on_gpu=on_gpu
        )
        return memory(blueprint, asked, pp_ranks=[blueprint.grid.coords(rank).pp])[0]

    return beside_the_plan(config.parallel, config.train.micro_batch_size, planned, missing, room)


def start() -> NoReturn:
    """Run it, and end the process with its exit code, without tearing Python down.

    Everything is closed and written by then.  gloo's worker threads outlive
    destroy_process_group() while a context still names a group; one that frees its last collective
    during interpreter shutdown aborts the process.
    """
    os._exit(run())


def run() -> int:
    """The exit code of main, for failures before it was known which rank this is, too."""
    outlive_output(results=asks_for_text(sys.argv[1:]))
    code = _main()
    settle_output()
    return code


def _main() -> int:
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt as error:  # while torch was being imported, or before ranks are known
        number = getattr(error, "number", signal.SIGINT)
        print(f"FATAL[{128 + number}] rank=- step=-: stopped by {signal.Signals(number).name} before "
              "anything was started", file=sys.stderr, flush=True)  # fmt: skip
        return 128 + number
    except ReaderGone as gone:  # of what a dry run prints
        return gone.exit_code
    except Exception as error:  # before it was known which rank this is
        return failed(error, debug=False)


if __name__ == "__main__":
    start()
