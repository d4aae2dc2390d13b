"""A model that turns neighbouring channels leaves as one that turns halves, and computes the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_lite.blueprint.figure.parts import Core
from megatron_lite.checkpoint.foreign.gguf import neighbours
from megatron_lite.checkpoint.huggingface.folder import open_folder
from megatron_lite.checkpoint.huggingface.importing import import_folder
from megatron_lite.checkpoint.huggingface.pairs import by_halves
from megatron_lite.cli import convert
from megatron_lite.storage.disk import Disk
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import our_logits, random_tokens, their_logits, tool

CORE = Core("attention.core", 3, 1, 8, rotated=6, interleaved=True)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt_neox"])
def test_an_export_computes_the_same_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With grouped heads, biases of q and k, norms of their heads, half of the channels turned."""
    needs("transformers")
    theirs, run, out = (tmp_path / n for n in ("theirs", "run", "out"))
    tiny(name).save_pretrained(theirs)
    found = open_folder(theirs)
    model = dataclasses.replace(found.model, rotary_interleaved=True)
    import_folder(
        dataclasses.replace(found, model=model), run, data={}, tokenizer={}, facts={},
        shard_bytes=1 << 30, disk=Disk(),
    )  # fmt: skip
    tokens = random_tokens(263)
    ours = our_logits(run, tokens)
    assert (ours - their_logits(theirs, tokens)).abs().max() > 0.01 * ours.abs().max()
    assert tool(convert.main, monkeypatch, run, out, "--dtype", "f32") == 0
    difference = (ours - their_logits(out, tokens)).abs().max() / ours.abs().max()
    assert difference < 1e-5, difference
    assert open_folder(out).model == found.model


def test_the_rows_of_a_pair_go_into_the_halves_and_all_others_stay() -> None:
    rows = torch.arange(16.0)
    for name, moved in (("q.weight", True), ("k.bias", True), ("q_norm.weight", True),
                        ("v.weight", False), ("output.weight", False)):  # fmt: skip
        tensor = rows.clone().view(16, 1).repeat(1, 2) if "weight" in name else rows.clone()
        by_halves(f"blocks.7.attention.{name}", tensor, CORE)
        head = [0, 2, 4, 1, 3, 5, 6, 7] if moved else list(range(8))
        expected = torch.tensor(head + [8 + row for row in head])
        assert torch.equal(tensor.view(16, -1)[:, 0], expected.float()), name
        by_halves(f"blocks.7.attention.{name}", rows, dataclasses.replace(CORE, interleaved=False))
        assert torch.equal(rows, torch.arange(16.0))


def test_llama_cpps_order_of_rows_is_that_of_such_a_model() -> None:
    core = dataclasses.replace(CORE, rotated=8)
    weight = torch.randn(16, 5)
    turned = weight.clone()
    by_halves("blocks.0.attention.k.weight", turned, core)
    assert torch.equal(neighbours(turned, 8), weight) and not torch.equal(turned, weight)
