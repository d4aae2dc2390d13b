"""Parallel linears and embeddings equal F.linear and F.embedding, forward and backward.

For 1 to 4 tp ranks, with and without sequence parallelism and bias; gradients through autograd,
added to accumulators, and deferred.  Everything is float64, so that a tolerance of 1e-12 leaves
no room for anything but the order of a sum.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lite.blueprint.figure.parts import Matrix, Table
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.layers.contexts import StageContext
from megatron_lite.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from megatron_lite.layers.linear import (
    ColumnParallelLinear,
    Products,
    RowParallelLinear,
    project_to_vocabulary,
)
from megatron_lite.parallel.context import Axis, ParallelContext
from tests.support.spawn import spawn

S, B, FAN_IN = 12, 2, 24  # twelve tokens and inputs divide by 1, 2, 3 and 4
PARTS = {"q": 24, "k": 12, "v": 12}
VOCAB, PADDED = 19, 24
HOW = ("autograd", "attached", "deferred")


def setting_of(rank, ranks, sequence_parallel):
    tp = Axis("tp", rank, ranks, tuple(range(ranks)), dist.group.WORLD if ranks > 1 else None)
    model = ModelConfig(hidden_size=FAN_IN, num_attention_heads=4, num_layers=1, seq_length=S,
                        max_position_embeddings=S)  # fmt: skip
    return StageContext(
        model, ParallelContext(torch.device("cpu"), tp=tp),
        padded_vocab_size=PADDED, vocab_size=VOCAB, sequence_parallel=sequence_parallel,
    )  # fmt: skip


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def share(x, rank, ranks, dim=0):
    return x.chunk(ranks, dim)[rank].clone()


def rows_of_parts(whole, rank, ranks):
    """This rank's rows of a fused weight: its share of every part."""
    return torch.cat([share(part, rank, ranks) for part in whole.split(list(PARTS.values()))])


def columns_of_parts(whole, rank, ranks):
    """The same of an output's last dim."""
    return rows_of_parts(whole.movedim(-1, 0), rank, ranks).movedim(0, -1)


def fill(module, **values):
    for name, value in values.items():
        parameter = getattr(module, name)
        parameter.data = value.clone()


def close(ours, theirs, what):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m: f"{what}: {m}")


class Gradients:
    """Two micro batches backward in one of three ways; then the sums, and what was reported ready."""

    def __init__(self, context, module, how):
        self.context, self.module, self.how = context, module, how
        self.sink = context.gradients
        self.reported = []
        if how != "autograd":
            self.sums = {p: torch.zeros_like(p) for p in module.parameters()}
            self.sink.attach(self.sums.items(), self.reported.append)

    def backward(self, microbatch, y, dy):
        self.sink.defer_to(microbatch if self.how == "deferred" else None)
        y.backward(dy)
        self.sink.defer_to(None)

    def finish(self, *matrices):
        """Gradients by name; matrices are the weights whose products wait for run()."""
        if self.how == "autograd":
            return {name: p.grad for name, p in self.module.named_parameters()}
        if self.how == "deferred":
            for weight in matrices:
                assert not self.sums[weight].any(), "a deferred product was carried out at once"
                assert weight not in self.reported
            assert self.sink.num_deferred == 2
            for m in range(2):
                self.sink.run(m)
        assert self.sink.num_deferred == 0
        found = {}
        for name, p in self.module.named_parameters():
            # a bias comes through autograd whatever was attached: its gradient is no product
            through_autograd = p.grad is not None
            times = sum(reported is p for reported in self.reported)
            assert times == (0 if through_autograd else 2), name
            found[name] = p.grad if through_autograd else self.sums[p]
        return found


def check_column(rank, ranks, sequence_parallel, bias, how):
    context = setting_of(rank, ranks, sequence_parallel)
    module = ColumnParallelLinear(
        context, Matrix("qkv", tuple(PARTS.items()), FAN_IN, "rows", bias)
    )
    rows = sum(PARTS.values())
    weight, b = draw(1, rows, FAN_IN).requires_grad_(True), draw(2, rows).requires_grad_(True)
    fill(module, weight=rows_of_parts(weight.detach(), rank, ranks))
    if bias:
        fill(module, bias=rows_of_parts(b.detach(), rank, ranks))
    gradients = Gradients(context, module, how)
    for m in range(2):
        x, dy = draw(10 + m, S, B, FAN_IN), draw(20 + m, S, B, rows)
        theirs = x.clone().requires_grad_(True)
        expected = F.linear(theirs, weight, b if bias else None)
        expected.backward(dy)
        local = share(x, rank, ranks) if context.sequence_parallel else x.clone()
        local.requires_grad_(True)
        y = module(local)
        close(y, columns_of_parts(expected.detach(), rank, ranks), "output")
        gradients.backward(m, y, columns_of_parts(dy, rank, ranks))
        dx = share(theirs.grad, rank, ranks) if context.sequence_parallel else theirs.grad
        close(local.grad, dx, "input gradient")
    found = gradients.finish(module.weight)
    close(found["weight"], rows_of_parts(weight.grad, rank, ranks), "weight gradient")
    if bias:
        close(found["bias"], rows_of_parts(b.grad, rank, ranks), "bias gradient")


def check_row(rank, ranks, sequence_parallel, bias, how):
    context = setting_of(rank, ranks, sequence_parallel)
    fan_out = 10
    module = RowParallelLinear(
        context, Matrix("output", (("output", fan_out),), FAN_IN, "columns", bias)
    )
    weight, b = draw(1, fan_out, FAN_IN).requires_grad_(True), draw(2, fan_out).requires_grad_(True)
    fill(module, weight=share(weight.detach(), rank, ranks, dim=1))
    if bias:
        fill(module, bias=b.detach())
    gradients = Gradients(context, module, how)
    for m in range(2):
        x, dy = draw(10 + m, S, B, FAN_IN), draw(20 + m, S, B, fan_out)
        theirs = x.clone().requires_grad_(True)
        expected = F.linear(theirs, weight, b if bias else None)
        expected.backward(dy)
        local = share(x, rank, ranks, dim=2).requires_grad_(True)
        y = module(local)
        assert (module.late_bias is not None) == (bias and ranks > 1)
        y = y if module.late_bias is None else y + module.late_bias
        split = context.sequence_parallel
        close(y, share(expected.detach(), rank, ranks) if split else expected.detach(), "output")
        gradients.backward(m, y, share(dy, rank, ranks) if split else dy)
        close(local.grad, share(theirs.grad, rank, ranks, dim=2), "input gradient")
    found = gradients.finish(module.weight)
    close(found["weight"], share(weight.grad, rank, ranks, dim=1), "weight gradient")
    if bias:
        # with sequence parallelism each rank has its tokens' share, and says so
        summed = found["bias"].clone()
        if context.sequence_parallel and ranks > 1:
            dist.all_reduce(summed)
        close(summed, b.grad, "bias gradient")


def check_embedding(rank, ranks, sequence_parallel, how):
    context = setting_of(rank, ranks, sequence_parallel)
    module = VocabParallelEmbedding(context, Table("tokens", PADDED, FAN_IN, vocabulary=True))
    weight = draw(1, PADDED, FAN_IN).requires_grad_(True)
    fill(module, weight=share(weight.detach(), rank, ranks))
    gradients = Gradients(context, module, how)
    for m in range(2):
        # every id once, so that the borders of all shards are among them; and some repeated
        ids = torch.arange(S * B).roll(m).remainder(VOCAB).view(S, B)
        dy = draw(20 + m, S, B, FAN_IN)
        expected = F.embedding(ids, weight)
        expected.backward(dy)
        y = module(ids)
        split = context.sequence_parallel
        close(y, share(expected.detach(), rank, ranks) if split else expected.detach(), "output")
        gradients.backward(m, y, share(dy, rank, ranks) if split else dy)
    found = gradients.finish()
    close(found["weight"], share(weight.grad, rank, ranks), "table gradient")


def check_positions(rank, ranks, sequence_parallel, how):
    context = setting_of(rank, ranks, sequence_parallel)
    module = PositionEmbedding(context, Table("positions", S, FAN_IN, vocabulary=False))
    weight = draw(1, S, FAN_IN).requires_grad_(True)
    fill(module, weight=weight.detach())
    gradients = Gradients(context, module, how)
    for m, index in enumerate([torch.arange(S), torch.arange(S * B).view(S, B) % 5]):
        expected = F.embedding(index, weight)
        expected = expected[:, None] if index.dim() == 1 else expected
        dy = draw(20 + m, *expected.shape)
        expected.backward(dy)
        y = module(index)
        split = context.sequence_parallel
        close(y, share(expected.detach(), rank, ranks) if split else expected.detach(), "output")
        gradients.backward(m, y, share(dy, rank, ranks) if split else dy)
    found = gradients.finish()["weight"].clone()
    if context.sequence_parallel and ranks > 1:
        dist.all_reduce(found)
    close(found, weight.grad, "table gradient")


def check_head(rank, ranks, sequence_parallel, how):
    context = setting_of(rank, ranks, sequence_parallel)
    module = VocabParallelEmbedding(
        context, Table("tokens", PADDED, FAN_IN, vocabulary=True)
    )  # the tied table as output matrix
    weight = draw(1, PADDED, FAN_IN).requires_grad_(True)
    fill(module, weight=share(weight.detach(), rank, ranks))
    gradients = Gradients(context, module, how)
    for m in range(2):
        x, dy = draw(10 + m, S, B, FAN_IN), draw(20 + m, S, B, PADDED)
        theirs = x.clone().requires_grad_(True)
        expected = F.linear(theirs, weight)
        expected.backward(dy)
        split = context.sequence_parallel
        local = (share(x, rank, ranks) if split else x.clone()).requires_grad_(True)
        y = project_to_vocabulary(local, module.weight, context, Products.chosen(context))
        close(y, share(expected.detach(), rank, ranks, dim=2), "logits")
        gradients.backward(m, y, share(dy, rank, ranks, dim=2))
        close(local.grad, share(theirs.grad, rank, ranks) if split else theirs.grad, "dx")
    found = gradients.finish(module.weight)
    close(found["weight"], share(weight.grad, rank, ranks), "weight gradient")


def check_all(rank, ranks, sequence_parallel):
    # parameters are made in the context's fp32 and get float64 data from fill()
    for how, bias in itertools.product(HOW, (True, False)):
        check_column(rank, ranks, sequence_parallel, bias, how)
        check_row(rank, ranks, sequence_parallel, bias, how)
    for how in HOW:
        check_head(rank, ranks, sequence_parallel, how)
        check_embedding(rank, ranks, sequence_parallel, how)
        check_positions(rank, ranks, sequence_parallel, how)
    return True


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parallel_layers_equal_the_plain_functions(ranks, sequence_parallel):
    assert spawn(check_all, ranks, sequence_parallel) == [True] * ranks
