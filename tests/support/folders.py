"""What lies in a folder, and what may befall one."""

from __future__ import annotations

import shutil
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def removed(folder: Path) -> None:
    """Delete it with all that is in it, also where a lock is renewed there meanwhile."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def renamed(folder: Path) -> None:
    """The folder is there, by another name."""
    folder.rename(folder.with_name("elsewhere"))
