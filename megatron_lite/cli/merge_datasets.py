"""Join token pairs into one, in the order given; the shards of a large preprocessing, for example.

python tools/merge_datasets.py --input PREFIX_OR_FOLDER [...] --output-prefix OUT [--overwrite]

A folder stands for all its pairs in the order of their names; a loss mask beside one goes with it.
All must have one dtype and, where their .meta.json says so, one tokenizer, which the new pair's
.meta.json then names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.errors import ConfigError, DataError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.indexed import IndexedDataset, bin_path, idx_path
from megatron_lite.data.masks import MASK_SUFFIX, MaskedDataset, mask_prefix
from megatron_lite.data.preparing.facts import joined, write_facts
from megatron_lite.data.preparing.indexed_builder import IndexedDatasetBuilder
from megatron_lite.data.provenance import (
    ALLOW_MISMATCH,
    maker_of,
    read_facts,
    require_same,
    told_of_unknown,
)
from megatron_lite.data.taught import taught_alike, taught_of
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, check_prefix, pair_paths, require_room


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes, or folders of pairs")
    parser.add_argument("--output-prefix", required=True, help="path of the new pair")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing pair")
    parser.add_argument(
        ALLOW_MISMATCH, action="store_true", help="join pairs of different tokenizers all the same"
    )
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
            found += sorted((p for p in inside if not _is_mask(p)), key=_natural)
        else:
            found.append(one)
    return found


def _is_mask(prefix: str) -> bool:
    """Whether a pair is the mask beside another, which brings it along."""
    return prefix.endswith(MASK_SUFFIX) and IndexedDataset.exists(prefix.removesuffix(MASK_SUFFIX))


def _masked(sources: Sequence[str]) -> bool:
    """Whether all have a loss mask beside them; DataError where only some have, or speak another way."""
    without = [prefix for prefix in sources if not IndexedDataset.exists(mask_prefix(prefix))]
    if without and len(without) < len(sources):
        raise DataError(
            f"{without[0]} has no loss mask beside it, and others have: what of it is learned is not "
            "known - join only pairs of tools/preprocess_data.py --chat, or only others"
        )
    if without:
        return False
    for prefix in sources:
        MaskedDataset(prefix)
    taught_alike({prefix: taught_of(prefix) for prefix in sources})
    return True


def _join(sources: Sequence[str], out: str, disk: Disk) -> None:
    with IndexedDatasetBuilder(bin_path(out), IndexedDataset(sources[0]).dtype, disk) as builder:
        for prefix in sources:
            builder.add_index(prefix)
        builder.finalize(idx_path(out))


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; returns the exit code."""
    asked = _parse(sys.argv[1:] if argv is None else argv)
    out, disk = asked.output_prefix, Disk()
    check_prefix("--output-prefix", out)
    check_outputs("--output-prefix", pair_paths(out), disk)
    sources = prefixes(asked.input)
    if any(Path(prefix).resolve() == Path(out).resolve() for prefix in sources):
        raise ConfigError(f"--output-prefix {out} is one of the inputs; choose another")
    if not asked.overwrite:
        for path in (bin_path(out), idx_path(out)):
            if path.exists():
                raise ConfigError(f"{path} exists; give --overwrite or another --output-prefix")
    makers = {prefix: maker_of(IndexedDataset(prefix)) for prefix in sources}
    said = require_same(makers, None, allowed=asked.allow_tokenizer_mismatch, whose="")
    for line in (*said, *told_of_unknown(makers)):
        print(f"NOTE: {line}", file=sys.stderr)
    dtype, masked = IndexedDataset(sources[0]).dtype, _masked(sources)
    sizes = (path(prefix).stat().st_size for prefix in sources for path in (bin_path, idx_path))
    require_room("--output-prefix", Path(out).absolute().parent, sum(sizes), disk)
    facts = [] if said else [read_facts(prefix) for prefix in sources]
    disk.make_folder(Path(out).absolute().parent)
    if masked:  # before the samples: where they stand it is there
        _join([mask_prefix(prefix) for prefix in sources], mask_prefix(out), disk)
    _join(sources, out, disk)
    if facts and None not in makers.values():
        write_facts(out, joined([one for one in facts if one is not None]), disk)
    merged = IndexedDataset(out)
    tokens = bin_path(out).stat().st_size // dtype.itemsize
    print(
        f"{out}: {len(sources)} pairs, {len(merged.document_indices) - 1:,} documents, "
        f"{tokens:,} tokens of {dtype}"
    )
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
