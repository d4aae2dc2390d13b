"""The examples that follow published systems: their printed commands, and how a test carries one out."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.support.places import ROOT


def block(system: str) -> list[str]:
    """The commands of its README, which are the same in both languages."""
    found = [
        re.findall(r"^```bash\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for path in sorted((ROOT / "examples" / system).glob("README*.md"))
    ]
    lines = [[re.sub(r" +#.*", "", line) for line in "".join(one).splitlines()] for one in found]
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0]
    return lines[0]


def carried_out(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A line of a README, in the repository, with nothing else in the environment."""
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=500,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **env},
    )  # fmt: skip


def planned_step(printed: str) -> float:
    """Seconds of a step in a printed plan; where it says a range, what its sum says."""
    (line,) = re.findall(r"^seconds per step +(.*)$", printed, re.MULTILINE)
    return float(line.rpartition("by this sum ")[2])
