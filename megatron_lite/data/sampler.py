"""Which samples a data parallel rank reads next; the whole state is the number consumed so far."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError
from megatron_lite.data.indices import shuffled

Int64 = npt.NDArray[np.int64]


def sample_numbers(
    consumed: int, global_batch: int, micro: int, dp_rank: int, dp_size: int
) -> Int64:
    """[microbatches, micro]: positions in the training stream this rank reads in one step.

    All ranks together read [consumed, consumed + global_batch), whatever micro and dp_size are;
    microbatch m of all ranks is the m-th run of micro * dp_size of them.
    """
    together = micro * dp_size
    assert 0 <= dp_rank < dp_size and global_batch % together == 0, (global_batch, micro, dp_size)
    first = consumed + np.arange(global_batch // together, dtype=np.int64) * together
    return first[:, None] + (dp_rank * micro + np.arange(micro, dtype=np.int64))[None, :]


class Order:
    """Positions of the training stream -> sample numbers of a dataset of `size` samples.

    single: the dataset's own order, which must suffice.  cyclic: every epoch a new permutation,
    a function of seed and epoch.
    """

    def __init__(self, kind: Literal["single", "cyclic"], size: int, seed: int, name: str) -> None:
        self.kind = kind
        self.size = size
        self.seed = seed
        self.name = name
        self._permutations: dict[int, Int64] = {}

    def __call__(self, positions: Int64) -> Int64:
        if self.kind == "single":
            if positions.size and int(positions.max()) >= self.size:
                raise DataError(
                    f"{self.name}: no samples left: position {int(positions.max())} of "
                    f"{self.size} - the run has consumed its data; ask for more "
                    "--train-iters or --train-samples, or use --dataloader-type cyclic"
                )
            return positions
        numbers = np.empty_like(positions)
        epochs = positions // self.size
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self._permutation(int(epoch))[positions[here] % self.size]
        return numbers

    def _permutation(self, epoch: int) -> Int64:
        known = self._permutations
        if epoch not in known:
            for old in [other for other in known if abs(other - epoch) > 1]:
                known.pop(old, None)
            # RandomState's stream never changes, whatever the version of numpy
            random = np.random.RandomState((self.seed, epoch))
            known[epoch] = shuffled(np.arange(self.size, dtype=np.int64), random)
        return known[epoch]
