"""The gates of .ci: a change without a CHANGELOG line, files that do not belong into a repository."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.places import ROOT

HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


class Repository:
    """A toy with the folders that matter, one commit on main, and a branch to work on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.git("init", "-q", "-b", "main")
        self.commit(
            "begin", {"CHANGELOG.md": "# Changelog\n\n## Unreleased\n- one\n", "csrc/a.cpp": ""}
        )
        self.git("checkout", "-q", "-b", "work")

    def git(self, *words: str) -> None:
        clean = {n: v for n, v in os.environ.items() if not n.startswith("GIT_")}
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *words], cwd=self.folder, env=clean, check=True, timeout=60)

    def commit(self, message: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def gate(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [ROOT / ".ci/changelog", *words],
            cwd=self.folder, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "toy")


MORE = "# Changelog\n\n## Unreleased\n- one\n- two\n"
CASES: dict[str, tuple[list[tuple[str, dict[str, str]]], int]] = {
    "the package": ([("a", {"megatron_lite/x.py": "x"})], 1),
    "a tool": ([("a", {"tools/x.py": "x"})], 1),
    "an example": ([("a", {"examples/demo/run.sh": "x"})], 1),
    "the helpers": ([("a", {"csrc/a.cpp": "x"})], 1),
    "tests and documents": ([("a", {"tests/x.py": "x", "docs/a.md": "x", "Makefile": "x"})], 0),
    "with a line": ([("a", {"megatron_lite/x.py": "x", "CHANGELOG.md": MORE})], 0),
    "a line in another commit": ([("a", {"tools/x": "x"}), ("b", {"CHANGELOG.md": MORE})], 0),
    "only lines gone": ([("a", {"tools/x": "x", "CHANGELOG.md": "# Changelog\n"})], 1),
    "a line come and gone": (
        [("a", {"tools/x": "x", "CHANGELOG.md": MORE}),
         ("b", {"CHANGELOG.md": "# Changelog\n\n## Unreleased\n- one\n"})], 1),
    "said that there is none": ([("a\n\nOnly names.\n\nNo CHANGELOG\n", {"tools/x": "x"})], 0),
    "said in passing": ([("a\n\nThere is no CHANGELOG entry.\n", {"tools/x": "x"})], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_change_of_the_program_has_a_line_in_the_changelog(
    repository: Repository, case: str
) -> None:
    commits, code = CASES[case]
    for message, files in commits:
        repository.commit(message, files)
    done = repository.gate("main")
    assert done.returncode == code, done
    if code:
        assert done.stdout == "" and 'label "no changelog"' in done.stderr
        assert re.search(
            r"^changelog: 1 file changed and CHANGELOG.md has no new line", done.stderr
        )
        (name,) = (name for name in commits[0][1] if name != "CHANGELOG.md")
        assert f"\n  {name}\n" in done.stderr
    else:
        assert done.stdout == done.stderr == ""


def test_what_main_did_meanwhile_is_no_line_of_the_branch(repository: Repository) -> None:
    repository.commit("a", {f"tools/{n:02}": "x" for n in range(12)})
    repository.git("checkout", "-q", "main")
    repository.commit("other", {"CHANGELOG.md": MORE})
    done = repository.gate("main", "work")
    assert done.returncode == 1 and "12 files changed" in done.stderr
    assert "  tools/09\n  ... and 2 more\n" in done.stderr


@pytest.mark.parametrize("words", [[], ["a", "b", "c"], ["nowhere"], ["main", "nowhere"]])
def test_a_gate_that_cannot_compare_says_so(repository: Repository, words: list[str]) -> None:
    done = repository.gate(*words)
    assert done.returncode == 2 and done.stderr.startswith("changelog: ")
    assert done.stderr.count("\n") == 1


def test_large_files_and_ends_of_lines_are_found(tmp_path: Path) -> None:
    contents = {
        "good.md": b"text\n", "empty.py": b"", "picture.png": b"\x89PNG\0\r\n",
        "no end.md": b"text", "twice.md": b"text\n\n", "large.bin": b"\0" * (512 * 1024 + 1),
        "allowed.bin": b"\0" * (512 * 1024), "end.txt": b"\n",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.md").symlink_to(tmp_path / "no end.md")
    done = subprocess.run(
        [ROOT / ".ci/files", *sorted(contents), "link.md", "gone"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [
        "files: large.bin has 512 KiB, more than 512; does it belong here?",
        "files: no end.md does not end its last line",
        "files: twice.md ends with an empty line",
    ]


def test_hooks_are_this_project_s_own_and_name_what_exists() -> None:
    assert [hook["id"] for hook in HOOKS] == [
        "ruff-check", "ruff-format", "mypy", "shellcheck", "files",
    ]  # fmt: skip
    for hook in HOOKS:
        assert hook["language"] == "system", hook["id"]
        first = hook["entry"].split()[0]
        assert first == "bash" or os.access(ROOT / first, os.X_OK), hook["id"]


def test_workflows_call_what_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        text = path.read_text()
        assert yaml.safe_load(text)["jobs"], path
        assert set(re.findall(r"\bmake ([a-z-]+)", text)) <= targets, path
        for script in re.findall(r"(\.ci/\w+)", text):
            assert os.access(ROOT / script, os.X_OK), f"{path}: {script}"
