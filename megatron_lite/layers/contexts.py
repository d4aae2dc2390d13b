"""What every layer of a stage is built with, and what one forward of it needs besides activations."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron_lite.blueprint.figure.parts import Figure, Format
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.logits import LogitsBudget
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.precision import PrecisionConfig
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.kernels.segments import Segments
from megatron_lite.kernels.table import Need
from megatron_lite.layers.choosing import chosen
from megatron_lite.layers.gradients import WeightGradients
from megatron_lite.layers.rotary import Turning, rotary_tables
from megatron_lite.parallel.context import Axis, ParallelContext
from megatron_lite.parallel.shard import DTYPES

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StageContext:
    """What every layer of a stage is built with: model sizes, ranks, number format, gradient sink.

    gradients: where linear layers leave their weight gradients.
    seed: of weights and dropout.
    drawn: the figure to build, the model's own by default.
    kernels: which implementation of each op runs, and why: a line for each choice.
    capability: of the GPU that runs this, or that a rehearsal stands for; see kernels/table.py.
    compiler: of what stands between two products; None: it runs as it is.
    neftune_alpha: how large the noise on embeddings is in training.
    engine_gives_memory: parameters are made without; together they need not fit.
    """

    model: ModelConfig
    ctx: ParallelContext
    padded_vocab_size: int
    vocab_size: int
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    sequence_parallel: bool = False
    seed: int = 1234
    gradients: WeightGradients = field(default_factory=WeightGradients)
    recompute: RecomputePlan = field(default_factory=RecomputePlan)
    logits_budget: LogitsBudget = field(default_factory=LogitsBudget)
    drawn: Figure | None = None
    kernels: list[str] = field(default_factory=list)
    capability: tuple[int, int] | None = None
    compiler: Compiler | None = None
    neftune_alpha: float = 0.0
    engine_gives_memory: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' and activations' number format."""
        return DTYPES[self.precision.name]

    @property
    def figure(self) -> Figure:
        """The model's parts, from which the layers are built."""
        return self.drawn or figure_of(self.model, self.padded_vocab_size)

    def need(self) -> Need:
        """What a kernel of this stage must cope with."""
        compiles = self.compiler is not None and self.compiler.failure is None
        capability = self.capability or _capability(self.ctx.device)
        return Need(self.ctx.device, self.dtype, compile=compiles, capability=capability)

    def choose(
        self, op: str, *, storage: torch.dtype | None = None, computes: bool = True
    ) -> Callable[..., Any]:
        """The implementation of an op that runs on this stage: chosen when a layer is built, not per call.

        storage: the number format of the layer's weight, where it is not the run's.
        computes: False where the op only looks at its input in another way: nothing to compile.
        """
        choice = chosen(op, replace(self.need(), storage=storage), self.precision.kernel)
        if choice.why not in self.kernels:
            self.kernels.append(choice.why)
        row = choice.implementation
        if self.compiler is None or not (row.fusible and computes):
            return row.run
        return self.compiler.piece(op, row.run, row.uncompiled)

    @property
    def tp(self) -> Axis:
        """The tensor-parallel axis."""
        return self.ctx.tp

    def parameter(self, *shape: int, storage: Format | None = None) -> nn.Parameter:
        """A parameter of zeros, to be filled by the canonical names of its module's part.

        storage: its number format, the run's by default.
        """
        dtype = self.dtype if storage is None else DTYPES[storage]
        made = torch.zeros(*shape, dtype=dtype, device=self.ctx.device)
        if self.engine_gives_memory:
            made.untyped_storage().resize_(0)
        return nn.Parameter(made)


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


class StepDropout(NamedTuple):
    """What the dropout masks of a step are functions of, beside samples and positions; see layers/dropout.py.

    step: on the host, for kernels that draw a mask of their own.
    keys: int64 [places] on the device, a key for each layer and site; features: int32 [h].
    """

    step: int
    keys: Tensor
    features: Tensor


class StepNoise(NamedTuple):
    """The noise of a step on embeddings: its size, a key of int64 on the device, features: int32 [h]."""

    alpha: float
    key: Tensor
    features: Tensor


class LayerCache(Protocol):
    """Keys and values of what came before, for one forward that continues it.

    unturned: they are held before they are turned by rotary positions.
    """

    unturned: bool

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: [b, m, s, d] of the new tokens -> all that is held, [b, m, t, d]."""
        ...

    def key_positions(self) -> Tensor:
        """int64 [t] or [t, b]: by what each key that is held unturned is turned."""
        ...

    def seen(self, window: int | None) -> Tensor | None:
        """bool [b, 1, s, t]: what a new token sees; None: all up to itself, or as far back as the window."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What a forward of one micro batch needs besides activations; every stage has it.

    samples: int64 [b], numbers in the global training stream; index: int64 [s] or [s, b], positions
    in the sample; first_sample: samples[0] on the host.
    dropout: of the step, None where nothing is dropped: in evaluation, and at rate 0.
    noise: of the step on embeddings; None: there is none.
    training: whether this is a training step's, in which attention may see less; False in evaluation.
    segments: documents that do not see one another, None where all of a row sees all before it.
    restarted: int64 [s, b], positions in the segment; None: those in the sample.
    slowed: fp64 [r/2] or [b, r/2], what learned rotary frequencies are multiplied by; see stretching.py.
    length: tokens that the whole text will have, of each sample where they differ; None: those of
    this forward.  Scaling by length goes by it (--rope-scaling-type), from the first token on.
    turning: cos and sin of rotary positions.
    """

    samples: Tensor
    index: Tensor
    first_sample: int = 0
    training: bool = False
    dropout: StepDropout | None = None
    noise: StepNoise | None = None
    segments: Segments | None = None
    cache: LayerCache | None = None
    restarted: Tensor | None = None
    length: int | tuple[int, ...] | None = None
    slowed: Tensor | None = None
    turning: Turning = rotary_tables
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def afresh(self) -> ForwardContext:
        """The same for one forward of a stage: what is made once for its layers lives as long as their graph.

        A step's micro batches all live as long as the step.
        """
        segments = None if self.segments is None else self.segments.afresh()
        return replace(self, segments=segments, _made={})

    def once(self, what: Hashable, make: Callable[[], _T]) -> _T:
        """What one layer makes and the others of the stage find: `what` names it, and all it depends on."""
        if what not in self._made:
            self._made[what] = make()
        made: _T = self._made[what]
        return made

    @property
    def encoded(self) -> Tensor:
        """int64 [s] or [s, b]: positions for RoPE and learned embeddings, which restart in every document.

        Dropout masks use `index`.
        """
        return self.index if self.restarted is None else self.restarted

    @property
    def whole(self) -> int | tuple[int, ...] | None:
        """Tokens of the whole text; None where a cache grows to nobody knows what."""
        if self.length is not None or self.cache is not None:
            return self.length
        return len(self.index)

    def unmasked(self) -> ForwardContext:
        """The same without a dense mask of its segments: what is made of it lives as long as it does."""
        return self if self.segments is None else replace(self, segments=self.segments.unmasked())
