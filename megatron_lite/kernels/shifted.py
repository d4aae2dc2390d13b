"""S²-attention (arXiv:2309.12307 § 3.2) for long texts, causal for every token: heads see groups of tokens.

    first half of the heads    [0 ...... G) [G ..... 2G) [2G .... 3G) ...
    the others                 [0 . G/2) [G/2 . 3G/2) [3G/2 . 5G/2) ... [s - G/2 . s)

So each group hears of its neighbours a layer later.  The paper moves tokens around the end, so that the
last moved group joins a text's end to its beginning; here these are two groups of half the size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_lite.kernels.attention import AttentionCall

AttentionKernel = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]


@dataclass(frozen=True, slots=True)
class ShiftedGroups:
    """size: tokens of a group, even; it divides the sequence.  still: how many of the heads are not moved."""

    size: int
    still: int


def shifted_sparse(
    attention: AttentionKernel,
    groups: ShiftedGroups,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
) -> Tensor:
    """attention(q, k, v, call) within groups; shapes as reference.attention, s = t.

    Groups become rows of a batch: nothing is masked, and any kernel will do.  Documents are cut once
    more where groups end.
    """
    assert q.shape[2] == k.shape[2] and q.shape[2] % groups.size == 0, (q.shape, k.shape, groups)
    assert call.window is None and call.dropout == 0.0, "neither windows nor dropout go with groups"
    found = []
    for heads, shift in _halves(q, k, v, groups):
        if call.segments is not None:
            cut = replace(call, segments=call.segments.within(groups.size, shift))
            found.append(attention(*heads, cut))
        elif shift:
            found.append(_moved(attention, groups.size, heads, call))
        else:
            found.append(_in_groups(attention, groups.size, heads, call))
    # in the order of memory, in which the next product reads it
    whole = torch.cat([y.permute(2, 0, 1, 3) for y in found], dim=2)
    return whole.permute(1, 2, 0, 3)


_Heads = tuple[Tensor, Tensor, Tensor]


def _halves(q: Tensor, k: Tensor, v: Tensor, groups: ShiftedGroups) -> Iterator[tuple[_Heads, int]]:
    """q, k and v of the heads that are not moved, and of those that are by so many tokens; none is empty."""
    heads, share = q.shape[1], q.shape[1] // k.shape[1]
    if groups.still % share:  # the border is within the queries of one key
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        share = 1
    for begin, end, shift in ((0, groups.still, 0), (groups.still, heads, groups.size // 2)):
        if begin < end:
            keys = slice(begin // share, end // share)
            yield (q[:, begin:end], k[:, keys], v[:, keys]), shift


def _in_groups(attention: AttentionKernel, size: int, heads: _Heads, call: AttentionCall) -> Tensor:
    """Heads [b, n, s, d], cut into s / size rows each -> [b, n, s, d]."""
    q, k, v = (x.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1) for x in heads)
    y = attention(q, k, v, call)  # [b s / size, n, size, d]
    return y.unflatten(0, (len(heads[0]), -1)).transpose(1, 2).flatten(2, 3)


def _moved(attention: AttentionKernel, size: int, heads: _Heads, call: AttentionCall) -> Tensor:
    """The same with the first group's border in its middle: both ends are half a group each."""
    half = size // 2
    q, k, v = (torch.cat((x[:, :, :half], x[:, :, -half:])) for x in heads)
    first, last = attention(q, k, v, call).chunk(2)
    parts = [first, last]
    if heads[0].shape[2] > size:
        q, k, v = (x[:, :, half:-half] for x in heads)
        parts.insert(1, _in_groups(attention, size, (q, k, v), call))
    return torch.cat(parts, dim=2)
