"""Bytes a rank sends over each axis in one training step, by the published formulas.

tp: 4 all-reduces of s b h elements per layer and micro batch (arXiv:1909.08053 § 3); with sequence
parallelism 10 all-gathers and reduce-scatters, since column inputs are gathered again in backward
(arXiv:2205.05198 § 4.2.2); what is recomputed says it again.  A ring over n ranks sends (n-1)/n of
the whole tensor per pass, and an all-reduce takes two passes.  dp: see sharing.py.
"""

from __future__ import annotations

import math

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.figure.parts import Matrix, Parts, Table
from megatron_lite.blueprint.parameters import stage_tensors
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.blueprint.stages import StageLayers
from megatron_lite.planner.activations import element_bytes
from megatron_lite.planner.head import logits_chunks
from megatron_lite.planner.memory import PlanInputs, layer_input_bytes
from megatron_lite.planner.sharing import passed, shared_by


def sent_bytes(
    blueprint: Blueprint, asked: PlanInputs, rank: int, *, num_microbatches: int
) -> dict[str, float]:
    """Axis (tp, pp, dp, tied) -> bytes a rank sends in the first step of so many micro batches.

    The few numbers that all ranks sum (loss, norm, votes) are left out.
    """
    sent = _sent(blueprint, asked, rank, num_microbatches, updates=True)
    if blueprint.curvature_interval:
        number = blueprint.curvature_microbatches(num_microbatches)
        more = _sent(blueprint, asked, rank, number, updates=False)
        sent = {axis: there + more[axis] for axis, there in sent.items()}
    return sent


def _sent(
    blueprint: Blueprint, asked: PlanInputs, rank: int, num_microbatches: int, *, updates: bool
) -> dict[str, float]:
    """Of a pass; updates: whether an update follows, else its labels are drawn."""
    grid, parallel = blueprint.grid, asked.parallel
    at = grid.coords(rank)
    stages = blueprint.stages_of(at.pp)
    passes = num_microbatches * sum(_tp_passes(blueprint, asked, stage) for stage in stages)
    if parallel.splits_sequence:
        passes += _deferred_passes(blueprint, at.pp, num_microbatches)
    whole = layer_input_bytes(blueprint.model, asked)
    if parallel.splits_sequence:
        whole *= grid.tp
    wide = 4 if parallel.accumulate_allreduce_grads_in_fp32 else element_bytes(asked.precision)
    shared = shared_by(parallel, blueprint.replicas).state
    # gradients to the tp ranks that own their matrices, weights back
    matrices = blueprint.held(at.pp).gathered / shared * (wide + element_bytes(asked.precision))
    tied = _tied_elements(blueprint, stages, at.tp) / shared
    common = float(blueprint.figure.shared.size) / shared
    split = sum(_split_elements(blueprint, asked, stage) for stage in stages) / shared + common
    tokens = blueprint.model.seq_length * asked.micro_batch_size / parallel.cp
    scored = _scored_bytes(blueprint, asked, tokens)
    if not updates:
        scored += 2 * tokens * 8
    scored *= any(stage.has_head for stage in stages)
    scored += sum(_length_bytes(blueprint, asked, stage) for stage in stages)
    sums = 2 * 4 * blueprint.held(at.pp).summed / shared * updates  # of rules, in fp32
    return {
        "tp": _ring(grid.tp)
        * (passes * whole + num_microbatches * scored + 2 * split * wide + matrices + sums),
        "pp": num_microbatches * _messages(blueprint, stages) * layer_input_bytes(
            blueprint.model, asked
        ) + _ring(grid.pp) * 2 * common * wide,
        "dp": _ring(blueprint.replicas) * passed(
            blueprint, parallel, asked.precision, at.pp,
            num_microbatches=num_microbatches, updates=updates,
        ).total,
        "tied": tied * wide,  # both ends hold it: two passes of a half
    }  # fmt: skip


def _scored_bytes(blueprint: Blueprint, asked: PlanInputs, tokens: float) -> float:
    """What the tp ranks say of their outputs: three fp32 numbers per token are summed over a
    vocabulary; outputs that are whole are gathered where the sequence is split."""
    output = blueprint.figure.output
    if output.vocabulary:
        return 3 * 2 * tokens * 4
    return tokens * output.rows * element_bytes(asked.precision) * asked.parallel.splits_sequence


def _length_bytes(blueprint: Blueprint, asked: PlanInputs, stage: StageLayers) -> float:
    """Squares of the rows' lengths, fp32, that adapters which train these sum in every forward, where a
    row is cut."""

    def summed(layer: Parts, prefix: str = "") -> float:
        cut = (m for m in layer.of(Matrix) if m.cut == "columns" and m.name.startswith(prefix))
        found = (matrix.adapter for matrix in cut)
        rows = (rows for one in found if one and one.magnitude for _, rows in one.pieces)
        return 2 * 4.0 * sum(rows)

    plan, figure = RecomputePlan.from_config(asked.parallel), blueprint.figure
    again = [stage.layers[position] for position in plan.recomputed(len(stage.layers))]
    total = figure.total(summed, stage.layers) + figure.total(summed, again)
    if "mlp" in plan.modules:
        total += figure.total(lambda layer: summed(layer, "mlp."), stage.layers)
    return total


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _tp_passes(blueprint: Blueprint, asked: PlanInputs, stage: StageLayers) -> float:
    """Passes of the whole [s, b, h] per micro batch: 2 for an all-reduce, 1 to gather or scatter."""
    parallel, figure = asked.parallel, blueprint.figure
    split, width = parallel.splits_sequence, blueprint.model.hidden_size
    passes = figure.total(
        lambda layer: training_passes(layer, split=split, width=width), stage.layers
    )
    # the lookup is summed forward; with the sequence split it is scattered, and gathered back
    looked_up = 2 - (split and figure.tokens.frozen) + 2 * _share(figure.tokens, width)
    passes += looked_up * stage.has_embedding
    # the head sums its input's gradient; split, it gathers, gathers again and scatters; in chunks it
    # has the gradient before it forgets what it gathered
    again_gathered = split and _chunks(blueprint, asked) == 1 and not figure.output.frozen
    passes += (2 + again_gathered) * (stage.has_head and figure.output.vocabulary)
    plan, count = RecomputePlan.from_config(parallel), len(stage.layers)
    again = [stage.layers[position] for position in plan.recomputed(count)]
    passes += figure.total(lambda layer: forward_passes(layer, split=split, width=width), again)
    if plan.split:  # every kept slice is gathered
        passes += sum(recomputed for _, recomputed in plan.groups(count))
    if "mlp" in plan.modules:
        passes += figure.total(
            lambda layer: _mlp_again_passes(layer, split=split, width=width), stage.layers
        )
    return float(passes)


def _chunks(blueprint: Blueprint, asked: PlanInputs) -> int:
    columns = blueprint.figure.output.local_rows(blueprint.grid.tp)
    position = asked.micro_batch_size * columns * element_bytes(asked.precision)
    return logits_chunks(blueprint, asked.parallel, position)


_FORWARD = {("rows", False): 0, ("columns", False): 2, ("rows", True): 1, ("columns", True): 1}
_BOTH = {("rows", False): 2, ("columns", False): 2, ("rows", True): 3, ("columns", True): 2}
"""(cut of a matrix, sequence parallelism) -> passes: an input gathered, in backward again, and its
gradient scattered; or an all-reduce of the input's gradient, or of the output."""


def forward_passes(layer: Parts, *, split: bool, width: int) -> float:
    """Passes of a layer's forward; width: of what passes, of which adapters send as much as their ranks."""
    return sum(
        _FORWARD[matrix.cut, split] * (1 + _share(matrix, width)) for matrix in layer.of(Matrix)
    )


def _mlp_again_passes(layer: Parts, *, split: bool, width: int) -> float:
    """Passes of the MLP recomputed, up to what is kept last: the sum of its last product is made again
    only where an adapter comes after it."""
    made = [matrix for matrix in layer.of(Matrix) if matrix.name.startswith("mlp.")]
    last = _FORWARD[made[-1].cut, split] if made[-1].adapter is None else 0
    return forward_passes(Parts(tuple(made)), split=split, width=width) - last


def training_passes(layer: Parts, *, split: bool, width: int) -> float:
    """Passes of a layer's forward and backward."""
    return sum(
        _both(matrix, split=split) + 2 * _share(matrix, width) for matrix in layer.of(Matrix)
    )


def _both(matrix: Matrix, *, split: bool) -> int:
    """Those of a matrix; the input of a frozen one is not gathered again."""
    return min(_BOTH[matrix.cut, split], 2 if matrix.frozen else 3)


def _share(part: Matrix | Table, width: int) -> float:
    """Numbers for each token that an adapter's ranks are, beside the width."""
    adapter = part.adapter
    return 0.0 if adapter is None else adapter.rank * len(adapter.pieces) / width


def _deferred_passes(blueprint: Blueprint, pp_rank: int, num_microbatches: int) -> float:
    """A W of its own keeps slices: the inputs of row-parallel layers are gathered a second time for it."""

    def reduced(layer: Parts) -> int:
        return sum(matrix.cut == "columns" and not matrix.frozen for matrix in layer.of(Matrix))

    per_stage = {
        stage.index: blueprint.figure.total(reduced, stage.layers)
        for stage in blueprint.stages_of(pp_rank)
    }
    row = blueprint.compute(num_microbatches).lists[pp_rank]
    return sum(per_stage[action.stage] for action in row if action.op is Op.W)


def _messages(blueprint: Blueprint, stages: tuple[StageLayers, ...]) -> int:
    """Messages sent per micro batch: activations onwards, gradients back, none within a rank."""
    placement, count = blueprint.placement, 0
    for stage in stages:
        for other in (stage.index - 1, stage.index + 1):
            if 0 <= other < len(placement) and placement[other] != placement[stage.index]:
                count += 1
    return count


def _tied_elements(blueprint: Blueprint, stages: tuple[StageLayers, ...], tp_rank: int) -> float:
    """Elements of the token table that two ranks hold a copy of, padding left out."""
    model, grid = blueprint.model, blueprint.grid
    ends = any(stage.has_embedding or stage.has_head for stage in stages)
    if (
        blueprint.figure.tokens.frozen
        or not blueprint.figure.tied
        or grid.pp == 1
        or grid.folded
        or not ends
    ):
        return 0.0
    rows = blueprint.padded_vocab_size // grid.tp
    return float(min(max(blueprint.vocab_size - tp_rank * rows, 0), rows) * model.hidden_size)


def _split_elements(blueprint: Blueprint, asked: PlanInputs, stage: StageLayers) -> float:
    """Elements whose gradient is each tp rank's share, of the sequence or of the heads, summed once a step."""
    split = asked.parallel.splits_sequence
    whole = (
        t for t in stage_tensors(blueprint.figure, stage)
        if t.tp_dim is None and not t.stages and not t.frozen and (split or t.heads)
    )  # fmt: skip
    return float(sum(math.prod(tensor.shape) for tensor in whole))
