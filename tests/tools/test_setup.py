"""tools/setup.sh keeps an environment that is there, and puts a new one in place only when complete.

The pythons are real environments of this interpreter; what `python -m venv` makes with them has a
stand-in for pip, which notes what it is asked and writes modules of a line.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.extras import named_in_setup, needs_program

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
PIP = r'''"""A stand-in for pip."""
import os, pathlib, sys
log = pathlib.Path(os.environ["PIP_NOTES"])
with log.open("a") as file:
    print(*sys.argv[1:], os.environ.get("PIP_CONSTRAINT", "-"), file=file)
if os.environ.get("PIP_FAILS"):
    sys.exit("no index today")
if os.environ.get("PIP_LACKS", "nothing") in sys.argv[-1]:
    sys.exit("ERROR: No matching distribution found for " + sys.argv[-1])
site = pathlib.Path(__file__).parents[1]
for name in "matplotlib", "numpy", "pytest", "tensorboard", "tokenizers", "transformers", "ruff":
    (site / f"{name}.py").write_text("zeros = lambda n: None\n")
if sys.argv[-1] == "torch":
    (site / "torch.py").write_text("__version__ = '2.13.0'\nfrom_numpy = lambda a: None\n")
    (site / "torch-2.13.0.dist-info").mkdir()
    (site / "torch-2.13.0.dist-info/METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
program = pathlib.Path(sys.executable).with_name("program")
program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c 'import sys; print(sys.prefix)'\n")
program.chmod(0o755)
'''
MAKE_WITH_STAND_IN = f'''
import pathlib, venv
old = venv.EnvBuilder.__init__
def begin(self, **options):
    old(self, **{{**options, "with_pip": False}})
def add_pip(self, context):
    folder = pathlib.Path(context.env_dir, "{SITE}", "pip")
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text({PIP!r})
venv.EnvBuilder.__init__ = begin
venv.EnvBuilder.post_setup = add_pip
'''


class Checkout:
    """A copy of what setup reads, and pythons to call it with."""

    def __init__(self, tmp: Path) -> None:
        self.root = tmp / "a checkout"
        self.venv = self.root / ".venv"
        self.notes = tmp / "notes"
        (self.root / "tools").mkdir(parents=True)
        for name in ("tools/setup.sh", "setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        for name in ("requirements", "csrc"):
            shutil.copytree(ROOT / name, self.root / name)
        self.base = self.python(tmp / "base")

    def python(self, folder: Path, *, torch: str | None = None) -> Path:
        """The bin folder of another python, with a torch of that version."""
        venv.EnvBuilder(symlinks=True).create(folder)
        (folder / SITE / "make_with_stand_in.py").write_text(MAKE_WITH_STAND_IN)
        (folder / SITE / "stand_in.pth").write_text("import make_with_stand_in\n")
        if torch is not None:
            found = folder / SITE / "torch/__init__.py"
            found.parent.mkdir()
            found.write_text(f"__version__ = {torch!r}\nfrom_numpy = lambda array: None\n")
            (folder / SITE / f"torch-{torch}.dist-info").mkdir()
            (folder / SITE / f"torch-{torch}.dist-info/METADATA").write_text(
                f"Name: torch\nVersion: {torch}\n"
            )
        return folder / "bin"

    def setup(self, *first_on_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, [*first_on_path, self.base, "/usr/bin", "/bin"]))
        return subprocess.run(
            [self.root / "tools/setup.sh"],
            env={"PATH": path, "PIP_NOTES": str(self.notes), **env},
            cwd=self.root.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def done(self, *first_on_path: Path, **env: str) -> str:
        """What a setup that succeeds says."""
        found = self.setup(*first_on_path, **env)
        assert found.returncode == 0, found.stderr
        assert {p.name for p in self.root.glob(".venv*")} <= {".venv", ".venv-oracles"}
        return found.stdout

    @property
    def asked(self) -> list[str]:
        """The lines that pip was called with since the last look."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.write_text("")
        return lines

    def change(self, name: str, old: str, new: str) -> None:
        text = (self.root / name).read_text()
        assert old in text
        (self.root / name).write_text(text.replace(old, new))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_activated_and_plain_shells_are_one_and_the_same(checkout: Checkout) -> None:
    assert "done: torch 2.13.0 in .venv" in checkout.done()
    before = checkout.venv.stat().st_ino, (checkout.venv / "setup-stamp").stat().st_mtime_ns
    assert len(checkout.asked) == 4
    other = checkout.python(checkout.root.parent / "other", torch="2.12.1")
    active = checkout.venv / "bin"
    for path in ([active], [other, active], []):
        assert checkout.done(*path) == ""
    for named in ("python3", str(checkout.base / "python3")):
        assert checkout.done(active, PYTHON=named, VIRTUAL_ENV=str(checkout.venv)) == ""
    (checkout.root.parent / "link").symlink_to(checkout.root)
    linked = subprocess.run(
        [checkout.root.parent / "link/tools/setup.sh"], capture_output=True, text=True, timeout=60
    )
    assert (linked.returncode, linked.stdout, linked.stderr) == (0, "", "")
    after = checkout.venv.stat().st_ino, (checkout.venv / "setup-stamp").stat().st_mtime_ns
    assert checkout.asked == [] and after == before


def test_a_new_environment_works_where_it_ends_up(checkout: Checkout) -> None:
    checkout.done()
    program = subprocess.run(
        [checkout.venv / "bin/program"], capture_output=True, text=True, timeout=60
    )
    assert program.stdout == f"{checkout.venv}\n"
    activated = subprocess.run(
        ["bash", "-c", ". .venv/bin/activate; echo $VIRTUAL_ENV; command -v program"],
        cwd=checkout.root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert activated.stdout.split("\n")[:2] == [
        str(checkout.venv),
        str(checkout.venv / "bin/program"),
    ]
    for path in [*checkout.venv.glob("bin/*"), checkout.venv / "pyvenv.cfg"]:
        assert b"setup-new" not in path.resolve().read_bytes(), path


@pytest.mark.ci
def test_the_running_environment_is_whole_until_the_next_is(checkout: Checkout) -> None:
    """A changed torch pin, from an activated shell whose python3 is the environment's own."""
    checkout.done()
    (checkout.venv / "mark").touch()
    checkout.change("requirements/torch.txt", "2.13.0", "2.13.1")
    active = checkout.venv / "bin"
    failed = checkout.setup(active, PIP_FAILS="1")
    assert failed.returncode == 2
    assert "no index today" in failed.stderr and ".venv.setup-log" in failed.stderr
    assert not (checkout.root / ".venv.setup-new").exists()
    assert (checkout.venv / "mark").exists() and (checkout.venv / "bin/program").exists()
    checkout.notes.unlink()
    said = checkout.done(active)
    assert "installing torch==2.13.1" in said and "(/" in said
    assert not (checkout.venv / "mark").exists() and len(checkout.asked) == 4
    assert checkout.done() == "" and checkout.done(active) == ""


@pytest.mark.ci
def test_other_pins_are_installed_where_they_are(checkout: Checkout) -> None:
    checkout.done()
    (checkout.venv / "mark").touch()
    checkout.change("requirements/constraints.txt", "pytest==", "# pytest==")
    assert len(checkout.asked) == 4
    # as docs/guides/install-gpu.md has it exported
    constraints = str(checkout.venv / "constraints.txt")
    assert "with torch 2.13.0; installing what changed" in checkout.done(PIP_CONSTRAINT=constraints)
    lines = checkout.asked
    assert (checkout.venv / "mark").exists() and len(lines) == 2
    assert all(line.endswith(" -") for line in lines)
    assert "torch==2.13.0" in (checkout.venv / "constraints.txt").read_text()


@pytest.mark.slow
def test_a_python_that_is_named_is_the_one_used(checkout: Checkout) -> None:
    """One with a torch lends it; without that torch the environment is made anew."""
    checkout.done()
    lender = checkout.python(checkout.root.parent / "lender", torch="2.12.1")
    assert checkout.setup(PYTHON="/nowhere/python3").returncode == 2
    said = checkout.done(checkout.venv / "bin", PYTHON=str(lender / "python3"))
    assert "torch 2.12.1 is installed and is used as it is" in said
    assert checkout.done(checkout.venv / "bin") == "" and checkout.done() == ""
    checkout.change("requirements/torch.txt", "2.13.0", "2.13.1")  # it has another torch anyway
    assert "with torch 2.12.1; installing what changed" in checkout.done()
    shutil.rmtree(lender / ".." / SITE / "torch-2.12.1.dist-info")
    shutil.rmtree(lender / ".." / SITE / "torch")
    assert "without torch" in checkout.done(checkout.venv / "bin")
    assert checkout.done() == ""


@pytest.mark.ci
def test_a_setup_killed_between_two_renames_is_put_right(checkout: Checkout) -> None:
    checkout.done()
    checkout.venv.rename(checkout.root / ".venv.setup-old")
    (checkout.root / ".venv.setup-new").mkdir()
    assert checkout.done() == "" and len(checkout.asked) == 4
    assert (checkout.venv / "bin/program").exists()


@pytest.mark.ci
def test_what_setup_did_not_make_is_not_replaced(checkout: Checkout) -> None:
    checkout.venv.mkdir()
    (checkout.venv / "thesis.tex").touch()
    refused = checkout.setup()
    assert refused.returncode == 2 and "did not make .venv" in refused.stderr
    assert (checkout.venv / "thesis.tex").exists() and checkout.asked == []
    shutil.rmtree(checkout.venv)
    made = ["-m", "venv", str(checkout.venv)]
    subprocess.run([checkout.base / "python3", *made], check=True, timeout=60)
    (checkout.venv / SITE / "own.py").touch()
    assert "installing what changed" in checkout.done()
    assert (checkout.venv / SITE / "own.py").exists() and len(checkout.asked) == 4
    assert checkout.done(checkout.venv / "bin") == ""
    assert checkout.done(PYTHON=str(checkout.base / "python3")) == ""


@pytest.mark.ci
def test_oracles_have_an_environment_of_their_own_and_what_lacks_is_said(
    checkout: Checkout,
) -> None:
    checkout.done()
    assert len(checkout.asked) == 4
    script, oracles = checkout.root / "tools/setup.sh", checkout.root / ".venv-oracles"
    program(checkout.base / "chromium", "")  # or it would be installed

    def setup(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{checkout.base}:/usr/bin:/bin", "PIP_NOTES": str(checkout.notes)}
        return subprocess.run(
            [script, *words], env={**path, **env}, capture_output=True, text=True, timeout=60
        )

    first = setup("oracles", PIP_LACKS="lm-eval")
    assert first.returncode == 0, first.stderr
    (lacking,) = re.findall(r"setup: (.*) cannot be installed here, so its tests .*", first.stdout)
    assert lacking.startswith("lm-eval>=") and "No matching distribution" in first.stdout
    assert "left out, as they need a CUDA compiler: flash-attn" in first.stdout
    names = [line.split()[-2] for line in checkout.asked[4:]]
    assert [re.split("[>=]", name)[0] for name in names] == sorted(named_in_setup()["oracles"])
    pins = (oracles / "constraints.txt").read_text().splitlines()
    own = (ROOT / "requirements/constraints-oracles.txt").read_text().splitlines()
    assert set(own) <= set(pins) and "python-dateutil==4.0.0" not in "".join(pins)
    assert "torch==2.13.0" in pins and "shellingham==1.5.4" in pins

    assert setup("oracles").returncode == 0 and len(checkout.asked) == 2 + len(names), "once more"
    assert setup("oracles").stdout == "" and checkout.done() == "" and checkout.asked == []
    assert setup("oracle").returncode == setup("oracles", "x").returncode == 2


def program(path: Path, script: str) -> None:
    """A stand-in for one."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("user", "apt", "said", "lacks"),
    [
        (0, 'echo "$@"; [ "$2" = update ] || { touch chromium; chmod +x chromium; }', "installing chromium", 0),
        (0, "exit 100", "as apt-get could not: ; as root", 1),
        (0, 'echo "E: no network"; exit 100', "as apt-get could not: E: no network; as root", 1),
        (7, "exit 1", "skipped, as this is not root; as root: apt-get install chromium", 0),
        (0, None, "as there is no apt-get", 0),
    ],
    ids=["installed", "apt-get fails silently", "apt-get fails", "no root", "no apt-get"],
)  # fmt: skip
def test_the_browser_is_installed_or_it_is_said_why_not(tmp_path, user, apt, said, lacks) -> None:
    """The function of tools/setup.sh by itself, with programs that are no others."""
    program(tmp_path / "id", f"echo {user}")
    for name in ("bash", "sed", "grep", "tail", "touch", "chmod"):
        (tmp_path / name).symlink_to(needs_program(name, "its package"))
    if apt is not None:
        program(tmp_path / "apt-get", apt)
    script = (
        'set -euo pipefail; LOG=log; : >log; lacking=(); say() { echo "$*"; }\n'
        f"source <(sed -n '/^install_chromium() {{/,/^}}/p; /^apt_try()/p' {ROOT}/tools/setup.sh)\n"
        "install_chromium; echo lacking ${#lacking[@]}"
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env={"PATH": str(tmp_path)},
                          capture_output=True, text=True, timeout=30)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout and f"lacking {lacks}" in done.stdout
    if said == "installing chromium":
        asked = (tmp_path / "log").read_text().splitlines()
        assert asked == ["-q update", "-q install -y --no-install-recommends chromium"]


def test_every_file_of_the_package_is_installed_with_it() -> None:
    """What is no Python is named in package_data: the page, for one."""
    call = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body[-1]
    assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
    (named,) = [word.value for word in call.value.keywords if word.arg == "package_data"]
    files = {
        f"{package.replace('.', '/')}/{file}"
        for package, files in ast.literal_eval(named).items()
        for file in files
    }
    assert files == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "megatron_lite").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    }


@pytest.mark.slow
def test_two_setups_at_once_install_once(checkout: Checkout) -> None:
    env = {"PATH": f"{checkout.base}:/usr/bin:/bin", "PIP_NOTES": str(checkout.notes)}
    script = [str(checkout.root / "tools/setup.sh")]
    both = [subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait(60) for one in both] == [0, 0]
    assert len(checkout.asked) == 4


@pytest.mark.parametrize("command", [["make"], ["make", "demo"], [".ci/run", "--here"]])
def test_a_checkout_in_a_path_with_a_space_is_refused_in_a_line(
    tmp_path: Path, command: list[str]
) -> None:
    needs_program("make", "apt-get install make")
    folder = tmp_path / "my checkout"
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    shutil.copy(ROOT / "Makefile", folder)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "", done
    assert f'"{folder}"' in done.stderr and "in a path with a space" in done.stderr
    assert done.stderr.count("\n") == 1
