"""tools/kernels.py: what runs of each op and why, how fast it is, as the guide prints it."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch

from megatron_lite.cli import kernels
from megatron_lite.config.errors import ConfigError
from megatron_lite.kernels.examples import EXAMPLES
from megatron_lite.kernels.on_request import rows_of
from megatron_lite.kernels.table import TABLE
from tests.support.places import ROOT

GUIDE = (ROOT / "docs" / "guides" / "install-gpu.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python tools/kernels\.py (.*)$", GUIDE, re.MULTILINE)


@pytest.fixture
def run(monkeypatch, capsys):
    """What it prints for a command line."""

    def printed(words: str) -> str:
        monkeypatch.setattr("sys.argv", ["kernels.py", *shlex.split(words)])
        assert kernels.main() == 0
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("words", COMMANDS)
def test_the_guides_commands_run_on_a_cpu(words, run) -> None:
    out = run(words)
    if "--json" in words:
        (op,) = json.loads(out)["ops"]
        assert op["op"] == "attention" and op["runs"] == "torch-sdpa"
        assert op["why"] == "attention: flash-attn no (needs a GPU) -> torch-sdpa"
        speeds = {row["name"]: row["speed"] for row in op["rows"]}
        assert speeds["reference"] == 1.0 and speeds["torch-sdpa"] > 0.0
        assert speeds["flash-attn"] is None
    elif "--bench" in words:
        assert re.search(r"^rms_norm +reference +runs +\d+\.\d{3} ms +1\.00 x$", out, re.M)
        assert re.search(r"liger +no \(needs a GPU\)$", out, re.MULTILINE)
    else:
        assert out.startswith("cuda, bf16: what runs of each op")
        runs = re.findall(r"reference(, compiled)? +runs$", out, re.MULTILINE)
        assert len(runs) == len(TABLE) - 1 and set(runs) == {", compiled", ""}
        assert re.search(r"liger +no \(not importable", out)


def test_every_row_of_every_op_is_there(run) -> None:
    found = json.loads(run("--json --device cpu --fp16"))
    assert found["dtype"] == "fp16" and found["sizes"] is None
    for op in found["ops"]:
        assert [row["name"] for row in op["rows"]] == [row.name for row in rows_of(op["op"])]
        assert sum(row["runs"] for row in op["rows"]) == 1
        assert all(row["milliseconds"] is None for row in op["rows"])
    assert [op["op"] for op in found["ops"]] == list(TABLE)


def test_what_is_compiled_stands_beside_what_is_not(run) -> None:
    (op,) = json.loads(run("--json --device cpu --torch-compile --op swiglu"))["ops"]
    assert op["runs"] == "reference, compiled"
    assert [row["name"] for row in op["rows"]] == ["reference, compiled", "reference", "liger"]


def test_without_a_model_flags_of_its_parts_count_all_the_same(run, monkeypatch) -> None:
    def asked(words: str) -> dict[str, object]:
        (op,) = json.loads(run(f"--json --op attention {words}"))["ops"]
        return {row["name"]: row["reason"] for row in op["rows"]} | {"runs": op["runs"]}

    gpu = "--device cuda --bf16 --no-torch-compile"
    assert asked(gpu)["runs"] == "torch-sdpa"
    assert "is for documents" in asked(gpu)["torch-varlen"]
    assert asked(f"{gpu} --window-size 63,0")["runs"] == "torch-varlen"
    assert asked("--device cpu --attention-dropout 0.1")["runs"] == "reference"
    windows = []
    monkeypatch.setattr(kernels, "_seconds", lambda run, inputs, *_: windows.append(inputs[3]) or 1)
    asked("--device cpu --bench --window-size 63,0")
    assert {call.window for call in windows} == {64}


@pytest.mark.parametrize("op", EXAMPLES)
def test_an_example_is_what_the_op_takes_in_any_format(op) -> None:
    sizes = kernels.Sizes(
        tokens=6, samples=2, hidden=16, heads=4, kv_heads=2, head_size=4, ffn=24, vocabulary=11,
        documents=3, window=4, dropout=0.5, device=torch.device("cpu"), dtype=torch.bfloat16,
    )  # fmt: skip
    for row in (row for row in TABLE[op] if row.fusible or row is TABLE[op][-1]):
        found = row.run(*EXAMPLES[op](sizes))
        results = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
        assert results and all(result.isfinite().all() for result in results), row.name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--op swiglue", "--op swiglue: there are .*swiglu"),
        ("--bench --device meta", "--bench --device meta: there is nothing to measure on"),
        ("--capability nine", "'nine' is no capability such as 9.0"),
        ("--bench --seconds 0", "--seconds 0 must be above 0"),
        ("--bench --seconds inf", "--seconds inf must be above 0 and finite"),
        ("--kernel ligre", "--kernel ligre: no op has such a row"),
        ("--device cpu --kernel liger", "--kernel rms_norm=liger cannot run: needs a GPU"),
        ("--colour red", "--colour"),
        ("--window-size 4,1", "--window-size 4,1 is not LEFT,RIGHT"),
    ],
)
def test_what_cannot_be_is_refused(words, said, run) -> None:
    with pytest.raises(ConfigError, match=said):
        run(words)
