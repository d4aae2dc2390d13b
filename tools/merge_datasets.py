#!/usr/bin/env python3
"""Join token pairs into one, in the order given; the shards of a large preprocessing, for example.

python tools/merge_datasets.py --input PREFIX_OR_FOLDER [...] --output-prefix OUT [--overwrite]

A folder stands for all its pairs in the order of their names.  All must have one dtype and, where
their .meta.json says so, one tokenizer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.indexed import IndexedDataset, bin_path, idx_path
from megatron_lite.data.indexed_builder import IndexedDatasetBuilder


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, or folders of pairs")
    parser.add_argument("--output-prefix", required=True, help="path of the new pair")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing pair")
    return parser.parse_args(argv)


def prefixes(inputs: Sequence[str]) -> list[str]:
    """The pairs that the inputs name; numbers in names count as numbers, so 2 comes before 10."""
    found: list[str] = []
    for one in inputs:
        folder = Path(one)
        if folder.is_dir():
            inside = [str(path.with_suffix("")) for path in folder.glob("*.idx")]
            if not inside:
                raise DataError(f"{one}: the folder holds no .idx file - give another --input")
            found += sorted(inside, key=_natural)
        else:
            found.append(one)
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _check_tokenizers(sources: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for prefix in sources:
        path = Path(f"{prefix}.meta.json")
        if not path.exists():
            continue
        try:
            name = str(json.loads(path.read_bytes())["tokenizer"]["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}) - remove or restore it") from error
        known.setdefault(name, prefix)
    if len(known) > 1:
        first, second, *_ = known.values()
        raise DataError(
            f"{first} and {second} were made with different tokenizers (.meta.json) - their ids "
            "mean different words; preprocess one of them again"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; returns the exit code."""
    asked = _parse(sys.argv[1:] if argv is None else argv)
    sources = prefixes(asked.input)
    out = asked.output_prefix
    if any(Path(prefix).resolve() == Path(out).resolve() for prefix in sources):
        raise ConfigError(f"--output-prefix {out} is one of the inputs; choose another")
    if not asked.overwrite:
        for path in (bin_path(out), idx_path(out)):
            if path.exists():
                raise ConfigError(f"{path} exists; give --overwrite or another --output-prefix")
    _check_tokenizers(sources)
    dtype = IndexedDataset(sources[0]).dtype
    with IndexedDatasetBuilder(bin_path(out), dtype) as builder:
        for prefix in sources:
            builder.add_index(prefix)
        builder.finalize(idx_path(out))
    merged = IndexedDataset(out)
    tokens = bin_path(out).stat().st_size // dtype.itemsize
    print(
        f"{out}: {len(sources)} pairs, {len(merged.document_indices) - 1:,} documents, "
        f"{tokens:,} tokens of {dtype}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
