"""The documents name only what exists: headings, flags, files, make targets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_lite.config.flags.legacy import LEGACY
from megatron_lite.config.flags.parser import spellings
from tests.parity.layouts import LAYOUTS
from tests.support.places import ROOT

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"),
     *ROOT.glob("tools/*.md")]
)  # fmt: skip
OF_OTHERS = {
    # pip, docker, srun, tensorboard, torchrun
    "--nproc_per_node", "--max_restarts", "--gpus", "--gpus-per-node", "--ipc", "--logdir",
    "--no-build-isolation", "--nodes",
    "--ntasks-per-node", "--signal", "--target",
}  # fmt: skip
"""Flags of other programs that the documents show."""


def tracked() -> set[str]:
    """Files and folders of the repository, new ones included."""
    asked = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    files = set(done.stdout.splitlines())
    return files | {str(parent) for file in files for parent in Path(file).parents}


def known_flags() -> set[str]:
    """Of training, of the other tools and scripts, and of other programs."""
    found = set(spellings()) | set(LEGACY) | OF_OTHERS
    for path in [*ROOT.glob("tools/*"), *ROOT.glob("examples/**/*.sh"), *ROOT.glob("examples/**/*.py"),
                 *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/parity/*.py"),
                 *ROOT.glob("megatron_lite/config/**/*.py"), *ROOT.glob("megatron_lite/cli/**/*.py"),
                 *ROOT.glob("megatron_lite/data/preparing/*_flags.py"),
                 ROOT / "megatron_lite/rendezvous/hostfile.py",
                 ROOT / "megatron_lite/planner/launch.py", ROOT / "megatron_lite/planner/questions.py",
                 ROOT / "tests/nightly.py"]:  # fmt: skip
        if path.suffix in (".py", ".sh"):
            text = path.read_text(encoding="utf-8")
            found |= set(re.findall(r"[\"'](--[a-z][a-z0-9_-]+)[\"']", text))
    return found


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"[`*]", "", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def headings(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def unknown_flags(text: str) -> set[str]:
    """Flags in the text that no program here knows; a star stands for the rest of a name."""
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]+)(?!\w|-|\*)", text))
    known = {flag.replace("_", "-") for flag in known_flags()}
    return {flag for flag in named if flag.replace("_", "-") not in known}


def missing_files(text: str) -> set[str]:
    """Paths in backticks, from a top-level folder down, that are not in the repository."""
    here = tracked()
    tops = {Path(name).parts[0] for name in here if "/" in name}
    named = set(re.findall(r"`([A-Za-z_.][\w./-]*/[\w./-]*)`", text))
    return {path for path in named if Path(path).parts[0] in tops and path.rstrip("/") not in here}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_only_what_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert unknown_flags(text) == set()
    assert missing_files(text) == set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= targets
    for link, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", text):
        if "://" not in link:
            target = (path.parent / link).resolve() if link else path
            assert anchor in headings(target), f"{link}#{anchor}"


def test_what_does_not_exist_is_found() -> None:
    assert unknown_flags("`--lr` and --learning-rat, --log-*") == {"--learning-rat"}
    assert missing_files("`tools/flags.py`, `tools/flogs.py`, `run/tb`") == {"tools/flogs.py"}
    assert slug("What the `log` means (6.1)") == "what-the-log-means-61"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_counts_the_layouts_of_the_parity_table(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert re.findall(r"\(docs/parity\.md\)\W*(\d+)", text) == [str(len(LAYOUTS))]
