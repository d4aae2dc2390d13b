"""Rights that some machines give to root alone: a test that needs one is marked `root`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

import pytest


def needs_right(command: Sequence[str], what: str) -> None:
    """A skip where the command, with `true` behind it, is not allowed or not there."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} (util-linux), {what}")
    tried = subprocess.run([*command, "true"], capture_output=True, timeout=60, check=False)
    if tried.returncode:
        pytest.skip(f"`{' '.join(command)}` is not allowed here, {what}")


def needs_namespaces(command: Sequence[str] = ("unshare", "-rm")) -> None:
    """A skip where a process cannot have mounts or process ids of its own."""
    needs_right(command, "to have namespaces of its own")
