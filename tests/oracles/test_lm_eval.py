"""lm-eval's log-likelihood of a text, under an exported GPT-2, is our own loss on that text."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.cli import convert
from megatron_lite.config.exit import run_tool
from megatron_lite.data.tokenizers.gpt2_bpe import GPT2_EOD, GPT2BPETokenizer, byte_characters
from tests.support.corpora import write_pair
from tests.support.extras import needs
from tests.train.runs import run_main

pytestmark = pytest.mark.oracles
LENGTH, SAMPLES = 24, 6
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r")]


def write_model(folder: Path) -> int:
    """A GPT-2 of Hugging Face's with a tokenizer of bytes and a few merges; returns the end of a document."""
    transformers = needs("transformers")
    names = [*byte_characters(), *map("".join, MERGES), GPT2_EOD]
    end = len(names) - 1
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(names), n_positions=LENGTH, n_embd=48, n_layer=2, n_head=3,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():  # far from uniform, so that the loss says something
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]))
    return end


def convert_folder(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path) -> Path:
    monkeypatch.setattr(sys, "argv", ["convert.py", str(source), str(target)])
    assert run_tool(convert.main) == 0
    return target


def our_loss(start: Path, prefix: str) -> float:
    """Of all samples of the token files, by an evaluation of the trainer."""
    done = run_main(
        "--config", str(start / "config.yaml"), "--load", str(start), "--finetune", "--skip-train",
        "--use-cpu", "--data-path", prefix, "--split", "0,100,0", "--eval-iters", str(SAMPLES),
        "--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1", "--lr", "0.1",
    )  # fmt: skip
    assert done.rc == 0, done.err
    found = re.search(r"lm loss value: (\S+)", done.out)
    assert found, done.out
    return float(found[1])


def their_likelihood(folder: Path, text: str) -> float:
    models, instances = needs("lm_eval.models.huggingface"), needs("lm_eval.api.instance")
    model = models.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    asked = instances.Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = model.loglikelihood_rolling([asked], disable_tqdm=True)
    return float(found)


def test_the_likelihood_of_a_text_is_our_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    end = write_model(tmp_path / "theirs")
    start = convert_folder(monkeypatch, tmp_path / "theirs", tmp_path / "start")
    exported = convert_folder(monkeypatch, start, tmp_path / "exported")

    tokenizer = GPT2BPETokenizer(str(exported / "vocab.json"), str(exported / "merges.txt"))
    letters = np.random.default_rng(0).choice(list("the inner "), 400)
    ids = tokenizer.encode("".join(letters))[: SAMPLES * LENGTH]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids and len(ids) == SAMPLES * LENGTH
    # a document's end first: it is what lm-eval puts before a text, and its windows are our samples
    prefix = write_pair(tmp_path / "text", [[end, *ids]], np.uint16)

    loss, likelihood = our_loss(start, prefix), their_likelihood(exported, text)
    assert abs(loss - math.log(end + 1)) > 0.2, "many models are next to a uniform guess"
    assert loss == pytest.approx(-likelihood / len(ids), rel=1e-5)
