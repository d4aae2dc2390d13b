"""Documents become nanoGPT's two files: train.bin and val.bin, a row of uint16, an end after each document."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_lite.config.errors import DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megatron_lite.storage.disk import Disk, write_atomically

HELD_OUT = 25
"""Of so many documents one is held out."""


def parse_arguments() -> argparse.Namespace:
    parser = ToolParser(prog="prepare.py", description=__doc__)
    parser.add_argument("documents", type=Path, help='JSON lines {"text"}')
    parser.add_argument("folder", type=Path, help="where train.bin and val.bin go")
    parser.add_argument("--vocab-file", required=True, help="GPT-2's, or one like it")
    parser.add_argument("--merge-file", required=True)
    return parser.parse_args()


def main() -> int:
    """Encode, deal out, write."""
    asked = parse_arguments()
    tokenizer = GPT2BPETokenizer(asked.vocab_file, asked.merge_file)
    if tokenizer.vocab_size > 1 << 16:
        raise DataError(
            f"--vocab-file: {tokenizer.vocab_size} ids; a flat file holds 65,536: take a smaller vocabulary"
        )
    rows: dict[str, list[int]] = {"train": [], "val": []}
    with asked.documents.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            part = rows["val" if number % HELD_OUT == 0 else "train"]
            part += [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod]
    Disk().make_folder(asked.folder)
    for name, ids in rows.items():
        write_atomically(asked.folder / f"{name}.bin", np.array(ids, "<u2").tobytes(), Disk())
        print(f"{asked.folder / name}.bin: {len(ids):,} tokens, an end is {tokenizer.eod}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))
