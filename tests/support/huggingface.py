"""Folders of Hugging Face's: tiny ones of transformers, changes that spoil them, what ours makes of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lite.config.exit import run_tool
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, byte_characters
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.layers.contexts import ForwardContext
from megatron_lite.parallel.context import ParallelContext

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r")]


def tool(main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of a tool with these words behind its name."""
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, words)])
    return run_tool(main)


def tokenizer_files(folder: Path, vocab: str, merges: str) -> tuple[Path, Path]:
    """The two files of a GPT-2 tokenizer with 262 ids, which ends documents with 261."""
    names = [*byte_characters(), *(a + b for a, b in MERGES), GPT2_EOD]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / vocab).write_text(json.dumps({name: n for n, name in enumerate(names)}))
    lines = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / merges).write_text("#version: 0.2\n" + lines)
    return folder / vocab, folder / merges


def gpt2(vocab_size: int = 262, **changes: object) -> Any:
    """transformers' GPT-2, with random weights in all of it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(**{
        "vocab_size": vocab_size, "n_positions": 24, "n_embd": 48, "n_layer": 2, "n_head": 3,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 261,
        "eos_token_id": 261, **changes,
    })  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():  # biases are zero by default: give them something to show
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def our_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: [b, s] -> [b, s, v], in fp32, by the newest checkpoint of a folder, or a folder of theirs."""
    ctx = ParallelContext.serial()
    model = build_model(find_model(path, ctx), ctx, dtype=torch.float32)
    at = ForwardContext(samples=torch.arange(len(tokens)), index=torch.arange(tokens.shape[1]))
    with torch.no_grad():
        logits = model(tokens.t(), at).transpose(0, 1)
    return logits[..., : model.context.vocab_size]


def their_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The same by transformers; every tensor must be there, and no other."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        return model.eval()(tokens).logits


def require_equal(
    ours: torch.Tensor, theirs: torch.Tensor, what: str, scale: torch.Tensor | None = None
) -> None:
    """No element is off by more than 1e-5 of the tensor's largest.

    Element by element 1e-5 means nothing in fp32: elements near zero are what large ones left over.
    """
    scale = theirs.abs().max() if scale is None else scale
    difference = (ours.double() - theirs.double()).abs().max() / scale
    assert difference < 1e-5, f"{what}: {difference:.1e}"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All of a folder's safetensors files."""
    return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}


def random_tokens(vocab: int = 262) -> torch.Tensor:
    """int64 [3, 24]."""
    return torch.randint(0, vocab, (3, 24), generator=torch.Generator().manual_seed(5))


Change = Callable[[Path], object]


def setting(**changes: object) -> Change:
    """config.json says something else."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """The folder's one file holds something else."""

    def make(folder: Path) -> None:
        found = tensors(folder)
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return make


def index(**places: str) -> Change:
    """An index that places tensors so."""

    def make(folder: Path) -> None:
        text = json.dumps({"weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)

    return make
