"""The baselines of bench_parallel.py: PyTorch's own parallel training of benchmarks/plain_gpt.py.

DDP, FSDP2 (fully_shard), tensor parallel DTensors (parallelize_module), torch.distributed.pipelining
(Schedule1F1B).  Each is a Trainer: its step takes the whole batch, works on its rank's part, clips
the global gradient norm to 1 and carries out a fused AdamW, as ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.plain_gpt import PlainGPT
from megatron_lite.config.sections.optim import OptimConfig

LR, DECAY, CLIP = 1e-4, 0.1, 1.0
OPTIM = OptimConfig()
Step = Callable[[Tensor], Tensor]
"""tokens of the whole batch, int64 [b, s + 1] -> this rank's share of the mean loss."""


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _adamw(
    parameters: Iterable[nn.Parameter], ours: OptimConfig = OPTIM, lr: float = LR
) -> torch.optim.AdamW:
    """Matrices decay, vectors do not, as in our trainer; fused, which takes DTensors or tensors."""
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dim() > 1, isinstance(parameter, DTensor)), []).append(
            parameter
        )
    groups = [
        {"params": held, "weight_decay": DECAY if is_matrix else 0.0}
        for (is_matrix, _), held in kinds.items()
    ]
    betas = (ours.adam_beta1, ours.adam_beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=ours.adam_eps, fused=True)


def _rows(tokens: Tensor, rank: int, ranks: int) -> Tensor:
    return tokens[rank::ranks]


def data_parallel(model: PlainGPT, rank: int, ranks: int) -> Step:
    """DistributedDataParallel, gradients as views of its buckets."""
    return _data_step(DistributedDataParallel(model, gradient_as_bucket_view=True), rank, ranks)


def fully_sharded(
    model: PlainGPT, rank: int, ranks: int, mesh: DeviceMesh, *, reshard: bool,
    optim: OptimConfig = OPTIM, lr: float = LR, num_microbatches: int = 1,
) -> Step:  # fmt: skip
    """FSDP2: every block, then the rest; the rest stays gathered until its backward, as it comes next.

    reshard: give the blocks' parameters back after forward, and gather them again for backward
    (ZeRO-3), or keep them (ZeRO-2).  Gradients are sharded after each micro batch.
    """
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return _data_step(model, rank, ranks, optim=optim, lr=lr, num_microbatches=num_microbatches)


def _data_step(
    model: nn.Module,
    rank: int,
    ranks: int,
    *,
    optim: OptimConfig = OPTIM,
    lr: float = LR,
    num_microbatches: int = 1,
) -> Step:
    optimizer = _adamw(model.parameters(), optim, lr)

    def step(tokens: Tensor) -> Tensor:
        total = torch.zeros(())
        for mine in _rows(tokens, rank, ranks).chunk(num_microbatches):
            loss = _cross_entropy(model(mine[:, :-1]), mine[:, 1:]) / num_microbatches
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total / ranks

    return step


class _Sharded(nn.Module):
    """The same model over tp ranks: DTensors in the embedding and the head, local tensors between."""

    def __init__(self, model: PlainGPT, mesh: DeviceMesh, *, split: bool) -> None:
        super().__init__()
        self.model, self.mesh, self.split = model, mesh, split
        between = Shard(1) if split else Replicate()
        plan: dict[str, object] = {
            "tokens": RowwiseParallel(
                input_layouts=Replicate(), output_layouts=between, use_local_output=False
            ),
            "head": ColwiseParallel(
                input_layouts=between, output_layouts=Shard(-1), use_local_output=False
            ),
        }
        for i, block in enumerate(model.blocks):
            block.heads //= mesh.size()
            for column, row in (("qkv", "out"), ("up", "down")):
                plan[f"blocks.{i}.{column}"] = ColwiseParallel(input_layouts=between)
                plan[f"blocks.{i}.{row}"] = RowwiseParallel(output_layouts=between)
            if split:
                plan |= {f"blocks.{i}.norm{n}": SequenceParallel() for n in (1, 2)}
        if split:
            plan["norm"] = SequenceParallel()
        parallelize_module(model, mesh, plan)  # type: ignore[arg-type]
        whole = distribute_tensor(model.positions.weight, mesh, [Replicate()])
        model.positions.weight = nn.Parameter(whole)

    def forward(self, tokens: Tensor) -> DTensor:
        x = self.model.tokens(tokens) + self.model.positions.weight[: tokens.shape[1]]
        x = x.to_local()
        for block in self.model.blocks:
            x = block(x)
        return self.model.head(self.model.norm(x))


def tensor_parallel(model: PlainGPT, mesh: DeviceMesh, *, split: bool) -> Step:
    """parallelize_module with ColwiseParallel and RowwiseParallel; split: SequenceParallel between."""
    sharded = _Sharded(model, mesh, split=split)
    optimizer = _adamw(sharded.parameters())
    held = list(sharded.parameters())
    kinds = [
        [p for p in held if isinstance(p, DTensor) == distributed] for distributed in (True, False)
    ]

    def step(tokens: Tensor) -> Tensor:
        logits = sharded(tokens[:, :-1])
        with loss_parallel():
            loss = _cross_entropy(logits, tokens[:, 1:])
            loss.backward()
        _clip(kinds)
        optimizer.step()
        optimizer.zero_grad()
        return loss.full_tensor().detach() / mesh.size()

    return step


def _clip(kinds: list[list[nn.Parameter]]) -> None:
    """clip_grad_norm_ of parameters of which some are DTensors; it takes one kind at a time."""
    norms = []
    for parameters in kinds:
        if parameters:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms))
    scale = (CLIP / (total + 1e-6)).clamp(max=1.0)
    for parameters in kinds:
        local = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
        if local:
            torch._foreach_mul_(local, scale)


class _Part(nn.Module):
    """Some blocks, with the embedding in front of the first and the head behind the last."""

    def __init__(self, model: PlainGPT, rank: int, ranks: int) -> None:
        super().__init__()
        share = len(model.blocks) // ranks
        self.blocks = model.blocks[rank * share : (rank + 1) * share]
        first, last = rank == 0, rank == ranks - 1
        self.tokens = model.tokens if first else None
        self.positions = model.positions if first else None
        self.norm = model.norm if last else None
        self.head = model.head if last else None

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is not None and self.positions is not None:
            x = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) if self.norm is not None and self.head is not None else x


def pipelined(
    model: PlainGPT, rank: int, ranks: int, num_microbatches: int, group: dist.ProcessGroup
) -> Step:
    """Schedule1F1B over PipelineStages of equally many blocks."""
    part = _Part(model, rank, ranks)
    stage = PipelineStage(part, rank, ranks, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(stage, num_microbatches, loss_fn=_cross_entropy)
    optimizer = _adamw(part.parameters())

    def step(tokens: Tensor) -> Tensor:
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(tokens[:, :-1])
        else:
            schedule.step(target=tokens[:, 1:], losses=losses)
        norm = nn.utils.get_total_norm([p.grad for p in part.parameters()]).square()
        dist.all_reduce(norm, group=group)
        nn.utils.clip_grads_with_norm_(part.parameters(), CLIP, norm.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().detach() if losses else torch.zeros(())

    return step
