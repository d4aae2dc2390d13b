"""DeepSpeedEngine: see base.Engine; DeepSpeed owns gradients, masters and states, and we name what it owns."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from megatron_lite.blueprint.buckets import bucket_elements
from megatron_lite.blueprint.turns import BlockDraw
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.extras import how_to_install
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.engines.base import EngineProgress, SquaredNorm, Statistics, Update
from megatron_lite.engines.clip import clip_coefficient, count_zeros, global_norm, squared_norms
from megatron_lite.engines.deepspeed.fragments import Box, boxes
from megatron_lite.engines.deepspeed.holders import GatheringHooks, Layer, Layers
from megatron_lite.engines.deepspeed.partitions import FlatPartition, Partition, partition_of
from megatron_lite.engines.deepspeed.written import STATE_NAMES, deepspeed_config
from megatron_lite.engines.holding import learns
from megatron_lite.engines.loss_scale import LossScale
from megatron_lite.optim.groups import Groups
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.shard import MASTER, LocalParameter, NamedSlice, weight_slices

EMBEDDING = "embedding."
"""Begins the names of what the first layer reads."""


class DeepSpeedEngine:
    """DeepSpeed's ZeRO 0 to 3 over the parameters of one stage, at tp 1.

    DeepSpeed begins when the weights are first filled: then the layers are known.
    """

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
        self.span, self.ctx, self.optim, self.statistics = span, ctx, optim, statistics
        self.groups = Groups(optim, draw)
        self.scaler = LossScale.from_config(precision)
        self._steps = 0
        self._stage = parallel.zero_stage
        self._sharded = self._stage > 0 and ctx.replicas.size > 1
        self._low = precision.name != "fp32"
        (self._all,) = stages.values()
        self._sizes = {local.parameter: tuple(local.parameter.shape) for local in self._all}
        self._trained = [local for local in self._all if learns(local, self.groups)]
        for local in self._all:
            local.parameter.requires_grad_(learns(local, self.groups))
        self._config = deepspeed_config(
            optim,
            parallel,
            precision,
            bucket_size=bucket_elements(parallel, ctx.replicas.size),
            on_gpu=ctx.device.type == "cuda",
        )
        self._layers: list[Layer] = []
        self._library = deepspeed_library(ctx.device)
        self._held: Partition | None = None
        self._boxes: dict[nn.Parameter, list[Box]] = {}

    # -- beginning -------------------------------------------------------------------------------

    def layer_hooks(self, parameters: Sequence[Tensor]) -> GatheringHooks | None:
        """Note the layer; at stage 3 its parameters are whole between the hooks alone."""
        layer = Layer(parameters)
        self._layers.append(layer)
        if self._stage < 3:
            return None
        read = [p for p in self._all if any(p.parameter is one for one in parameters)]
        return GatheringHooks(
            layer,
            lambda: self._deep.optimizer.parameter_offload,
            looks_up=all(local.spec.name.startswith(EMBEDDING) for local in read),
        )

    @property
    def _deep(self) -> Any:
        assert self._held is not None, "the weights are not yet filled"
        return self._held.deep

    def fill(self, write: Callable[[list[NamedSlice]], None], *, masters: bool = False) -> None:
        """The first time DeepSpeed is begun with what is written; later its own tensors are written."""
        if self._held is None:
            write(list(weight_slices(self._all, self.ctx, owned=False)))
            self._begin()
            return
        self._fill(write, masters=masters)

    @torch.no_grad()
    def _fill(self, write: Callable[[list[NamedSlice]], None], *, masters: bool) -> None:
        assert self._held is not None
        state = self.state(owned=False) if masters else ()
        self._held.take_apart()
        write([*self.weights(owned=False), *(p for p in state if p.name.startswith(MASTER))])
        for local in self._trained:
            if self._boxes[local.parameter] and not (masters and self._low):
                self._held.master(local.parameter).copy_(self._held.weight(local.parameter))
        self._held.make_whole()

    def _begin(self) -> None:
        # DeepSpeed asks the environment for what the context knows
        os.environ["LOCAL_RANK"] = str(self.ctx.device.index or 0)
        if not dist.is_initialized():  # one process needs no group; DeepSpeed does
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with contextlib.redirect_stdout(io.StringIO()):  # where it tells its memory
            deep, *_ = self._initialize()
        deep.set_gradient_accumulation_boundary(False)
        self._held = partition_of(self._stage, deep)
        self._make_states()
        for local in self._all if self._stage == 3 else self._trained:
            start, stop = self._held.range_of(local.parameter)
            found = boxes(local, self._sizes[local.parameter], start, stop)
            self._boxes[local.parameter] = list(found)

    def _initialize(self) -> Sequence[Any]:
        try:
            made: Sequence[Any] = self._library.initialize(
                model=Layers(self._layers), model_parameters=self._groups(), config=self._config
            )
        except (AssertionError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())[:400]
            raise ConfigError(
                f"--engine deepspeed: DeepSpeed refuses its configuration: {said} - see --deepspeed-keys, "
                "or the ds.json that they come from"
            ) from error
        return made

    def _groups(self) -> list[dict[str, Any]]:
        """torch's, of one weight decay and one learning rate each; and our own factors on both."""
        found: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
        for local in self._trained:
            how = self.groups.treatment(local.spec)
            key = how.lr, how.decay(local.spec), local.spec.vocabulary
            found.setdefault(key, []).append(local.parameter)
        return [
            {"params": held, "factors": key, "weight_decay": 0.0} for key, held in found.items()
        ]

    def _make_states(self) -> None:
        """Zeros, which the optimizers themselves would make in their first update."""
        assert self._held is not None
        optimizer = self._deep.basic_optimizer
        counts = not isinstance(optimizer, torch.optim.SGD)
        torchs = type(optimizer).__module__.startswith("torch.")
        for parameter in self._held.updated():
            state = optimizer.state[parameter]
            if counts:
                state["step"] = torch.tensor(0.0, device=parameter.device) if torchs else 0
            for name in self._state_names.values():
                state[name] = torch.zeros_like(parameter, requires_grad=False)
        if isinstance(self._held, FlatPartition):
            self._held.link_states()

    @property
    def _state_names(self) -> Mapping[str, str]:
        names = STATE_NAMES[self.optim.optimizer]
        kept = {
            state.name
            for local in self._trained
            for state in self.groups.treatment(local.spec).states
        }
        return {ours: theirs for ours, theirs in names.items() if ours in kept}

    # -- a step ----------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """1: bf16 and fp32 need none."""
        return self.scaler.scale

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """DeepSpeed's forward of the whole model is ours."""
        found: Tensor = self._deep(run)
        return found

    def backward(self, end: GradientEdge | Tensor, gradient: Tensor | None) -> None:
        """DeepSpeed's; it takes the mean of what the ranks have, where the loss is already one over all."""
        assert isinstance(end, Tensor) and gradient is None, "a pipeline's stage has no loss"
        self._deep.backward(end * self.ctx.replicas.size, scale_wrt_gas=False)

    def accumulators(self) -> list[tuple[Tensor, Tensor]]:
        """None: DeepSpeed takes gradients from autograd."""
        return []

    def ready(self, parameter: Tensor) -> None:
        """Nobody calls it without accumulators."""

    def begin_last_backward(
        self, stage: int, pending_wgrads: Sequence[Tensor] | None = None
    ) -> None:
        """The next backward is DeepSpeed's boundary of gradient accumulation."""
        self._deep.set_gradient_accumulation_boundary(True)

    @contextmanager
    def unreduced(self) -> Iterator[None]:
        """Nothing else: from stage 2 on each backward reduces its gradients."""
        yield

    def reduce(self) -> None:
        """Done by the last backward."""
        self._deep.set_gradient_accumulation_boundary(False)

    def _gradients(self) -> Iterator[tuple[LocalParameter, Tensor]]:
        """Trained parameters that this rank has a part of, and the gradient of that part, flat."""
        assert self._held is not None
        for local in self._trained:
            if self._boxes[local.parameter]:
                yield local, self._held.gradient(local.parameter)

    @torch.no_grad()
    def squared_norm(self) -> SquaredNorm:
        """This rank's share of the gradient's squared norm; the sum over the world is the whole."""
        found = [part.data for part in self.gradients(owned=False)]
        squares = squared_norms(found, self.ctx.device).to(self.ctx.device)
        counts = self._sharded or self.ctx.replicas.rank == 0
        return SquaredNorm(squares.sum() if counts else squares.new_zeros(()), squares.isfinite())

    @property
    def waits_because(self) -> str:
        """DeepSpeed's step is made or not by the host."""
        return "--engine deepspeed (its update waits for the host)"

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
        """Clip by the global norm, then DeepSpeed's step, which clears the gradients."""
        assert taken is None, "see waits_because"
        num_zeros = self._num_zeros() if self.statistics.num_zeros else None
        if self.optim.clip_grad > 0.0:
            with self.span("optimizer-clip-main-grad"):
                coefficient = clip_coefficient(norm, self.optim.clip_grad)
                for _, gradient in self._gradients():
                    gradient.mul_(coefficient.to(gradient.device))  # waits for the device: offload
        for group in self._deep.basic_optimizer.param_groups:
            factor, decay, vocabulary = group["factors"]
            own = decoupled_lr if vocabulary and decoupled_lr is not None else lr
            group["lr"], group["weight_decay"] = factor * own, decay * weight_decay
        with self.span("optimizer-inner-step"):
            self._deep.set_gradient_accumulation_boundary(True)
            self._deep.step()
            self._deep.set_gradient_accumulation_boundary(False)
        if not self._deep.was_step_applied():
            return Update(norm, skipped=True, num_zeros=num_zeros)
        self._steps += 1
        params_norm = self._params_norm() if self.statistics.params_norm else None
        return Update(norm, skipped=False, num_zeros=num_zeros, params_norm=params_norm)

    def take_back(self) -> None:
        """Never: see waits_because."""
        raise AssertionError("an update that waits is not taken back")

    def discard(self, norm: Tensor) -> Update:
        """Clear the gradients: the step is skipped, weights and state stay as they are."""
        assert self._held is not None
        self._held.clear()
        return Update(norm, skipped=True)

    @property
    def _sums(self) -> Any:
        return self.ctx.world if self._sharded else self.ctx.model

    def _num_zeros(self) -> Tensor:
        with self.span("optimizer-count-zeros"):
            found = [part.data.to(self.ctx.device) for part in self.gradients(owned=True)]
            return count_zeros(found, self._sums, self.ctx.device)

    def _params_norm(self) -> Tensor:
        assert self._held is not None
        parts = [p.parameter for p in self._trained if self._boxes[p.parameter]]
        found = [self._held.master(parameter).to(self.ctx.device) for parameter in parts]
        return global_norm(found, self._sums, self.ctx.device)

    # -- what it holds, named --------------------------------------------------------------------

    def wait_for_param_gather(self) -> None:
        """A step ends with all weights gathered."""

    def wait_for(self, parameters: Iterable[Tensor]) -> None:
        """Likewise."""

    def _named(self, local: LocalParameter, flat: Tensor, prefix: str = "") -> Iterator[NamedSlice]:
        """This rank's elements of a parameter as boxes of its canonical tensors."""
        assert self._held is not None
        begin, _ = self._held.range_of(local.parameter)
        for box in self._boxes[local.parameter]:
            data = flat[box.start - begin : box.stop - begin].view(box.sizes)
            yield NamedSlice(
                prefix + box.piece.name,
                box.piece.shape,
                box.offset,
                data,
                replicated=not self._sharded,
            )

    def weights(self, *, owned: bool) -> Iterator[NamedSlice]:
        """The model's tensors as named slices (views); at stage 3 this rank's part of them."""
        if self._stage < 3:
            yield from weight_slices(self._all, self.ctx, owned=owned)
            return
        assert self._held is not None
        for local in self._all:
            yield from self._named(local, self._held.weight(local.parameter))

    def gradients(self, *, owned: bool) -> Iterator[NamedSlice]:
        """What DeepSpeed's step will be made of."""
        for local, gradient in self._gradients():
            yield from self._named(local, gradient)

    def state(self, *, owned: bool) -> Iterator[NamedSlice]:
        """Masters (`master.<name>`) and optimizer tensors (`<state>.<name>`), likewise."""
        assert self._held is not None
        for local in self._trained:
            if not self._boxes[local.parameter]:
                continue
            if self._low:
                yield from self._named(local, self._held.master(local.parameter), MASTER)
            for ours, theirs in self._state_names.items():
                flat = self._held.state(local.parameter, theirs)
                yield from self._named(local, flat, f"{ours}.")

    def progress(self) -> EngineProgress:
        """Updates done, for a checkpoint."""
        return EngineProgress(self._steps, self.scaler.state())

    def resume(self, progress: EngineProgress) -> None:
        """Stand where a checkpoint was saved."""
        assert self._held is not None
        self._steps = steps = progress.steps
        for parameter in self._held.updated():
            state = self._deep.basic_optimizer.state[parameter]
            if "step" in state:
                step = state["step"]
                state["step"] = torch.full_like(step, steps) if torch.is_tensor(step) else steps


def deepspeed_library(device: torch.device) -> ModuleType:
    """DeepSpeed itself, which would take a GPU that it finds."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise ConfigError(
            f"--engine deepspeed needs the package deepspeed ({error}); "
            f"`{how_to_install('deepspeed')}`, or leave --engine out"
        ) from error
    # collectives of its own through shared memory, on a CPU: a compiler would run for a minute first
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
