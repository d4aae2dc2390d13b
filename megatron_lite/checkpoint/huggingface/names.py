"""Canonical names of tensors -> where a family of Hugging Face keeps them, as a table of modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_lite.config.sections.model import ModelConfig

_HEAD = "head"
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)", re.ASCII)
_OUTSIDE = re.compile(r"(.+)\.(weight|bias)")


class FusedPart(NamedTuple):
    """One of several matrices that a Hugging Face module holds below one another, counted from 0.

    by_head: they are mixed: the rows that belong to key and value head 0 of every part, those of head
    1, and so on.
    """

    module: str
    number: int
    by_head: bool = False


class Source(NamedTuple):
    """Where a canonical tensor lies in their files.

    transposed: they keep [in, out]; part: which of a fused tensor, None for the whole; groups: the
    parts of a fused tensor come so many times one after the other, each a share of its rows.
    """

    name: str
    transposed: bool = False
    part: int | None = None
    groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The modules of a family by our canonical ones; `weight` and `bias` of each are called so.

    prefix: of every name but the head's; files of the model without its head leave it out.
    outside: those outside of the layers, "head" among them; layer: what stands before a module of
    a layer, with its number as {}; block: the modules of a layer.
    transposed: whether the matrices of a layer are kept [in, out] (GPT-2's Conv1D).
    constants: ends of names that are no weights, which old files keep beside them.
    """

    prefix: str
    outside: Mapping[str, str]
    layer: str
    block: Mapping[str, str | FusedPart]
    transposed: bool = False
    constants: tuple[str, ...] = ()

    @property
    def head(self) -> str:
        """The full name of the output matrix, there or not."""
        return f"{self.outside[_HEAD]}.weight"

    def full(self, name: str) -> str:
        """A name as a file has it, with the prefix that some files leave out."""
        own = name == self.head or name.startswith(self.prefix)
        return name if own else self.prefix + name

    def source(self, canonical: str, model: ModelConfig) -> Source:
        """The place of a canonical tensor; KeyError where the family has none for it."""
        inside = _LAYER.fullmatch(canonical)
        if inside is None:
            outside = _OUTSIDE.fullmatch(canonical)
            if outside is None or outside[1] not in self.outside:
                raise KeyError(f"{canonical} has no place in {self.prefix}*")
            module, leaf = outside.groups()
            before = "" if module == _HEAD else self.prefix
            return Source(f"{before}{self.outside[module]}.{leaf}")
        layer, module, leaf = inside.groups()
        if module not in self.block:
            raise KeyError(f"{canonical} has no place in {self.prefix}{self.layer}*")
        theirs, before = self.block[module], self.prefix + self.layer.format(layer)
        transposed = self.transposed and leaf == "weight" and not module.endswith("norm")
        if isinstance(theirs, str):
            return Source(f"{before}{theirs}.{leaf}", transposed)
        groups = model.num_kv_heads if theirs.by_head else 1
        return Source(f"{before}{theirs.module}.{leaf}", transposed, theirs.number, groups)
