"""Seconds of each action of a schedule by kind, from the model's shapes and a device's numbers.

Every matrix product is timed by its shape, attention by its kernel, everything else by the bytes it
moves.  A tensor-parallel collective counts where it is exposed: those of a backward run under the
weight gradient's product, as layers/product.py starts them; where that product waits for its W, they
have nothing to run under, and what W gathers again runs under the product before.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.figure.parts import (
    WEIGHT_BYTES,
    Activation,
    Core,
    Matrix,
    Norm,
    Parts,
)
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.blueprint.schedules.actions import Action, Op
from megatron_lite.blueprint.schedules.simulate import Cost
from megatron_lite.blueprint.stages import StageLayers
from megatron_lite.config.pipeline import SPLIT_BACKWARD
from megatron_lite.planner.activations import element_bytes
from megatron_lite.planner.attention import core_seconds
from megatron_lite.planner.hardware import Cluster
from megatron_lite.planner.head import logits_chunks
from megatron_lite.planner.memory import PlanInputs, layer_input_bytes
from megatron_lite.planner.pieces import Moved, kernel_table, moved
from megatron_lite.planner.work import Passes, StageTimes, Work

FORWARD_LAUNCHES, BACKWARD_LAUNCHES, CALL_LAUNCHES = 8, 4, 4
"""Host time of a product of a linear layer in forward, of each of its two in backward, and of a
collective, in times of a kernel's launch: modules and autograd functions are Python.  Measured on a
CPU with tensors so small that only the host counts: a GPT layer takes 205 us forward with 10 kernels
and 230 backward with 31, a Llama layer 350 with 35 and 340 with 66, dropout 255 with 58 more."""

COMPILED_LAUNCHES = 20, 10
"""The same of a compiled piece, forward and backward, which looks whether its graph still holds: with
four of them a GPT layer takes 630 and 400 us, with five a Llama layer 630 and 360."""


class Costs:
    """The work of every action of a Blueprint on a cluster; `given` times replace the predicted."""

    def __init__(
        self,
        blueprint: Blueprint,
        asked: PlanInputs,
        cluster: Cluster,
        given: StageTimes | None = None,
    ) -> None:
        self.blueprint, self.asked, self.cluster, self.given = blueprint, asked, cluster, given
        self.model, self.device = blueprint.model, cluster.device
        self.tokens = self.model.seq_length * asked.micro_batch_size / asked.parallel.cp
        self.width = element_bytes(asked.precision)
        self.slow = 1.0 if self.width == 2 else self._fp32_factor()
        self.tp = blueprint.grid.tp
        self.compiled = asked.precision.compiles(on_gpu=asked.on_gpu)
        self.pieces = kernel_table(compiled=self.compiled, width=self.width)
        self._by_parts: dict[int, Passes] = {}
        self.head = self._head()
        self.embedding = self._embedding()
        self._by_action: dict[tuple[Op, int], Work] = {}
        self._by_layers: dict[tuple[object, ...], Work] = {}

    def work(self, op: Op, stage: StageLayers) -> Work:
        """All of one action."""
        known = self._by_action.get((op, stage.index))
        if known is None:
            if self.given is None:
                known = self._alike(op, stage)
            else:
                chunks = len(self.blueprint.placement) // self.blueprint.grid.pp
                known = self.given.work(op, chunks)
            self._by_action[op, stage.index] = known
        return known

    def backward(self, stage: StageLayers) -> Work:
        """A whole backward of one micro batch, split or not as the schedule has it."""
        if self.blueprint.schedule in SPLIT_BACKWARD:
            return self.work(Op.I, stage) + self.work(Op.W, stage)
        return self.work(Op.B, stage)

    def cost(self) -> Cost:
        """Seconds of an action, for the simulator."""
        stages = self.blueprint.stages

        def seconds(action: Action) -> float:
            return self.work(action.op, stages[action.stage]).seconds

        return seconds

    def message_seconds(self) -> float:
        """A message between neighbouring pipeline ranks."""
        grid = self.blueprint.grid
        if grid.pp == 1:
            return 0.0
        if self.given is not None:
            return self.given.message
        stride = grid.rank(pp=1)
        return self.cluster.message_seconds(
            layer_input_bytes(self.model, self.asked), stride=stride
        )

    def _fp32_factor(self) -> float:
        # fp32 products run outside the 16-bit tensor cores
        tf32 = self.asked.precision.tf32 and self.asked.on_gpu
        return 1 / (self.device.tf32_rate if tf32 else self.device.fp32_rate)

    def _product(self, inner: float, columns: float, chunks: int = 1) -> tuple[float, float, float]:
        """Seconds of y = x W, dx = dy Wᵀ and dW = xᵀ dy, which differ in their inner dimension.

        chunks: of the tokens; the seconds are those of one.
        """
        tokens, seconds = self.tokens / chunks, self.device.product_seconds
        return (
            seconds(tokens, inner, columns) * self.slow,
            seconds(tokens, columns, inner) * self.slow,
            seconds(inner, tokens, columns) * self.slow,
        )

    def _moving(self, elements: float, values: float) -> float:
        """Elementwise kernels that read and write so many values per element."""
        return self.device.moving_seconds(elements * values * self.width)

    def _all_reduce(self) -> float:
        """The sum of the residual stream over tp, or its gather and scatter: the same bytes."""
        payload = self.tokens * self.model.hidden_size * self.width
        return self.cluster.ring_seconds(payload, self.blueprint.grid.tp, stride=1, passes=2)

    def layer(self, number: int) -> Passes:
        """The work of a layer."""
        parts = self.blueprint.figure.layers[number]
        known = self._by_parts.get(id(parts))
        if known is None:
            known, draw = self._layer(parts), self.blueprint.draw
            if draw is not None:  # no weight gradients in the other steps
                known = replace(known, weights=known.weights * draw.share)
            self._by_parts[id(parts)] = known
        return known

    def _layer(self, layer: Parts) -> Passes:
        matrices, cores = layer.of(Matrix), layer.of(Core)
        linears = {matrix: self._linear(matrix) for matrix in matrices}
        forward, inputs, weights = (sum(seconds) for seconds in zip(*linears.values(), strict=True))
        core_forward, core_backward = (
            sum(seconds) for seconds in zip(*map(self._core, cores), strict=True)
        )
        moves, back_moves = self._moves(layer)
        ring = self._all_reduce()
        # an all-reduce, or a gather and a scatter, of each pair of matrices between two norms
        num_rings = sum(matrix.into_stream for matrix in matrices)
        rings = num_rings * ring
        under = sum(seconds[2] for matrix, seconds in linears.items() if matrix.cut == "rows")
        exposed, hidden = self._backward_tp(rings, under)
        # keys and values around cp, under the attention of the piece that is there
        around = self._ring_attention_comm(sum(core.keys for core in cores) / self.tp)
        calls = CALL_LAUNCHES * num_rings * (self.tp > 1) + len(cores)
        back = BACKWARD_LAUNCHES * len(matrices)
        started, started_back = moves.kernels, back_moves.kernels
        if self.compiled:
            started, started_back = (moves.kernels * one for one in COMPILED_LAUNCHES)
        return Passes(
            Work(forward, core_forward, self._piece_seconds(moves),
                 rings + max(around - core_forward, 0.0), min(around, core_forward),
                 calls + started + FORWARD_LAUNCHES * len(matrices)),
            Work(inputs, core_backward, self._piece_seconds(back_moves),
                 exposed + max(2 * around - core_backward, 0.0),
                 hidden + min(2 * around, core_backward),
                 calls + started_back + back),
            Work(weights, 0.0, self._accumulating(layer), launches=back),
            # two all-reduces, or two gathers of dy and two scatters of dx
            exposed=rings + max(2 * around - core_backward, 0.0),
            # the inputs of two column-parallel, dy of two row-parallel layers
            gathered=rings if self.asked.parallel.splits_sequence else 0.0,
        )  # fmt: skip

    def _linear(self, matrix: Matrix) -> tuple[float, float, float]:
        """Seconds of its three products, of which a frozen one lacks the last, and of its adapter's.

        One that is packed is read, and written unpacked, before each.
        """
        inputs, outputs = matrix.local(self.tp)
        forward, back, weight = self._product(inputs, outputs)
        packed = matrix.storage == "nf4"
        moved = (WEIGHT_BYTES["nf4"] + self.width) * inputs * outputs * packed
        unpacked = self.device.moving_seconds(moved)
        products = [(forward + unpacked, back + unpacked, 0.0 if matrix.frozen else weight)]
        if matrix.adapter is not None:
            ranks = matrix.adapter.rank * len(matrix.adapter.pieces)
            products += [self._product(inputs, ranks), self._product(matrix.adapter.rank, outputs)]
        forward, back, weight = (sum(seconds) for seconds in zip(*products, strict=True))
        return forward, back, weight

    def _moves(self, layer: Parts) -> tuple[Moved, Moved]:
        """What a layer's kernels between its products move in forward and in backward."""
        split = self.tokens / (self.tp if self.asked.parallel.splits_sequence else 1)
        dropped = self.model.hidden_dropout > 0.0
        mask = self.device.dropout_values * 2 / self.width if dropped else None
        return moved(layer, self.pieces, tokens=self.tokens, split=split, tp=self.tp, mask=mask)

    def _piece_seconds(self, work: Moved) -> float:
        """Seconds of kernels between products."""
        return self._moving(work.values, 1) + work.kernels * self.device.launch_seconds

    def _ring_attention_comm(self, keys: float) -> float:
        """Keys and values passed around the ranks that share a sequence."""
        grid = self.blueprint.grid
        whole = 2 * keys * self.tokens * self.width * grid.cp
        return self.cluster.ring_seconds(whole, grid.cp, stride=grid.tp, passes=1)

    def _backward_tp(self, ring: float, under: float) -> tuple[float, float]:
        """(exposed, hidden) of a layer's backward all-reduces, which take `ring` seconds.

        Without sequence parallelism all belong to column-parallel inputs and run under the weight
        gradient; with it half of each does, and gathering a row-parallel layer's dy is exposed.
        """
        able = ring if not self.asked.parallel.splits_sequence else ring / 2
        hidden = min(able, under) * self.device.overlap
        return ring - hidden, hidden

    def _accumulating(self, layer: Parts) -> float:
        """Adding the weight gradient to the accumulator: the sum is read and written."""
        weights = sum(matrix.size for matrix in layer.of(Matrix) if not matrix.frozen)
        wide = 4 if self.asked.parallel.accumulate_allreduce_grads_in_fp32 else self.width
        return self.device.moving_seconds(weights / self.tp * 2 * wide)

    def _core(self, core: Core) -> tuple[float, float]:
        """Attention between q, k, v and its output, forward and backward."""
        return core_seconds(
            core, self.model, self.asked, self.device,
            squares=self.tokens * core.pairs(self.model.seq_length) / self.model.seq_length / self.tp,
            tokens=self.tokens, slow=self.slow,
        )  # fmt: skip

    def _head(self) -> Passes:
        model, tp = self.model, self.blueprint.grid.tp
        output = self.blueprint.figure.output
        columns = output.local_rows(tp)
        position = self.asked.micro_batch_size * columns * self.width
        chunks = logits_chunks(self.blueprint, self.asked.parallel, position)
        forward_product, inputs, weights = (
            chunks * seconds for seconds in self._product(model.hidden_size, columns, chunks)
        )
        weights = 0.0 if output.frozen else weights
        forward, backward = self._scoring(self.tokens * columns)
        # a head that each tp rank has whole says nothing to the others
        ring = self._all_reduce() if output.vocabulary else 0.0
        half = ring / 2 if self.asked.parallel.splits_sequence else 0.0
        norm = self._moving(self.tokens * model.hidden_size, 2.0)
        if chunks > 1:
            return self._chunked_head(
                Work(forward_product + inputs + weights, 0.0, forward + backward + norm),
                gathered=half, reduced=half or ring, under=weights / chunks, norm=norm,
                summed=self.device.moving_seconds(4.0 * columns * model.hidden_size), chunks=chunks,
            )  # fmt: skip
        return Passes(
            Work(forward_product, 0.0, forward + norm, half),
            Work(inputs, 0.0, backward + 1.5 * norm, max(ring - weights, 0.0), min(ring, weights)),
            Work(weights, 0.0, 0.0, 0.0),
            exposed=half or ring,
            gathered=half,
        )

    def _scoring(self, logits: float) -> tuple[float, float]:
        """Seconds of the loss of so many logits, and of its gradient."""
        moving = self.device.moving_seconds
        if self.compiled:  # fp32 only in registers
            return moving(logits * self.width), moving(logits * 2 * self.width)
        # fp32 log probabilities, read twice; their gradient by five kernels that read and write fp32
        return moving(logits * (2 * self.width + 4)), moving(logits * (2 * self.width + 32))

    def _chunked_head(
        self, made: Work, *, gathered: float, reduced: float, under: float, norm: float,
        summed: float, chunks: int,
    ) -> Passes:  # fmt: skip
        """All three products in forward; the weight's is summed in fp32 and added in backward.

        gathered: seconds of the input's gather; reduced: of its gradient, under the last chunk's
        product; summed: of reading or writing the sum once.
        """
        hidden = min(reduced, under)
        tp = Work(elementwise=2 * chunks * summed, tp=gathered + reduced - hidden, tp_hidden=hidden)
        back = Work(elementwise=2.5 * norm)
        return Passes(made + tp, back, Work(elementwise=5 * summed), exposed=0.0)

    def _embedding(self) -> Passes:
        model = self.model
        elements = self.tokens * model.hidden_size
        ring = self._all_reduce()
        none = Work()
        look_up = self._moving(elements, 4.0)
        back = ring / 2 if self.asked.parallel.splits_sequence else 0.0
        # its gradient is no product: B, or I, adds it
        return Passes(
            Work(0.0, 0.0, look_up, ring), Work(0.0, 0.0, look_up * 2, back), none, exposed=back
        )

    def _alike(self, op: Op, stage: StageLayers) -> Work:
        """The work of any stage with such layers and ends."""
        layers = tuple(id(self.blueprint.figure.layers[number]) for number in stage.layers)
        key = (op, layers, stage.has_head, stage.has_embedding)
        if key not in self._by_layers:
            self._by_layers[key] = self._work(op, stage)
        return self._by_layers[key]

    def _work(self, op: Op, stage: StageLayers) -> Work:
        like = Counter(id(self.blueprint.figure.layers[number]) for number in stage.layers)
        first = {id(self.blueprint.figure.layers[n]): n for n in stage.layers}
        parts = [(self.layer(first[same]), float(times)) for same, times in like.items()]
        if stage.has_head:
            parts.append((self.head, 1.0))
        if stage.has_embedding:
            parts.append((self.embedding, 1.0))
        done = Work()
        for passes, times in parts:
            if op is Op.F:
                done += passes.forward * times
            if op is Op.B:
                done += (passes.inputs + passes.weights) * times
            if op is Op.I:
                done += passes.split()[0] * times
            if op is Op.W:
                done += passes.split()[1] * times
        if op in (Op.B, Op.I):
            done += self._again(stage)
        return self._waited(done)

    def _waited(self, work: Work) -> Work:
        """With the time that the device waits for its host; a CPU is both."""
        host = work.launches * self.device.host_seconds
        return replace(work, host=host if self.device.cpu else max(0.0, host - work.seconds))

    def _again(self, stage: StageLayers) -> Work:
        """What recomputing adds to a stage's backward."""
        plan, done = RecomputePlan.from_config(self.asked.parallel), Work()
        for position in plan.recomputed(len(stage.layers)):
            done += self.layer(stage.layers[position]).forward
        if not plan.modules:
            return done
        for number in stage.layers:
            if "core_attn" in plan.modules:
                done += Work(attention=self.layer(number).forward.attention)
            if "mlp" in plan.modules:
                done += self._mlp_again(self.blueprint.figure.layers[number])
            if "layernorm" in plan.modules:
                done += self._norms_again(self.blueprint.figure.layers[number])
        return done

    def _norms_again(self, layer: Parts) -> Work:
        """The norms before attention and MLP."""
        tokens = self.tokens / (self.tp if self.asked.parallel.splits_sequence else 1)
        work = Moved()
        for norm in layer.of(Norm):
            if not norm.heads:
                kernels, values = self.pieces[norm.function].forward
                work += Moved(kernels, values * tokens * norm.width)
        return Work(elementwise=self._piece_seconds(work), launches=work.kernels)

    def _mlp_again(self, layer: Parts) -> Work:
        again = Work()
        for activation in layer.of(Activation):
            branch = activation.name.rpartition(".")[0]
            matrices = [m for m in layer.of(Matrix) if m.name.startswith(branch + ".")]
            kernels, values = self.pieces[activation.function].forward
            elements = self.tokens * activation.width / self.tp
            again += Work(
                products=sum(self._product(*matrix.local(self.tp))[0] for matrix in matrices),
                elementwise=self._piece_seconds(Moved(kernels, values * elements)),
                launches=kernels + FORWARD_LAUNCHES * len(matrices),
                tp=self._all_reduce(),
            )
        return again
