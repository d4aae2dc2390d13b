"""How the samples of a pair of token files are made: a plan of them, and what makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_lite.data.cache import Arrays
from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.pretrain import DocumentRange, GPTPlan, TokenSource, shortage
from megatron_lite.data.samples import Samples


class SamplesPlan(Protocol):
    """Which samples of one file's split are asked for, before any array of it is built."""

    @property
    def source(self) -> TokenSource:
        """The file."""
        ...

    @property
    def name(self) -> str:
        """Its prefix."""
        ...

    @property
    def split(self) -> str:
        """Which of them."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The arrays that the samples need."""
        ...

    def __len__(self) -> int: ...

    def key(self) -> dict[str, Any]:
        """All that the arrays depend on."""
        ...

    def build(self) -> Arrays:
        """The arrays."""
        ...

    def dataset(self, arrays: Arrays, /) -> Samples:
        """The samples, of what build() gives, from a cache perhaps."""
        ...


@dataclass(frozen=True, slots=True)
class SampleForm:
    """How samples are made of a pair: what opens it, what draws up a plan; why there are none, in words."""

    open: Callable[..., IndexedDataset] = IndexedDataset
    draw_up: Callable[..., SamplesPlan] = GPTPlan.draw_up
    shortage: Callable[[TokenSource, DocumentRange, int, int | None], str] = shortage


STREAM = SampleForm()
"""Cut from a stream of documents, as Megatron does."""
