"""--extend runs a user's files before the flags are read; what is wrong with one is told with its line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_lite.blueprint.optimizers import ADAM, OPTIMIZERS
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.extensions import extensions
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.registry import REGISTRIES
from megatron_lite.engines.table import ENGINES

ROW = "from megatron_lite.blueprint.optimizers import ADAM, OPTIMIZERS\n"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch):
    """What a file adds is gone after the test."""
    rows, modules = dict(OPTIMIZERS), set(sys.modules)
    yield
    OPTIMIZERS.clear()
    OPTIMIZERS.update(rows)
    for name in set(sys.modules) - modules:
        if name.startswith("megatron_lite_extension:"):
            del sys.modules[name]


def extension(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_row_of_a_file_is_a_value_of_its_flag(tmp_path: Path) -> None:
    path = extension(tmp_path, f"{ROW}OPTIMIZERS['mine'] = lambda optim, tensor: ADAM\n")
    for _ in range(2):  # the file is run once
        config = parse(["--optimizer", "mine", "--extend", path]).config
        assert config.optim.optimizer == "mine"
    assert OPTIMIZERS["mine"](config.optim, None) is ADAM and extensions() == [path]
    assert settings()["optim.optimizer"].type_name == "adam|sgd|mine"
    assert settings()["optim.optimizer"].choices == ("adam", "sgd")


def test_a_name_without_a_row_is_refused_with_the_way_to_make_one() -> None:
    with pytest.raises(ConfigError, match=r"takes one of adam, sgd; got 'mine'; .*--extend FILE"):
        parse(["--optimizer", "mine"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{ROW}\nOPTIMIZERS['mine'] = ADAMM\n", "line 3: NameError: name 'ADAMM'"),
        ("x = 1\ny = = 2\n", "line 2: SyntaxError"),
        ("import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such"),
        (None, "is no Python file"),
    ],
    ids=["name", "syntax", "import", "absent"],
)
def test_a_file_that_fails_is_a_usage_error(tmp_path: Path, text: str | None, said: str) -> None:
    path = str(tmp_path / "absent.py") if text is None else extension(tmp_path, text)
    for _ in range(2):  # nothing of it stays
        with pytest.raises(ConfigError) as failed:
            parse(["--extend", path])
        assert path in str(failed.value) and said in str(failed.value)
    assert extensions() == []


def test_extend_takes_files() -> None:
    with pytest.raises(ConfigError, match="--extend takes one or more Python files, got none"):
        parse(["--extend"])


@pytest.mark.parametrize("key", ["optim.optimizer", "parallel.engine", "train.objective"])
def test_a_setting_names_the_rows_of_its_table(key: str) -> None:
    """A plan reads the names without importing what the rows are made of."""
    assert set(REGISTRIES) >= {"optim.optimizer", "parallel.engine"} and "zero" in ENGINES
    assert settings()[key].choices == tuple(REGISTRIES[key])


def test_every_open_setting_has_a_table() -> None:
    assert {key for key, setting in settings().items() if setting.open} == set(REGISTRIES)
