"""Megatron-LM's torch_dist in: what Megatron core wrote computes its logits; what is spoiled is refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint.foreign.torch_dist import open_torch_dist
from megatron_lite.checkpoint.foreign.torch_file import open_torch_file
from megatron_lite.cli import convert
from megatron_lite.config.errors import CheckpointError
from tests.checkpoint.megatron_writer import (
    BASE,
    FFN,
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    ROWS,
    arguments,
)
from tests.support.extras import needs
from tests.support.huggingface import our_logits, tool
from tests.support.mutations import mutations
from tests.support.places import ROOT

Capture = pytest.CaptureFixture[str]
D = HIDDEN // HEADS


def computes_its_logits(source: Path, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool(convert.main, monkeypatch, source, ours) == 0
    written = open_torch_file(source / "logits.pt")
    tokens, logits = (written.read(written.value[name]) for name in ("tokens", "logits"))
    difference = (our_logits(ours, tokens) - logits).abs().max() / logits.abs().max()
    assert difference < 1e-5, difference


@pytest.mark.parametrize("kind", BASE)
def test_what_megatron_core_wrote_computes_its_logits(
    tmp_path: Path, monkeypatch, kind: str
) -> None:
    kept = ROOT / "tests/fixtures/megatron_core_0.16.1" / kind
    computes_its_logits(kept, tmp_path / "ours", monkeypatch)


def test_each_of_its_parts_is_read_and_felt(tmp_path: Path, monkeypatch) -> None:
    kept = ROOT / "tests/fixtures/megatron_core_0.16.1/parts"
    model = open_torch_dist(kept).model
    assert (model.qk_layernorm, model.add_qkv_bias, model.window) == (True, True, 6)
    assert (model.rope_scaling_type, model.rope_scaling_factor) == ("llama3", 4.0)
    for n, part in enumerate(
        ({"window_size": None}, {"use_rope_scaling": False}, {"rotary_interleaved": True})
    ):
        other = tmp_path / f"other{n}"
        shutil.copytree(kept, other)
        args = argparse.Namespace(**{**vars(arguments("parts")), **part})
        torch.save({"args": args, "iteration": 7}, other / "iter_0000007" / "common.pt")
        with pytest.raises(AssertionError, match="tensor"):
            computes_its_logits(other, tmp_path / f"ours{n}", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BASE)
def test_so_does_what_the_installed_one_writes(tmp_path: Path, monkeypatch, kind: str) -> None:
    needs("megatron.core")
    words = [sys.executable, "-m", "tests.checkpoint.megatron_writer", kind, str(tmp_path / kind)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    computes_its_logits(tmp_path / kind, tmp_path / "ours", monkeypatch)


# -- files of our own ---------------------------------------------------------------------------


def llama_state() -> dict[str, torch.Tensor]:
    """Tensors as Megatron core names and stacks them."""
    torch.manual_seed(1)
    layers = {
        "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * D, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, HIDDEN),
        "mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
        "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN),
    }
    return {
        "embedding.word_embeddings.weight": torch.randn(ROWS, HIDDEN),
        "decoder.final_layernorm.weight": torch.randn(HIDDEN),
        "output_layer.weight": torch.randn(ROWS, HIDDEN),
        "optimizer.state.exp_avg.output_layer.weight": torch.randn(ROWS, HIDDEN),
        **{f"decoder.layers.{name}": torch.randn(LAYERS, *shape) for name, shape in layers.items()},
    }


def write(folder: Path, state: dict[str, Any], args: object) -> Path:
    """One iteration by torch's own writer."""
    from torch.distributed import checkpoint

    inside = folder / "iter_0000007"
    inside.mkdir(parents=True)
    checkpoint.save(dict(state), checkpoint_id=inside, no_dist=True)
    torch.save({"args": args, "iteration": 7}, inside / "common.pt")
    (inside / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return inside


def test_each_part_of_a_fused_matrix_is_found(tmp_path: Path) -> None:
    state = llama_state()
    write(tmp_path, state, arguments("llama"))
    found = open_torch_dist(tmp_path, vocab_size=50)
    parts = {name: part for c in found.conversions for name, part in found.parts(c)}
    qkv = state["decoder.layers.self_attention.linear_qkv.weight"][1].view(GROUPS, -1, D, HIDDEN)
    each = HEADS // GROUPS
    expected = {
        "attention.q": qkv[:, :each], "attention.k": qkv[:, each], "attention.v": qkv[:, each + 1],
        "mlp.gate": state["decoder.layers.mlp.linear_fc1.weight"][1, :FFN],
        "mlp.up": state["decoder.layers.mlp.linear_fc1.weight"][1, FFN:],
        "mlp.down": state["decoder.layers.mlp.linear_fc2.weight"][1],
    }  # fmt: skip
    for name, tensor in expected.items():
        assert torch.equal(
            parts[f"blocks.1.{name}.weight"], tensor.reshape(-1, tensor.shape[-1])
        ), name
    assert torch.equal(parts["head.weight"], state["output_layer.weight"][:50])
    norm = state["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    assert torch.equal(parts["blocks.1.mlp_norm.weight"], norm[1])
    assert found.model.vocab_size == 50


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def _args(**changes: object) -> Callable[[Path], object]:
    def change(inside: Path) -> None:
        args = argparse.Namespace(**{**vars(arguments("llama")), **changes})
        torch.save({"args": args}, inside / "common.pt")

    return change


def _metadata(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def make(inside: Path) -> None:
        found = pickle.loads((inside / ".metadata").read_bytes())
        change(found)
        (inside / ".metadata").write_bytes(pickle.dumps(found))

    return make


def _elsewhere(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../__0_0.distcp"


def _swapped(metadata: Any) -> None:
    """Two tensors of one shape are not told apart; of two shapes they are."""
    places = metadata.storage_data
    first, last = (
        next(k for k in places if name in k.fqn) for name in ("fc1.weight", "fc2.weight")
    )
    places[first], places[last] = places[last], places[first]


def _cut(inside: Path) -> None:
    path = next(inside.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:3000])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda i: next(i.glob("*.distcp")).unlink(), "is not there"),
    "cut off": (_cut, "cut off"),
    "no common": (lambda i: (i / "common.pt").unlink(), "is not there"),
    "no args": (lambda i: torch.save({"iteration": 3}, i / "common.pt"), "has no args of Megatron's"),
    "zarr": (lambda i: (i / "metadata.json").write_text('{"sharded_backend": "zarr"}'), "'zarr'"),
    "no json": (lambda i: (i / "metadata.json").write_text("{"), "cannot be read"),
    "experts": (_args(num_experts=8), "args.num_experts 8"),
    "layers": (_args(num_layers=3), "args.num_layers is 3"),
    "width": (_args(hidden_size=30), "in the file"),
    "ahead": (_args(window_size=(4, 2)), "args.window_size (4, 2)"),
    "some windows": (
        _args(window_size=[4, 0], window_attn_skip_freq=2), "args.window_attn_skip_freq 2"
    ),
    "another norm": (_args(qk_l2_norm=True), "args.qk_l2_norm True"),
    "no norms": (_args(qk_layernorm=True), "q_layernorm.weight: missing"),
    "rope": (_args(mrope_section=[4, 4]), "args.mrope_section"),
    "position": (_args(position_embedding_type="mrope"), "position_embedding_type mrope"),
    "elsewhere": (_metadata(_elsewhere), "only a plain *.distcp"),
    "swapped": (_metadata(_swapped), "the folder is a mix of two"),
    "no place": (_metadata(lambda m: m.storage_data.clear()), "does not say of every tensor"),
    "a stranger": (
        _metadata(lambda m: m.state_dict_metadata.update(
            {"vision.weight": m.state_dict_metadata["output_layer.weight"]})),
        "vision.weight: no tensor of a GPT or Llama",
    ),
    "one less": (_metadata(lambda m: m.state_dict_metadata.pop("output_layer.weight")), "missing"),
    "pickle": (lambda i: (i / ".metadata").write_bytes(b"\x80\x04junk"), "is damaged or no pickle"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_whole_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch, capsys: Capture, name: str
) -> None:
    change, reason = SPOILED[name]
    inside = write(tmp_path / "theirs", llama_state(), arguments("llama"))
    change(inside)
    assert tool(convert.main, monkeypatch, tmp_path / "theirs", tmp_path / "ours") == 4
    assert reason in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_programs_in_its_pickles_are_not_run(tmp_path: Path, monkeypatch) -> None:
    canary = tmp_path / "canary"
    args = argparse.Namespace(**vars(arguments("llama")), extra=Evil(canary))
    inside = write(tmp_path / "theirs", llama_state(), args)
    assert tool(convert.main, monkeypatch, tmp_path / "theirs", tmp_path / "ours") == 0
    (inside / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
    assert tool(convert.main, monkeypatch, inside, tmp_path / "no") == 4
    assert not canary.exists()


def test_mutated_metadata_are_read_or_refused(tmp_path: Path) -> None:
    inside = write(tmp_path, llama_state(), arguments("llama"))
    refused = 0
    for data in mutations((inside / ".metadata").read_bytes(), 150, 3):
        (inside / ".metadata").write_bytes(data)
        try:
            open_torch_dist(inside)
        except CheckpointError:
            refused += 1
    assert refused > 50
