"""Failures a user can act on; each class carries the exit code the process ends with."""

from __future__ import annotations


class MegatronLiteError(Exception):
    """A foreseeable failure: ends the process with `exit_code` and one FATAL line, without a traceback."""

    exit_code = 70


class ConfigError(MegatronLiteError):
    """What the user wrote cannot work; nothing was started or written."""

    exit_code = 2


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


PREEMPTED = 75
"""Exit code of a run that stopped on request from outside with its checkpoint saved: please requeue."""
