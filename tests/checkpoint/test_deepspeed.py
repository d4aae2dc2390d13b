"""Megatron-DeepSpeed's files of each rank in; no such program is here, so the files are of our own writing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.foreign.deepspeed import open_deepspeed
from megatron_lite.cli import convert
from tests.checkpoint.deepspeed_writer import GROUPS, HEADS, args_of, write
from tests.support.huggingface import tool

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("pipeline", [True, False], ids=["layers", "ranks"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["gpt", "llama", "parts"])
def test_every_tensor_is_put_together(tmp_path: Path, kind: str, tp: int, pipeline: bool) -> None:
    ours = write(tmp_path, kind, tp, pipeline=pipeline)
    found = open_deepspeed(tmp_path)
    parts = {name: part for c in found.conversions for name, part in found.parts(c)}
    assert parts.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(parts[name], tensor), name
    groups = HEADS if kind == "gpt" else GROUPS
    assert found.model.gelu == "tanh" and found.model.num_kv_heads == groups
    felt = (found.model.window, found.model.rope_scaling_type)
    assert felt == ((6, "llama3") if kind == "parts" else (None, "none"))


def test_it_becomes_a_run(tmp_path: Path, monkeypatch, capsys: Capture) -> None:
    write(tmp_path / "from", "llama", 2, pipeline=True)
    words = (tmp_path / "from", tmp_path / "ours", "--vocab-size", 50)
    assert tool(convert.main, monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert (
        "iteration 20 of Megatron-DeepSpeed" in said
        and (tmp_path / "ours" / "config.yaml").is_file()
    )


def _remove(pattern: str) -> Callable[[Path], object]:
    return lambda folder: next(folder.rglob(pattern)).unlink()


def _shorter(folder: Path) -> None:
    path = folder / "global_step20" / "layer_03-model_01-model_states.pt"
    torch.save({"self_attention.dense.weight": torch.ones(2, 2)}, path)


def _experts(folder: Path) -> None:
    args = argparse.Namespace(**{**vars(args_of("llama", 2)), "num_experts": [8]})
    torch.save({"args": args}, folder / "global_step20" / "mp_rank_00_model_states.pt")


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a rank": (_remove("layer_03-model_01*"), "copy all of it"),
    "a layer": (_remove("layer_04-model_*"), "args say 2"),
    "a file of another": (_shorter, "lacks"),
    "experts": (_experts, "args.num_experts [8]"),
    "cut off": (lambda f: next(f.rglob("layer_01*")).write_bytes(b"PK\x03\x04"), "damaged"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_whole_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch, capsys: Capture, name: str
) -> None:
    change, reason = SPOILED[name]
    write(tmp_path / "from", "llama", 2, pipeline=True)
    change(tmp_path / "from")
    assert tool(convert.main, monkeypatch, tmp_path / "from", tmp_path / "ours") == 4
    assert reason in capsys.readouterr().err and not (tmp_path / "ours").exists()
