"""Libraries that a machine may lack: a test asks for one here, and a skip names the extra it is in."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from megatron_lite.config.extras import how_to_install
from tests.support.places import ROOT

ENVIRONMENTS = {"test": "setup", "oracles": "setup-oracles"}
"""Extra -> the make target of the environment that has it."""
DISTRIBUTIONS = {"megatron": "megatron-core", "yaml": "pyyaml", "tiktoken_ext": "tiktoken"}
"""First part of a module's name -> who distributes it, where the names differ."""


@cache
def named_in_setup() -> dict[str, list[str]]:
    """Extra -> distributions, and "" -> those required, as setup.py says without being run."""
    known: dict[str, object] = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("REQUIRED", "EXTRAS", "TEST"):
                known[name] = ast.literal_eval(node.value)
    needed, extras, test = known["REQUIRED"], known["EXTRAS"], known["TEST"]
    assert isinstance(needed, list) and isinstance(extras, dict) and isinstance(test, list)
    found = {"": needed, **extras, "test": [need for extra in test for need in extras[extra]]}
    return {extra: [_distribution(need) for need in needs] for extra, needs in found.items()}


def _distribution(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match, requirement
    return match[0].lower().replace("_", "-")


def distribution_of(module: str) -> str:
    """What pip calls its library."""
    first = module.partition(".")[0]
    return DISTRIBUTIONS.get(first, first.lower().replace("_", "-"))


def extra_of(module: str) -> str:
    """The extra that a test's library comes with: test or oracles; "" if it is always there."""
    name = distribution_of(module)
    for extra in ("", *ENVIRONMENTS):
        if name in named_in_setup()[extra]:
            return extra
    raise LookupError(f"{name} is in neither of setup.py's extras {' and '.join(ENVIRONMENTS)}")


def needs(module: str) -> ModuleType:
    """The module, imported; where its library is absent, a skip that says how to get it."""
    extra = extra_of(module)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module and not module.startswith(f"{error.name}."):
            raise  # it is there, and something that it needs is not
    _skip(distribution_of(module), f"{how_to_install(extra)}, or make {ENVIRONMENTS[extra]}")


def needs_program(name: str, package: str) -> str:
    """Where a program is: in this environment or on PATH; a skip that names its package."""
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        _skip(name, package)
    return found


def _skip(what: str, how: str) -> NoReturn:
    raise pytest.skip.Exception(f"needs {what}: {how}", allow_module_level=True)
