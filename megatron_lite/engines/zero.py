"""The default engine: data parallel with bucketed, overlapped reduction; fp32 accumulators and masters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor

from megatron_lite.blueprint.turns import BlockDraw
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.engines.around import LayerMemory
from megatron_lite.engines.base import EngineProgress, SquaredNorm, Statistics, Update
from megatron_lite.engines.bucket import Bucket, has_memory, wake
from megatron_lite.engines.buckets import GradientBuckets, frozen_weights
from megatron_lite.engines.clip import (
    clip_coefficient,
    count_zeros,
    global_norm,
    squared_norms,
    sum_together,
)
from megatron_lite.engines.gathering import Gathers
from megatron_lite.engines.held import Held, fit_states
from megatron_lite.engines.holding import (
    buckets_by_stage,
    hold,
    is_gathered,
    layer_of,
    learns,
    weights_held,
)
from megatron_lite.engines.loss_scale import LossScale
from megatron_lite.engines.matrices import CutMatrices
from megatron_lite.engines.offload import HostUpdate
from megatron_lite.engines.whole import SharedLayer, WholeWeights
from megatron_lite.optim.groups import Groups, Rates
from megatron_lite.parallel.carrier import Plainly
from megatron_lite.parallel.collectives import all_reduce
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layer_hooks import LayerHooks
from megatron_lite.parallel.shard import (
    MASTER,
    LocalParameter,
    NamedSlice,
    is_primary_copy,
)


class ZeroEngine(Plainly):
    """Holds every rank's gradients and optimizer state; see base.Engine for the protocol.

    fp32 parameters are their own masters; fp16 and bf16 ones have an fp32 copy.  Gradients are
    accumulated and reduced in fp32 unless --no-accumulate-allreduce-grads-in-fp32.
    """

    gives_memory = True

    def __init__(
        self,
        stages: Mapping[int, Sequence[LocalParameter]],
        ctx: ParallelContext,
        *,
        optim: OptimConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        statistics: Statistics,
        draw: BlockDraw | None,
        span: Callable[[str], AbstractContextManager[object]],
    ) -> None:
        self.span = span
        self.ctx, self.optim, self.statistics = ctx, optim, statistics
        self.groups = Groups(optim, draw)
        self.scaler = LossScale.from_config(precision)
        self._steps = 0
        self._unreduced = False
        self.sharded = parallel.shares_state and ctx.replicas.size > 1
        self._shares_gradients = parallel.shares_gradients and self.sharded
        self._overlap_gather = parallel.overlap_param_gather
        self._gathers = Gathers()
        # where sharded, each replica has other rows; else the sum over tp x pp is whole on each
        self._sums = ctx.world if self.sharded else ctx.model
        self._all = [local for held in stages.values() for local in held]
        # what never trains has weights alone: no accumulators, masters or state
        self._home = {p.parameter: stage for stage, held in stages.items() for p in held}
        frozen = [local for local in self._all if not learns(local, self.groups)]
        stages = {stage: [p for p in held if p not in frozen] for stage, held in stages.items()}
        self._stage_of = {p.parameter: stage for stage, held in stages.items() for p in held}
        self._locals = [local for held in stages.values() for local in held]
        self._weights = WholeWeights(until_last_backward=ctx.pp.size > 1)
        self._buckets = buckets_by_stage(stages, ctx, self.groups, parallel, precision)
        buckets = [b for held in self._buckets.values() for b in held.buckets]
        if self.sharded and parallel.shares_weights:
            buckets += frozen_weights(frozen, ctx, layer_of)
        self._apart: dict[Tensor, Bucket] = {
            p.parameter: b for b in buckets if b.shard is not None for p in b.locals
        }
        for local in self._all:
            if local.parameter not in self._apart:
                wake(local.parameter.data)
        self._host = HostUpdate(ctx, self.groups, share=parallel.on_host, span=span)
        self._held = [
            held
            for local in self._locals
            for held in hold(local, self._buckets_of(local), ctx, self.groups, self._host)
        ]
        cut = [held for held in self._held if is_gathered(held.piece, ctx, self.groups)]
        self._updated = [held for held in self._held if held not in cut]
        self._matrices = CutMatrices(cut, ctx, self.groups, self._host)
        for local in self._locals:
            local.parameter.register_post_accumulate_grad_hook(self._take_gradient())
        pieces = (piece for local in self._locals for piece in local.pieces)
        self._turns = {self.groups.treatment(piece.spec).turns for piece in pieces}
        self._choose_trained()
        self._fit_states()

    def _choose_trained(self) -> None:
        """Let autograd compute, and buckets hold and await, gradients of what the next update changes."""
        steps = self._steps
        for buckets in self._buckets.values():
            buckets.wake(lambda turns: turns.begun(steps) is not None)
        self._trained = self.groups.trained(self._beside_weights(), steps)
        self._host.choose([held for held in self._updated if held.on_host], steps)
        self._awake = [
            held for held in self._held if self._buckets_of(held.local).holds(held.local)
        ]
        self._frozen = [held for held in self._awake if not held.turns.trains(steps)]
        counts = [self._counts(held) for held in self._awake]
        self._counted = torch.tensor(counts, dtype=torch.bool, device=self.ctx.device)
        for local in self._all:
            turns = (self.groups.treatment(piece.spec).turns for piece in local.pieces)
            local.parameter.requires_grad_(any(turn.trains(steps) for turn in turns))
        self._fitted = False

    def _fit_states(self) -> None:
        """Not before the update that needs them, since the last one may be taken back."""
        if self._fitted:  # asked in every update, and other only after a turn
            return
        fit_states(self._beside_weights(), self.groups, self._steps)
        owned = self._matrices.owned
        fit_states([o for o in owned if not o.shard.on_host], self.groups, self._steps)
        self._host.fit([own for own in owned if own.shard.on_host])
        self._fitted = True

    def _beside_weights(self) -> list[Held]:
        """Those whose master and states lie on the device."""
        return [held for held in self._updated if not held.on_host]

    def _buckets_of(self, local: LocalParameter) -> GradientBuckets:
        return self._buckets[self._stage_of[local.parameter]]

    def _take_gradient(self) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            if parameter.grad is None:  # the layer has added it to the accumulator itself
                return
            self._bucket_of(parameter).open()
            self._view(parameter).add_(parameter.grad)
            parameter.grad = None
            self.ready(parameter)

        return take

    def _bucket_of(self, parameter: Tensor) -> Bucket:
        return self._buckets[self._stage_of[parameter]].bucket_of(parameter)  # type: ignore[index]

    def _view(self, parameter: Tensor) -> Tensor:
        return self._buckets[self._stage_of[parameter]].views[parameter]  # type: ignore[index]

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before backward; 1 unless fp16."""
        return self.scaler.scale

    @torch.no_grad()
    def fill(self, write: Callable[[list[NamedSlice]], None], *, masters: bool = False) -> None:
        """Have the weights this rank holds written in place, and their masters follow or be written."""
        self._let_go()
        weights = list(self.weights(owned=False))
        if masters:
            state = self.state(owned=False)
            write([*weights, *(part for part in state if part.name.startswith(MASTER))])
        else:
            write(weights)
        for held in self._updated:
            if held.master is not held.weight and not (masters and held.has_master):
                held.master.copy_(held.weight)
        self._matrices.follow(masters=masters)

    def accumulators(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, accumulator) pairs for layers that add their gradients themselves."""
        return [(local.parameter, self._view(local.parameter)) for local in self._locals]

    def ready(self, parameter: Tensor) -> None:
        """One gradient contribution of the parameter has been accumulated."""
        if not self._unreduced:
            self._buckets[self._stage_of[parameter]].ready(parameter)  # type: ignore[index]

    def begin_last_backward(
        self, stage: int, pending_wgrads: Sequence[Tensor] | None = None
    ) -> None:
        """From here gradients of this stage are final: a full bucket may be reduced.

        pending_wgrads: what its last W will still report, see base.Engine; None: a whole backward comes.
        """
        self._weights.begin_last_backward(stage)
        if not self._unreduced:
            self._buckets[stage].begin_last_backward(pending_wgrads)

    @contextmanager
    def unreduced(self) -> Iterator[None]:
        """Within, no reduction starts: accumulators hold what this rank alone has added to them.

        All of them have memory then, at every stage.
        """
        self._unreduced = True
        for bucket in self._all_buckets():
            bucket.open()
        try:
            yield
        finally:
            self._unreduced = False

    @torch.no_grad()
    def reduce(self) -> None:
        """Finish reductions and unscale: accumulators hold the gradient of the mean loss.  Collective."""
        with self.span("all-grads-sync"):
            self._reduce()

    @torch.no_grad()
    def squared_norm(self) -> SquaredNorm:
        """This rank's share of the gradient's squared norm; the sum over the world is the whole."""
        squares = squared_norms([held.gradient for held in self._awake], self.ctx.device)
        # where, not a product: 0 x inf is nan.  Copies that do not count must be finite, too: the
        # rank that holds a bad one would otherwise update with it.
        return SquaredNorm(squares.where(self._counted, 0.0).sum(), squares.isfinite())

    def _counts(self, held: Held) -> bool:
        """Whether sums over the world take this rank's gradient, not another rank's copy of it."""
        first = held.local.replicas(self.ctx).rank == 0
        return is_primary_copy(held.local, self.ctx) and (self.sharded or first)

    def _mine(self, held: Iterable[Held]) -> list[Held]:
        """Those whose primary copy this rank holds, for sums over all ranks."""
        return [one for one in held if is_primary_copy(one.local, self.ctx)]

    @property
    def waits_because(self) -> str:
        """Why apply() cannot be given `taken`: an update rule that does not know it."""
        return self._host.waits_because or self.groups.waits_because

    @torch.no_grad()
    def apply(
        self,
        norm: Tensor,
        *,
        lr: float,
        weight_decay: float,
        decoupled_lr: float | None = None,
        taken: Tensor | None = None,
    ) -> Update:
        """Clip by the global norm, update, clear the accumulators.  Collective over the grid."""
        num_zeros = self._num_zeros() if self.statistics.num_zeros else None
        if self.optim.clip_grad > 0.0:
            with self.span("optimizer-clip-main-grad"):
                coefficient = clip_coefficient(norm, self.optim.clip_grad)
                if self.sharded:  # the other rows of the buffers are not read again
                    torch._foreach_mul_([held.gradient for held in self._awake], coefficient)
                else:  # one kernel per bucket instead of one per tensor
                    for bucket in self._all_buckets():
                        bucket.sums.mul_(coefficient)
        with self.span("optimizer-inner-step"):
            self._apply(Rates(lr, weight_decay, decoupled_lr), taken)
        self._clear()
        params_norm = self._params_norm() if self.statistics.params_norm else None
        return Update(norm, skipped=False, num_zeros=num_zeros, params_norm=params_norm)

    def discard(self, norm: Tensor) -> Update:
        """Clear the accumulators: the step is skipped, weights and state stay as they are."""
        self._clear()
        return Update(norm, skipped=True)

    def take_back(self) -> None:
        """The last apply() was not taken: it does not count among the updates."""
        turned = self._turn()
        self._steps -= 1
        if turned:
            self._choose_trained()

    def _reduce(self) -> None:
        """Sum gradients over replicas, over tp where a rank saw its share of the sequence, over tied stages."""
        self._let_go()
        for buckets in self._buckets.values():
            buckets.finish()
        # sorted: the order of a set of strings differs from process to process, that of collectives
        # may not
        for axis in sorted({axis for held in self._awake for axis in held.local.grad_summed_over}):
            shares = [held.gradient for held in self._awake if axis in held.local.grad_summed_over]
            sum_together(shares, self.ctx.named(axis))  # norms and biases
        if self._frozen:  # some of them may be a piece of a parameter that is trained otherwise
            torch._foreach_zero_([held.gradient for held in self._frozen])
        # after the sum over replicas, so that where sharded only the rows this rank keeps travel
        for held in self._awake:
            if held.local.tied_across_stages:
                all_reduce(held.gradient, self.ctx.tied)
        if self.loss_scale != 1.0:
            for bucket in self._all_buckets():
                bucket.sums.mul_(1.0 / self.loss_scale)

    def _apply(self, rates: Rates, taken: Tensor | None) -> None:
        self._fit_states()
        total = partial(sum_together, axis=self.ctx.tp)
        self._host.begin()
        self.groups.update(self._trained, rates, steps=self._steps, taken=taken, total=total)
        self._matrices.update(rates, steps=self._steps, taken=taken)
        self.copy_masters()  # the same bits again where the update is not taken
        self._host.finish(rates, steps=self._steps, total=total)
        if self.sharded:
            # buckets lie in the order of backward, the reverse of forward's
            held = self._buckets.values()
            whole = (b for buckets in held for b in reversed(buckets.awake) if b.shard is None)
            self._gathers.start(whole)
            if not self._overlap_gather:
                self.wait_for_param_gather()
        self._steps += 1
        if self._turn():
            self._choose_trained()

    def _turn(self) -> bool:
        """Whether the next update may change other tensors than the last one."""
        return any(turns.changes(self._steps) for turns in self._turns)

    @torch.no_grad()
    def wait_for_param_gather(self) -> None:
        """Wait until every parameter is all-gathered: before they are read outside a forward."""
        self._gathers.wait_for_all()

    @torch.no_grad()
    def wait_for(self, parameters: Iterable[Tensor]) -> None:
        """Wait until these parameters are all-gathered: called before a layer's forward."""
        for parameter in parameters:
            stage = self._stage_of.get(parameter)  # type: ignore[call-overload]
            if stage is not None:  # else it is frozen, and always whole
                self._gathers.wait_for(self._bucket_of(parameter))

    def layer_hooks(self, parameters: Sequence[Tensor]) -> LayerHooks | None:
        """None needed where gradients and weights always have memory."""
        if not self._shares_gradients or not parameters:
            return None
        learned = [parameter for parameter in parameters if parameter in self._stage_of]
        shared = [self._apart[parameter] for parameter in parameters if parameter in self._apart]
        layer = SharedLayer(self._home[parameters[0]], list(dict.fromkeys(shared)))  # type: ignore[index]
        buckets = list(dict.fromkeys(map(self._bucket_of, learned)))
        return LayerMemory(buckets, layer, self._weights)

    def _let_go(self) -> None:
        """Keep of shared weights this rank's rows alone."""
        self._weights.let_go(dict.fromkeys(self._apart.values()))

    def copy_masters(self) -> None:
        """Round the masters into the parameters the model computes with."""
        low = [held for held in self._held if held.has_master and not held.on_host]
        if low:
            with torch.no_grad():
                torch._foreach_copy_([h.weight for h in low], [h.master for h in low])

    def _clear(self) -> None:
        for bucket in self._all_buckets():
            bucket.clear()

    def _all_buckets(self) -> Iterator[Bucket]:
        """Those that have a turn."""
        for buckets in self._buckets.values():
            yield from buckets.awake

    def _num_zeros(self) -> Tensor:
        trained = (held for held in self._held if held.turns.trains(self._steps))
        gradients = [held.gradient for held in self._mine(trained)]
        with self.span("optimizer-count-zeros"):
            return count_zeros(gradients, self._sums, self.ctx.device)

    def _params_norm(self) -> Tensor:
        masters = [held.master for held in self._mine(self._updated)]
        masters += [own.master for own in self._matrices.owned]
        return global_norm(masters, self._sums, self.ctx.device)

    def weights(self, *, owned: bool) -> Iterator[NamedSlice]:
        """The model's tensors as named slices (views): this rank's primary copies, or all it holds."""
        self.wait_for_param_gather()
        yield from weights_held(self._all, self._apart, self.ctx, owned=owned)

    def gradients(self, *, owned: bool) -> Iterator[NamedSlice]:
        """The accumulators this rank updates from, likewise; before reduce() its own sums."""
        for held in self._awake:
            if not owned or is_primary_copy(held.local, self.ctx):
                alone = self._unreduced and has_memory(held.accumulator)
                gradient = held.alone if alone else held.gradient
                yield held.slice(gradient, "", replicated=not self.sharded)

    def state(self, *, owned: bool) -> Iterator[NamedSlice]:
        """Masters (`master.<name>`) and optimizer tensors (`<state>.<name>`) as named slices (views).

        owned: only primary copies (to save), or all this rank holds (to load).
        """
        self._fit_states()
        same = not self.sharded
        for held in self._updated:
            if owned and not is_primary_copy(held.local, self.ctx):
                continue
            if held.has_master:
                yield held.slice(held.master, MASTER, replicated=same)
            for state in self.groups.treatment(held.spec).states if held.state else ():
                if owned and not (state.has(held.share.cut) or self.ctx.tp.rank == 0):
                    continue  # every tp rank has it whole
                data = held.state[state.name]
                yield held.slice(data, f"{state.name}.", replicated=same, state=state)
        yield from self._matrices.state(replicated=same)

    def progress(self) -> EngineProgress:
        """Updates done and the loss scale's state, for a checkpoint."""
        return EngineProgress(self._steps, self.scaler.state())

    def resume(self, progress: EngineProgress) -> None:
        """Stand where a checkpoint was saved, with the states that there are then, to be filled.

        A loss scale that it does not say stays.
        """
        self._steps = progress.steps
        self._choose_trained()
        self._fit_states()
        if progress.loss_scale:
            self.scaler.load(progress.loss_scale)
