"""Whether a launcher that is not torchrun started this process beside others like it; no torch."""

from __future__ import annotations

import os

from megatron_lite.config.errors import ConfigError

TASKS = (
    ("SLURM_STEP_NUM_TASKS", "srun started {} tasks"),
    ("OMPI_COMM_WORLD_SIZE", "mpirun started {} processes"),
    ("PMI_SIZE", "mpirun started {} processes"),
    ("MPI_LOCALNRANKS", "mpirun started {} processes here"),
    ("MV2_COMM_WORLD_SIZE", "mpirun started {} processes"),
    ("PALS_SIZE", "mpiexec started {} processes"),
    ("PET_NNODES", "torchrun's settings ask for {} nodes"),
)
"""Variables that count the copies of this process, and what more than one means."""

RANK_VARIABLES = (
    ("SLURM_PROCID", "srun started this as task {} of several"),
    ("OMPI_COMM_WORLD_RANK", "mpirun started this as process {} of several"),
    ("PMIX_RANK", "mpirun started this as process {} of several"),
    ("PMI_RANK", "mpirun started this as process {} of several"),
    ("MV2_COMM_WORLD_RANK", "mpirun started this as process {} of several"),
    ("PALS_RANKID", "mpiexec started this as process {} of several"),
)
"""Variables that number them from 0 on: where nothing counts them, a later one gives itself away."""


def one_of_many(*, of_torchrun: bool = True) -> str | None:
    """Says so where it is; raises ConfigError where a variable that would say it is no number.

    of_torchrun: whether torchrun's own settings (PET_*), which only torchrun reads, count.
    A batch script is one process however many tasks its job has: only a step counts its own.
    """
    for most, rows in ((1, TASKS), (0, RANK_VARIABLES)):
        for name, what in rows:
            if name.startswith("PET_") and not of_torchrun:
                continue
            number = _number(name, os.environ.get(name, ""))
            if number > most:
                return f"{what.format(number)} ({name}={os.environ[name]})"
    return None


def _number(name: str, text: str) -> int:
    """Of PET_NNODES=MIN:MAX the larger one; 0 where nothing is said."""
    parts = text.split(":") if name == "PET_NNODES" else [text]
    if not text:
        return 0
    if not all(part.isascii() and part.isdigit() for part in parts) or len(parts) > 2:
        raise ConfigError(
            f"{name}={text!r} in the environment is no number: it should say how many copies of this "
            "process were started, or which one this is - correct it, or unset it"
        )
    return max(map(int, parts))


def alone_among_many() -> str | None:
    """Why a start without RANK and WORLD_SIZE is refused here, and how to start; None where it is not."""
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return None
    others = one_of_many()
    return others and (
        f"{others}, and RANK is not set: every one of them would train alone, into one folder - "
        "start one tools/launch.py per node, which starts its ranks (srun --ntasks-per-node 1 "
        "... --nnodes N --node_rank K --nproc_per_node G, see examples/gpt3/README.md), or set "
        "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each; for one process, "
        "start one"
    )
