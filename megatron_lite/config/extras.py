"""How an optional package is installed: from the checkout, since no package index has megatron_lite."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """The command for one of setup.py's extras, which `make setup` has run where it was called."""
    return f"pip install -e '.[{extra}]' in the checkout"
