"""tools/plan.py as users run it: no torch, one line for a mistake, JSON and pictures that parse."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shlex
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_lite.blueprint.timeline import Event, Lane, Timeline, Track, chrome_trace
from megatron_lite.cli import plan as plan_tool
from megatron_lite.config.errors import ConfigError
from tests.support.places import ROOT

RUN = shlex.split(
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --bf16 "
    "--vocab-size 50257 --micro-batch-size 1 --global-batch-size 32 "
    "--pipeline-model-parallel-size 4"
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "plan.py"), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_json_says_what_the_table_says_and_no_torch_is_loaded() -> None:
    done = run("--hardware", "a100", "--nodes", "1", "--json", "--tokens", "2B", *RUN)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True and len(plan["stages"]) == 4
    assert sum(stage["layers"] != [] for stage in plan["stages"]) == 4
    for stage in plan["stages"]:
        assert abs(sum(stage["memory_bytes"].values()) - stage["total_bytes"]) < 1
    rates = plan["rates"]
    per_second = 32 * 1024 / plan["time"]["step_seconds"]
    assert abs(rates["tgs"] - per_second / 8) < 1e-6 * rates["tgs"]
    assert abs(plan["run"]["days"] * 86400 * per_second - 2e9) < 1
    code = f"import runpy, sys; sys.argv = ['plan.py', *{RUN!r}]\n"
    code += f"try: runpy.run_path({str(ROOT / 'tools' / 'plan.py')!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nassert not {'torch', 'numpy'} & set(sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


LLAMA_405B = shlex.split(
    "--num-layers 126 --hidden-size 16384 --num-attention-heads 128 --ffn-hidden-size 53248 "
    "--seq-length 8192 --vocab-size 128256 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --group-query-attention --num-query-groups 8 "
    "--untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 "
    "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --sequence-parallel "
    "--num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 1 --global-batch-size 2048 "
    "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
)


def test_llama_405b_that_does_not_fit_gets_advice_and_says_its_precision() -> None:
    """arXiv:2407.21783, section 3.3.2: 126 layers, tp 8, pp 16, ends with a layer less each."""
    done = run("--hardware", "h100", "--nodes", "128", "--json", "--bf16", *LLAMA_405B)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert not plan["fits"] and plan["cheapest_change"]["total_bytes"] <= 80e9
    assert [len(plan["stages"][n]["layers"]) for n in (0, 1, 15)] == [7, 8, 7]
    assert plan["precision"] == {
        "parameters": "bf16", "tf32": False, "gradient_accumulation": "fp32", "optimizer": "fp32",
        "moments": ["fp32", "fp32"],
    }  # fmt: skip


def test_text_drawing_and_search_say_the_precision() -> None:
    assert "\nprecision: bf16, gradients accumulated in fp32" in run(*RUN).stdout
    wide = [word for word in RUN if word != "--bf16"]
    assert "\nprecision: fp32 (--bf16 or --fp16 plans mixed precision)\n" in run(*wide).stdout
    low = run("--no-accumulate-allreduce-grads-in-fp32", "--json", *RUN).stdout
    assert json.loads(low)["precision"]["gradient_accumulation"] == "bf16"
    assert ", fp32, products in TF32: " in run("--draw", "-", "--tf32", *wide).stdout
    found = run("--search", "--hardware", "h100", "--gpus-per-node", "4", "--nodes", "1", *RUN)
    assert "\nprecision: bf16, gradients" in found.stdout, found.stderr


def test_the_175b_script_is_planned_from_its_printed_command() -> None:
    script = ROOT / "examples" / "gpt3" / "train_gpt3_175b_distributed.sh"
    printed = subprocess.run(
        ["bash", str(script), "ckpt", "tb", "vocab.json", "merges.txt"],
        capture_output=True, text=True, env={"PRINT_COMMAND": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    words = shlex.split(printed.stdout)
    done = run("--hardware", "a100", "--json", *words[1:])
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["hardware"]["world_size"] == 64
    assert round(plan["model"]["num_parameters"] / 1e9, 3) == 174.616
    billions = [round(stage["parameters"] / 1e9, 3) for stage in plan["stages"]]
    assert billions == [2.823, *[2.719] * 6, 2.798]


def test_the_175b_script_is_planned_by_its_path_and_by_a_dry_run() -> None:
    folder = ROOT / "examples" / "gpt3"
    script = str(folder / "train_gpt3_175b_distributed_tgs.sh")
    done = run("--hardware", "a100", "--json", script)
    assert done.returncode == 0, done.stderr
    by_path = json.loads(done.stdout)
    assert by_path["hardware"]["world_size"] == 64 and by_path["run"]["tokens"] == 10 * 1536 * 2048
    dry = subprocess.run(
        ["bash", str(folder / "train_gpt3_175b_distributed_tgs.sh")],
        capture_output=True, text=True, timeout=60,
        env={"DRY_RUN": "1", "HARDWARE": "a100", "PLAN_ARGS": "--json", "PATH": "/usr/bin:/bin",
             "PYTHON": sys.executable},
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout) == by_path


def test_a_script_that_might_start_something_is_not_run(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_text(f"touch {tmp_path}/started\n")
    done = run("--hardware", "a100", str(script))
    assert done.returncode == 2 and "does not know PRINT_COMMAND=1" in done.stderr
    assert not (tmp_path / "started").exists()


def test_measured_stage_times_give_the_published_bubble() -> None:
    """arXiv:2401.10241, tables 4 and 9, 1.5B with 24 micro batches on 8 stages."""
    times = ["--stage-times-ms", "18.522", "18.086", "9.337", "0.601"]
    model = shlex.split(
        "--num-layers 24 --hidden-size 2304 --num-attention-heads 24 --seq-length 1024 --nodes 1 "
        "--vocab-size 50257 --micro-batch-size 6 --global-batch-size 144 "
        "--pipeline-model-parallel-size 8"
    )
    for name, rate in (("1f1b", 0.2431), ("zb-h1", 0.1585)):
        done = run("--json", *times, "--pipeline-schedule", name, *model)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)["pipeline"]
        assert abs(found["bubble_rate"] - rate) < 2e-4
        ideal = 24 * (18.522 + 18.086 + 9.337) / 1e3
        assert abs(1 - ideal / found["span_seconds"] - found["bubble_rate"]) < 1e-9


def test_what_is_only_not_built_yet_is_planned_and_said() -> None:
    done = run("--nodes", "1", "--json", "--context-parallel-size", "2", *RUN)
    assert done.returncode == 0, done.stderr
    assert any("is not built yet" in note for note in json.loads(done.stdout)["notes"])


def test_pictures_are_well_formed_and_hold_every_action(tmp_path: Path) -> None:
    svg, trace = tmp_path / "t.svg", tmp_path / "t.json"
    for path in (svg, trace):
        done = run("--draw", str(path), "--draw-microbatches", "6", *RUN)
        assert done.returncode == 0, done.stderr
    names = [e.text or "" for e in ElementTree.parse(svg).iter() if e.tag.endswith("title")]
    assert len(names) == 4 * 6 * 2
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == 4 * 6 * 2
    for rank in range(4):
        row = sorted((e["ts"], e["dur"]) for e in events if e["pid"] == rank)
        # three numbers that are rounded to a thousandth
        assert all(a[0] + a[1] <= b[0] + 2e-3 for a, b in zip(row, row[1:], strict=False))
    text = run("--draw", "-", *RUN).stdout.splitlines()
    assert len(text) == 5 and text[1].startswith("pp  0 |F")


def test_a_real_timeline_lies_below_the_plan(tmp_path: Path) -> None:
    real = Timeline(
        "iteration 3",
        (
            Track("pp 0 dp 0 (rank 0)", (
                Lane("compute", (Event(0.0, 1.0, "F", "0F0"), Event(1.0, 3.0, "B", "0B0"),
                                 Event(2.0, 2.5, "dW", "weight-gradient"))),
                Lane("dp", (Event(2.0, 4.0, "message", "all-reduce 1 MB"),)),
            )),
        ),
    )  # fmt: skip
    plain, packed, broken = (tmp_path / name for name in ("t.json", "t.json.gz", "b.json.gz"))
    plain.write_text(chrome_trace([real]))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    broken.write_bytes(packed.read_bytes()[:-20])
    for file in (plain, packed):
        text = run("--draw", "-", "--beside", str(file), *RUN).stdout.splitlines()
        assert len(text) == 5 + 3 and text[5] == "iteration 3"
        assert text[6].startswith("pp 0 dp 0 (rank 0) |F0") and text[7].endswith(
            "|" + "." * 60 + "=" * 60 + "|"
        )
    svg = tmp_path / "both.svg"
    assert run("--draw", str(svg), "--beside", str(packed), *RUN).returncode == 0
    names = [e.text or "" for e in ElementTree.parse(svg).iter() if e.tag.endswith("title")]
    assert len(names) == 4 * 8 * 2 + 4 and "all-reduce 1 MB 2000.00-4000.00 ms" in names
    for file in (broken, Path(__file__)):
        done = run("--draw", "-", "--beside", str(file), *RUN)
        assert done.returncode == 3 and "--profile-timeline" in done.stderr, done.stderr
    assert run("--beside", str(packed), *RUN).returncode == 2


def test_a_mistake_is_one_line_with_the_way_out() -> None:
    for words, said in (
        (["--hardware", "h9000", *RUN], "there are v100-32g"),
        (["--nodes", "0", *RUN], "must be a whole number of at least 1"),
        (["--nodes", "1", "--tensor-model-parallel-size", "3", *RUN], "does not divide"),
        (["--draw", "x.gif", *RUN], "give -, a .txt, a .svg or a .json"),
        (["--no-such-flag", *RUN], "--no-such-flag"),
        (["--tokens", "many", *RUN], "argument --tokens: 'many' is no number of tokens"),
        (["--stage-times-ms", "1", "0", "1", "0", *RUN], "only the message may take no time"),
        (["--nodes", "1", "--search"], "--num-layers is required"),
        (["--nodes", "1", "--tokens", "1B"], "--seq-length is required"),
        (["nothere.sh"], "nothere.sh: cannot be read"),
    ):
        done = run(*words)
        assert done.returncode == 2, (words, done.stdout, done.stderr)
        assert said in done.stderr and "Traceback" not in done.stderr


def test_nothing_that_is_asked_for_goes_unheard() -> None:
    torchrun = shlex.split("torchrun --nnodes 2 --nproc_per_node 4 tools/pretrain_gpt.py")
    for words, said in (
        (["--bf16", "--global-batch-size", "64", *torchrun, *RUN], "--bf16 stands before pretrain_gpt.py"),
        ([*torchrun[:1], "--fp16", *torchrun[1:], *RUN], "--fp16 stands before pretrain_gpt.py"),
        (["--no-such-flag", *torchrun, *RUN], "--no-such-flag stands before"),
        (["--nodes", "3", *torchrun, *RUN], "--nodes 3 contradicts the launcher's --nnodes 2"),
        (["--gpus-per-node", "6", *torchrun, *RUN], "contradicts the launcher's --nproc_per_node 4"),
        ([*torchrun, "--world-size", "16", *RUN], "--world-size 16 contradicts 2 nodes of 4 = 8"),
        (["torchrun", "--nproc_per_node=auto", "pretrain_gpt.py", *RUN], "'auto' must be a whole number"),
        (["srun", "-N", "4", "python", "pretrain_gpt.py", *RUN], "srun: its numbers of machines are not read"),
        (["/usr/bin/mpirun", "-np", "9", "pretrain_gpt.py", *RUN], "mpirun: its numbers of machines"),
        (["--nnodes", "4", *RUN], "--nnodes is a launcher's"),
        (["--price-per-gpu-hour", "2", *RUN], "--price-per-gpu-hour 2 is for a run of known length"),
        (["--measured-seconds", "1e-300", *RUN], "must be from 1e-9 to 1e12"),
        (["--hardware", "", *RUN], "no such device"),
        ([*RUN, "--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size 0 must be at least 1"),
        (["--top", "3", *RUN], "--top 3 is of --search"),
        (["--search", "--price-per-gpu-hour", "2", *RUN], "--price-per-gpu-hour changes nothing of --search"),
        (["--search", "--tokens", "2B", *RUN], "--tokens changes nothing of --search"),
        (["--search", "--draw", "-", *RUN], "--draw changes nothing of --search"),
        (["--json", "--draw", "-", *RUN], "--draw - is text, which --json is not"),
        (["--draw-microbatches", "4", *RUN], "--draw-microbatches is of a drawing"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(said)):
            in_process(*words)


def test_a_search_keeps_what_the_command_line_says() -> None:
    model = [*RUN[: RUN.index("--micro-batch-size")], "--global-batch-size", "32"]
    own = shlex.split("--hardware a100 --nodes 1 --gpus-per-node 4 --search --json --top 1000")

    def found(flags: str) -> list[dict[str, Any]]:
        layouts: list[dict[str, Any]] = json.loads(in_process(*own, *model, *flags.split()))[
            "layouts"
        ]
        return layouts

    free = found("")
    for flags, key, value in (
        ("--tensor-model-parallel-size 2", "tp", 2),
        ("--pipeline-model-parallel-size 2", "pp", 2),
        ("--micro-batch-size 4", "micro_batch_size", 4),
        ("--pipeline-schedule gpipe --pipeline-model-parallel-size 4", "schedule", "gpipe"),
        ("--num-virtual-stages-per-pipeline-rank 2", "schedule", "interleaved"),
        ("--recompute-granularity selective", "recompute_granularity", "selective"),
    ):
        layouts = found(flags)
        assert layouts and {layout[key] for layout in layouts} == {value}, flags
        assert {layout[key] for layout in free} != {value}
    for flag, idle in (("--sequence-parallel", "tp"), ("--zero-stage 2", "dp")):
        layouts = found(flag)
        assert layouts and all(flag in layout["flags"] or layout[idle] == 1 for layout in layouts)
        assert any(flag not in layout["flags"] and layout[idle] > 1 for layout in free)
    with pytest.raises(
        ConfigError, match="no layout on 4 devices.* --pipeline-model-parallel-size say"
    ):
        found("--pipeline-model-parallel-size 3")


def test_a_search_says_what_was_not_searched() -> None:
    own = ["--hardware", "v100", "--nodes", "1", "--gpus-per-node", "4", "--search", "--top", "2"]
    text, found = in_process(*own, *RUN), json.loads(in_process(*own, "--json", *RUN))
    fixed = ["--pipeline-model-parallel-size 4", "--micro-batch-size 1"]
    assert found["fixed"] == fixed and f"\nnot searched: {' '.join(fixed)}\n" in text
    assert found["closest"] is None
    large = "--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --recompute-granularity selective"
    none = json.loads(in_process(*own, "--json", *RUN, *large.split()))
    assert none["layouts"] == [] and none["closest"]["total_bytes"] > 32e9
    assert set(none["fixed"]) == {*fixed, "--recompute-granularity selective"}


def in_process(*words: str) -> str:
    with (
        unittest.mock.patch.object(sys, "argv", ["plan.py", *words]),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        assert plan_tool.main() == 0
    return out.getvalue()


def test_an_nvlink_domain_wider_than_the_launcher_s_nodes_is_no_more_ranks() -> None:
    torchrun = shlex.split("torchrun --nnodes 4 --nproc_per_node 4 tools/pretrain_gpt.py")
    for own in ([], ["--nodes", "4"], ["--gpus-per-node", "72"]):
        plan = json.loads(in_process("--hardware", "gb200", "--json", *own, *torchrun, *RUN))
        assert plan["hardware"]["world_size"] == 16


def test_a_run_on_cores_that_is_planned_for_gpus_is_a_note() -> None:
    notes = json.loads(in_process("--json", "--use-cpu", *RUN))["notes"]
    assert any(note.startswith("--use-cpu: planned for h100 all the same") for note in notes)
    cores = json.loads(in_process("--json", "--use-cpu", "--hardware", "cpu", *RUN))["notes"]
    assert not any("--use-cpu" in note for note in cores)


def test_tokens_stand_for_the_run_s_own_length_in_its_unit() -> None:
    """2B tokens are 1,953,125 samples of 1024, and 61,036 batches of 32."""
    for length, note in (
        ("--train-iters 10", "61,036 iterations instead of --train-iters 10"),
        ("--train-samples 640 --lr-decay-samples 320", "1,953,125 samples instead of --train-samples 640"),
        ("--train-epochs 2 --epoch-samples 99", "1,953,125 samples instead of --train-epochs 2"),
    ):  # fmt: skip
        plan = json.loads(in_process("--tokens", "2B", "--json", *RUN, *length.split()))
        assert f"--tokens: {note}" in plan["notes"]
        assert plan["run"]["tokens"] == 2e9
    for length in ("--train-iters 10", "--train-iters 10 --train-samples 320"):
        with pytest.raises(
            ConfigError, match="exclude each other" if "samples" in length else "warmup"
        ):
            in_process("--tokens", "100K", *RUN, "--lr-warmup-iters", "9", *length.split())


def test_every_device_is_listed_with_sources() -> None:
    done = run("--list-hardware")
    assert done.returncode == 0
    for name in ("a100-80g", "h100", "h200", "b200", "gb300", "mi300x"):
        assert f"\n{name}\n" in done.stdout
