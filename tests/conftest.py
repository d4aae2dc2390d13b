"""Settings that all tests share, and what a run may demand of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Generator, Iterator

import pytest
from hypothesis import settings

from megatron_lite.config.extensions import extensions
from tests.support.case_ids import CASE, shortened, too_long

# no deadline for an example: a busy machine is no failure; the suite has time limits of its own
settings.register_profile("megatron_lite", deadline=None)
settings.load_profile("megatron_lite")


@pytest.fixture(autouse=True)
def forgotten_extensions() -> Iterator[None]:
    """A file that a test ran by --extend in this process is new to the next test."""
    yield
    for path in extensions():
        del sys.modules[f"megatron_lite_extension:{path}"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips-but", metavar="MARKS",
        help="a test that is skipped fails unless it has one of these marks, e.g. gpu,root",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # A shell may have had these ignored (a job in the background, nohup), and every program that a test
    # starts would ignore them, too.  A handler is not inherited, so here they are still survived.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def forbid(report: pytest.TestReport | pytest.CollectReport, marks: str) -> None:
    """A skip becomes a failure that gives its reason."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{reason} (and --no-skips-but {marks})"


def is_marked(item: pytest.Item, marks: str) -> bool:
    return any(map(item.get_closest_marker, marks.split(",")))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    marks = item.config.getoption("--no-skips-but")
    expected = hasattr(report, "wasxfail")
    if marks and report.skipped and not (expected or is_marked(item, marks)):
        forbid(report, marks)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    marks = collector.config.getoption("--no-skips-but")
    if marks and report.skipped:  # a whole file, before its marks are known
        forbid(report, marks)
    return report


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    return shortened(val, argname)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if found := too_long(item.name for item in items):
        raise pytest.UsageError(
            f"{len(found)} cases have names of more than {CASE} characters; "
            "give them an id: " + ", ".join(found)
        )
