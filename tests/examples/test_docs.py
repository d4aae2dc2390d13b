"""The documents say what is there: the floors picture, links, variables, file names."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.extras import named_in_setup
from tests.support.places import ROOT

DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
)


def floors() -> str:
    """The picture in the package's docstring."""
    tree = ast.parse((ROOT / "megatron_lite/__init__.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree, clean=False)
    assert docstring is not None
    return "\n".join(line for line in docstring.splitlines() if line.startswith("    "))


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "docs/ARCHITECTURE.md"])
def test_the_floors_picture_is_the_package_docstring_s(name: str) -> None:
    assert floors().count("\n") >= 9
    assert floors() in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    dead = [
        link
        for link in links
        if link and "://" not in link and not (path.parent / link).resolve().exists()
    ]
    assert dead == []


def test_every_folder_of_the_package_is_on_a_floor() -> None:
    folders = {path.parent.name for path in (ROOT / "megatron_lite").glob("*/__init__.py")}
    named = set(re.findall(r"(\w+)/", floors()))
    assert folders <= named


def test_every_variable_of_the_175b_script_is_in_its_table() -> None:
    script = (ROOT / "examples/gpt3/train_gpt3_175b_distributed.sh").read_text(encoding="utf-8")
    table = (ROOT / "examples/gpt3/README.md").read_text(encoding="utf-8")
    variables = set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?-", script)) - {"SLURM_NODEID"}
    assert len(variables) > 30
    assert {name for name in variables if f"`{name}`" not in table} == set()


def test_make_alone_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    done = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    listed = {line.split()[0] for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert targets <= listed


@pytest.mark.parametrize(
    ("extra", "file"), [("test", "constraints.txt"), ("oracles", "constraints-oracles.txt")]
)
def test_what_an_environment_is_made_of_is_pinned(extra: str, file: str) -> None:
    pins = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([a-z0-9-]+)==", pins, flags=re.MULTILINE))
    assert pinned and set(named_in_setup()[extra]) - pinned == set()


def test_nothing_says_that_a_package_index_has_megatron_lite() -> None:
    """`pip install 'megatron_lite[extra]'` finds nothing; how_to_install() says what works."""
    asked = ["git", "-C", str(ROOT), "grep", "-nE", r"pip install [^`]*megatron[_-]lite(\[|$| )"]
    where = ["--", ".", ":!tests", ":!CHANGELOG.md"]
    done = subprocess.run([*asked, *where], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")  # 1: nothing found
