"""The arithmetic of W + s B A: its rows' lengths and the whole, of tensors that lie here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_lengths(own: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A|² of each row, fp32 [rows], of the columns that are here, without a matrix of W's size.

    own: |W|² of each row; w: [rows, columns], a: [rank, columns], b: [rows, rank].
    """
    cross = (F.linear(w, a.to(w.dtype)).float() * b.float()).sum(1)
    squared = ((b.float() @ (a.float() @ a.float().t())) * b.float()).sum(1)
    return own + 2 * scale * cross + scale * scale * squared


def sum_of_products(
    w: Tensor, a: Tensor, b: Tensor, scale: float, lengths: Tensor | None = None
) -> Tensor:
    """W + s B A in fp32, and each row times its length where there are some."""
    whole = torch.addmm(w.float(), b.float(), a.float(), alpha=scale)
    return whole if lengths is None else whole * lengths[:, None]


def taken_apart(
    whole: Tensor, a: Tensor, b: Tensor, scale: float, lengths: Tensor | None = None
) -> Tensor:
    """W of the above, in fp32."""
    equal = whole.float() if lengths is None else whole.float() / lengths[:, None]
    return torch.addmm(equal, b.float(), a.float(), alpha=-scale)
