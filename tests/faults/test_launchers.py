"""What a launcher was told wrongly, and copies that know nothing of each other: refused at once."""

from __future__ import annotations

import pytest

from megatron_lite.cli import launch as launcher
from megatron_lite.cli import pretrain_gpt
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import run_tool
from megatron_lite.rendezvous.copies import RANK_VARIABLES, TASKS, one_of_many
from megatron_lite.rendezvous.launch import read_launch
from tests.support.launch import TOOL, TORCHRUN, WITHOUT_DATA, set_environment
from tests.support.sizes import with_flags

LAUNCHERS: dict[str, tuple[dict[str, str | None], str | None]] = {
    "srun, task 2 of 4": ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks"),
    "srun, task 0 of 4": ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks"),
    "srun, only the number": ({"SLURM_PROCID": "1"}, "as task 1 of several"),
    "Open MPI": ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
    "MPICH": ({"PMI_SIZE": "3"}, "mpirun started 3 processes"),
    "nodes of torchrun": ({"PET_NNODES": "2"}, "settings ask for 2 nodes"),
    "a range of nodes": ({"PET_NNODES": "1:4"}, "settings ask for 4 nodes .PET_NNODES=1:4"),
    "a batch script": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}, None),
    "its own single step": ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
    "one of each": ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "PET_NNODES": "1"}, None),
    "the first of all": ({"PMIX_RANK": "0", "PMI_RANK": "0"}, None),
    "PMIx, only the number": ({"PMIX_RANK": "1"}, "as process 1 of several .PMIX_RANK=1"),
    "Intel MPI": ({"PMI_RANK": "0", "MPI_LOCALNRANKS": "2"}, "mpirun started 2 processes here"),
    "nothing said": ({"SLURM_PROCID": "", "PET_NNODES": ""}, None),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"), [("PET_NNODES", "many"), ("PET_NNODES", "1:2:3"), ("PMI_SIZE", "-2")]
)
def test_what_should_count_the_copies_and_is_no_number_is_refused(monkeypatch, name, text) -> None:
    set_environment(monkeypatch, {name: text})
    with pytest.raises(ConfigError, match=f"^{name}='{text}' in the environment is no number"):
        read_launch()


def test_a_dry_run_says_what_a_start_would_refuse(monkeypatch, capsys) -> None:
    set_environment(monkeypatch, {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"})
    assert pretrain_gpt.main(with_flags(WITHOUT_DATA, "--mock-data", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "NOTE: a start would be refused here: srun started 4 tasks" in said
    set_environment(monkeypatch, {"SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "1"})
    assert pretrain_gpt.main(with_flags(WITHOUT_DATA, "--mock-data", "--dry-run")) == 0
    assert "would be refused" not in capsys.readouterr().out


@pytest.mark.parametrize("name", LAUNCHERS)
def test_copies_that_know_nothing_of_each_other_are_refused(monkeypatch, name) -> None:
    values, message = LAUNCHERS[name]
    for variable, _ in (*TASKS, *RANK_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    set_environment(monkeypatch, values)
    if message is None:
        assert read_launch().world_size == 1 and one_of_many() is None
        return
    with pytest.raises(ConfigError, match=f"{message}.*RANK is not set.*tools/launch.py per node"):
        read_launch()
    set_environment(monkeypatch, TORCHRUN | values)  # torchrun, or the user, has said who is who
    assert read_launch().rank == 1


HOSTS = ["--nnodes", "8", "--nproc_per_node", "1", "--node_rank", "0"]
SOUND = ["--mock-data", "--global-batch-size", "16"]
MASTER = ["--master_addr", "127.0.0.1", "--master_port", "1"]
WRONG_STARTS: dict[str, tuple[dict[str, str], list[str], list[str], int, str]] = {
    "several nodes, none named": ({}, HOSTS, SOUND, 2, "8 nodes and no MASTER_ADDR"),
    "srun without numbers": (
        {"SLURM_STEP_NUM_TASKS": "4"}, ["--nproc_per_node", "2"], SOUND, 2, "srun started 4 tasks"),
    "mpirun without numbers": (
        {"OMPI_COMM_WORLD_SIZE": "2"}, ["--nnodes", "1"], SOUND, 2, "mpirun started 2 processes"),
    "no files": (
        {}, [*HOSTS, *MASTER],
        ["--data-path", "0.5", "a", "0.5", "b", "--global-batch-size", "16",
         "--tokenizer-type", "GPT2BPETokenizer",
         "--vocab-file", "no/vocab.json", "--merge-file", "no/merges.txt"],
        3, "--vocab-file no/vocab.json\n  --merge-file no/merges.txt\n  data a.idx\n  data a.bin\n  data b"),
    "nodes in words": ({}, ["--nnodes", "many"], SOUND, 2, "--nnodes many (PET_NNODES) is no number"),
    "a range backwards": ({}, ["--nnodes", "2:1"], SOUND, 2, "--nnodes 2:1 (PET_NNODES) is no number"),
    "a range without a store": ({}, ["--nnodes", "1:2"], SOUND, 2, "needs --rdzv_backend c10d"),
    "a node in words": ({}, ["--node_rank", "x"], SOUND, 2, "flags: argument --node-rank/--node_rank: invalid"),
    "ranks in words": (
        {}, ["--nproc_per_node", "many"], SOUND, 2, "torchrun's flags: Unsupported nproc_per_node"),
    "fewer than no ranks": ({}, ["--nproc_per_node", "-1"], SOUND, 2, "must be at least 1"),
    "a node too many": (
        {}, ["--nnodes", "2", "--node_rank", "2", *MASTER], SOUND, 2, "--node_rank 2 (NODE_RANK) is not below"),
    "no port": ({}, ["--master_port", "70000"], SOUND, 2, "--master_port 70000 is no port"),
    "no port in words": (
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "many"}, HOSTS, SOUND, 2, "MASTER_PORT=many is no port"),
    "no such rendezvous": ({}, ["--rdzv_backend", "no"], SOUND, 2, "torchrun's flags: The rendezvous backend"),
    "no such flag": ({}, [*HOSTS, *MASTER], ["--learning", "1"], 2, "--learning"),
    "no such layout": ({}, [*HOSTS, *MASTER], ["--tensor-model-parallel-size", "3"], 2, "8 ranks"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_STARTS)
def test_a_launcher_says_at_once_what_is_wrong_here(monkeypatch, tmp_path, capsys, name) -> None:
    env, flags, words, code, message = WRONG_STARTS[name]
    monkeypatch.chdir(tmp_path)
    set_environment(monkeypatch, dict(env))
    monkeypatch.setattr(
        "sys.argv", ["launch.py", *flags, str(TOOL), *with_flags(WITHOUT_DATA, *words)]
    )
    if name != "no such rendezvous":
        monkeypatch.setattr(launcher, "run", lambda asked: pytest.fail("torchrun was started"))
    monkeypatch.setattr(
        launcher, "gather_hosts", lambda *_: pytest.fail("the hosts were waited for")
    )
    assert run_tool(launcher.main, argv=[]) == code
    said = capsys.readouterr().err
    assert message in said and said.count("FATAL[") == 1
