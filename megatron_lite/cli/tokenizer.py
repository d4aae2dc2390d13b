"""What a tokenizer does to a text: pieces, ids, characters per token, unknown share.

python tools/tokenizer.py --tokenizer-type T <its files> --text "..." ["..."]    every piece with its id
python tools/tokenizer.py --tokenizer-type T <its files> --input FILES           numbers about a corpus
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.sections.data import DataConfig
from megatron_lite.data.preparing.input_flags import add_input_flags
from megatron_lite.data.preparing.reading import corpus_texts
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.build import TOKENIZERS, build_tokenizer
from megatron_lite.data.tokenizers.examining import changed_from, measure, pieces_of
from megatron_lite.data.tokenizers.training import TextSample, longest_line_of

_FILES = (
    "tokenizer_type", "vocab_file", "merge_file", "tokenizer_model", "chatglm_special_tokens",
    "tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens",
)  # fmt: skip


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ConfigError where there is nothing to look at."""
    parser = ToolParser(
        prog="tokenizer.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--tokenizer-type", default="GPT2BPETokenizer", help=", ".join(TOKENIZERS))
    add("--vocab-file", help="gpt2-vocab.json")
    add("--merge-file", help="gpt2-merges.txt")
    add("--tokenizer-model", help="folder or file of the other tokenizers")
    add("--vocab-size", type=int, help="for NullTokenizer; cuts TikTokenizer's .json")
    add("--tiktoken-pattern", help="v1, v2, gpt2, cl100k or o200k; by the file's name")
    add("--tiktoken-num-special-tokens", type=int, default=1000, help="before the ranks of a .json")
    add("--tiktoken-special-tokens", nargs="+", default=[], help="names of the first of them")
    add("--chatglm-special-tokens", action="store_true", help="ChatGLM2's five, appended")
    add("--text", nargs="+", action="extend", default=[], help="show these, piece by piece")
    add("--most-pieces", type=int, default=200, help="of each text (%(default)s)")
    add_input_flags(add, keys="all of them are looked at", required=False)
    asked = parser.parse_args(argv)
    if not asked.text and not asked.input:
        raise ConfigError('nothing to look at: give --text "..." or --input FILES')
    if asked.most_pieces < 1:
        raise ConfigError(f"--most-pieces {asked.most_pieces} must be at least 1")
    return asked


def main() -> int:
    """Build it, show each text, measure the corpus."""
    asked = parse_arguments(sys.argv[1:])
    data = DataConfig(**{name: getattr(asked, name) for name in _FILES})
    tokenizer = build_tokenizer(data, vocab_size=asked.vocab_size)
    print(f"{asked.tokenizer_type}: {tokenizer.vocab_size} ids")
    for text in asked.text:
        show(tokenizer, text, asked.most_pieces)
    if asked.input:
        sample = TextSample()
        total = sum(1 for _ in sample.watch(corpus_texts(asked)))
        print(f"a sample of {len(sample.texts)} of {total} texts:")
        print("\n".join(measure(tokenizer, sample.texts).lines))
        print(longest_line_of(tokenizer))
    return 0


def show(tokenizer: Tokenizer, text: str, most: int) -> None:
    """A text's pieces, one a line, and its numbers."""
    ids = tokenizer.encode(text)
    width = len(str(tokenizer.vocab_size))
    print(f"{text!r}:")
    for piece in pieces_of(tokenizer, ids[:most]):
        note = " (unknown)" if piece.id == tokenizer.unknown else ""
        what = "a part of the next character" if piece.text is None else repr(piece.text)
        print(f"  {piece.id:>{width}}  {what}{note}")
    if len(ids) > most:
        print(f"  and {len(ids) - most} more (--most-pieces)")
    print("\n".join(measure(tokenizer, [text]).lines[:2]))
    back = tokenizer.decode(ids)
    at = changed_from(text, back)
    if at is not None:
        print(f"it comes back as {back!r}: another text from character {at} on")


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
