"""Make a flat token file (uint16 in one row, the nanoGPT layout) a pair that the trainer reads.

python tools/convert_flat.py train.bin --eod 50256                       writes train.idx beside it
python tools/convert_flat.py train.bin --eod 50256 --output-prefix OUT   copies to OUT.bin, OUT.idx

A document ends with the token --eod; whatever follows the last one is a document, too.  The header of
llm.c's files and of .npy files is left out, with a line; files of other kinds are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.data.preparing.check import verify
from megatron_lite.data.preparing.flat import convert_flat, index_flat
from megatron_lite.storage.disk import Disk
from megatron_lite.storage.outputs import check_outputs, check_prefix


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the flat file")
    parser.add_argument("--eod", type=int, required=True, help="id that ends a document")
    parser.add_argument("--dtype", choices=("uint16", "int32"), help="uint16, or as a header says")
    parser.add_argument(
        "--output-prefix", help="copy to this pair; by default only FILE.idx is made"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    asked = _parse(sys.argv[1:] if argv is None else argv)
    prefix = asked.output_prefix or str(Path(asked.file).with_suffix(""))
    made = [f"{prefix}.idx"] + ([f"{prefix}.bin"] if asked.output_prefix else [])
    disk = Disk()
    if asked.output_prefix is not None:
        check_prefix("--output-prefix", asked.output_prefix)
    check_outputs("--output-prefix" if asked.output_prefix else "FILE", made, disk,
                  needed=Path(asked.file).stat().st_size
                  if asked.output_prefix and Path(asked.file).is_file() else 0)  # fmt: skip
    if asked.output_prefix and Path(f"{prefix}.bin").resolve() == Path(asked.file).resolve():
        raise ConfigError("--output-prefix is the file itself; leave it out to write only the .idx")
    for path in made:
        if Path(path).exists() and not asked.overwrite:
            raise ConfigError(f"{path} exists; give --overwrite or another --output-prefix")
    if asked.output_prefix:
        disk.make_folder(Path(prefix).absolute().parent)
        header = convert_flat(asked.file, asked.eod, prefix, dtype=asked.dtype, disk=disk)
        if header is not None:
            print(
                f"NOTE: {header.name} of {header.bytes} bytes is left out; {header.dtype} follows"
            )
    else:
        index_flat(asked.file, asked.eod, dtype=asked.dtype, disk=disk)
    report = verify(prefix, eod=asked.eod)
    print(
        f"{prefix}: {report.documents:,} documents, {report.tokens:,} tokens of {report.dtype}, "
        f"{report.ended_by_eod:,} end with token {asked.eod}"
    )
    if not report.ended_by_eod:
        print(
            f"WARNING: token {asked.eod} stands nowhere at an end: the file is one document - is it the "
            "--eod with which it was made?",
            file=sys.stderr,
        )
    return 0


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, go_on="nothing was finished: start it again"))


if __name__ == "__main__":
    start()
