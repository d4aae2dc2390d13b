"""The two GPT-3 scripts say exactly what they would run, from any folder and with any override."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.extras import needs_program
from tests.support.gpt3_script import (
    DATA,
    FLAGS_175B,
    PATHS,
    ROOT,
    TGS,
    TRAIN,
    command,
    flags,
    launch,
    run,
)


def test_unset_it_is_the_175b_run() -> None:
    words = command(TRAIN, *PATHS, env=DATA)
    assert flags(words) == FLAGS_175B
    assert launch(words) == {
        "--nproc_per_node": "8",
        "--nnodes": "8",
        "--node_rank": "0",
        "--master_addr": "localhost",
        "--master_port": "6000",
    }


def test_the_command_does_not_depend_on_the_folder_it_is_called_from(tmp_path: Path) -> None:
    there = tmp_path / "some where"
    there.mkdir()
    here = command(TRAIN, *PATHS)
    assert command(TRAIN, *PATHS, cwd=there) == here
    assert command(TRAIN, *PATHS, cwd=TRAIN.parent) == here


def test_a_link_in_a_folder_with_spaces_still_finds_the_repository(tmp_path: Path) -> None:
    link = tmp_path / "my repository"
    link.symlink_to(ROOT)
    words = command(link / "examples/gpt3" / TRAIN.name, *PATHS)
    assert str(link / "tools/pretrain_gpt.py") in words


@pytest.mark.parametrize(
    "env, flag, values",
    [
        ({"PRECISION": "bf16"}, "--bf16", []),
        ({"PRECISION": "bf16"}, "--fp16", None),
        ({"PRECISION": "fp32"}, "--fp16", None),
        ({"PRECISION": "fp32"}, "--bf16", None),
        ({"TP": "4"}, "--tensor-model-parallel-size", ["4"]),
        ({"TP": "2"}, "--sequence-parallel", []),
        ({"TP": "1"}, "--sequence-parallel", None),
        ({"PP": "16"}, "--pipeline-model-parallel-size", ["16"]),
        ({"DATASET": "/data/one"}, "--data-path", ["/data/one"]),
        ({"DATASET": "0.5 a 0.5 'b c'"}, "--data-path", ["0.5", "a", "0.5", "b c"]),
        (
            {"DATASET_PATH": "/d s"},
            "--data-path",
            ["0.35", "/d s/wikipedia_text_document", "0.65", "/d s/openwebtext_text_document"],
        ),
        ({}, "--data-cache-path", ["check points/index-cache"]),
        ({"NUM_LAYERS": "4"}, "--num-layers", ["4"]),
        ({"HIDDEN_SIZE": "64"}, "--hidden-size", ["64"]),
        ({"NUM_ATTENTION_HEADS": "4"}, "--num-attention-heads", ["4"]),
        ({"SEQ_LENGTH": "128"}, "--seq-length", ["128"]),
        ({"SEQ_LENGTH": "128"}, "--max-position-embeddings", ["128"]),
        (
            {"SEQ_LENGTH": "128", "MAX_POSITION_EMBEDDINGS": "256"},
            "--max-position-embeddings",
            ["256"],
        ),
        ({"ATTENTION_BACKEND": "auto"}, "--attention-backend", ["auto"]),
        ({"MICRO_BATCH_SIZE": "2"}, "--micro-batch-size", ["2"]),
        ({"GLOBAL_BATCH_SIZE": "8"}, "--global-batch-size", ["8"]),
        ({"TRAIN_ITERS": "5"}, "--train-iters", ["5"]),
        ({"WEIGHT_DECAY": "0"}, "--weight-decay", ["0"]),
        ({"ADAM_BETA1": "0.8"}, "--adam-beta1", ["0.8"]),
        ({"ADAM_BETA2": "0.99"}, "--adam-beta2", ["0.99"]),
        ({"INIT_METHOD_STD": "0.02"}, "--init-method-std", ["0.02"]),
        ({"CLIP_GRAD": "0.5"}, "--clip-grad", ["0.5"]),
        ({"LR": "1e-3"}, "--lr", ["1e-3"]),
        ({"MIN_LR": "1e-4"}, "--min-lr", ["1e-4"]),
        ({"LR_DECAY_STYLE": "linear"}, "--lr-decay-style", ["linear"]),
        ({"LR_DECAY_ITERS": "5"}, "--lr-decay-iters", ["5"]),
        ({"LR_WARMUP_FRACTION": "0.1"}, "--lr-warmup-fraction", ["0.1"]),
        ({"SPLIT": "90,5,5"}, "--split", ["90,5,5"]),
        ({"LOG_INTERVAL": "1"}, "--log-interval", ["1"]),
        ({"SAVE_INTERVAL": "7"}, "--save-interval", ["7"]),
        ({"EVAL_INTERVAL": "3"}, "--eval-interval", ["3"]),
        ({"EVAL_ITERS": "2"}, "--eval-iters", ["2"]),
        ({"LOAD_PATH": "/other run"}, "--load", ["/other run"]),
        ({"LOAD_PATH": ""}, "--load", None),
        ({"EXTRA_ARGS": "--seed 7 --log-params-norm"}, "--seed", ["7"]),
        ({"EXTRA_ARGS": '--wandb-exp-name "two words"'}, "--wandb-exp-name", ["two words"]),
        (
            {"EXTRA_ARGS": "--wandb-entity '$(touch x); * `id`'"},
            "--wandb-entity",
            ["$(touch x); * `id`"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value)[:40],
)
def test_an_override_changes_its_flag(
    env: dict[str, str], flag: str, values: list[str] | None
) -> None:
    """None: the flag is absent."""
    assert flags(command(TRAIN, *PATHS, env=env)).get(flag) == values


def test_an_override_changes_nothing_else() -> None:
    changed = flags(command(TRAIN, *PATHS, env={**DATA, "PP": "4", "LR": "1e-4"}))
    assert {name for name, values in changed.items() if FLAGS_175B.get(name) != values} == {
        "--pipeline-model-parallel-size",
        "--lr",
    }
    assert changed.keys() == FLAGS_175B.keys()


def test_the_cluster_variables_reach_the_launcher() -> None:
    env = {"NUM_NODES": "4", "NODE_RANK": "03", "GPUS_PER_NODE": "2", "TP": "2", "PP": "4"}
    env |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    assert launch(command(TRAIN, *PATHS, env=env)) == {
        "--nproc_per_node": "2",
        "--nnodes": "4",
        "--node_rank": "3",
        "--master_addr": "node0",
        "--master_port": "29500",
    }


def test_slurm_tells_the_node_rank_and_node_rank_wins() -> None:
    assert launch(command(TRAIN, *PATHS, env={"SLURM_NODEID": "5"}))["--node_rank"] == "5"
    both = {"SLURM_NODEID": "5", "NODE_RANK": "6"}
    assert launch(command(TRAIN, *PATHS, env=both))["--node_rank"] == "6"


def test_one_node_finds_a_free_port_unless_one_is_named() -> None:
    free = command(TRAIN, *PATHS, env={"NUM_NODES": "1"})
    assert "--standalone" in free and "--master_port" not in free
    named = command(TRAIN, *PATHS, env={"NUM_NODES": "1", "MASTER_PORT": "7000"})
    assert "--standalone" not in named and launch(named)["--master_port"] == "7000"


def test_a_dry_run_is_one_process_that_knows_the_world_size() -> None:
    words = command(TRAIN, env={"DRY_RUN": "1", "NUM_NODES": "16", "GPUS_PER_NODE": "4", **DATA})
    assert words[:2] == [sys.executable, str(ROOT / "tools/pretrain_gpt.py")]
    found = flags(words)
    assert found.pop("--world-size") == ["64"] and found.pop("--dry-run") == []
    assert found.keys() == FLAGS_175B.keys()


def test_a_rehearsal_is_one_process_that_knows_the_world_size_and_needs_no_paths() -> None:
    words = command(TRAIN, env={"REHEARSE": "1", "NUM_NODES": "16", "GPUS_PER_NODE": "4", **DATA})
    assert words[:2] == [sys.executable, str(ROOT / "tools/pretrain_gpt.py")]
    found = flags(words)
    assert found.pop("--world-size") == ["64"] and found.pop("--rehearse") == []
    assert found.keys() == FLAGS_175B.keys()


@pytest.mark.parametrize("script", [TRAIN, TGS], ids=lambda path: path.stem)
@pytest.mark.parametrize("count", range(4))
def test_missing_paths_are_a_usage_error(script: Path, count: int) -> None:
    done = run(script, *PATHS[:count])
    assert done.returncode == 2 and done.stdout == ""
    usage = "CHECKPOINT_PATH TENSORBOARD_LOGS_PATH VOCAB_FILE MERGE_FILE"
    assert usage in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    "env, says",
    [
        ({"PRECISION": "fp8"}, "PRECISION=fp8 is none of fp16, bf16, fp32"),
        ({"TP": "two"}, "TP=two is not a whole number"),
        ({"PP": "0"}, "PP=0 must be at least 1"),
        ({"NUM_NODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 is not below NUM_NODES=2"),
        ({"GPUS_PER_NODE": "a[$(touch x)]"}, "is not a whole number"),
        ({"DRY_RUN": "yes"}, "DRY_RUN=yes is neither 0 nor 1"),
        ({"REHEARSE": "1", "DRY_RUN": "1"}, "DRY_RUN=1 and REHEARSE=1 exclude each other"),
        ({"EXTRA_ARGS": '--seed "7'}, 'EXTRA_ARGS has a quote without its partner: --seed "7'),
        ({"DATASET": "o'brien"}, "DATASET has a quote without its partner: o'brien"),
        ({"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python is no program"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_by_name(env: dict[str, str], says: str) -> None:
    done = run(TRAIN, *PATHS, env=env)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr


def test_a_fifth_argument_is_refused_with_the_way_out() -> None:
    done = run(TRAIN, *PATHS, "/data/corpus")
    assert done.returncode == 2
    assert "takes 4 paths, got 5" in done.stderr and "DATASET" in done.stderr


@pytest.mark.parametrize("script", [TRAIN, TGS])
def test_several_nodes_and_no_address_are_refused_at_once(script: Path) -> None:
    done = run(script, *PATHS, env={"MASTER_ADDR": "", "PYTHON": "true"})
    assert done.returncode == 2 and "NUM_NODES=8 and MASTER_ADDR is not set" in done.stderr
    assert (
        run(script, *PATHS, env={"MASTER_ADDR": "", "PYTHON": "true", "NUM_NODES": "1"}).returncode
        == 0
    )


def test_help_is_the_usage_text() -> None:
    done = run(TRAIN, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ")


def test_the_children_see_one_hardware_queue_and_the_repository(tmp_path: Path) -> None:
    """A stand-in for python prints what the real one would see."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$CUDA_DEVICE_MAX_CONNECTIONS|$PYTHONPATH|$1"\n')
    python.chmod(0o755)
    done = run(TRAIN, *PATHS, env={"PYTHON": str(python), "PYTHONPATH": "/mine"})
    assert done.stdout == f"1|{ROOT}:/mine|{ROOT}/tools/launch.py\n"
    done = run(TRAIN, *PATHS, env={"PYTHON": str(python), "CUDA_DEVICE_MAX_CONNECTIONS": "32"})
    assert done.stdout == f"32|{ROOT}|{ROOT}/tools/launch.py\n"


def test_restarts_are_asked_for_by_a_variable() -> None:
    assert "--max_restarts" not in launch(command(TRAIN, *PATHS))
    words = command(TRAIN, *PATHS, env={"MAX_RESTARTS": "03"})
    assert launch(words)["--max_restarts"] == "3"
    done = run(TRAIN, *PATHS, env={"MAX_RESTARTS": "many"})
    assert done.returncode == 2 and "MAX_RESTARTS=many is not a whole number" in done.stderr


def test_torchrun_waits_longer_than_a_step_of_175b_for_the_checkpoint(tmp_path: Path) -> None:
    """torchrun's own 30 s would kill the ranks in the middle of the step that SIGTERM lets finish."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\n')
    python.chmod(0o755)
    assert run(TRAIN, *PATHS, env={"PYTHON": str(python)}).stdout == "900\n"
    mine = {"PYTHON": str(python), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
    assert run(TRAIN, *PATHS, env=mine).stdout == "60\n"


def test_a_prefix_with_spaces_needs_no_quotes_when_its_files_are_there(tmp_path: Path) -> None:
    prefix = tmp_path / "my texts" / "corpus_text_document"
    prefix.parent.mkdir()
    prefix.with_suffix(".idx").touch()
    words = command(TRAIN, *PATHS, env={"DATASET": str(prefix)})
    assert flags(words)["--data-path"] == [str(prefix)]


@pytest.fixture
def set_up(tmp_path: Path) -> Path:
    """A copy of the scripts in a repository where `make setup` was run; its python prints its path."""
    folder = tmp_path / "repo" / "examples" / "gpt3"
    folder.mkdir(parents=True)
    for script in (TRAIN, TGS):
        shutil.copy(script, folder)
    shutil.copy(ROOT / "examples" / "signals.sh", folder.parent)
    python = tmp_path / "repo" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$(cd "${0%/*}" && pwd)"\n')
    python.chmod(0o755)
    return folder


def test_without_an_activated_environment_the_one_of_make_setup_is_used(set_up: Path) -> None:
    bin_folder = set_up.parents[1] / ".venv" / "bin"
    env = {"PYTHON": "", "DRY_RUN": "1"}
    assert run(set_up / TRAIN.name, env=env).stdout == f"{bin_folder}\n"
    done = run(set_up / TGS.name, *PATHS, env={"PYTHON": ""})  # the run, then its summary
    assert done.stdout == f"{bin_folder}\n" * 2, done.stderr


def test_an_activated_environment_comes_before_the_one_of_make_setup(
    set_up: Path, tmp_path: Path
) -> None:
    python = tmp_path / "active" / "python3"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho active\n")
    python.chmod(0o755)
    env = {"PYTHON": "", "VIRTUAL_ENV": "/some/venv"}
    env["PATH"] = f"{python.parent}:{os.environ['PATH']}"
    done = run(set_up / TGS.name, *PATHS, env=env)
    assert done.stdout == "active\n" * 2, done.stderr


def test_tgs_is_the_same_run_for_ten_iterations_in_its_own_folder() -> None:
    words = command(TGS, *PATHS, env=DATA)
    assert launch(words) == launch(command(TRAIN, *PATHS, env=DATA))
    expected = dict(FLAGS_175B)
    del expected["--load"]
    expected |= {
        "--train-iters": ["10"],
        "--log-interval": ["1"],
        "--eval-iters": ["0"],
        "--save": ["check points/tgs"],
        "--no-save-checkpoints": [],
        "--initial-loss-scale": ["65536"],
    }
    assert flags(words) == expected


@pytest.mark.parametrize(
    "env, calls",
    [
        ({}, ["tools/launch.py", "report.py runs/tgs --tgs"]),
        ({"NODE_RANK": "1"}, ["tools/launch.py"]),
        ({"SLURM_NODEID": "1"}, ["tools/launch.py"]),
        ({"DRY_RUN": "1"}, ["pretrain_gpt.py"]),
        ({"REHEARSE": "1"}, ["pretrain_gpt.py"]),
    ],
    ids=str,
)
def test_tgs_reports_once_and_from_the_first_node(
    tmp_path: Path, env: dict[str, str], calls: list[str]
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*"\n')
    python.chmod(0o755)
    done = run(TGS, "runs", "tb", "v", "m", env={"PYTHON": str(python), **env})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    assert all(call in line for call, line in zip(calls, lines, strict=True))


def test_tgs_ends_with_the_code_of_a_failed_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    done = run(TGS, "runs", "tb", "v", "m", env={"PYTHON": str(python)})
    assert done.returncode == 7 and done.stdout == ""


def test_shellcheck_finds_nothing() -> None:
    shellcheck = needs_program("shellcheck", "make setup, or apt-get install shellcheck")
    scripts = [*ROOT.glob("examples/**/*.sh"), *ROOT.glob("tools/*.sh"), *ROOT.glob(".ci/*")]
    done = subprocess.run(
        [shellcheck, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
