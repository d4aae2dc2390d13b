"""--extend runs a user's files before the flags are read; what is wrong with one is told with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.optimizers import ADAM, OPTIMIZERS
from megatron_lite.cli import pretrain_gpt
from megatron_lite.config.errors import ConfigError, DistributedError
from megatron_lite.config.exit import run_tool
from megatron_lite.config.extensions import extensions
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.flags.settings import settings
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.registry import REGISTRIES
from megatron_lite.engines.table import ENGINES
from megatron_lite.optim.groups import Groups
from megatron_lite.optim.rules import RULES
from megatron_lite.train.ending.failures import Failures
from megatron_lite.train.objectives.language_model import LanguageModel
from megatron_lite.train.objectives.table import LOSSES
from tests.support.launch import TINY
from tests.support.tiny import draw, tiny_config

ROW = "from megatron_lite.blueprint.optimizers import ADAM, OPTIMIZERS\n"


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch):
    """The rows that a file adds are gone after the test."""
    rows = dict(OPTIMIZERS)
    yield
    OPTIMIZERS.clear()
    OPTIMIZERS.update(rows)


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
    assert settings()["optim.optimizer"].type_name.endswith("|apex-adam|mine")
    assert "mine" not in settings()["optim.optimizer"].choices


def test_a_name_without_a_row_is_refused_with_the_way_to_make_one() -> None:
    with pytest.raises(
        ConfigError, match=r"takes one of adam, .*, apex-adam; got 'mine'; .*--extend FILE"
    ):
        parse(["--optimizer", "mine"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{ROW}\nOPTIMIZERS['mine'] = ADAMM\n", "line 3: NameError: name 'ADAMM'"),
        ("x = 1\ny = = 2\n", "line 2: SyntaxError"),
        ("import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such"),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3"),
        (None, "is no Python file"),
    ],
    ids=["name", "syntax", "import", "exit", "absent"],
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
    assert "zero" in ENGINES and "language-model" in OBJECTIVES  # those of tables that are imported
    assert settings()[key].choices == tuple(REGISTRIES[key])


def test_every_open_setting_has_a_table() -> None:
    assert {key for key, setting in settings().items() if setting.open} == set(REGISTRIES)


def test_a_row_that_fails_later_is_told_with_its_line_and_is_no_bug_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{ROW}def row(optim, tensor):\n    return 1 / 0\nOPTIMIZERS['mine'] = row\n"
    path = extension(tmp_path, text)
    config = parse(["--optimizer", "mine", "--extend", path]).config
    assert run_tool(lambda: OPTIMIZERS["mine"](config.optim, None), argv=[]) == 2
    said = capsys.readouterr().err
    assert f": --extend {path}: line 3: ZeroDivisionError: division by zero\n" in said
    assert "Traceback" in said and "bug" not in said
    failures = Failures(0, folder=None, debug=False)
    try:
        OPTIMIZERS["mine"](config.optim, None)
    except ZeroDivisionError as error:
        assert failures.report(error) == 2
    assert f"--extend {path}: line 3: Zero" in capsys.readouterr().err
    assert Failures(0, folder=None, debug=False).report(KeyError("sum")) == 70
    assert f"a bug of ours, or of a row that {path} (--extend) added" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("None", "gives None for .*; it must be a Treatment"),
        ("Treatment('sgd', (State('a'), State('a')))", "states have names of their own"),
        ("Treatment('mine')", "rule 'mine', which is no row of RULES"),
        ("Treatment('idle')", "RULES makes a int for 'idle', which has no update"),
    ],
    ids=["none", "twice", "no rule", "no update"],
)
def test_a_row_of_an_optimizer_that_cannot_be_is_refused_before_a_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: str, said: str
) -> None:
    imports = "from megatron_lite.blueprint.optimizers import OPTIMIZERS, State, Treatment\n"
    path = extension(tmp_path, f"{imports}OPTIMIZERS['mine'] = lambda optim, tensor: {row}\n")
    monkeypatch.setitem(RULES, "idle", lambda optim: 3)
    config = parse(["--optimizer", "mine", "--extend", path]).config
    tensor = draw(tiny_config(), 1).parameters[0].tensor
    with pytest.raises(ConfigError, match=f"--optimizer mine.*{said}"):
        Groups(config.optim).new_state(tensor, torch.zeros(2))


def test_a_head_that_is_no_row_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="'vocab' of --objective is no row of HEADS"):
        figure_of(tiny_config().model, 64, "vocab")


def test_a_plan_that_finds_a_bug_ends_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain_gpt, "main", lambda argv: {}["odd"])
    assert pretrain_gpt.run() == 70
    assert "FATAL[70] rank=- step=-: KeyError: 'odd' - a bug of ours" in capsys.readouterr().err


def test_a_rehearsal_in_which_every_rank_breaks_off_says_where(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Fails(LanguageModel):
        def loss(self, outputs, batch):
            raise ValueError("no such outputs")

    monkeypatch.setitem(LOSSES, "language-model", lambda at: Fails())
    with pytest.raises(DistributedError, match="rank 0 breaks off: ValueError: no such outputs"):
        pretrain_gpt.main([*TINY, "--mock-data", "--rehearse"])
