"""Every family equals transformers' with the same weights: logits, gradients and chosen tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint.huggingface.folder import open_folder
from megatron_lite.inference.generate import generate
from megatron_lite.inference.model import build_model, find_model
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.parameters import local_parameters
from megatron_lite.parallel.context import ParallelContext
from tests.support.extras import needs
from tests.support.families import TINY, tiny
from tests.support.huggingface import random_tokens, require_equal
from tests.support.models import logits_and_loss

needs("transformers")


def loaded(folder: Path) -> Decoder:
    ctx = ParallelContext.serial()
    return build_model(find_model(folder, ctx), ctx)


@pytest.mark.parametrize("name", TINY)
def test_logits_loss_and_every_gradient_equal_transformers(tmp_path: Path, name: str) -> None:
    reference = tiny(name)
    reference.save_pretrained(tmp_path)
    found, model = open_folder(tmp_path), loaded(tmp_path)
    assert sum(p.numel() for p in reference.parameters()) == sum(
        torch.Size(shape).numel() for c in found.conversions for shape in c.ours.values()
    )
    reference = reference.double()
    tokens = random_tokens(263)
    theirs = reference(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    ours, loss = logits_and_loss(model, tokens)
    loss.backward()
    require_equal(ours[..., :263].transpose(0, 1), theirs.detach(), "logits")

    gradients = {n: p.grad for n, p in reference.named_parameters()}
    if "lm_head.weight" in gradients:  # GPT-NeoX's files keep its old name
        gradients["embed_out.weight"] = gradients["lm_head.weight"]
    expected = {
        part: (tensor, gradients[c.theirs].abs().max())
        for c in found.conversions
        for part, tensor in c.parts(gradients[c.theirs])
    }
    checked = set()
    for local in local_parameters(model):
        for piece in local.pieces:
            gradient, scale = expected[piece.name]
            if piece.name.endswith("attention.k.bias"):
                # it moves no softmax where positions do not turn it, little where they do
                scale = expected[piece.name.replace(".k.", ".q.")][0].abs().max()
            require_equal(piece.of(local.parameter.grad), gradient, piece.name, scale)
            checked.add(piece.name)
    assert checked == expected.keys()


@pytest.mark.parametrize("name", TINY)
def test_greedy_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    reference = tiny(name)
    reference.save_pretrained(tmp_path)
    prompt = random_tokens(263)[0, :5].tolist()
    answer = generate(
        loaded(tmp_path), prompt, max_new_tokens=19, pick=lambda x, _: x.argmax(-1), eod=None
    )
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=19, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()  # fmt: skip
    assert prompt + list(answer.ids) == expected
