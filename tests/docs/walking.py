"""Guides whose blocks are run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.places import ROOT

GUIDES = ROOT / "docs/guides"
NEXT = "\x1e"


def read(guide: str) -> str:
    return (GUIDES / f"{guide}.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def in_shell(codes: list[str], folder: Path) -> list[list[str]]:
    """The same of shell, in a folder that has the tools."""
    for name in ("tools", "megatron_lite"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    script = "\nprintf '\\036'\n".join(["set -euo pipefail", *codes])
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(folder)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [part.strip("\n").splitlines() for part in done.stdout.split(NEXT)[1:]]
