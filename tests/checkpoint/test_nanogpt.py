"""nanoGPT's ckpt.pt in: logits equal, one that is spoiled or hostile is refused and nothing runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.cli import convert
from tests.support.extras import needs
from tests.support.huggingface import gpt2, our_logits, random_tokens, tensors, tool
from tests.train.runs import run_main, steps

Capture = pytest.CaptureFixture[str]
_TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def checkpoint(*, bias: bool = True, untied: bool = False, prefix: str = "") -> tuple[Any, Any]:
    """transformers' GPT-2 of the same numbers, and what nanoGPT's train.py would save of it."""
    needs("transformers")
    model = gpt2(activation_function="gelu", tie_word_embeddings=not untied)
    if not bias:
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.zeros_(parameter)
    state = {
        prefix + name: tensor.t().contiguous() if name.endswith(_TURNED) else tensor
        for name, tensor in model.state_dict().items()
        if bias or not name.endswith(".bias")
    }
    saved = {
        "model": state,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {
            "n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 24, "bias": bias,
            "vocab_size": 262, "dropout": 0.0,
        },
        "iter_num": 5000, "best_val_loss": torch.tensor(2.5), "config": {"dataset": "openwebtext"},
    }  # fmt: skip
    return model, saved


@pytest.mark.parametrize(
    ("options", "zipped"),
    [({}, True), ({"prefix": "_orig_mod."}, True), ({"bias": False}, True),
     ({"untied": True}, True), ({}, False)],
    ids=["plain", "compiled", "no bias", "untied", "old file"],
)  # fmt: skip
def test_logits_are_those_of_the_same_numbers(
    tmp_path: Path, monkeypatch, options: dict[str, Any], zipped: bool
) -> None:
    model, saved = checkpoint(**options)
    (source := tmp_path / "out").mkdir()
    torch.save(saved, source / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    assert tool(convert.main, monkeypatch, source, tmp_path / "ours") == 0
    tokens = random_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
    difference = (our_logits(tmp_path / "ours", tokens) - expected).abs().max()
    assert difference / expected.abs().max() < 1e-5, difference


def test_it_is_trained_on_and_goes_out_to_transformers(
    tmp_path: Path, monkeypatch, capsys: Capture
) -> None:
    _, saved = checkpoint()
    torch.save(saved, tmp_path / "some.pt")
    ours, run, out = (tmp_path / name for name in ("ours", "run", "out"))
    assert tool(convert.main, monkeypatch, tmp_path / "some.pt", ours, "--vocab-size", 257) == 0
    said = capsys.readouterr().out
    assert "iteration 5000 of nanoGPT" in said and "GELU" in said
    done = run_main(
        "--config", str(ours / "config.yaml"), "--load", str(ours), "--finetune", "--save", str(run),
        "--save-interval", "2", "--use-cpu", "--mock-data", "--train-iters", "2", "--eval-iters", "0",
        "--micro-batch-size", "2", "--global-batch-size", "2", "--lr", "1e-3", "--num-workers", "0",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", "256",
    )  # fmt: skip
    assert done.rc == 0 and len(steps(run)) == 2, done.err
    assert tool(convert.main, monkeypatch, ours, out) == 0
    assert torch.equal(
        tensors(out)["transformer.wte.weight"], saved["model"]["transformer.wte.weight"][:257]
    )


def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path, monkeypatch, capsys: Capture) -> None:
    torch.save(checkpoint()[1], tmp_path / "ckpt.pt")
    assert tool(convert.main, monkeypatch, tmp_path, tmp_path / "ours", "--dry-run") == 0
    assert (
        "transformer.h.1.attn.c_attn.weight [144, 48] -> blocks.1.attention.q.weight [48, 48]"
        in (capsys.readouterr().out)
    )
    assert not (tmp_path / "ours").exists()


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def _set(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["model_args"].__setitem__(key, value)


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no sizes": (lambda s: s.pop("model_args"), "no model and model_args"),
    "one tensor less": (lambda s: s["model"].pop("transformer.ln_f.bias"), "missing"),
    "one tensor more": (lambda s: s["model"].update(x=torch.ones(1)), "x: no tensor of such"),
    "no tensor": (lambda s: s["model"].update(x="y"), "which is no tensor"),
    "no table": (lambda s: s.update(model=[1]), "no tables by name"),
    "another width": (_set("n_embd", 42), "in the file"),
    "no heads": (_set("n_head", 7), "no such model is built here"),
    "huge": (_set("n_layer", 1 << 30), "holds only"),
    "a size that is none": (_set("n_layer", "2"), "not a whole number"),
    "not known": (_set("n_experts", 4), "model_args.n_experts"),
    "whole numbers": (
        lambda s: s["model"].update({"transformer.ln_f.bias": torch.ones(48, dtype=torch.int64)}),
        "torch.int64",
    ),
    "a namespace": (lambda s: s.update(model=argparse.Namespace()), "no tables by name"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_whole_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch, capsys: Capture, name: str
) -> None:
    change, reason = SPOILED[name]
    saved = checkpoint()[1]
    change(saved)
    torch.save(saved, tmp_path / "ckpt.pt")
    assert tool(convert.main, monkeypatch, tmp_path / "ckpt.pt", tmp_path / "ours") == 4
    err = capsys.readouterr().err
    assert reason in err and str(tmp_path / "ckpt.pt") in err
    assert not (tmp_path / "ours").exists()


def test_one_that_is_cut_off_foreign_or_hostile_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch, capsys: Capture
) -> None:
    saved, canary = checkpoint()[1], tmp_path / "canary"
    saved["config"] = Evil(canary)
    path = tmp_path / "ckpt.pt"
    torch.save(saved, path)
    words = (path, tmp_path / "ours", "--dry-run")
    assert tool(convert.main, monkeypatch, *words) == 0  # the rest of it is what it should be
    saved["model"]["transformer.wte.weight"] = Evil(canary)
    torch.save(saved, path)
    whole = path.read_bytes()
    for data, reason in (
        (whole, "which is no tensor"), (whole[: len(whole) // 2], "damaged or no file of torch.save"),
        (b"\x80\x04N.", "does not begin with the number"), (b"", "has 0 bytes"),
        (b"not one of torch's", "damaged or no file"),
    ):  # fmt: skip
        path.write_bytes(data)
        assert tool(convert.main, monkeypatch, *words) == 4
        assert reason in capsys.readouterr().err
    assert tool(convert.main, monkeypatch, path, tmp_path / "no", "--dtype", "float16") == 2
    assert not canary.exists()
