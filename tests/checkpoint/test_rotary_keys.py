"""Scaled rotary positions in config.json: what transformers computes of it we compute, at every length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint.huggingface.folder import open_folder
from megatron_lite.checkpoint.manifest import NAME
from megatron_lite.cli import convert
from megatron_lite.config.errors import CheckpointError
from tests.support.extras import needs
from tests.support.families import tiny
from tests.support.huggingface import our_logits, require_equal, their_logits, tool

needs("transformers")
LISTS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 1.5, 2.0, 2.5]}
SCALED: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 1.5, **LISTS},
    "yarn of DeepSeek": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "mscale": 0.707,
        "mscale_all_dim": 0.5, "beta_fast": 1.0, "beta_slow": 0.2},
    "yarn of the first models": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "finetuned": True,
        "mscale": 1.0, "mscale_all_dim": 0},
    "yarn of gpt-oss": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6, "truncate": False,
        "beta_fast": 1.0, "beta_slow": 0.2},
}  # fmt: skip


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 263, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", SCALED)
def test_logits_are_those_of_transformers_in_short_and_long_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    theirs = tmp_path / "theirs"
    tiny("llama", rope_parameters=SCALED[name] | {"rope_theta": 5000.0}).save_pretrained(theirs)
    found = [our_logits(theirs, tokens(length)) for length in (12, 40)]  # trained are 24, or 16
    for logits, length in zip(found, (12, 40), strict=True):
        require_equal(logits, their_logits(theirs, tokens(length)), f"{name} at {length}")
    ours, out = tmp_path / "ours", tmp_path / "out"
    for source, target in ((theirs, ours), (ours, out)):
        assert tool(convert.main, monkeypatch, source, target, "--no-tokenizer") == 0
    assert open_folder(out).model == open_folder(theirs).model
    assert torch.equal(our_logits(ours, tokens(40)), found[1])
    assert torch.equal(their_logits(out, tokens(40)), their_logits(theirs, tokens(40)))


def _stretch(folder: Path, **model: object) -> None:
    """The manifest says another scaling, and its hash is true again."""
    path = folder / "iter_0000000" / NAME
    body = json.loads(path.read_bytes())["body"]
    body["config"]["model"].update(model)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "body": body}))


def test_ntk_goes_out_as_the_base_it_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    tiny("llama").save_pretrained(theirs)
    assert tool(convert.main, monkeypatch, theirs, ours, "--no-tokenizer") == 0
    _stretch(ours, rope_scaling_type="ntk", rope_scaling_factor=4.0)
    assert tool(convert.main, monkeypatch, ours, tmp_path / "out", "--no-tokenizer") == 0
    assert "NOTE: --rope-scaling-type ntk goes out as its base, 31748.0" in capsys.readouterr().out
    require_equal(
        our_logits(ours, tokens(40)), their_logits(tmp_path / "out", tokens(40)), "another base"
    )


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 0.0, 1.0, 1.0]},
         ["rope_parameters.short_factor [1.0, 0.0, 1.0, 1.0]: no list", "rope_parameters.long_factor None"]),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 5},
         ["--rope-long-factors has 5 numbers, and 8 of 8 channels per head are rotated: give 4"]),
        ({"rope_type": "yarn", "factor": 0.5}, ["rope_parameters.factor 0.5: less than 1 shortens"]),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 32}, ["--rope-beta-slow 32.0 must be below"]),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, ["rope_parameters.truncate 'no'"]),
        ({"rope_type": "dynamic"}, ["rope_parameters.factor is missing"]),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, ["rope_parameters.beta_fast '3.0': not"]),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(
    tmp_path: Path, said: dict[str, Any], refused: list[str]
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"rope_parameters": said}))
    with pytest.raises(CheckpointError) as error:
        open_folder(tmp_path)
    assert all(words in str(error.value) for words in refused), str(error.value)


@pytest.mark.parametrize("beside", [{"rope_theta": 7e3}, {}], ids=["another base", "no base"])
def test_two_ways_to_say_it_have_one_base(tmp_path: Path, beside: dict[str, Any]) -> None:
    """transformers takes the base beside rope_scaling, 10000 where none is said."""
    tiny("llama").save_pretrained(tmp_path)
    path, scaling = tmp_path / "config.json", {"rope_type": "linear", "factor": 2.0}
    said = {"rope_parameters": scaling | {"rope_theta": 5e3}, "rope_scaling": scaling}
    whole = json.loads(path.read_bytes()) | said
    path.write_text(json.dumps(whole | {"rope_theta": 5000}))
    assert open_folder(tmp_path).model.rotary_base == 5000
    path.write_text(json.dumps(whole | beside))
    with pytest.raises(CheckpointError, match=r"with rope_theta .* say different things"):
        open_folder(tmp_path)
