"""Blueprint + Cluster -> Forecast: memory, seconds per step by kind, and the rates that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.blueprint.flops import cores_forward, layer_forward
from megatron_lite.blueprint.holdings import Holding
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.blueprint.schedules import SCHEDULES
from megatron_lite.blueprint.schedules.actions import Op
from megatron_lite.blueprint.schedules.simulate import Simulation, simulate
from megatron_lite.config.sections.parallel import ParallelConfig
from megatron_lite.planner.activations import element_bytes
from megatron_lite.planner.bubble import least_span, rough_span
from megatron_lite.planner.cost import Costs
from megatron_lite.planner.exchange import data_parallel_seconds
from megatron_lite.planner.hardware import Cluster
from megatron_lite.planner.memory import PlanInputs, RankMemory, memory
from megatron_lite.planner.offload import on_host
from megatron_lite.planner.sharing import shared_by
from megatron_lite.planner.work import StageTimes, Work

DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a step time means: per device, FLOPs in 1e12 per second, shares of the dense peak.

    mfu counts attention's full square and no recomputation (SC21, PaLM); mfu_causal its causal half
    (Megatron-LM since 2025).  hfu adds what is recomputed; hfu_published counts selective
    recomputation as arXiv:2205.05198 does, attention's core three times more.
    """

    step_seconds: float
    tgs: float
    tflops: float
    tflops_causal: float
    tflops_hardware: float
    mfu: float
    mfu_causal: float
    hfu: float
    hfu_published: float

    def seconds_for(self, tokens: float, world_size: int) -> float:
        """Wall time of so many tokens."""
        return tokens / (self.tgs * world_size)


def hardware_flops_per_token(blueprint: Blueprint, parallel: ParallelConfig) -> int:
    """FLOPs of forward, backward and recomputation, attention as a full square."""
    figure, s = blueprint.figure, blueprint.model.seq_length
    full, plan = blueprint.flops_per_token_full, RecomputePlan.from_config(parallel)
    if plan.modules:
        return full + int(cores_forward(figure, s))
    again = (
        stage.layers[position]
        for stage in blueprint.stages
        for position in plan.recomputed(len(stage.layers))
    )
    return full + int(figure.total(lambda layer: layer_forward(layer, s), again))


def rates(
    blueprint: Blueprint, asked: PlanInputs, step_seconds: float, peak_tflops: float
) -> Throughput:
    """The rates of a step of the full global batch that takes so long."""
    model, world = blueprint.model, blueprint.grid.world_size
    tokens = blueprint.batch_schedule.final_batch_size * model.seq_length
    tgs = tokens / (step_seconds * world)
    full, causal = blueprint.flops_per_token_full, blueprint.flops_per_token_causal
    parallel = asked.parallel
    hardware = hardware_flops_per_token(blueprint, parallel)
    published = hardware
    if parallel.recompute_granularity == "selective":
        published = full + 3 * cores_forward(blueprint.figure, model.seq_length)
    per_peak = tgs / (peak_tflops * 1e12)
    return Throughput(
        step_seconds=step_seconds,
        tgs=tgs,
        tflops=tgs * full / 1e12,
        tflops_causal=tgs * causal / 1e12,
        tflops_hardware=tgs * hardware / 1e12,
        mfu=full * per_peak,
        mfu_causal=causal * per_peak,
        hfu=hardware * per_peak,
        hfu_published=published * per_peak,
    )


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run of this Blueprint on this Cluster needs and reaches."""

    blueprint: Blueprint
    asked: PlanInputs
    cluster: Cluster
    memory: tuple[RankMemory, ...]
    seconds: Mapping[str, float]
    """Kind -> seconds of a step of the pipeline rank that computes longest; they add up to it."""
    hidden_seconds: Mapping[str, float]
    """Kind -> seconds of communication that run under computation."""
    bubble: float
    """Share of the pipeline's time that the rank with the most work idles: (span - work) / span."""
    span_seconds: float
    """From the first forward to the last backward."""
    costs: Costs
    rates: Throughput

    @property
    def fits(self) -> bool:
        """Whether every rank's memory is below the device's, and what its host must hold below the host's."""
        return self.worst.total <= self.cluster.device.memory_bytes and not self.lacks_on_host

    @property
    def host_bytes(self) -> float:
        """Of a node whose ranks keep most in host memory."""
        return max(rank.host for rank in self.memory) * self.cluster.ranks_of_node

    @property
    def lacks_on_host(self) -> float:
        """Bytes that a node has too few for what is kept there; 0 where its memory is not known."""
        room = self.cluster.device.host_memory_gb * 1e9
        return max(self.host_bytes - room, 0.0) if room else 0.0

    @property
    def worst(self) -> RankMemory:
        """The pipeline rank that needs most."""
        return max(self.memory, key=lambda rank: rank.total)


def forecast(
    blueprint: Blueprint,
    asked: PlanInputs,
    cluster: Cluster,
    *,
    simulated: bool = True,
    given: StageTimes | None = None,
) -> Forecast:
    """Predict; `simulated=False` takes a lower bound of the pipeline's time, which is near it.

    given: measured times of a pipeline rank instead of predicted ones.
    """
    costs = Costs(blueprint, asked, cluster, given)
    step = step_time(costs, simulated=simulated)
    return Forecast(
        blueprint=blueprint,
        asked=asked,
        cluster=cluster,
        memory=memory(blueprint, asked),
        seconds=step.seconds,
        hidden_seconds=step.hidden,
        bubble=step.bubble,
        span_seconds=step.span,
        costs=costs,
        rates=rates(blueprint, asked, step.total, cluster.device.peak_tflops),
    )


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by kind, as a Forecast has them."""

    seconds: Mapping[str, float]
    hidden: Mapping[str, float]
    span: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self.seconds.values())

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time that the rank with the most work idles."""
        return self.seconds["pipeline bubble"] / self.span


def step_time(costs: Costs, *, simulated: bool = True) -> StepTime:
    """The time alone; not simulated it is a lower bound."""
    blueprint, num = costs.blueprint, costs.blueprint.microbatches()
    totals = [_total(costs, blueprint, pp_rank) * num for pp_rank in range(blueprint.grid.pp)]
    busiest = max(range(len(totals)), key=lambda rank: totals[rank].seconds)
    work = totals[busiest]
    span = pipeline_seconds(costs, num) if simulated else least_seconds(costs, num)
    dp = data_parallel_seconds(costs, busiest)
    seconds = {
        "products": work.products,
        "attention": work.attention,
        "elementwise": work.elementwise,
        "tp communication": work.tp,
        "host": work.host,
        "pipeline bubble": max(span - work.seconds, 0.0),
        "dp communication": dp.exposed,
        "optimizer": _optimizer_seconds(blueprint, costs.asked, costs.cluster, busiest),
    }
    slower = costs.cluster.slowest - 1.0
    seconds["slowest node"] = (span + seconds["optimizer"]) * slower
    every = blueprint.curvature_interval
    if every:
        fraction = blueprint.optim.sophia_hessian_fraction
        seconds["curvature"] = (span * fraction + dp.exposed) / every
    hidden = {
        "tp communication": work.tp_hidden,
        "pp communication": _messages_hidden(costs, num),
        "dp gradients": dp.gradients_hidden,
        "dp parameters": dp.parameters_hidden,
    }
    return StepTime(seconds, hidden, span)


def _total(costs: Costs, blueprint: Blueprint, pp_rank: int) -> Work:
    """One micro batch through all stages of a rank."""
    done = Work()
    for stage in blueprint.stages_of(pp_rank):
        done = done + costs.work(Op.F, stage) + costs.backward(stage)
    return done


def simulate_step(costs: Costs, num: int) -> Simulation:
    """The schedule of so many micro batches in seconds."""
    blueprint = costs.blueprint
    schedule = SCHEDULES[blueprint.schedule].generate(blueprint.placement, num)
    return simulate(schedule, costs.cost(), latency=costs.message_seconds())


def pipeline_seconds(costs: Costs, num: int) -> float:
    """Time from the first forward to the last backward.

    A long schedule repeats itself, so past its steady state it grows by the same time per group of
    micro batches: two short simulations give the line that a long one follows.
    """
    pp = costs.blueprint.grid.pp
    if pp == 1:
        stage = costs.blueprint.stages[0]
        return num * (costs.work(Op.F, stage).seconds + costs.backward(stage).seconds)
    first = 6 * pp
    if num <= 8 * pp or costs.blueprint.schedule == "gpipe":
        return simulate_step(costs, num).makespan
    first += num % pp
    near, far = (simulate_step(costs, n).makespan for n in (first, first + pp))
    return near + (num - first) / pp * (far - near)


def least_seconds(costs: Costs, num: int, *, rough: bool = False) -> float:
    """A lower bound of pipeline_seconds, and near it, without a simulation; rough: at once, and less near."""
    blueprint = costs.blueprint

    def seconds(op: Op, stage: int) -> float:
        return costs.work(op, blueprint.stages[stage]).seconds

    bound = rough_span if rough else least_span
    return bound(blueprint.schedule, blueprint.placement, num, seconds, costs.message_seconds())


def _messages_hidden(costs: Costs, num: int) -> float:
    blueprint = costs.blueprint
    if blueprint.grid.pp == 1:
        return 0.0
    chunks = len(blueprint.placement) // blueprint.grid.pp
    return 2 * num * chunks * costs.message_seconds()


def _optimizer_seconds(
    blueprint: Blueprint, asked: PlanInputs, cluster: Cluster, pp_rank: int
) -> float:
    """Norm, clipping, update and clearing: bound by memory, but for products of whole matrices.

    Per element: gradients read twice, written, cleared; of the owned share master and states read
    and written, gradient read, weight written.  The host updates its part at the same time.
    """
    held = blueprint.held(pp_rank)
    there = on_host(blueprint, asked.parallel, asked.precision, pp_rank)
    shared = shared_by(asked.parallel, blueprint.replicas).state
    every, owned = 4.0 * 2, 4.0 * 2 + 4.0 * 3 + 2.0
    device = cluster.device
    rate = device.bandwidth_gb_s * 1e9 * device.optimizer_efficiency
    moved = held.accumulated * owned / shared + held.state_bytes * 2.0 / shared
    here = moved / rate + _matrices_seconds(blueprint, asked, cluster, held, shared)
    here *= 1.0 - there.share
    if there.share:
        here = max(here, there.seconds(device, cluster.ranks_of_node))
    return held.accumulated * every / rate + here


def _matrices_seconds(
    blueprint: Blueprint, asked: PlanInputs, cluster: Cluster, held: Holding, shared: int
) -> float:
    """Products of updates of whole matrices, shared out, and what tp ranks send for them.

    A singular value decomposition is taken for a product in fp32, which flatters it.
    """
    device, optim = cluster.device, blueprint.optim
    rate = {"medium": 1.0, "high": device.tf32_rate}.get(
        optim.muon_fp32_matmul_prec if optim.optimizer == "muon" else "", device.fp32_rate
    )
    # no rank has less than a matrix
    flops = max(held.update_flops / shared, held.largest_flops)
    wide = (
        4 if asked.parallel.accumulate_allreduce_grads_in_fp32 else element_bytes(asked.precision)
    )
    sent = held.gathered / shared * (wide + element_bytes(asked.precision))
    gathering = cluster.ring_seconds(sent, blueprint.grid.tp, stride=1, passes=1) if sent else 0.0
    return flops / (device.matmul_tflops * 1e12 * device.sustained * rate) + gathering


def measured(plan: Forecast, step_seconds: float) -> Forecast:
    """The same run with the rates of a step that was measured, to compare with the prediction."""
    peak = plan.cluster.device.peak_tflops
    return replace(plan, rates=rates(plan.blueprint, plan.asked, step_seconds, peak))
