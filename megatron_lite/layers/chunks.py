"""Head and scores a chunk of tokens at a time: of the logits no more exists than a chunk of them.

    chunk   x ─▶ logits ─▶ scores ─▶ gradient, over the logits ─▶ dx, and added to dW

A sum of losses with weights that are known makes the gradient in its forward, while the logits are
there, and backward only multiplies with what comes from above: nothing is computed twice.  Scores of
which an objective makes what it likes get their gradient in backward, where each chunk's logits are
made again: a fourth product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lite.layers.cross_entropy import Scoring, VocabularyScores, score, scored_again
from megatron_lite.layers.drawing import LabelNoise, draw_labels
from megatron_lite.layers.gradients import WeightGradients
from megatron_lite.layers.product import Products, TPComm
from megatron_lite.parallel.collectives import Pending, all_gather


@dataclass(frozen=True, slots=True)
class ChunkedHead:
    """What a chunk is computed with; number: of chunks, along the sequence."""

    number: int
    comm: TPComm
    products: Products
    scoring: Scoring
    sink: WeightGradients

    def split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """[s, ...] each -> their chunks, side by side."""
        return zip(*(x.tensor_split(self.number) for x in tensors), strict=True)


class _Gradients:
    """Those of x and the weight, added up chunk by chunk.

    The reduction of dx over tp begins before the last product of the weight's and runs under it.
    """

    def __init__(self, head: ChunkedHead, weight: Tensor, needs: tuple[bool, bool]) -> None:
        self.head, self.weight = head, weight
        self.needs_x, needs_weight = needs
        self.of_x: list[Tensor] = []
        self.of_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if needs_weight
            else None
        )
        self.pending: Pending | None = None

    def add(self, x: Tensor, dlogits: Tensor) -> None:
        """x: [c, b, h], dlogits: [c, b, v/tp] of the next chunk."""
        products = self.head.products
        if self.needs_x:
            self.of_x.append(products.input_gradient(dlogits, self.weight))
            if len(self.of_x) == self.head.number:
                self.pending = self.head.comm.start_reduce(torch.cat(self.of_x))
                self.of_x.clear()
        if self.of_weight is not None:
            products.weight_gradient(dlogits, x, self.of_weight)

    def of_input(self) -> Tensor | None:
        """dx, like the x that the head was given."""
        return None if self.pending is None else self.pending.wait()


class _LossSum(torch.autograd.Function):
    """(sum of weighted losses, losses); the gradient is made in forward.

    expected: what the sum's own gradient will be, as far as is known: in fp16 small probabilities
    would be lost without it.  What really comes is divided by it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, expected: Tensor,
        head: ChunkedHead, needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        made = _Gradients(head, weight, needs) if any(needs) else None
        whole, losses = all_gather(x, head.comm.gather_input), []
        for part, ids, dy in head.split(whole, labels, weights * expected):
            logits = head.products.forward(part, weight, None)
            found = score(logits, ids, head.scoring)
            losses.append(found.losses)
            if made is not None:
                columns = head.scoring.part(logits)
                made.add(
                    part,
                    head.scoring.gradients(logits, ids, columns, found.offset, dy, None),
                )
            del logits  # else the next chunk's are made beside them
        together = torch.cat(losses)
        if made is not None:
            ctx.save_for_backward(weight, expected, made.of_input(), made.of_weight)
            ctx.sink = head.sink
        ctx.mark_non_differentiable(together)
        return (together * weights).sum(), together

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, expected, dx, dw = ctx.saved_tensors
        factor = dy / expected
        if dx is not None:
            dx *= factor  # in place: the graph runs backward once
        if dw is not None:
            dw = ctx.sink.summed(weight, dw.mul_(factor))
        return dx, dw, None, None, None, None, None


class _Scores(torch.autograd.Function):
    """(losses, entropies or None); backward makes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, entropy: bool, head: ChunkedHead
    ) -> tuple[Tensor, Tensor | None]:
        found: list[VocabularyScores] = []
        for part, ids in head.split(all_gather(x, head.comm.gather_input), labels):
            logits = head.products.forward(part, weight, None)
            found.append(score(logits, ids, head.scoring, entropy=entropy))
            del logits  # else the next chunk's are made beside them
        losses, log_sum = (
            torch.cat(numbers)
            for numbers in ([f.losses for f in found], [f.log_sum for f in found])
        )
        entropies = [f.entropies for f in found if f.entropies is not None]
        together = torch.cat(entropies) if entropies else None
        ctx.save_for_backward(x, weight, labels, log_sum, together)
        ctx.head = head
        return losses, together

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, labels, log_sum, entropies = ctx.saved_tensors
        head: ChunkedHead = ctx.head
        made = _Gradients(head, weight, ctx.needs_input_grad[:2])
        beside = [] if entropies is None else [entropies, dh]
        whole = all_gather(x, head.comm.gather_input)
        for part, ids, total, d_loss, *more in head.split(whole, labels, log_sum, dy, *beside):
            logits = head.products.forward(part, weight, None)
            offset = scored_again(logits, ids, head.scoring, total)
            both = (more[0], more[1]) if more else None
            columns = head.scoring.part(logits)
            made.add(part, head.scoring.gradients(logits, ids, columns, offset, d_loss, both))
            del logits  # else the next chunk's are made beside them
        dw = made.of_weight
        if dw is not None:
            dw = head.sink.summed(weight, dw)
        return made.of_input(), dw, None, None, None


def chunked_loss_sum(
    x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, expected: Tensor, head: ChunkedHead
) -> tuple[Tensor, Tensor]:
    """x: [s/tp, b, h] or [s, b, h], weight: [v/tp, h], labels, weights: [s, b] -> (sum, losses [s, b])."""
    grad = torch.is_grad_enabled()
    needs = (grad and x.requires_grad, grad and weight.requires_grad)
    total, losses = _LossSum.apply(x, weight, labels, weights, expected, head, needs)
    return total, losses


def chunked_scores(
    x: Tensor, weight: Tensor, labels: Tensor, head: ChunkedHead, *, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """x: [s/tp, b, h] or [s, b, h], weight: [v/tp, h], labels: [s, b] -> (losses, entropies), fp32 [s, b]."""
    losses, entropies = _Scores.apply(x, weight, labels, entropy, head)
    return losses, entropies


@torch.no_grad()
def chunked_labels(x: Tensor, weight: Tensor, noise: LabelNoise, head: ChunkedHead) -> Tensor:
    """x: [s/tp, b, h] or [s, b, h], weight: [v/tp, h] -> labels drawn from the logits, int64 [s, b]."""
    drawn = []
    for part, tokens in head.split(all_gather(x, head.comm.gather_input), noise.tokens):
        logits = head.products.forward(part, weight, None)
        drawn.append(draw_labels(logits, LabelNoise(noise.key, tokens), head.scoring))
        del logits  # else the next chunk's are made beside them
    return torch.cat(drawn)
