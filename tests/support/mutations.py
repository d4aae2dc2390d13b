"""Files that are nearly what they should be."""

from __future__ import annotations

import random
from collections.abc import Iterator


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """So many files that are nearly this one."""
    draw = random.Random(seed)
    for _ in range(count):
        found = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(found)) if found else 0
            kind = draw.randrange(4)
            if kind == 0 and found:
                found[at] = draw.randrange(256)
            elif kind == 1:
                found[at:at] = draw.randbytes(draw.randint(1, 9))
            elif kind == 2:
                del found[at : at + draw.randint(1, 30)]
            else:
                del found[max(at, 1) :]
        yield bytes(found)
