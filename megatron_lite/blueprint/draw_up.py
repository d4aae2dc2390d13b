"""Config -> Blueprint: the only place that derives values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from megatron_lite.blueprint.batches import BatchSchedule, batch_schedule, padded_vocab_size
from megatron_lite.blueprint.figure.adapters import with_adapters
from megatron_lite.blueprint.figure.parts import Figure, Tensor
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.flops import flops_per_token
from megatron_lite.blueprint.grid import RankGrid
from megatron_lite.blueprint.holdings import (
    Holding,
    Updates,
    check_updates,
    curvature_every,
    holdings,
)
from megatron_lite.blueprint.length import Length, run_length
from megatron_lite.blueprint.optimizers import State, Treatment, treatment
from megatron_lite.blueprint.parameters import ParamSpec, table_of, total_size
from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Lowered, Schedule
from megatron_lite.blueprint.schedules.check import check_schedule
from megatron_lite.blueprint.schedules.forward_only import forward_only_schedule
from megatron_lite.blueprint.schedules.lower import lower
from megatron_lite.blueprint.stages import Placement, StageLayers, cut_stages
from megatron_lite.blueprint.turns import BlockDraw
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.pipeline import pipeline
from megatron_lite.config.rules.table import check_sizes
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.optim import OptimConfig
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.config.sections.train import TrainConfig

GPT2_VOCABULARY = 50257


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Everything that follows from a RunConfig and a world size, the same on every rank.

    placement[stage] is the pp rank of a stage.  flops_per_token_*: forward and backward in the two
    conventions of flops.py, without recompute.  length is None where it was not given.
    notes: assumptions the reader of a plan should know.
    """

    model: ModelConfig
    grid: RankGrid
    schedule: str
    stages: tuple[StageLayers, ...]
    placement: Placement
    vocab_size: int
    padded_vocab_size: int
    figure: Figure
    batch_schedule: BatchSchedule
    length: Length | None
    parameters: tuple[ParamSpec, ...]
    optim: OptimConfig
    draw: BlockDraw | None
    flops_per_token_full: int
    flops_per_token_causal: int
    notes: tuple[str, ...] = ()

    @property
    def train_iters(self) -> int | None:
        """Steps of the whole run; None where it was not given."""
        return None if self.length is None else self.length.iterations

    @property
    def train_samples(self) -> int | None:
        """Samples of these steps."""
        return None if self.length is None else self.length.samples

    @property
    def dp(self) -> int:
        """Data-parallel size: ranks with other samples."""
        return self.grid.dp

    @property
    def replicas(self) -> int:
        """Ranks with the same weights: they sum gradients and may share the optimizer's state."""
        return self.grid.dp * self.grid.cp

    def microbatches(self, samples: int | None = None) -> int:
        """Micro batches per dp rank of a step of so many samples; of one at full size by default."""
        batches = self.batch_schedule
        return batches.microbatches(batches.final_batch_size if samples is None else samples)

    def stages_of(self, pp_rank: int) -> tuple[StageLayers, ...]:
        """The stages a pp rank holds, in order of layers."""
        return tuple(s for s in self.stages if self.placement[s.index] == pp_rank)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, padding included, tied ones once."""
        return total_size(self.parameters)

    @property
    def num_trained(self) -> int:
        """Those of them that are not frozen."""
        return total_size(
            spec for spec in self.parameters if not self.treatment(spec.tensor).frozen
        )

    def held(self, pp_rank: int) -> Holding:
        """What one rank (any tp and dp) of a pp rank holds."""
        return self._holdings[pp_rank]

    @cached_property
    def _holdings(self) -> tuple[Holding, ...]:
        return holdings(
            self.figure,
            self.stages,
            self.placement,
            self.grid.tp,
            Updates.of(self.optim),
            self.draw,
        )

    def treatment(self, tensor: Tensor) -> Treatment:
        """How a canonical tensor is updated."""
        return treatment(self.optim, tensor, self.draw)

    def states(self, tensor: Tensor, updates: int) -> tuple[State, ...]:
        """What the optimizer keeps of a canonical tensor after so many updates, its fp32 master apart."""
        how = self.treatment(tensor)
        return () if how.turns.begun(updates) is None else how.states

    @cached_property
    def curvature_interval(self) -> int:
        """Every how many iterations a pass of its own observes curvature; 0: none does."""
        return curvature_every(self.figure, self.stages, Updates.of(self.optim))

    def curvature_microbatches(self, num_microbatches: int) -> int:
        """How many of a step's micro batches such a pass reads: whole rounds of the schedule."""
        at_once = self.grid.pp if self.schedule == "interleaved" else 1
        # the smallest surplus is the product's rounding
        share = num_microbatches * self.optim.sophia_hessian_fraction / at_once
        return min(num_microbatches, math.ceil(share - 1e-9) * at_once)

    def compute(self, num_microbatches: int) -> Schedule:
        """The training schedule before lowering, to simulate or draw."""
        return SCHEDULES[self.schedule].generate(self.placement, num_microbatches)

    def actions(self, num_microbatches: int) -> Lowered:
        """Per pp rank, the checked groups of a training step."""
        return _training(self.schedule, self.placement, num_microbatches)

    def forward_actions(self, num_microbatches: int) -> Lowered:
        """Per pp rank, the checked groups of an evaluation step."""
        return forwards(self.placement, num_microbatches)


@lru_cache(maxsize=2)  # a ramp passes each number once; neighbours never alternate
def _training(name: str, placement: Placement, num_microbatches: int) -> Lowered:
    return _checked(SCHEDULES[name].generate(placement, num_microbatches), num_microbatches)


@lru_cache(maxsize=2)
def forwards(placement: Placement, num_microbatches: int) -> Lowered:
    """Per pp rank, the checked groups of forwards alone."""
    return _checked(forward_only_schedule(placement, num_microbatches), num_microbatches)


def _checked(schedule: Schedule, num_microbatches: int) -> Lowered:
    lowered = lower(schedule)
    check_schedule(lowered, schedule.placement, num_microbatches)
    return lowered


def draw_up(config: RunConfig, world_size: int) -> Blueprint:
    """All consequences of a config for this many ranks.

    Raises ConfigError with every rule of config/ about sizes that is broken.
    """
    model, parallel, train = config.model, config.parallel, config.train
    check_sizes(config, world_size)
    asked = pipeline(model.num_layers, parallel)
    placement = SCHEDULES[asked.schedule].place(parallel.pp, asked.chunks)
    grid = draw_grid(parallel, world_size, folded=parallel.pp > 1 and placement[0] == placement[-1])
    notes = []
    vocab_size = model.vocab_size
    if vocab_size is None:
        vocab_size = GPT2_VOCABULARY
        notes.append(f"vocabulary size not known: GPT-2's {GPT2_VOCABULARY:,} is assumed")
    padded = padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, grid.tp)
    stages = cut_stages(asked.layers)
    batches = batch_schedule(train, seq_length=model.seq_length, dp=grid.dp)
    length = run_length(train, batches)
    head = OBJECTIVES[train.objective].head
    figure = with_adapters(figure_of(model, padded, head), config.lora, model)
    parameters = table_of(figure, stages)
    check_updates(figure, stages, grid.tp, Updates.of(config.optim))
    draw = block_draw(config)
    trained = 1.0 if draw is None else draw.share
    return Blueprint(
        model=model,
        grid=grid,
        schedule=asked.schedule,
        stages=stages,
        placement=placement,
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        figure=figure,
        batch_schedule=batches,
        length=length,
        parameters=parameters,
        optim=config.optim,
        draw=draw,
        flops_per_token_full=flops_per_token(
            model, padded, attention="full", figure=figure, trained=trained
        ),
        flops_per_token_causal=flops_per_token(
            model, padded, attention="causal", figure=figure, trained=trained
        ),
        notes=tuple(notes),
    )


def block_draw(config: RunConfig) -> BlockDraw | None:
    """What --lisa-layers asks for."""
    number, layers = config.optim.lisa_layers, config.model.num_layers
    if number is None:
        return None
    return BlockDraw(layers, number, config.optim.lisa_interval, config.train.seed)


def taken_up(blueprint: Blueprint, train: TrainConfig, batches: BatchSchedule) -> Blueprint:
    """The blueprint of a run that resumes from a checkpoint; batches: see Progress.goes_on."""
    return replace(blueprint, batch_schedule=batches, length=run_length(train, batches))


def draw_grid(parallel: ParallelConfig, world_size: int, *, folded: bool = False) -> RankGrid:
    """The grid of this many ranks; what tp, cp and pp leave over is dp.

    folded: the last stage sits on the first pp rank.
    """
    return RankGrid(
        tp=parallel.tp,
        cp=parallel.cp,
        dp=world_size // parallel.ranks_per_sample,
        pp=parallel.pp,
        order="tp-cp-pp-dp" if parallel.use_tp_pp_dp_mapping else "tp-cp-dp-pp",
        folded=folded,
    )
