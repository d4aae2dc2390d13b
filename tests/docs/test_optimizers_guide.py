"""The commands of the guide to optimizers, run as they are printed, in this process."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_lite.cli import plan
from tests.docs.walking import blocks, read
from tests.support.huggingface import tool


def test_the_advice_is_what_the_tool_says(monkeypatch, capsys) -> None:
    advice = re.split("^## ", read("optimizers"), flags=re.MULTILINE)[-1]
    (_, code), (language, shown) = blocks(advice)
    python, script, *words = shlex.split(code.replace("\\\n", " "))
    assert (python, script, language) == ("python", "tools/plan.py", "text")
    assert tool(plan.main, monkeypatch, *words) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("section", ["Muon", "GaLore", "In host memory"])
def test_the_plan_of_an_optimizer_goes_as_printed(section, monkeypatch, capsys) -> None:
    text = re.split("^## ", read("optimizers"), flags=re.MULTILINE)
    mine = next(part for part in text if part.startswith(f"{section}\n"))
    (_, code), *_ = blocks(mine)
    python, script, *words = shlex.split(code.replace("\\\n", " "))
    assert (python, script) == ("python", "tools/plan.py")
    assert tool(plan.main, monkeypatch, *words) == 0
    assert "fits" in capsys.readouterr().out
