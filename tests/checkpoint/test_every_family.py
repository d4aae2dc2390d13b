"""Every family goes in, is trained and goes out; what it cannot be is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint.huggingface.families import FAMILIES
from megatron_lite.checkpoint.huggingface.folder import open_folder
from megatron_lite.cli import convert
from megatron_lite.config.errors import CheckpointError
from tests.support.extras import needs
from tests.support.families import TINY, tiny
from tests.support.huggingface import (
    our_logits,
    random_tokens,
    setting,
    tensors,
    their_logits,
    tokenizer_files,
    tool,
)
from tests.train.runs import run_main

needs("transformers")


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return found


@pytest.mark.ci
@pytest.mark.parametrize("name", TINY)
def test_in_three_steps_and_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    theirs, ours, run, out, back = (tmp_path / n for n in ("theirs", "ours", "run", "out", "back"))
    tiny(name).save_pretrained(theirs)
    tokenizer_files(theirs, "vocab.json", "merges.txt")
    assert tool(convert.main, monkeypatch, theirs, ours) == 0
    done = run_main(
        "--config", str(ours / "config.yaml"), "--load", str(ours), "--finetune", "--save", str(run),
        "--save-interval", "3", "--use-cpu", "--mock-data", "--train-iters", "3", "--eval-iters", "0",
        "--micro-batch-size", "2", "--global-batch-size", "2", "--lr", "1e-3", "--num-workers", "0",
    )  # fmt: skip
    assert done.rc == 0, done.err
    assert tool(convert.main, monkeypatch, run, out, "--dtype", "f32") == 0
    before, after = tensors(theirs), tensors(out)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[n], after[n]) for n in before)
    tokens = random_tokens(263)
    expected = their_logits(out, tokens)
    difference = (our_logits(run, tokens) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, difference

    assert tool(convert.main, monkeypatch, ours, back) == 0
    assert all(torch.equal(before[n], t) for n, t in tensors(back).items())
    again = said(back)
    # without its window a Mistral is a Llama, and goes out as one
    kind = "llama" if name == "mistral-whole" else said(theirs)["model_type"]
    assert again["model_type"] == kind and FAMILIES[kind].architecture in again["architectures"]
    assert open_folder(back).model == open_folder(theirs).model


UNLIKE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"attention_bias": True}, "attention_bias True and mlp_bias False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu' is a Llama"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor '0.5': not known here"),
    ("llama", {"is_causal": False}, "is_causal False: only True is a Llama here"),
    ("gpt_neox", {"is_causal": None}, "is_causal None: only True is a GPT-NeoX here"),
    ("gpt_neox", {"attention_bias": False}, "attention_bias False: only True"),
    ("gpt_neox", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("mistral", {"sliding_window": 0}, "sliding_window 0"),
    ("qwen3", {"attention_bias": True}, "attention_bias True: only False"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}},
     "rope_parameters.mrope_section"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), UNLIKE, ids=lambda value: str(value)[:40])
def test_what_is_not_computed_here_is_refused_by_its_key(
    name: str, changes: dict[str, Any], words: str
) -> None:
    kind = name.split("-")[0]
    config = tiny(name).config.to_dict() | changes
    with pytest.raises(Exception, match="converted") as caught:
        FAMILIES[kind].read(json.loads(json.dumps(config)), Path("config.json"))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_no_other_family_takes_a_model_for_its_own(tmp_path: Path, name: str) -> None:
    """What one family says of its model no other says of it, but where they are one and the same."""
    tiny(name).save_pretrained(tmp_path)
    found = open_folder(tmp_path)
    assert found.family.lacks(found.model) == []
    able = [kind for kind, family in FAMILIES.items() if not family.lacks(found.model)]
    assert said(tmp_path)["model_type"] in able and able[0] in ("llama", name.split("-")[0])
    wider = dataclasses.replace(found.model, norm_epsilon=3e-6, rotary_base=7e5)
    assert not FAMILIES[able[0]].lacks(wider)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_head_of_its_own_is_not_dropped_for_the_table(tmp_path: Path, name: str) -> None:
    """transformers 5 computes with it, whatever config.json says; a copy of the table is left out."""
    tiny(name).save_pretrained(tmp_path)
    setting(tie_word_embeddings=True)(tmp_path)
    with pytest.raises(CheckpointError, match=r"other values than .*tie_word_embeddings false"):
        open_folder(tmp_path)


def test_one_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    """transformers reads model.safetensors, other programs what the index lists."""
    tiny("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    tiny("llama").save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds model\.safetensors and a .* of model-00001-of"
    ):
        open_folder(tmp_path)
