"""The border pairs and collectives against what they mean, forward and backward, on 1 to 4 ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_lite.parallel import collectives as c
from megatron_lite.parallel import regions as r
from megatron_lite.parallel.context import Axis
from tests.support.spawn import spawn

S, B, H = 12, 2, 3


def drawn(ranks, seed, *shape):
    """Every rank's tensor, known to all."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(ranks)]


def through(region, mine, dy, axis):
    """(y, dx) of a border."""
    x = mine.clone().requires_grad_(True)
    # a border may work in place, as on the output of a product, but not on a leaf
    y = region(x * 1.0, axis)
    before = dy.clone()
    y.backward(dy)
    assert torch.equal(dy, before), "the gradient belongs to others too"
    return y.detach(), x.grad


def close(found, expected, what) -> None:
    for name, a, b in zip(("forward", "backward"), found, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-13, atol=1e-13, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def borders(rank, ranks) -> bool:
    axis = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD if ranks > 1 else None)
    whole, parts = drawn(ranks, 1, S, B, H), drawn(ranks, 2, S // ranks, B, H)
    d_whole, d_parts = drawn(ranks, 3, S, B, H), drawn(ranks, 4, S // ranks, B, H)
    total = sum(whole)

    def cut(x):
        return x.chunk(ranks)[rank]

    # the function of all ranks' inputs, and its gradient to this rank's, by hand
    close(through(r.reduce_from_tp, whole[rank], d_whole[0], axis), (total, d_whole[0]), "reduce")
    close(through(r.join_sequence, parts[rank], d_whole[0], axis),
          (torch.cat(parts), cut(d_whole[0])), "join")  # fmt: skip
    close(through(r.reduce_to_sequence, whole[rank], d_parts[rank], axis),
          (cut(total), torch.cat(d_parts)), "reduce to sequence")  # fmt: skip
    return True


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_border_is_its_line_in_the_table(ranks) -> None:
    assert spawn(borders, ranks) == [True] * ranks


def exchanged(rank, ranks) -> bool:
    axis = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD if ranks > 1 else None)
    whole = drawn(ranks, 5, S, B)
    assert torch.equal(c.all_reduce(whole[rank].clone(), axis, c.MAX), torch.stack(whole).amax(0))
    assert torch.equal(c.all_reduce(whole[rank].clone(), axis, c.MIN), torch.stack(whole).amin(0))
    for dim in (0, 1):
        assert torch.equal(c.all_gather(whole[rank], axis, dim), torch.cat(whole, dim))
        # what is not contiguous goes as what it shows
        assert torch.equal(
            c.all_gather(whole[rank].t(), axis, dim), torch.cat([w.t() for w in whole], dim)
        )
        joined = torch.cat(whole, dim)
        assert torch.equal(c.local_slice(joined, axis, dim), whole[rank])
    summed = sum(whole).chunk(ranks)[rank]
    torch.testing.assert_close(c.reduce_scatter(whole[rank].clone(), axis), summed)
    pending = [c.start_all_reduce(whole[rank].clone(), axis) for _ in range(2)]
    for under_way in reversed(pending):
        torch.testing.assert_close(under_way.wait(), sum(whole))
    c.barrier(axis)
    return True


@pytest.mark.parametrize("ranks", [1, 3])
def test_collectives_are_what_their_names_say(ranks) -> None:
    assert spawn(exchanged, ranks) == [True] * ranks


def test_a_slice_that_does_not_come_out_even_is_a_bug_not_a_loss() -> None:
    with pytest.raises(AssertionError, match=r"\(7, 2\) cut along 0 over 2"):
        c.local_slice(torch.zeros(7, 2), Axis("tp", 0, 2, (0, 1)))
