"""Registry: a table whose names are the values of a setting, and which a program may add rows to.

    OPTIMIZERS: Registry[...] = Registry("optim.optimizer", {"adam": ..., "sgd": ...})

The setting names the rows of the package (`metadata={"rows": ...}`), so that a command line is
checked without importing what they are made of; rows added before it is read are taken, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

_Row = TypeVar("_Row")


class Registry(dict[str, _Row]):
    """Name -> row, chosen by the setting `section.field`."""

    def __init__(self, setting: str, rows: Mapping[str, _Row]) -> None:
        super().__init__(rows)
        assert setting not in REGISTRIES, f"{setting} has a table already"
        REGISTRIES[setting] = self


REGISTRIES: dict[str, Registry[Any]] = {}
"""section.field -> the table it chooses from, of those that are imported: others have no new rows."""


def added(setting: str, known: tuple[object, ...]) -> Iterator[str]:
    """Names of the setting's table that are not among the known."""
    return (name for name in REGISTRIES.get(setting, ()) if name not in known)
