"""Vocabulary-parallel loss equals torch's, forward and backward, whatever the padding and tp."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lite.layers.cross_entropy import cross_entropy
from megatron_lite.parallel.context import Axis
from tests.support.spawn import spawn

VOCAB = 17


def reference(padded):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, padded, generator=generator) * 5
    labels = torch.randint(0, VOCAB, (5, 3), generator=generator)
    upstream = torch.rand(5, 3, generator=generator)
    x = logits.double().requires_grad_(True)
    loss = F.cross_entropy(x[..., :VOCAB].flatten(0, 1), labels.flatten(), reduction="none")
    (loss.view(5, 3) * upstream).sum().backward()
    return logits, labels, upstream, loss.view(5, 3).detach(), x.grad


def local(rank, ranks, padded) -> bool:
    logits, labels, upstream, loss, gradient = reference(padded)
    columns = slice(rank * padded // ranks, (rank + 1) * padded // ranks)
    x = logits[..., columns].clone().requires_grad_(True)
    axis = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD if ranks > 1 else None)
    ours = cross_entropy(x, labels, axis, VOCAB)
    (ours * upstream).sum().backward()
    torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), gradient[..., columns], rtol=1e-5, atol=1e-7)
    return True


@pytest.mark.parametrize(("ranks", "padded"), [(1, 17), (1, 32), (2, 20), (4, 32), (3, 60)])
def test_equals_torch(ranks, padded) -> None:
    """With 3 ranks and 60 columns the last rank holds nothing but padding."""
    assert spawn(local, ranks, padded) == [True] * ranks


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(4, 2, VOCAB, dtype=torch.bfloat16)
    labels = torch.randint(0, VOCAB, (4, 2))
    ours = cross_entropy(logits, labels, Axis("tp"), VOCAB)
    theirs = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(ours.flatten(), theirs)


def nothing_but_padding(rank, ranks, padded, dtype) -> None:
    logits, labels, upstream, _, _ = reference(padded)
    columns = slice(rank * padded // ranks, (rank + 1) * padded // ranks)
    x = logits[..., columns].to(dtype).requires_grad_(True)
    axis = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD)
    ours = cross_entropy(x, labels, axis, VOCAB)
    (ours * upstream).sum().backward()
    rounded = logits.to(dtype).float()[..., :VOCAB].flatten(0, 1)
    theirs = F.cross_entropy(rounded, labels.flatten(), reduction="none").view(5, 3)
    torch.testing.assert_close(ours, theirs)
    real = min(max(VOCAB - columns.start, 0), columns.stop - columns.start)
    assert x.grad.isfinite().all() and not x.grad[..., real:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rank_with_nothing_but_padding_is_finite_in_16_bits(dtype) -> None:
    spawn(nothing_but_padding, 3, 60, dtype)
