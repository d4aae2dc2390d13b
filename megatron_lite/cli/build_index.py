"""Build the index cache of a training run before it starts, on any machine that sees the data.

python tools/build_index.py <the flags of the training command> --data-cache-path FOLDER

Takes what tools/pretrain_gpt.py takes; needs no accelerator, no torch and no other process.  The
run finds the arrays if it gets the same flags and the same --data-cache-path (or --save, whose
index-cache folder is the default).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.blueprint.length import sample_counts
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import run_tool
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules import table as rules
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.data.overview import overview
from megatron_lite.data.provenance import made_with
from megatron_lite.data.sources import kind_for, with_epochs
from megatron_lite.data.tokenizers.build import build_tokenizer, model_vocab_size
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Build and print what was built; returns the exit code."""
    parsed = parse(sys.argv[1:] if argv is None else argv)
    world_size = parsed.config.train.world_size or parsed.config.parallel.ranks_per_sample
    config = rules.checked(parsed, world_size).config
    folder = _folder(config)
    check_folder("--data-cache-path or --save", folder, Disk())
    tokenizer = build_tokenizer(config.data, vocab_size=config.model.vocab_size)
    size = model_vocab_size(tokenizer.vocab_size, config.model.vocab_size)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    train = with_epochs(config.data, config.train, seq_length=config.model.seq_length)
    config = dataclasses.replace(config, train=train)
    blueprint = draw_up(config, world_size)
    began = time.perf_counter()
    datasets = kind_for(config.train.objective).build(
        config.data,
        seq_length=config.model.seq_length,
        seed=config.train.seed,
        vocab_size=size,
        eod=tokenizer.eod if config.data.mock_data else None,
        cache_folder=folder,
        tokenizer=made_with(tokenizer, config.data),
        **sample_counts(config.train, blueprint.batch_schedule),
    )
    for line in (*overview(datasets), *datasets.notices):
        print(line)
    seconds = time.perf_counter() - began
    print(f"{folder}: ready after {seconds:.1f} s, digest {datasets.digest:016x}")
    return 0


def _folder(config: RunConfig) -> Path:
    if config.data.data_cache_path:
        return Path(config.data.data_cache_path)
    if config.checkpoint.save:
        return Path(config.checkpoint.save) / "index-cache"
    raise ConfigError("give --data-cache-path or --save, where the run will look for the index")


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
