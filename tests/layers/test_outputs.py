"""What an objective gets from its outputs, whole or in chunks, is plain torch's, with autograd's gradients."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.blueprint.logits import LogitsBudget
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.cross_entropy import Scoring
from megatron_lite.layers.outputs import Outputs
from megatron_lite.layers.product import Products
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.rehearsal.footprint import Footprint
from tests.support.spawn import spawn

S, B, H, V = 12, 2, 8, 21
MODEL = ModelConfig(num_layers=1, hidden_size=H, num_attention_heads=1, seq_length=S)
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
CHUNKS = (1, 4, 8)  # eight do not divide 12 tokens evenly
ASKED = ("loss sum", "losses", "scores")


def drawn(padded: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x, weight, labels, and what the losses and entropies of tokens count."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(S, B, H, generator=generator).to(dtype)
    weight = torch.randn(padded, H, generator=generator).to(dtype)
    labels = torch.randint(0, V, (S, B), generator=generator)
    return x, weight, labels, torch.rand(S, B, generator=generator).round(decimals=1)


def total_of(losses: Tensor, entropies: Tensor | None, counts: Tensor, asked: str) -> Tensor:
    """One number that the losses enter as they are, squared, or beside entropies."""
    if asked == "loss sum":
        return (losses * counts).sum()
    if entropies is None:
        return (losses.square() * counts).sum()
    return (losses * counts).sum() + (entropies.exp() * counts).sum()


def plain(padded: int, dtype: torch.dtype, asked: str) -> tuple[Tensor, ...]:
    """(total, losses, gradients of x and weight) of one process that keeps everything in fp32."""
    x, weight, labels, counts = drawn(padded, dtype)
    x, weight = (y.requires_grad_(True) for y in (x, weight))
    logits = F.linear(x, weight)[..., :V].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    log_p = logits.log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1) if asked == "scores" else None
    total = total_of(losses, entropies, counts, asked)
    (total * 0.25).backward()
    assert x.grad is not None and weight.grad is not None
    return total.detach(), losses.detach(), x.grad, weight.grad


def made(
    rank: int, ranks: int, padded: int, dtype: torch.dtype, asked: str, number: int, split: bool,
    attached: bool, expected: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same of this rank: its slice of x, its rows of the weight."""
    x, weight, labels, counts = drawn(padded, dtype)
    weight = weight.chunk(ranks)[rank].clone().requires_grad_(True)
    x = (x.chunk(ranks)[rank] if split else x).clone().requires_grad_(True)
    tp = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD if ranks > 1 else None)
    context = StageContext(
        MODEL, ParallelContext(torch.device("cpu"), tp=tp), padded_vocab_size=padded, vocab_size=V,
        sequence_parallel=split,
        logits_budget=LogitsBudget(S * B * len(weight) * x.element_size() / number, None),
    )  # fmt: skip
    total_gradient = torch.zeros(weight.shape)
    ready: list[Tensor] = []
    if attached:
        context.gradients.attach([(weight, total_gradient)], ready.append)
    outputs = Outputs(x * 1.0, weight, context, Products.chosen(context), Scoring.chosen(context))
    assert outputs.num_chunks == number
    if expected is not None:
        outputs = outputs.expecting(torch.tensor(expected))
    if asked == "loss sum":
        total, losses = outputs.loss_sum(labels, counts)
        assert not losses.requires_grad
    elif asked == "losses":
        losses = outputs.token_losses(labels)
        total = total_of(losses, None, counts, asked)
    else:
        picked, entropies = outputs.token_scores(labels)
        losses = -picked
        total = total_of(losses, entropies, counts, asked)
    (total * 0.25).backward()
    assert x.grad is not None
    if attached:
        assert len(ready) == 1 and ready[0] is weight and weight.grad is None
        return total.detach(), losses.detach(), x.grad, total_gradient
    assert weight.grad is not None and weight.grad.dtype == dtype
    return total.detach(), losses.detach(), x.grad, weight.grad


def of_rank(rank: int, ranks: int, padded: int) -> bool:
    """Every way to ask, in every format, against plain torch."""
    splits = (False, True) if ranks > 1 else (False,)
    for dtype, asked, number, split in itertools.product(FORMATS, ASKED, CHUNKS, splits):
        total, losses, dx, dw = plain(padded, dtype, asked)
        dx = dx.chunk(ranks)[rank] if split else dx
        dw = dw.chunk(ranks)[rank]
        # gradients of logits and of x are rounded to 16 bits once each, more often with tp
        step = 2e-6 if dtype == torch.float32 else 2**-6 if dtype == torch.bfloat16 else 2**-9
        for attached, expected in ((True, 0.25), (True, None), (False, 16.0)):
            ours = made(rank, ranks, padded, dtype, asked, number, split, attached, expected)
            torch.testing.assert_close(ours[0], total, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(ours[1], losses, rtol=1e-5, atol=1e-5)
            for found, theirs in zip(ours[2:], (dx, dw), strict=True):
                worst = (found.float() - theirs.float()).abs().max()
                assert worst <= step * theirs.float().abs().max(), (dtype, asked, number, split)
    return True


@pytest.mark.parametrize("padded", [V, 32])
def test_outputs_equal_plain_torch(padded: int) -> None:
    assert of_rank(0, 1, padded)


@pytest.mark.parametrize(("ranks", "padded"), [(2, 24), pytest.param(4, 64, marks=pytest.mark.ci)])
def test_outputs_over_tp_equal_plain_torch(ranks: int, padded: int) -> None:
    """Of 4 ranks with 16 columns each, two have nothing but padding."""
    assert spawn(of_rank, ranks, padded) == [True] * ranks


def test_an_evaluation_in_chunks_makes_no_gradient() -> None:
    x, weight, labels, counts = drawn(32, torch.float32)
    budget = LogitsBudget(S * B * 32 * 4 / 4, None)
    context = StageContext(
        MODEL, ParallelContext.serial(), padded_vocab_size=32, vocab_size=V, logits_budget=budget
    )
    parts = context, Products.chosen(context), Scoring.chosen(context)

    def never(*_: object) -> Tensor:
        raise AssertionError("a gradient in an evaluation")

    scoring = parts[2]._replace(gradients=never)
    outputs = Outputs(x, weight.requires_grad_(True), context, parts[1], scoring)
    with torch.no_grad():
        total, losses = outputs.loss_sum(labels, counts)
        assert torch.equal(losses, outputs.token_losses(labels))
    theirs = plain(32, torch.float32, "loss sum")
    torch.testing.assert_close((total, losses), theirs[:2])


@pytest.mark.parametrize("frozen", ["x", "weight"])
@pytest.mark.parametrize("asked", ASKED[:2])
def test_what_is_frozen_gets_no_gradient_in_chunks(frozen: str, asked: str) -> None:
    x, weight, labels, counts = drawn(32, torch.float32)
    context = StageContext(
        MODEL, ParallelContext.serial(), padded_vocab_size=32, vocab_size=V,
        logits_budget=LogitsBudget(S * B * 32 * 4 / 4, None),
    )  # fmt: skip
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    outputs = Outputs(x, weight, context, Products.chosen(context), Scoring.chosen(context))
    if asked == "loss sum":
        total = outputs.loss_sum(labels, counts).total
    else:
        total = total_of(outputs.token_losses(labels), None, counts, asked)
    (total * 0.25).backward()
    theirs = dict(zip(("x", "weight"), plain(32, torch.float32, asked)[2:], strict=True))
    for name, tensor in (("x", x), ("weight", weight)):
        if name == frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, theirs[name])


def peak(number: int, asked: str) -> int:
    """Bytes on top of what there was, in a forward and backward of 2048 tokens over 4096 columns."""
    tokens, columns = 2048, 4096
    model = replace(MODEL, hidden_size=16, seq_length=tokens)
    context = StageContext(
        model, ParallelContext.serial("meta"), padded_vocab_size=columns, vocab_size=4000,
        logits_budget=LogitsBudget(tokens * columns * 2 / number, None),
    )  # fmt: skip
    with torch.device("meta"):
        x = torch.zeros(tokens, 1, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(columns, 16, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(tokens, 1, dtype=torch.int64)
        counts = torch.zeros(tokens, 1)
    kernels = Products.chosen(context), Scoring.chosen(context)
    seen = Footprint("meta")
    with seen:
        outputs = Outputs(x, weight, context, *kernels)
        if asked == "loss sum":
            outputs.loss_sum(labels, counts).total.backward()
        else:
            (outputs.token_losses(labels).square() * counts).sum().backward()
    return seen.peak


@pytest.mark.parametrize("asked", ASKED[:2])
def test_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """Logits of 16 MiB in all; their fp32 block is kept small beside them."""
    monkeypatch.setattr("megatron_lite.kernels.cross_entropy._BLOCK", 2**16)
    logits, rest = 2048 * 4096 * 2, 2**21
    assert logits < peak(1, asked) < logits + rest
    for number in (4, 16):
        assert logits / number < peak(number, asked) < logits / number + rest


def test_chunks_follow_from_the_budget() -> None:
    default = LogitsBudget()
    gib = 2.0**30
    assert [default.chunks(1024, n * gib / 1024) for n in (0.1, 1.0, 1.01, 3, 6.1, 8, 60)] == [
        1, 1, 2, 4, 8, 8, 8,
    ]  # fmt: skip
    tiny = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 64 --seq-length 16"

    def asked(more: str, schedule: str) -> LogitsBudget:
        config = parse(f"{tiny} --lr 1e-3 --train-iters 1 --mock-data {more}".split()).config
        return LogitsBudget.from_config(config.parallel, schedule)

    assert asked("", "1f1b") == default
    assert asked("", "zb-h1").chunks(1024, gib) == 1
    given = asked("--logits-chunk-mib 256", "zb-h1")
    assert given.chunks(1024, 16 * gib / 1024) == 64
    assert given.chunks(4, 64 * gib) == 4  # a token at least
