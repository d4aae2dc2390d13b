"""Vocabulary-parallel scores equal torch's, forward and backward, whatever the padding, tp and format."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.kernels import cross_entropy as kernels
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.kernels.table import TABLE
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.cross_entropy import Scoring, token_losses, token_scores
from megatron_lite.parallel.context import Axis, ParallelContext
from tests.support.spawn import spawn

VOCAB = 17
OPS = ("cross_entropy", "cross_entropy_gradients")
COMPILER = Compiler()


def broken(graph, inputs):
    """A backend that compiles nothing."""
    raise OSError("no compiler here")


def scoring(rank=0, ranks=1, compilers=None):
    """compilers: of the two ops' rows that are to be compiled; the reference without."""
    ops = [TABLE[op][-1].run for op in OPS]
    if compilers is not None:
        rows = [TABLE[op][0] for op in OPS]
        ops = [
            compiler.piece(op, row.run, row.uncompiled)
            for compiler, op, row in zip(compilers, OPS, rows, strict=True)
        ]
    axis = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD if ranks > 1 else None)
    return Scoring(axis, VOCAB, *ops)


def drawn(padded, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 3, padded, generator=generator) * 5).to(dtype)
    labels = torch.randint(0, VOCAB, (5, 3), generator=generator)
    return logits, labels, torch.rand(2, 5, 3, generator=generator)


def plain(logits, labels, upstream, entropy):
    """(log p, entropy, gradient of their weighted sum) by autograd in float64."""
    x = logits.double().requires_grad_(True)
    log_p = x[..., :VOCAB].log_softmax(-1)
    picked = log_p.gather(-1, labels[..., None])[..., 0]
    entropies = torch.distributions.Categorical(logits=x[..., :VOCAB]).entropy()
    (picked * -upstream[0] + entropies * upstream[1] * entropy).sum().backward()
    return picked.detach(), entropies.detach(), x.grad


def local(rank, ranks, padded, dtype, compilers=None) -> bool:
    columns = slice(rank * padded // ranks, (rank + 1) * padded // ranks)
    logits, labels, upstream = drawn(padded, dtype)
    fine = dtype == torch.float32
    for entropy in (False, True):
        picked, entropies, gradient = plain(logits, labels, upstream, entropy)
        x = logits[..., columns].clone().requires_grad_(True)
        if entropy:
            ours = token_scores(x.clone(), labels, scoring(rank, ranks, compilers))
            losses = -ours.log_probabilities
            torch.testing.assert_close(ours.entropies.double(), entropies, rtol=1e-5, atol=1e-5)
            ((losses * upstream[0]).sum() + (ours.entropies * upstream[1]).sum()).backward()
        else:
            losses = token_losses(x.clone(), labels, scoring(rank, ranks, compilers))
            (losses * upstream[0]).sum().backward()
        torch.testing.assert_close(-losses.double(), picked, rtol=1e-6, atol=1e-6)
        # a 16-bit gradient is rounded once
        bounds = {"rtol": 1e-5, "atol": 1e-6} if fine else {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(x.grad.double(), gradient[..., columns], **bounds)
        real = min(max(VOCAB - columns.start, 0), columns.stop - columns.start)
        assert not x.grad[..., real:].any()
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [17, 32])
def test_equals_torch(padded, dtype) -> None:
    assert local(0, 1, padded, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_pair_equals_torch(dtype) -> None:
    """Its scores leave the logits as they are, and its gradients know padding by its place."""
    assert local(0, 1, 32, dtype, (COMPILER, COMPILER))
    assert COMPILER.failure is None and COMPILER.pieces == [*OPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_gradients_cannot_be_compiled_the_reference_finishes(dtype) -> None:
    """Compiled scores leave padding unmarked, and the logits as they are."""
    said: list[str] = []
    compilers = Compiler("eager", warn=pytest.fail), Compiler(broken, warn=said.append)
    assert local(0, 1, 32, dtype, compilers)
    assert len(said) == 1


def test_compiled_gradients_follow_the_references_scores() -> None:
    """`--kernel cross_entropy=reference`: fp32 logits are log probabilities by then."""
    logits, labels, upstream = drawn(32)
    gradients = TABLE[OPS[1]][0]
    compiled = Compiler("eager", warn=pytest.fail).piece(OPS[1], gradients.run)
    results = []
    for how in (scoring(), scoring()._replace(gradients=compiled)):
        x = logits.clone().requires_grad_(True)
        (token_losses(x.clone(), labels, how) * upstream[0]).sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


def test_a_layer_whose_compiler_fails_goes_on_in_blocks(monkeypatch) -> None:
    """The rows for a compiler, run as they are, would store several fp32 copies of the logits."""
    widest = 0

    def see(logits, *beside):
        nonlocal widest
        widest = max(widest, logits.numel())
        return blocks(logits, *beside)

    blocks = kernels._blocks
    monkeypatch.setattr(kernels, "_blocks", see)
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=8)
    context = StageContext(
        model, ParallelContext.serial(), vocab_size=VOCAB, padded_vocab_size=32,
        compiler=Compiler(broken, warn=lambda line: None),
    )  # fmt: skip
    how = Scoring.chosen(context)
    assert any("at-once" in line for line in context.kernels)
    logits, labels, _ = drawn(32)
    results = []
    for one in (how, scoring()):
        x, widest = logits.clone().requires_grad_(True), 0
        token_scores(x.clone(), labels, one).entropies.sum().backward()
        assert widest == logits.numel()
        results.append(x.grad)
    assert torch.equal(*results)


def of_each_format(rank, ranks, padded) -> bool:
    return all(
        local(rank, ranks, padded, dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


@pytest.mark.parametrize(("ranks", "padded"), [(2, 20), (4, 32), (3, 60)])
def test_equals_torch_over_tp(ranks, padded) -> None:
    """With 3 ranks and 60 columns the last rank holds nothing but padding."""
    assert spawn(of_each_format, ranks, padded) == [True] * ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_widened_in_blocks_is_what_is_widened_at_once(monkeypatch, dtype) -> None:
    logits, labels, upstream = drawn(20, dtype)
    found = []
    for elements in (kernels._BLOCK, 4 * 20, 1):
        monkeypatch.setattr(kernels, "_BLOCK", elements)
        x = logits.clone().requires_grad_(True)
        ours = token_scores(x.clone(), labels, scoring())
        (ours.log_probabilities * upstream[0] + ours.entropies * upstream[1]).sum().backward()
        found.append([*ours, x.grad])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(4, 2, VOCAB, dtype=torch.bfloat16)
    labels = torch.randint(0, VOCAB, (4, 2))
    ours = token_losses(logits.clone(), labels, scoring())
    theirs = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(ours.flatten(), theirs)
