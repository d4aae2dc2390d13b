"""`--no-skips-but`: a skip without one of the marks fails the run and gives its reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT

pytest_plugins = ["pytester"]
CONFTEST = (Path(__file__).parents[1] / "conftest.py").read_text(encoding="utf-8")
TESTS = """
import pytest

pytestmark = pytest.mark.browser

def test_runs(): pass

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no accelerator")
def test_marked(): pass

@pytest.mark.xfail
def test_expected_to_fail(): assert False

def test_of_a_marked_file(): pytest.skip("no browser")
"""
UNMARKED = """
import pytest

@pytest.mark.slow
def test_unmarked(): pytest.skip("no luck")

@pytest.fixture
def machine(): pytest.skip("no machine")

def test_in_a_fixture(machine): pass
"""
WHOLE = 'import pytest\npytest.skip("no library", allow_module_level=True)\ndef test_one(): pass'


@pytest.fixture
def toy(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(CONFTEST)
    marks = "".join(f"\n    {name}: of a toy" for name in ("gpu", "root", "browser", "slow"))
    pytester.makeini(f"[pytest]\nmarkers ={marks}\n")
    return pytester


def test_marked_skips_are_skips(toy: pytest.Pytester) -> None:
    toy.makepyfile(TESTS)
    for marks in ("gpu,root,browser", "browser"):
        done = toy.runpytest_inprocess("--no-skips-but", marks, "--strict-markers")
        done.assert_outcomes(passed=1, skipped=2, xfailed=1)
        assert done.ret == 0


def test_any_other_skip_fails_with_its_reason(toy: pytest.Pytester) -> None:
    toy.makepyfile(test_marked=TESTS, test_unmarked=UNMARKED, test_whole=WHOLE)
    words = ["--no-skips-but", "gpu,root", "--continue-on-collection-errors", "-rA"]
    done = toy.runpytest_inprocess(*words)
    done.assert_outcomes(passed=1, skipped=1, xfailed=1, failed=2, errors=2)
    assert done.ret == 1
    for what in ("luck", "machine", "library", "browser"):
        assert f"no {what} (and --no-skips-but gpu,root)" in done.stdout.str()


def test_without_the_option_a_skip_is_a_skip(toy: pytest.Pytester) -> None:
    toy.makepyfile(test_unmarked=UNMARKED, test_whole=WHOLE)
    toy.runpytest_inprocess().assert_outcomes(skipped=3)


def test_programs_of_tests_do_not_ignore_what_the_shell_ignored(
    toy: pytest.Pytester,
) -> None:
    """A job in the background of a script ignores Ctrl-C, and nohup's a hangup; so would its children."""
    toy.makepyfile("""
        import os, signal, subprocess, sys
        ASK = "import signal; print([signal.getsignal(n) == signal.SIG_IGN for n in (2, 1, 3, 15)])"
        def test_child():
            said = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
            assert said.stdout == "[False, False, False, False]\\n"
            for number in (signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), number)  # what was ignored still is, here
    """)
    ignoring = "trap '' INT HUP; exec \"$@\""
    done = subprocess.run(
        ["sh", "-c", ignoring, "sh", sys.executable, "-m", "pytest", "-q"],
        cwd=toy.path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
