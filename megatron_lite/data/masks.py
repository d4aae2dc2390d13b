"""Token files with a mask beside them: which of a sample's tokens are learned.

PREFIX.bin  PREFIX.idx                          the samples, one sequence each
PREFIX_loss_mask.bin  PREFIX_loss_mask.idx      uint8 of the same lengths: 1 where a token is learned
PREFIX.meta.json                                names both, with their hashes
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.indexed import IndexedDataset, TokenArray
from megatron_lite.data.maps import FileMaps

MASK_SUFFIX = "_loss_mask"
MASK_DTYPE = np.dtype(np.uint8)

_TOGETHER = 1 << 14  # samples whose masks are summed at once
_AGAIN = "write both with tools/preprocess_data.py --chat"


def mask_prefix(prefix: str | os.PathLike[str]) -> str:
    """Where the mask of a pair lies."""
    return f"{os.fspath(prefix)}{MASK_SUFFIX}"


def told_of_masks(prefixes: Iterable[str]) -> list[str]:
    """A line where pairs are read as texts although a mask says what of them is learned."""
    masked = [prefix for prefix in prefixes if IndexedDataset.exists(mask_prefix(prefix))]
    if not masked:
        return []
    more = f" and of {len(masked) - 1} more" if len(masked) > 1 else ""
    return [
        f"the loss mask of {masked[0]}{more} is not read: every token counts, those of the questions, too; "
        "--objective sft goes by the mask"
    ]


class MaskedDataset(IndexedDataset):
    """Samples of a pair and what of them is learned.

    Raises DataError where the mask is missing, or is that of another pair.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        *,
        mmap_bin: bool = True,
        maps: FileMaps | None = None,
    ) -> None:
        super().__init__(prefix, mmap_bin=mmap_bin, maps=maps)
        beside = mask_prefix(prefix)
        if not IndexedDataset.exists(beside):
            raise DataError(
                f"{beside}.bin and .idx, the loss mask of {self.prefix}, are not there: nothing says "
                f"which tokens are learned - copy them, too, or {_AGAIN}"
            )
        self._mask = IndexedDataset(beside, mmap_bin=mmap_bin, maps=maps)
        if self._mask.dtype != MASK_DTYPE:
            raise DataError(
                f"{beside}: holds {self._mask.dtype}, no mask of {MASK_DTYPE} - {_AGAIN}"
            )
        mine, theirs = self.sequence_lengths, self._mask.sequence_lengths
        if not np.array_equal(mine, theirs):
            raise DataError(
                f"{beside} has {len(theirs)} sequences of {int(theirs.sum(dtype=np.int64))} tokens, "
                f"{self.prefix} {len(mine)} of {int(mine.sum(dtype=np.int64))}: it is the mask of "
                f"another pair - {_AGAIN}"
            )

    def mask(self, index: int, length: int) -> TokenArray:
        """Of the first tokens of a sample: 1 where one is learned."""
        found = self._mask.get(index, 0, length)
        if len(found) and int(found.max()) > 1:
            raise DataError(
                f"{self._mask.prefix}.bin: sequence {index} holds {int(found.max())}, a mask 0 and 1 - "
                f"the file is damaged; {_AGAIN}"
            )
        return found

    def fingerprint(self) -> str:
        """Names the content of both."""
        return f"{super().fingerprint()} {self._mask.fingerprint()}"

    def content(self) -> str:
        """The same for copies that lie elsewhere."""
        return f"{super().content()} {self._mask.content()}"

    def learned(self, start: int, stop: int, longest: int) -> npt.NDArray[np.int64]:
        """Of samples start to stop - 1: how many of each one's first `longest` tokens are learned.

        The first token is predicted from nothing, and never counts.
        """
        found = [
            _sums(self._mask.run(begin, end), self.sequence_lengths[begin:end], longest)
            for begin in range(start, stop, _TOGETHER)
            for end in [min(begin + _TOGETHER, stop)]
        ]
        return np.concatenate(found) if found else np.empty(0, np.int64)


def _sums(mask: TokenArray, lengths: npt.NDArray[np.int32], longest: int) -> npt.NDArray[np.int64]:
    """Over samples end to end, without the first token of each and what is beyond `longest`."""
    before = np.concatenate(([0], np.cumsum(mask, dtype=np.int64)))
    sizes = lengths.astype(np.int64)
    begins = np.cumsum(sizes) - sizes
    first = begins + np.minimum(sizes, 1)
    found: npt.NDArray[np.int64] = before[begins + np.minimum(sizes, longest)] - before[first]
    return found
