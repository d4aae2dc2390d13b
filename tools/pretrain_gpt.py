#!/usr/bin/env python3
"""Train a GPT-like model: what torchrun starts, and what runs alone in one process.

python tools/pretrain_gpt.py --preset gpt2-124m --mock-data --train-iters 10 --lr 6e-4 ...
python -m torch.distributed.run --nproc_per_node 4 tools/pretrain_gpt.py ...
python tools/pretrain_gpt.py ... --dry-run --world-size 64      plans only: no torch, no data
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run from a checkout, installed or not

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.blueprint.plan import describe
from megatron_lite.config import rules
from megatron_lite.config.errors import ConfigError, MegatronLiteError
from megatron_lite.config.exit import BUG, fatal_line
from megatron_lite.config.flags import Parsed, parse
from megatron_lite.config.run import RunConfig
from megatron_lite.data.tokenizers.build import build_tokenizer, read_vocab_size

if TYPE_CHECKING:
    from megatron_lite.parallel.launch import Launch


def main(argv: Sequence[str]) -> int:
    """Parse, check, and plan or train; returns the exit code."""
    parsed = parse(argv)
    if parsed.config.train.dry_run:
        return _plan(parsed)
    # torch is imported only now: a plan needs none
    from megatron_lite.parallel.launch import read_launch  # noqa: PLC0415

    launch = read_launch()
    errors = _Errors(parsed.config, launch.rank)
    try:
        return _train(parsed, launch)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return errors.report(error, debug="--debug" in argv)


def _plan(parsed: Parsed) -> int:
    config = parsed.config
    world_size = config.train.world_size or config.parallel.tp * config.parallel.pp
    notes = list(parsed.notices)
    if config.model.vocab_size is None:
        try:
            config = _with_vocabulary(config)
        except MegatronLiteError as error:
            notes.append(f"the tokenizer cannot be read ({error}); GPT-2's vocabulary is assumed")
    rules.check(config, world_size)
    for line in (*notes, *rules.notices(config, world_size)):
        print(f"NOTE: {line}")
    print(describe(draw_up(config, world_size)))
    print("dry run: every rule holds; nothing was started")
    return 0


def _with_vocabulary(config: RunConfig) -> RunConfig:
    size = read_vocab_size(config.data, vocab_size=config.model.vocab_size)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def _train(parsed: Parsed, launch: Launch) -> int:
    from megatron_lite.train.session import Tokens, train  # noqa: PLC0415

    config = parsed.config
    asked = config.train.world_size
    if asked is not None and asked != launch.world_size:
        raise ConfigError(
            f"--world-size {asked}, but {launch.world_size} processes were started; the flag is "
            "for --dry-run: leave it out"
        )
    rules.check(config, launch.world_size)
    tokenizer = build_tokenizer(config.data, vocab_size=config.model.vocab_size)
    size = max(tokenizer.vocab_size, config.model.vocab_size or 0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    notices = [*parsed.notices, *rules.notices(config, launch.world_size)]
    return train(config, launch, Tokens(size, tokenizer.eod), notices)


class _Errors:
    """How a rank reports its failure: one FATAL line, and errors/rank<r>.json in the run folder.

    torchrun hides a worker's exit code; the file keeps it.
    """

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.rank = rank
        save = config.checkpoint.save
        self.folder = Path(save) / "errors" if save else None

    def report(self, error: BaseException, *, debug: bool) -> int:
        """Print, write, and return the exit code."""
        known = self._as_known(error)
        print(fatal_line(known, rank=self.rank), file=sys.stderr, flush=True)
        code = known.exit_code if isinstance(known, MegatronLiteError) else BUG
        if debug or code == BUG:
            traceback.print_exception(error)
        if self.folder is not None and self.folder.parent.is_dir():
            self._write(known, code)
        return code

    def _as_known(self, error: BaseException) -> BaseException:
        if isinstance(error, RuntimeError):
            from megatron_lite.train.session import as_distributed  # noqa: PLC0415

            return as_distributed(error) or error
        return error

    def _write(self, error: BaseException, code: int) -> None:
        assert self.folder is not None
        text = {"rank": self.rank, "exit_code": code, "error": str(error), "time": time.time()}
        try:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"rank{self.rank}.json"
            path.write_text(json.dumps(text, indent=1) + "\n")
        except OSError as problem:  # the failure itself has been printed already
            print(f"({self.folder} cannot be written: {problem})", file=sys.stderr)


def _start() -> int:
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        return 130
    except MegatronLiteError as error:  # before it was known which rank this is
        print(fatal_line(error), file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(_start())
