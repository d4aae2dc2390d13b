"""The texts of a corpus, one after the other, as the flags of add_input_flags say."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from megatron_lite.data.preparing.input_flags import longest_line
from megatron_lite.data.preparing.inputs import find_inputs, plan_inputs, read_batches
from megatron_lite.data.preparing.records import Reader

_BATCH = 1 << 20  # bytes


def corpus_texts(arguments: argparse.Namespace) -> Iterator[str]:
    """The texts of all records and keys; nothing but the current batch is held."""
    longest = longest_line(arguments)
    reader = Reader(arguments.json_keys, arguments.template, arguments.on_bad_line, longest)
    parts = plan_inputs(find_inputs(arguments.input), unit=arguments.text_unit)
    for batch in read_batches(parts, _BATCH, columns=reader.columns, longest=longest):
        parsed = reader.parse(batch)
        places = [iter(key.texts) for key in parsed.keys]
        for record in range(len(parsed.lines)):
            for key, rest in zip(parsed.keys, places, strict=True):
                yield from itertools.islice(rest, key.counts[record])
