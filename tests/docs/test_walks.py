"""How a step works: every snippet of the guide is run as it is printed, and prints what is printed there.

A block of Python or shell is followed by a block of text where it prints something.  Numbers with a
point are compared to a hundredth, the times of a machine are not shown; all else is equal.
The guide's translations have the same blocks, so that one of them is run for all.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.walking import GUIDES, NEXT, blocks, in_shell, read

LANGUAGES = ("how-a-step-works", "how-a-step-works.zh-CN")
"""The first one is run."""
FRACTION = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?")


def prose(text: str) -> str:
    """What is not in a block, in one line."""
    return " ".join(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split())


def named_in_files(text: str) -> list[tuple[str, str]]:
    """(name, file) of each `name` in [file](...), `name` ([file](...)) and `name`（[file](...)）."""
    file = r"\[[^`\]]+\]\(([^)]+\.py)\)"
    return re.findall(rf"`([A-Za-z_.]+)[^`]*` ?(?:in )?[(（]?{file}", prose(text))


def snippets(text: str, language: str) -> Iterator[tuple[str, list[str]]]:
    """(code, the lines it prints) of each block of a language."""
    found = blocks(text)
    for (kind, code), (following, printed) in zip(found, [*found[1:], ("", "")], strict=True):
        if kind == language:
            yield code, printed.splitlines() if following == "text" else []


def in_python(codes: list[str], folder: Path) -> list[list[str]]:
    """What each prints, run one after the other as one program."""
    program = folder / "walks.py"
    program.write_text(f"print({NEXT!r})\n".join(codes), encoding="utf-8")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(program))
    return [part.strip("\n").splitlines() for part in said.getvalue().split(NEXT)]


def alike(printed: str, said: str) -> bool:
    """Whether two lines are the same but for the last digits of their fractions."""
    numbers = [[float(n) for n in FRACTION.findall(line)] for line in (printed, said)]
    same = [FRACTION.sub("#", " ".join(line.split())) for line in (printed, said)]
    return same[0] == same[1] and numbers[0] == pytest.approx(numbers[1], rel=1e-2, abs=1e-4)


def check(printed: list[str], said: list[str], code: str) -> None:
    assert len(printed) == len(said), (code, printed, said)
    wrong = [pair for pair in zip(printed, said, strict=True) if not alike(*pair)]
    assert not wrong, (code, wrong)


def test_the_python_of_the_walks_prints_what_they_say(tmp_path: Path) -> None:
    found = list(snippets(read(LANGUAGES[0]), "python"))
    said = in_python([code for code, _ in found], tmp_path)
    for (code, printed), lines in zip(found, said, strict=True):
        check(printed, lines, code)


@pytest.mark.ci
def test_the_commands_of_the_walks_print_what_they_say(tmp_path: Path) -> None:
    found = list(snippets(read(LANGUAGES[0]), "bash"))
    said = in_shell([code for code, _ in found], tmp_path)
    for (code, printed), lines in zip(found, said, strict=True):
        check(printed, lines, code)


@pytest.mark.parametrize("guide", LANGUAGES)
def test_what_the_walks_name_in_a_file_is_there(guide: str) -> None:
    """`_Linear.backward` ([layers/linear.py](...)): the file has a `_Linear` and a `backward`."""
    named = named_in_files(read(guide))
    assert len(named) >= 5
    for name, file in named:
        source = (GUIDES / file).read_text(encoding="utf-8")
        missing = [word for word in name.split(".") if not re.search(rf"\b{word}\b", source)]
        assert not missing, f"{file} has no {missing}"


@pytest.mark.parametrize("guide", LANGUAGES[1:])
def test_a_translation_of_the_walks_has_the_same_blocks_links_and_names(guide: str) -> None:
    ours, theirs = read(LANGUAGES[0]), read(guide)
    assert blocks(theirs) == blocks(ours) != []
    links = [
        sorted(re.findall(r"\]\(([^)]+)\)", prose(text).replace(f"({other}.md)", "")))
        for text, other in ((ours, guide), (theirs, LANGUAGES[0]))
    ]
    assert links[1] == links[0] != []
    assert sorted(named_in_files(theirs)) == sorted(named_in_files(ours))


def test_lines_are_compared() -> None:
    assert alike("lm loss 4.1630", "lm  loss 4.1629") and not alike("loss 4.16", "loss 4.26")
    assert not alike("rank 1 [8, 2]", "rank 1 [8, 3]") and not alike("a 1.0", "b 1.0")
