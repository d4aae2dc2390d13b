"""Train a byte-level BPE on JSON lines and write gpt2-vocab.json and gpt2-merges.txt."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.inputs import plan, read_batches
from megatron_lite.data.records import Reader
from megatron_lite.data.tokenizers.gpt2_bpe import EOD
from megatron_lite.storage.disk import Disk, write_atomically

BYTES = 256


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = ToolParser(prog="train_tokenizer.py", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, help="JSON-lines files")
    parser.add_argument("--vocab-size", type=int, required=True, help="ids, <|endoftext|> included")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    arguments = parser.parse_args()
    if arguments.vocab_size < BYTES + 1:
        raise ConfigError(
            f"--vocab-size {arguments.vocab_size} must be at least {BYTES + 1}: "
            f"{BYTES} bytes and {EOD}"
        )
    return arguments


def texts(paths: list[str], keys: list[str]) -> Iterator[str]:
    """The texts of all records, one after the other; nothing but the current batch is held."""
    reader = Reader(keys)
    for batch in read_batches(plan(paths), 1 << 20, columns=reader.columns):
        parsed = reader.parse(batch)
        places = [iter(key.texts) for key in parsed.keys]
        for record in range(len(parsed.lines)):
            for key, rest in zip(parsed.keys, places, strict=True):
                yield from itertools.islice(rest, key.counts[record])


def train(texts: Iterator[str], vocab_size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of vocab_size - 1 byte-level tokens, and <|endoftext|> as last id."""
    try:
        import tokenizers  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            "training a tokenizer needs the package `tokenizers`: "
            "pip install 'megatron_lite[tokenizers]'"
        ) from error
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    if EOD in vocab:
        raise DataError(f"the text made {EOD} a word of its own; remove it from the input")
    vocab[EOD] = len(vocab)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return vocab, merges


def main() -> int:
    """Train, write both files, say what they hold."""
    arguments = parse_arguments()
    vocab, merges = train(texts(arguments.input, arguments.json_keys), arguments.vocab_size)
    folder, disk = Path(arguments.output_dir), Disk()
    disk.make_folder(folder)
    merge_lines = "".join(f"{a} {b}\n" for a, b in merges)
    write_atomically(folder / "gpt2-merges.txt", f"#version: 0.2\n{merge_lines}".encode(), disk)
    write_atomically(
        folder / "gpt2-vocab.json", json.dumps(vocab, ensure_ascii=False).encode(), disk
    )
    if len(vocab) < arguments.vocab_size:
        print(
            f"note: the text has only {len(vocab)} tokens worth learning, "
            f"fewer than --vocab-size {arguments.vocab_size}",
            file=sys.stderr,
        )
    print(f"{folder}/gpt2-vocab.json: {len(vocab)} tokens, {len(merges)} merges, last {EOD}")
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
