"""Failures a user can act on; each class carries the exit code the process ends with."""

from __future__ import annotations

from collections.abc import Sequence


class MegatronLiteError(Exception):
    """A foreseeable failure: the process ends with `exit_code` and one FATAL line, no traceback."""

    exit_code = 70


class ConfigError(MegatronLiteError):
    """What the user wrote cannot work; nothing was started or written."""

    exit_code = 2


class ExtensionError(ConfigError):
    """A line of a file that --extend named failed; the traceback is shown, as for a bug."""


class DataError(MegatronLiteError):
    """A corpus, index or tokenizer file is missing, broken or does not fit; names the file."""

    exit_code = 3


class CheckpointError(MegatronLiteError):
    """No usable checkpoint, or one that does not fit this run; names the folder."""

    exit_code = 4


class StorageError(MegatronLiteError):
    """The disk said no: full, read-only, no permission or an I/O error; names the path."""

    exit_code = 5


class DistributedError(MegatronLiteError):
    """A rank was lost, timed out or disagrees with the others."""

    exit_code = 6


class NumericsError(MegatronLiteError):
    """A non-finite value the policy does not tolerate."""

    exit_code = 7


class OutOfMemory(MegatronLiteError):
    """The run does not fit into the memory of a device or of the host: another configuration may."""

    exit_code = 2


class DeviceFault(MegatronLiteError):
    """A device failed, and no other rank was lost before."""

    exit_code = 6


PREEMPTED = 75
"""Exit code of a run stopped on request from outside, its checkpoint saved: please requeue."""


def all_together(problems: Sequence[str], where: str) -> ConfigError:
    """One ConfigError that lists every problem, numbered where there are several.

    `where` completes "3 problems ...", e.g. "on the command line".
    """
    if len(problems) == 1:
        return ConfigError(problems[0])
    listed = "".join(f"\n  {n}. {problem}" for n, problem in enumerate(problems, start=1))
    return ConfigError(f"{len(problems)} problems {where}:{listed}")
