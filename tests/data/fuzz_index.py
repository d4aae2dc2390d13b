"""Damaged .idx files against the parser: it accepts what is consistent and refuses all else in words.

python -m tests.data.fuzz_index --seconds 60 [--seed 0]

Anything but a DataError, or an accepted index that would read outside .bin, is a finding: the
bytes are printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import struct
import sys
import time
from pathlib import Path

import numpy as np

from megatron_lite.config.errors import DataError
from megatron_lite.data.indexed import CODES, HEADER, MAGIC, VERSION, check_index

PATH = Path("fuzzed.idx")
INTERESTING = (0, 1, -1, 2**7, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32, 2**62, -(2**63), 2**63 - 1)


def valid(random: np.random.Generator) -> bytes:
    """An intact index of a few sequences."""
    dtype = random.choice(list(CODES))
    lengths = random.integers(0, 9, random.integers(0, 12)).astype("<i4")
    inside = np.sort(random.integers(0, len(lengths) + 1, random.integers(0, 6)))
    bounds = np.concatenate(([0], inside, [len(lengths)])).astype("<i8")
    nbytes = lengths.astype("<i8") * np.dtype(dtype).itemsize
    header = HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], len(lengths), len(bounds))
    pointers = (np.cumsum(nbytes) - nbytes).astype("<i8")
    return header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes()


def damaged(data: bytes, random: np.random.Generator) -> bytes:
    """One to four wounds: flipped bits, cut or added bytes, numbers at the edges of their types."""
    found = bytearray(data)
    for _ in range(int(random.integers(1, 5))):
        kind = random.integers(6)
        at = int(random.integers(len(found))) if found else 0
        if kind == 0 and found:
            found[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            del found[at : at + int(random.integers(1, 40))]
        elif kind == 2:
            found[at:at] = random.bytes(int(random.integers(1, 40)))
        elif kind == 3 and found:
            found[at] = int(random.integers(256))
        else:
            number = int(random.choice(np.array(INTERESTING, dtype=object)))
            width = 8 if kind == 4 else 4
            fits = struct.pack("<q", max(min(number, 2**63 - 1), -(2**63)))[:width]
            # the header's counts as often as all the rest
            at = int(random.choice([18, 26, at]))
            found[at : at + width] = fits
    return bytes(found)


def problem(data: bytes) -> str | None:
    """What the parser did wrong with these bytes, or None."""
    try:
        layout = check_index(PATH, data)
    except DataError as error:
        return None if PATH.name in str(error) else f"an error without the file's name: {error}"
    except Exception as error:  # what we look for
        return f"{type(error).__name__}: {error}"
    index = layout.arrays(data)
    ends = index.pointers + index.lengths.astype(np.int64) * layout.dtype.itemsize
    total = int(index.lengths.sum(dtype=np.int64)) * layout.dtype.itemsize
    if len(ends) and (index.lengths.min() < 0 or index.pointers.min() < 0 or ends.max() > total):
        return "accepted, but a sequence lies outside .bin"
    bounds = index.documents
    if bounds[0] != 0 or bounds[-1] != len(index.lengths) or np.any(np.diff(bounds) < 0):
        return "accepted, but the documents do not cover the sequences"
    return None


def fuzz(seconds: float, seed: int = 0) -> tuple[int, int]:
    """(files tried, files accepted); AssertionError with the bytes of the first finding."""
    random = np.random.default_rng(seed)
    tried, accepted = 0, 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = valid(random)
        assert problem(data) is None, data.hex()
        for _ in range(50):
            wounded = damaged(data, random)
            found = problem(wounded)
            assert found is None, f"{found}: {wounded.hex()}"
            tried += 1
            try:
                check_index(PATH, wounded)
                accepted += 1
            except DataError:
                pass
    return tried, accepted


def main() -> int:
    """Fuzz for --seconds; the exit code says whether something was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    try:
        tried, accepted = fuzz(asked.seconds, asked.seed)
    except AssertionError as error:
        print(error)
        return 1
    print(f"{tried} damaged indices: {accepted} consistent ones read, the others refused in words")
    return 0


if __name__ == "__main__":
    sys.exit(main())
