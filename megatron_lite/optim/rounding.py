"""fp32 moments into bf16 ones: rounded up or down so that the mean over updates is exact.

Rounded to nearest, a mean that moves by less than half a step of bf16 (2^-9 of its value) stands
still: with beta2 0.999 the second moment would never fall again.  Here a number rounds up where the
16 bits that bf16 leaves out reach a threshold, which walks evenly through all of them from update
to update: the fractional parts of multiples of the golden ratio.  One threshold for all elements of
an update, so that the result depends on no layout, a resumed run continues bit for bit, and there is
nothing to draw or to remember.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
_KEPT = -0x10000  # the upper 16 bits of 32: what bf16 has of an fp32 number


def threshold(update: int) -> int:
    """0 to 65535, of the update after so many: what is added to the 16 bits before they are cut."""
    return ((update + 1) * _GOLDEN & 0xFFFFFFFF) >> 16


def round_into(stored: Sequence[Tensor], exact: Sequence[Tensor], *, update: int) -> None:
    """exact: fp32, overwritten -> stored: bf16 of the same shapes; what bf16 can hold stays as it is.

    A tensor that is both, fp32 already, stays as it is, too.
    """
    pairs = [(kept, wide) for kept, wide in zip(stored, exact, strict=True) if kept is not wide]
    if not pairs:
        return
    bits = [wide.view(torch.int32) for _, wide in pairs]
    torch._foreach_add_(bits, threshold(update))
    for each in bits:
        each &= _KEPT
    torch._foreach_copy_([kept for kept, _ in pairs], [wide for _, wide in pairs])
