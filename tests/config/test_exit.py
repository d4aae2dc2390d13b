"""Every program ends with one FATAL line and the code of the failure's class."""

from __future__ import annotations

import pytest

from megatron_lite.config.errors import ConfigError, DataError, StorageError
from megatron_lite.config.exit import ToolParser, fatal_line, run_tool


def fail_with(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    "error, code", [(ConfigError("a"), 2), (DataError("a"), 3), (StorageError("a"), 5)]
)
def test_a_foreseen_failure_is_one_line_and_its_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(lambda: fail_with(error), argv=[]) == code
    assert capsys.readouterr().err == f"FATAL[{code}] rank=- step=-: a\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: fail_with(DataError("a")), argv=["--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_70_with_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: fail_with(ValueError("odd")), argv=[]) == 70
    err = capsys.readouterr().err
    assert err.startswith("FATAL[70] rank=- step=-: ValueError: odd - a bug of ours - please")
    assert "Traceback" in err


def test_success_and_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: 0, argv=[]) == 0
    assert run_tool(lambda: fail_with(KeyboardInterrupt()), argv=[]) == 130
    assert "Ctrl-C" in capsys.readouterr().err


def test_the_line_names_rank_and_step() -> None:
    assert fatal_line(DataError("x"), rank=3, step=12) == "FATAL[3] rank=3 step=12: x"


def test_parser_errors_are_config_errors_and_flags_are_not_abbreviated() -> None:
    parser = ToolParser(prog="tool")
    parser.add_argument("--workers", type=int)
    with pytest.raises(ConfigError, match="--work"):
        parser.parse_args(["--work", "2"])
    with pytest.raises(ConfigError, match="invalid int value: 'x'.*tool --help"):
        parser.parse_args(["--workers", "x"])
    with pytest.raises(ConfigError, match="--workers: 9223372036854775808 is beyond 2.63 - 1"):
        parser.parse_args(["--workers", str(2**63)])
    assert parser.parse_args(["--workers", "-9223372036854775808"]).workers == -(2**63)
