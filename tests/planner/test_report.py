"""What people and programs read of a plan: nothing vanishes, runs together or goes unsaid."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import sys
import unittest.mock
from typing import Any

import pytest

from megatron_lite.cli import plan as plan_tool
from megatron_lite.config.errors import ConfigError
from megatron_lite.planner.columns import aligned
from tests.support.places import ROOT

MODEL = (
    "--hardware h100 --nodes 1 --num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
    "--vocab-size 50257 --micro-batch-size 1 --global-batch-size 32 --bf16 "
)
MUON = "--num-layers 1 --hidden-size 4096 --seq-length 128 --optimizer muon --use-distributed-optimizer"
"""Its worst moment is a matrix's update, when activations are gone."""


def said(flags: str) -> str:
    with (
        unittest.mock.patch.object(sys, "argv", ["plan.py", *shlex.split(MODEL + flags)]),
        contextlib.redirect_stdout(io.StringIO()) as out,
    ):
        assert plan_tool.main() == 0
    return out.getvalue()


def planned(flags: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(f"--json {flags}"))
    return found


def test_activations_and_logits_have_a_column_where_the_worst_moment_has_none() -> None:
    text, stage = said(MUON), planned(MUON)["stages"][0]
    head, row = text.splitlines()[4:6]
    assert stage["worst_moment"] == "updating" and stage["memory_bytes"]["logits"] == 0.0
    gib = {kind: size / 2**30 for kind, size in stage["computing_bytes"].items()}
    assert gib["logits"] > 0.01
    columns = dict(zip(re.split("  +", head), re.split("  +", row), strict=False))
    assert columns["activ."] == f"({gib['activations']:.2f})"
    assert columns["logits"] == f"({gib['logits']:.2f})"
    assert "pp 0: most is needed when matrices are updated whole" in text
    usual = said("--pipeline-model-parallel-size 2").splitlines()
    assert "activ.  logits" in usual[4] and re.search(r" 0\.00  ", usual[5])
    assert not any("(" in line for line in usual[5:7])


def test_numbers_of_any_size_stand_apart() -> None:
    rows = [["a", "b"], ["1", "2" * 30, "and more"], ["3" * 12, "4"]]
    lines = list(aligned(rows, least=1))
    assert [line.split() for line in lines] == [
        ["a", "b"],
        ["1", "2" * 30, "and", "more"],
        ["3" * 12, "4"],
    ]
    assert len({len(line) for line in lines if "more" not in line}) == 1
    text = said("--tokens 60T --micro-batch-size 64 --global-batch-size 1000448 --seq-length 65536")
    (last,) = re.findall(r"^ +\d.*0\.0000e\+00$", text, re.M)
    assert len(last.split()) == 4 and "1,000,448" in last.split()


def test_advice_and_drawing_say_device_batch_length_schedule_and_precision() -> None:
    head = said("--tokens 1B").splitlines()[:3]
    assert "8 x h100 (1 node)" in head[0] and head[0].endswith("1f1b")
    assert "32 sequences of 1,024" in head[1] and "bf16" in head[2]
    assert said("--tokens 1B --lr 1e-3 --advise").splitlines()[:3] == head
    plan, advice = planned("--tokens 1B --lr 1e-3"), planned("--tokens 1B --lr 1e-3 --advise")
    for key in ("hardware", "precision", "layout"):
        assert plan[key] == advice[key]
    assert plan["model"].items() < advice["model"].items()
    drawn = said("--draw - --pipeline-model-parallel-size 4")
    assert drawn.startswith(
        "1f1b, pp 4, 8 of 16 micro batches of 1 x 1,024, 8 x h100 (1 node), bf16: "
    )


def test_advice_takes_measured_times_where_they_matter() -> None:
    advise = "--tokens 1B --lr 1e-3 --advise"
    for flag in ("--measured-seconds 3", "--stage-times-ms 9 9 9 0"):
        with pytest.raises(ConfigError, match=f"{flag.split()[0]} changes nothing of --advise's"):
            said(f"{advise} {flag}")
    with pytest.raises(ConfigError, match="--price-per-gpu-hour changes nothing of --advise's"):
        said(f"{advise} --price-per-gpu-hour 2 --exit-duration-in-mins 60")
    stops = said(f"{advise} --measured-seconds 3 --exit-duration-in-mins 60")
    assert "at about step 1,200 of 30,518" in stops


def test_sequence_parallelism_at_tp_1_is_the_same_plan() -> None:
    """The trainer has nothing to split there."""
    for layout in ("", "--pipeline-model-parallel-size 4 --pipeline-schedule zb-h1"):
        split, whole = planned(f"{layout} --sequence-parallel"), planned(layout)
        assert split.pop("notes") != whole.pop("notes")
        assert split == whole
        at_two = f"{layout} --tensor-model-parallel-size 2"
        assert planned(f"{at_two} --sequence-parallel")["time"] != planned(at_two)["time"]


def documented() -> set[str]:
    """Keys of the guide's table of --json; a name with a leading dot goes on from the one before."""
    text = (ROOT / "docs/guides/plan.md").read_text(encoding="utf-8")
    table = text[text.index("| key | what") : text.index("`--search --json` has")]
    found: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        first, *more = re.findall(r"`(.*?)`", row)
        parent = first.rpartition(".")[0]
        found |= {first, *(f"{parent}{name}" for name in more if name.startswith("."))}
        found |= {name for name in more if not name.startswith(".")}
    return found


def at(found: Any, key: str) -> Any:
    for name in key.split("."):
        found = found[name.removesuffix("[]")]
        found = found[0] if name.endswith("[]") else found
    return found


def test_the_guide_has_every_key_of_the_json_and_no_other() -> None:
    """A key that programs read does not go: see SCHEMA in planner/statement.py."""
    found = planned("--tokens 1B --price-per-gpu-hour 2")
    assert found["schema"] == 1
    for key in documented():
        at(found, key)
    tops = {key.split(".")[0].removesuffix("[]") for key in documented()}
    assert tops == found.keys()
    shown = {key for key in documented() if key.startswith(("rates.", "run.", "time.", "flops."))}
    assert shown == {
        f"{part}.{name}" for part in ("rates", "run", "time", "flops") for name in found[part]
    } - {"rates.tokens_per_second_per_gpu"}


def test_numbers_have_their_units_and_definitions() -> None:
    """What a benchmarker would misread: GB or GiB, whose FLOPs, of which peak, per what."""
    found = planned("--tokens 1B --price-per-gpu-hour 2.5 --measured-seconds 0.5")
    text = said("--tokens 1B --price-per-gpu-hour 2.5 --measured-seconds 0.5")
    tgs = 32 * 1024 / 0.5 / 8
    assert (
        f"TGS {tgs:,.1f} tokens per second and GPU; all together {8 * tgs:,.0f} tokens, 64 seq"
        in text
    )
    tflops = tgs * found["flops"]["per_token"] / 1e12
    assert (
        f"MFU {tflops / 989:.1%} = {tflops:,.1f} TFLOP/s per GPU of 989 (dense 16-bit peak)" in text
    )
    assert found["rates"]["mfu"] == pytest.approx(tflops / 989)
    hours = 1e9 / (8 * tgs) / 3600
    assert (
        f": {hours:.1f} hours without a stop, {8 * hours:.3g} GPU-hours, {20 * hours:.3g} at 2.5"
        in text
    )
    assert "a device has 74.5 GiB (80 GB)" in text


def test_formats_that_a_device_lacks_are_warned_of_and_faster_ones_hinted_at() -> None:
    fp32 = "--no-bf16"
    old = planned("--hardware v100")
    assert old["warnings"][0].startswith("--bf16: v100-32g has no bf16 units")
    assert "\nwarning: --bf16: v100-32g" in said("--hardware v100")
    assert planned("--hardware v100 --fp16 --no-bf16")["warnings"] == []
    (hint,) = planned(f"--hardware v100 {fp32}")["hints"]
    assert hint.startswith("add --fp16: ")
    (warning,) = planned(f"--hardware v100 --tf32 {fp32}")["warnings"]
    assert "has no TF32" in warning
    slow, fast = planned(f"--hardware a100 {fp32}"), planned("--hardware a100")
    times = slow["time"]["step_seconds"] / fast["time"]["step_seconds"]
    assert slow["hints"][0].startswith(f"add --bf16: {times:.1f} times as fast by this plan, ")
    assert f"\nhint: {slow['hints'][0]}\n" in said(f"--hardware a100 {fp32}")
    for quiet in ("--hardware a100", f"--hardware cpu {fp32}", f"{fp32} --stage-times-ms 9 9 9 0"):
        assert planned(quiet)["hints"] == []


def test_an_fp32_softmax_is_noted_where_it_takes_a_fifth_more() -> None:
    """Megatron-LM's own default keeps it in 16 bits (arXiv:2205.05198 counts it so)."""

    def noted(flags: str) -> list[str]:
        return [note for note in planned(flags)["notes"] if "its softmax is in fp32" in note]

    (note,) = noted("--attention-backend unfused")
    now, then = (
        sum(planned(f"--attention-backend unfused {flag}")["stages"][0]["computing_bytes"].values())
        for flag in ("", "--no-attention-softmax-in-fp32")
    )
    assert now > 1.2 * then
    assert f"keeps {now / 2**30:.2f} GiB" in note and note.endswith(f" {then / 2**30:.2f}")
    for quiet in ("", "--attention-backend unfused --seq-length 128 --vocab-size 250880",
                  "--attention-backend unfused --no-attention-softmax-in-fp32",
                  "--attention-backend unfused --recompute-granularity selective"):  # fmt: skip
        assert noted(quiet) == []


def test_a_table_wider_than_the_terminal_comes_in_parts() -> None:
    rows = [["pp", "a" * 9, "b" * 9, "c" * 9], ["0", "1", "2", "3", "fits"]]
    assert len(list(aligned(rows, left=1, width=80))) == 2
    lines = list(aligned(rows, left=1, width=32))
    assert len(lines) == 4 and max(map(len, lines)) <= 32
    assert [line.split() for line in lines] == [
        ["pp", "a" * 9, "b" * 9], ["0", "1", "2"], ["pp", "c" * 9], ["0", "3", "fits"]
    ]  # fmt: skip


def test_a_search_says_what_was_searched() -> None:
    free = MODEL.replace("--micro-batch-size 1 ", "").replace("h100", "v100")
    with unittest.mock.patch.object(sys.modules[__name__], "MODEL", free):
        text, found = said("--search --top 3"), json.loads(said("--search --top 3 --json"))
        none = said("--search --hidden-size 32768")
    lines = text.splitlines()
    assert lines[0] == "0.153 B parameters on 8 x v100-32g (1 node)"
    assert lines[1] == "32 sequences of 1,024 per step" and lines[2].startswith("precision: bf16")
    for layout, line in zip(found["layouts"], lines[5:8], strict=True):
        assert f" {layout['schedule']}  {layout['flags']}" in line
    assert (found["schema"], found["hardware"]["name"], found["global_batch_size"]) == (
        1,
        "v100-32g",
        32,
    )
    assert found["model"]["seq_length"] == 1024 and found["precision"]["parameters"] == "bf16"
    assert any("no bf16 units" in warning for warning in found["warnings"])
    assert f"warning: {found['warnings'][0]}" in lines
    assert not any("--train-iters" in line or "--lr " in line for line in lines)
    assert "\nnothing fits; " in none and "\nthe closest needs " in none
    assert "note: --hidden-size (1024) and --hidden-size (32768): the last one counts" in none


def test_rates_of_a_core_are_no_zeros() -> None:
    """Its whole peak is a tenth of a TFLOP/s."""
    flags = (
        "--hardware cpu --gpus-per-node 2 --num-layers 2 --hidden-size 64 --num-attention-heads 4"
    )
    text = said(f"{flags} --seq-length 64")
    shown = re.findall(r"^(?:MFU|HFU|  causal) .*? = ([\d.,]+\d)", text, re.MULTILINE)
    assert len(shown) == 3 and all(0 < float(number) < 0.12 for number in shown)
