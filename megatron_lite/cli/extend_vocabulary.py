"""Add new pieces to an old vocabulary, and the rows for them to a model that was trained with it.

python tools/extend_vocabulary.py OLD NEW TO    OLD, NEW: a SentencePiece .model, or a folder of GPT-2's files
python tools/extend_vocabulary.py RUN NEW TO    RUN: a run folder; TO is one to start from, with longer tables

Every old id stays what it is.  New rows start as the mean of the old ones, so the scores of the old ids
do not change; next: tools/pretrain_gpt.py --config TO/config.yaml --load TO --finetune.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NoReturn

from megatron_lite.checkpoint.beginning import config_yaml
from megatron_lite.checkpoint.choice import iterations, names_in
from megatron_lite.checkpoint.manifest import NAME
from megatron_lite.checkpoint.resizing import resize
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.provenance import made_with
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.beginning import BEGINS
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.merging import (
    Merged,
    merge_vocabularies,
    section_of,
    tokenizer_at,
)
from megatron_lite.inference.model import CheckpointSource, find_checkpoint
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.storage.disk import Disk, folder_at_once, write_atomically
from megatron_lite.storage.outputs import check_folder


def parse_arguments() -> argparse.Namespace:
    """The command line; ConfigError for numbers that cannot be."""
    parser = ToolParser(
        prog="extend_vocabulary.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("old", metavar="OLD|RUN", help="a tokenizer, or a run folder")
    add("new", metavar="NEW", help="the tokenizer whose pieces are added")
    add("target", metavar="TO", help="the new folder")
    add("--most", type=int, help="at most so many new pieces, first learned first")
    add("--ckpt-step", type=int, help="of RUN: this iteration instead of the newest")
    asked = parser.parse_args()
    if asked.most is not None and asked.most < 1:
        raise ConfigError(f"--most {asked.most} must be at least 1")
    return asked


def main() -> int:
    """Merge, write the tokenizer or the run, and say what was gained."""
    asked = parse_arguments()
    old, target, disk = Path(asked.old), Path(asked.target), Disk()
    check_folder("TO", target, disk)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already: nothing is overwritten; name a new folder")
    source = _run_at(old, asked.ckpt_step)
    section = tokenizer_at(old) if source is None else source.data(None, None)
    merged = merge_vocabularies(section, tokenizer_at(Path(asked.new)), asked.most)
    with folder_at_once(target, disk) as partial:
        if source is None:
            for name, content in merged.files.items():
                write_atomically(partial / name, content, disk)
            place = partial
        else:
            place = _write_run(source, section, merged, partial, target, disk)
        tokenizer = build_tokenizer(section_of(section.tokenizer_type, place, [*merged.files]))
        _report(tokenizer, merged)
    if source is None:
        print(f"{target}: {', '.join(merged.files)}")
    else:
        print(f"next: python tools/pretrain_gpt.py --config {target / 'config.yaml'} --load {target} "
              "--finetune --save ...")  # fmt: skip
    return 0


def _run_at(path: Path, step: int | None) -> CheckpointSource | None:
    """The checkpoint, where the path is a run folder or one checkpoint of it."""
    if path.is_dir() and (iterations(path) or NAME in names_in(path)):
        return find_checkpoint(path, ParallelContext.serial(), step=step)
    if step is not None:
        raise ConfigError(f"--ckpt-step {step} is for run folders, and {path} is none")
    return None


def _write_run(
    source: CheckpointSource,
    old: DataConfig,
    merged: Merged,
    partial: Path,
    target: Path,
    disk: Disk,
) -> Path:
    """Tokenizer, weights and config.yaml; returns the folder of the tokenizer."""
    folder = partial / "tokenizer"
    disk.make_folder(folder)
    for name, content in merged.files.items():
        write_atomically(folder / name, content, disk)
    maker = made_with(build_tokenizer(section_of(old.tokenizer_type, folder, [*merged.files])), old)
    where = section_of(old.tokenizer_type, target.absolute() / "tokenizer", [*merged.files])
    names = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_model")
    data = {name: value for name in names if (value := getattr(where, name)) is not None}
    have = source.config.vocab_size or 0
    rows = max(have, merged.first + len(merged.added))
    facts = {"type": maker.type, "fingerprint": maker.fingerprint, "vocab_size": rows}
    if maker.eod is not None:
        facts["eod"] = maker.eod
    if BEGINS in source.manifest.tokenizer:
        facts[BEGINS] = source.manifest.tokenizer[BEGINS]
    model = resize(
        source.store, source.manifest, source.config, partial, ids=merged.first, rows=rows,
        data=data, tokenizer=merged.files, facts=facts, disk=disk,
    )  # fmt: skip
    write_atomically(partial / "config.yaml", config_yaml(model, data).encode(), disk)
    new = rows - merged.first
    print(
        f"{target}: {source.where} as iteration 0, {have} rows of the vocabulary -> {rows}\n"
        # Jensen's inequality: e to the mean score is at most the mean of e to the scores
        f"until they are trained the new rows take at most {new / rows:.2%} of the probability: a loss "
        f"on old text rises by at most {math.log1p(new / merged.first):.4f}"
    )
    return folder


def _report(tokenizer: Tokenizer, merged: Merged) -> None:
    """Whether the new pieces are given to the texts that they are."""
    ids = range(merged.first, merged.first + len(merged.added))
    texts = {number: tokenizer.decode([number]) for number in ids}
    whole = {number: text for number, text in texts.items() if text and "\ufffd" not in text}
    reached = sum(number in tokenizer.encode(text) for number, text in whole.items())
    print(
        f"{merged.first} old ids, {len(ids)} new: {tokenizer.vocab_size} in all; of {len(whole)} new "
        f"pieces that are whole characters {reached} are given to their own text, the old merges cut the "
        "others in another way"
    )


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
