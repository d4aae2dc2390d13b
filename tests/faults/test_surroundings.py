"""What surrounds a run: locale, home, working folder, shared memory, threads that read its data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import LAUNCHER_NAMES, TINY, TOOL, launch
from tests.support.rights import needs_namespaces
from tests.support.sizes import with_flags

BARE = 'mount -t tmpfs -o ro none /dev/shm && mount -t tmpfs -o ro none "$1" && cd "$1" && shift && exec "$@"'


@pytest.mark.ci
@pytest.mark.root
@pytest.mark.parametrize("saves", [True, False])
def test_no_locale_no_home_no_shared_memory_and_a_folder_that_cannot_be_written(
    tmp_path: Path, saves: bool
) -> None:
    needs_namespaces()
    (tmp_path / "here").mkdir()
    run = tmp_path / "l\u00e4uft \u8bad\u7ec3"
    kept = ["--save", str(run), "--save-interval", "3"] if saves else []
    env = {n: v for n, v in os.environ.items() if n not in (*LAUNCHER_NAMES, "HOME", "LANG")}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", BARE, "sh", str(tmp_path / "here"),
         sys.executable, str(TOOL), *TINY, *kept],
        env=env | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True, timeout=120,
    )  # fmt: skip
    said = done.stderr.decode(errors="replace")
    assert done.returncode == (0 if saves else 5), said
    assert "Traceback" not in said
    assert (run / "iter_0000006").is_dir() == saves
    assert saves or "runs" in said


@pytest.mark.ci
def test_threads_that_read_ahead_never_hang_a_run() -> None:
    """Two ranks with two threads each, 200 steps; no process is forked for the data."""
    words = with_flags(TINY, "--num-workers", "2", "--train-iters", "200", "--log-interval", "100")
    ended = launch(2, words, deadline=120)
    assert [rank.rc for rank in ended] == [0, 0], [rank.err[-500:] for rank in ended]
    assert "iteration      200/" in ended[-1].out


@pytest.mark.ci
def test_a_compiler_that_does_not_work_is_one_warning_and_a_run_without_it(tmp_path: Path) -> None:
    """Two ranks that agree on it, and the losses of a run that was not to compile."""
    losses = {}
    for flag in ("--torch-compile", "--no-torch-compile"):
        broken = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        ended = launch(2, [*TINY, flag], deadline=120, env=broken)
        assert [rank.rc for rank in ended] == [0, 0], [rank.err[-500:] for rank in ended]
        warned = [
            line for rank in ended for line in rank.err.splitlines() if "--torch-comp" in line
        ]
        assert len(warned) == (flag == "--torch-compile"), warned
        assert all("/nowhere/c++" in line and "--no-torch-compile" in line for line in warned)
        losses[flag] = re.findall(r"lm loss: \S+", ended[-1].out)
    assert " > torch.compile: nothing (--torch-compile off, on cpu)" in ended[0].out
    assert losses["--torch-compile"] == losses["--no-torch-compile"] != []
