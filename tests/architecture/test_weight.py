"""What an import costs: the package nothing, the floors below torch no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.places import PACKAGE, ROOT


def loaded_after(*modules: str) -> set[str]:
    """Names in sys.modules of a fresh interpreter after importing the modules."""
    code = (
        "import importlib, json, sys\n"
        f"for name in {list(modules)!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def modules_of(*folders: str) -> list[str]:
    files: list[Path] = [f for folder in folders for f in (PACKAGE / folder).rglob("*.py")]
    dotted = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return sorted(name.removesuffix(".__init__") for name in dotted)


def test_importing_the_package_imports_nothing_else() -> None:
    extra = loaded_after("megatron_lite") - loaded_after("json")
    assert extra == {"megatron_lite"}


def test_config_blueprint_telemetry_and_storage_load_no_torch_and_no_numpy() -> None:
    modules = modules_of("config", "blueprint", "telemetry", "storage")
    assert "megatron_lite.blueprint.draw_up" in modules
    assert loaded_after(*modules) & {"torch", "numpy"} == set()
