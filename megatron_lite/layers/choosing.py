"""Which implementation of an op runs: the one that --kernel names, or the first that can."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from megatron_lite.config.errors import ConfigError, all_together
from megatron_lite.config.extras import how_to_install
from megatron_lite.kernels.on_request import INSTALLED_BY, requested, rows_of
from megatron_lite.kernels.table import TABLE, Choice, Need, choose

_IN_EVERY_BLOCK = ("layer_norm", "rms_norm", "gelu", "gelu_erf", "swiglu")
_JOINED = "add_dropout_"


def asked_row(op: str, words: Sequence[str]) -> str | None:
    """The row of an op that the words of --kernel ask for: `op=row`, or `row` of every op that has it."""
    for word in words:
        if word.startswith(f"{op}="):
            return word.partition("=")[2]
    names = [row.name for row in rows_of(op)]
    return next((word for word in words if word in names), None)


def chosen(op: str, need: Need, words: Sequence[str]) -> Choice:
    """ConfigError where the row that was asked for cannot run.

    Tensors without memory stand for a device that is not here: there it is the first row that can.
    """
    name = asked_row(op, words)
    if name is None:
        return choose(op, need)
    found = requested(op, name, need)
    if isinstance(found, Choice):
        return found
    if need.device.type == "meta":
        return choose(op, need)
    raise ConfigError(
        f"--kernel {op}={name} cannot run: {found}{_installed_by(name, found)}; leave it out for "
        f"{choose(op, need).implementation.name}"
    )


def _installed_by(name: str, reason: str) -> str:
    """Where the package comes from, if that is what is missing."""
    source = INSTALLED_BY.get(name)
    if source is None or not reason.startswith("not importable"):
        return ""
    if source.extra:
        return f" - {how_to_install(source.extra)}"
    return f" - {source.guide} says how it is built"


def require_known(words: Sequence[str]) -> None:
    """ConfigError that lists every word of --kernel that names no op, or no row of it."""
    problems = list(_unknown(words))
    if problems:
        raise all_together(problems, "with --kernel")


def _unknown(words: Sequence[str]) -> Iterator[str]:
    everywhere = {row.name for op in TABLE for row in rows_of(op)}
    for word in words:
        op, separator, name = word.partition("=")
        if not separator and word not in everywhere:
            yield f"--kernel {word}: no op has such a row; there are {', '.join(sorted(everywhere))}"
        elif separator and op not in TABLE:
            yield f"--kernel {word}: no op {op}; there are {', '.join(TABLE)}"
        elif separator and name not in (names := [row.name for row in rows_of(op)]):
            yield f"--kernel {word}: {op} has the rows {', '.join(names)}"


def require_used(words: Sequence[str], ops: Collection[str], *, all_stages: bool) -> None:
    """ConfigError for a word of --kernel that changes nothing: no layer of this model has the op.

    ops: those that were chosen.  all_stages: whether they are of the whole model; else only what is
    in every block is missed.
    """
    for word in words:
        op, separator, _ = word.partition("=")
        if separator:
            missed = op not in ops and (all_stages or op.removeprefix(_JOINED) in _IN_EVERY_BLOCK)
        else:
            missed = all(asked_row(used, [word]) is None for used in ops)
        if missed:
            have = ", ".join(sorted(ops))
            raise ConfigError(
                f"--kernel {word} changes nothing: this model has the ops {have}; leave it out"
            )
