"""Train a tokenizer on a corpus: byte-level BPE (GPT-2's files) or SentencePiece (BPE, unigram)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.preparing.input_flags import add_input_flags
from megatron_lite.data.preparing.reading import corpus_texts
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2BPETokenizer
from megatron_lite.data.tokenizers.sentencepiece import GPTSentencePieceTokenizer
from megatron_lite.data.tokenizers.training import (
    SentencePieceSettings,
    TextSample,
    report_lines,
    train_bpe,
    train_sentencepiece,
)
from megatron_lite.storage.disk import Disk, write_atomically
from megatron_lite.storage.outputs import check_outputs

MODEL = "tokenizer.model"
BPE = ("gpt2-vocab.json", "gpt2-merges.txt")
SMALLEST = {"bpe": 257, "sentencepiece-bpe": 260, "sentencepiece-unigram": 260}


def parse_arguments() -> argparse.Namespace:
    """The flags; ConfigError for sizes that cannot work."""
    parser = ToolParser(prog="train_tokenizer.py", description=__doc__)
    add = parser.add_argument
    add_input_flags(add, keys="all of them are learned from")
    add("--type", choices=list(SMALLEST), default="bpe", help="bpe writes GPT-2's two files")
    add("--vocab-size", type=int, required=True, help="ids, special tokens included")
    add("--output-dir", required=True)
    add("--overwrite", action="store_true", help="replace a vocabulary that is there")
    add("--max-token-chars", type=int, default=16, help="longest token in characters")
    add("--han-runs", action="store_true", help="bpe: no token joins Han with other letters")
    add = parser.add_argument_group("SentencePiece").add_argument
    add("--character-coverage", type=float, default=0.9995, help="share of characters in pieces")
    add("--normalizer", choices=["identity", "nfkc", "nmt_nfkc"], default="identity",
        help="identity keeps full-width punctuation")  # fmt: skip
    add("--no-byte-fallback", action="store_true", help="rare characters become <unk>")
    add("--input-sentence-size", type=int, default=0, help="sample so many lines; 0: all")
    arguments = parser.parse_args()
    smallest = SMALLEST[arguments.type]
    if arguments.vocab_size < smallest:
        raise ConfigError(
            f"--vocab-size {arguments.vocab_size} must be at least {smallest}: "
            "256 bytes and the special tokens"
        )
    if arguments.max_token_chars < 1:
        raise ConfigError(f"--max-token-chars {arguments.max_token_chars} must be at least 1")
    if arguments.han_runs and arguments.type != "bpe":
        raise ConfigError(
            "--han-runs is for --type bpe: SentencePiece keeps scripts apart by itself"
        )
    if not 0.9 <= arguments.character_coverage <= 1:
        raise ConfigError(
            f"--character-coverage {arguments.character_coverage} must be from 0.9 to 1"
        )
    return arguments


def main() -> int:
    """Train, write the files whole, and print the report."""
    arguments = parse_arguments()
    folder, disk, sample = Path(arguments.output_dir), Disk(), TextSample()
    paths = [folder / name for name in (BPE if arguments.type == "bpe" else [MODEL])]
    check_outputs("--output-dir", paths, disk)
    for path in paths:
        if path.exists() and not arguments.overwrite:
            raise ConfigError(f"{path} exists; give --overwrite or another --output-dir")
    disk.make_folder(folder)
    corpus = sample.watch(corpus_texts(arguments))
    names = [str(path) for path in paths]
    tokenizer: Tokenizer
    if arguments.type == "bpe":
        files = train_bpe(
            corpus, arguments.vocab_size, arguments.max_token_chars, han_runs=arguments.han_runs
        )
        for name, content in files.items():
            write_atomically(folder / name, content, disk)
        tokenizer = GPT2BPETokenizer(*names)
    else:
        settings = SentencePieceSettings(
            kind=arguments.type.removeprefix("sentencepiece-"),
            vocab_size=arguments.vocab_size,
            max_token_chars=arguments.max_token_chars,
            character_coverage=arguments.character_coverage,
            normalizer=arguments.normalizer,
            byte_fallback=not arguments.no_byte_fallback,
            sample=arguments.input_sentence_size,
        )
        write_atomically(names[0], train_sentencepiece(corpus, settings), disk)
        tokenizer = GPTSentencePieceTokenizer(names[0])
    if tokenizer.vocab_size < arguments.vocab_size:
        print(
            f"note: the text has only {tokenizer.vocab_size} tokens worth learning, "
            f"fewer than --vocab-size {arguments.vocab_size}",
            file=sys.stderr,
        )
    print(f"{', '.join(names)}: {tokenizer.vocab_size} tokens, end of document {tokenizer.eod}")
    for line in report_lines(tokenizer, sample.texts):
        print(line)
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
