"""Which samples a data parallel rank reads next; the whole state is the number consumed so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import DataError

_Int64 = npt.NDArray[np.int64]
Permute: TypeAlias = Callable[[int, int], _Int64]
"""(size, seed) -> a permutation of so many numbers."""
OrderKind: TypeAlias = Literal["single", "repeated", "cyclic"]


def sample_numbers(
    consumed: int, micro: int, num_microbatches: int, dp_rank: int, dp_size: int
) -> _Int64:
    """[num_microbatches, micro]: positions in the training stream this rank reads in one step.

    All ranks together read the global batch that begins at `consumed`, whatever micro and dp_size
    are; micro batch m of all ranks is the m-th run of micro * dp_size samples.
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    first = consumed + np.arange(num_microbatches, dtype=np.int64) * (micro * dp_size)
    return first[:, None] + (dp_rank * micro + np.arange(micro, dtype=np.int64))[None, :]


class Order:
    """Positions of the training stream -> sample numbers of a dataset of `size` samples.

    single: the dataset's own order, which must suffice.  repeated: that order again and again.
    cyclic: Megatron's, which permutes anew in every epoch; a rank reads its own part of the dataset
    (or, without `sharding`, its turns of one permutation of all), so that the order depends on dp
    and the micro batch.  Samples beyond the last whole round of micro batches are left out.
    """

    def __init__(
        self, kind: OrderKind, size: int, name: str, *, dp_size: int = 1,
        sharding: bool = True, permute: Permute | None = None,
    ) -> None:  # fmt: skip
        assert kind != "cyclic" or permute is not None, "cyclic needs a permutation"
        self.kind = kind
        self.size = size
        self.name = name
        self.dp_size = dp_size
        self.sharding = sharding
        self._permute = permute
        self._permutations: dict[tuple[int, int], _Int64] = {}

    def __call__(self, positions: _Int64, micro: int) -> _Int64:
        if self.kind == "single":
            if positions.size and int(positions.max()) >= self.size:
                raise DataError(
                    f"{self.name}: no samples left: position {int(positions.max())} of "
                    f"{self.size} - the run has consumed its data; ask for more "
                    "--train-iters or --train-samples, or use --dataloader-type cyclic"
                )
            return positions
        if self.kind == "repeated":
            return positions % self.size
        together = micro * self.dp_size
        used = self.size - self.size % together
        if used == 0:
            raise DataError(
                f"{self.name}: {self.size} samples are fewer than --micro-batch-size {micro} x "
                f"data-parallel size {self.dp_size}, which --dataloader-type cyclic reads at once - "
                "use --dataloader-type single, or more data"
            )
        epochs, inside = np.divmod(positions, used)
        numbers = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            numbers[here] = self._of_epoch(int(epoch), inside[here], micro, used)
        return numbers

    def _of_epoch(self, epoch: int, inside: _Int64, micro: int, used: int) -> _Int64:
        turn, rest = np.divmod(inside, micro * self.dp_size)
        rank, at = np.divmod(rest, micro)
        if self.sharding:
            part = used // self.dp_size
            drawn = self._permutation(epoch, part)
            numbers: _Int64 = rank * part + drawn[turn * micro + at]
            return numbers
        drawn = self._permutation(epoch, self.size - self.size % micro)
        numbers = drawn[turn * micro * self.dp_size + at * self.dp_size + rank]
        return numbers

    def _permutation(self, epoch: int, size: int) -> _Int64:
        known = self._permutations
        if (epoch, size) not in known:
            for old in [other for other in known if abs(other[0] - epoch) > 1]:
                known.pop(old, None)
            assert self._permute is not None
            known[epoch, size] = self._permute(size, epoch)
        return known[epoch, size]
