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
from megatron_lite.data.preparing.input_flags import add_input_flags
from megatron_lite.data.preparing.reading import corpus_texts
from megatron_lite.data.preparing.tokenizer_flags import add_tokenizer_flags, tokenizer_section
from megatron_lite.data.tokenizers.base import Tokenizer
from megatron_lite.data.tokenizers.build import build_tokenizer
from megatron_lite.data.tokenizers.examining import changed_from, measure, pieces_of
from megatron_lite.data.tokenizers.training import TextSample, longest_line_of


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; ConfigError where there is nothing to look at."""
    parser = ToolParser(
        prog="tokenizer.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add_tokenizer_flags(add)
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
    tokenizer = build_tokenizer(tokenizer_section(asked), vocab_size=asked.vocab_size)
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
