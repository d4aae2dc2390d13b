"""Rules about sizes: whether model and batch divide over the ranks.

Each function yields the problems of one rule; table.py lists them and runs them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_lite.config.batch_schedule import parse_schedule
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.pipeline import SPLIT_BACKWARD, pipeline
from megatron_lite.config.sections.model import WINDOW
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.config.sections.train import TrainConfig


def divisors(number: int, *, at_most: int | None = None) -> list[int]:
    """The divisors of a positive number in order, up to a limit."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    found = sorted({*low, *(number // d for d in low)})
    return [d for d in found if at_most is None or d <= at_most]


def one_of(values: list[int]) -> str:
    """Values as a message lists them, the middle left out where there are many."""
    if len(values) > 12:
        return f"{', '.join(map(str, values[:9]))}, ..., {values[-1]}"
    return ", ".join(map(str, values))


def nearest(number: int, unit: int) -> str:
    """The multiples of unit next to number: `96 or 104`."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def data_parallel_size(config: RunConfig, world_size: int) -> int | None:
    """dp, or None where tp * pp * cp does not divide the ranks (another rule says so)."""
    dp, rest = divmod(world_size, config.parallel.ranks_per_sample)
    return dp if rest == 0 and dp else None


def world(config: RunConfig, world_size: int) -> Iterator[str]:
    """tp * pp * cp divides the ranks."""
    p = config.parallel
    product = p.ranks_per_sample
    if data_parallel_size(config, world_size):
        return
    what = (
        f"--tensor-model-parallel-size {p.tp} x --pipeline-model-parallel-size {p.pp} x "
        f"--context-parallel-size {p.cp} = {product} does not divide {world_size} ranks"
    )
    yield f"{what}; start {nearest(world_size, product)} ranks{_layouts(config, world_size)}"


def _layouts(config: RunConfig, world_size: int) -> str:
    """Layouts of this model that fill the ranks, largest tp * pp first."""
    m = config.model
    if m.num_layers < 1 or m.num_attention_heads < 1:
        return ""
    found = [
        (tp, pp)
        for tp in divisors(world_size, at_most=m.num_attention_heads)
        for pp in divisors(world_size // tp, at_most=m.num_layers)
        if m.num_attention_heads % tp == 0 and m.num_layers % pp == 0
    ]
    found.sort(key=lambda layout: (-layout[0] * layout[1], -layout[0]))
    return f", or use tp x pp {', '.join(f'{tp}x{pp}' for tp, pp in found[:6])}"


def heads_divide_hidden(config: RunConfig, world_size: int) -> Iterator[str]:
    """The width splits into heads, unless --kv-channels says how wide one is."""
    m = config.model
    if m.kv_channels is None and m.hidden_size % m.num_attention_heads:
        yield (
            f"--hidden-size {m.hidden_size} does not divide into --num-attention-heads "
            f"{m.num_attention_heads}; choose heads from {one_of(divisors(m.hidden_size))}, a "
            f"hidden size of {nearest(m.hidden_size, m.num_attention_heads)}, or --kv-channels"
        )


def tensor_parallel_heads(config: RunConfig, world_size: int) -> Iterator[str]:
    """tp divides heads, key/value heads and feed-forward width."""
    m, tp = config.model, config.parallel.tp
    named = {"--num-attention-heads": m.num_attention_heads, "--ffn-hidden-size": m.ffn_size}
    if m.group_query_attention and m.num_query_groups is not None:
        named["--num-query-groups"] = m.num_query_groups
    for flag, size in named.items():
        if size < 1:
            yield f"{flag} comes out as {size}; give {flag} or a larger --hidden-size"
        elif size % tp:
            yield (
                f"{flag} {size} cannot be split over --tensor-model-parallel-size {tp}; "
                f"choose tp from {one_of(divisors(size))}"
            )


def query_groups(config: RunConfig, world_size: int) -> Iterator[str]:
    """Grouped attention names a number of groups that divides the heads."""
    m = config.model
    groups, heads = m.num_query_groups, m.num_attention_heads
    if m.group_query_attention and groups is None:
        yield (
            "--group-query-attention needs --num-query-groups; "
            f"choose from {one_of(divisors(heads))}"
        )
    elif groups is not None and heads % groups:
        yield (
            f"--num-attention-heads {heads} do not divide into --num-query-groups {groups}; "
            f"choose from {one_of(divisors(heads))}"
        )
    elif groups is not None and groups != heads and not m.group_query_attention:
        yield f"--num-query-groups {groups} has no effect without --group-query-attention; add it"


def positions(config: RunConfig, world_size: int) -> Iterator[str]:
    """The position table covers a sample."""
    m = config.model
    if m.max_position_embeddings is not None and m.max_position_embeddings < m.seq_length:
        yield (
            f"--max-position-embeddings {m.max_position_embeddings} is below --seq-length "
            f"{m.seq_length}; give at least {m.seq_length}, or leave it out"
        )


def attention_window(config: RunConfig, world_size: int) -> Iterator[str]:
    """A window is two numbers, and ends with the token itself."""
    asked = config.model.window_size
    if asked is not None and WINDOW.fullmatch(asked) is None:
        yield (
            f"--window-size {asked} is not LEFT,RIGHT with RIGHT 0: how many tokens before its own one "
            "sees, or -1 for all, and none after it, since attention is causal; write 4095,0"
        )


def shifted_groups(config: RunConfig, world_size: int) -> Iterator[str]:
    """S2-attention's groups have halves and fill a sample, and nothing else decides what a token sees."""
    m = config.model
    if m.group_size is None:
        if m.s2_group_size is not None:
            yield f"--s2-group-size {m.s2_group_size} has no effect without --s2-attention; add it"
        return
    if m.group_size % 2 or m.seq_length % max(m.group_size, 1) or not m.group_size:
        even = [size for size in divisors(m.seq_length) if size % 2 == 0]
        way = f"choose from {one_of(even)}" if even else "take an even --seq-length"
        how = "" if m.s2_group_size else f", a quarter of --seq-length {m.seq_length},"
        yield (
            f"--s2-group-size {m.group_size}{how} must be even and divide --seq-length {m.seq_length}, since "
            f"groups are moved by half of one; {way}"
        )
    if m.num_attention_heads < 2:
        yield (
            f"--s2-attention moves the groups of half of the heads, and --num-attention-heads is "
            f"{m.num_attention_heads}; take 2 or more, or drop it"
        )
    if m.window is not None:
        yield (
            f"--s2-attention and --window-size {m.window_size} both say what a token sees; drop one"
        )
    if m.attention_dropout > 0.0:
        yield (
            f"--s2-attention has no attention dropout, and --attention-dropout is "
            f"{m.attention_dropout:g}; give --attention-dropout 0"
        )


def pipeline_stages(config: RunConfig, world_size: int) -> Iterator[str]:
    """The schedule has as many stages per rank as it needs, and the layers come out."""
    try:
        pipeline(config.model.num_layers, config.parallel)
    except ConfigError as error:
        yield str(error)


def whole_groups(config: RunConfig, world_size: int) -> Iterator[str]:
    """Interleaved micro batches walk through the chunks in groups of pp."""
    t, p, dp = config.train, config.parallel, data_parallel_size(config, world_size)
    try:
        name = pipeline(config.model.num_layers, p).schedule
    except ConfigError:
        return
    if name != "interleaved" or dp is None:
        return
    unit = t.samples_at_once(dp) * p.pp
    for flag, size in _batch_sizes(config, dp):
        if size % unit:
            yield (
                f"{flag} {size} is {size / t.samples_at_once(dp):g} micro batches per "
                "data-parallel rank; the interleaved schedule takes multiples of "
                f"--pipeline-model-parallel-size {p.pp}: use {nearest(size, unit)}, or 1f1b or zb-v"
            )


def _batch_sizes(config: RunConfig, dp: int) -> Iterator[tuple[str, int]]:
    """What the batch size is made of, with the flag that says so."""
    t = config.train
    if t.step_batch_size_schedule is not None:
        try:
            steps = parse_schedule(t.step_batch_size_schedule)
        except ConfigError:  # another rule says so
            return
        for size in dict.fromkeys(step.size for step in steps):
            yield "--step-batch-size-schedule:", size
        return
    if t.rampup_batch_size and len(t.rampup_batch_size) == 3:
        yield "--rampup-batch-size: start", t.rampup_batch_size[0]
        yield "--rampup-batch-size: increment", t.rampup_batch_size[1]
    yield "--global-batch-size", t.global_batch_size or t.samples_at_once(dp)


def split_backward(config: RunConfig, world_size: int) -> Iterator[str]:
    """Only wgrads that layers add to the accumulators themselves can be deferred."""
    name = config.parallel.pipeline_schedule
    if name in SPLIT_BACKWARD and not config.precision.gradient_accumulation_fusion:
        yield (
            f"--pipeline-schedule {name} defers weight gradients, which "
            "--no-gradient-accumulation-fusion leaves to autograd; drop one of them"
        )


def sequence_parallel(config: RunConfig, world_size: int) -> Iterator[str]:
    """The sequence splits over tp (sequence parallel) and in halves over cp."""
    m, p = config.model, config.parallel
    if p.sequence_parallel and m.seq_length % p.tp:
        yield (
            f"--sequence-parallel cannot split --seq-length {m.seq_length} over "
            f"--tensor-model-parallel-size {p.tp}; use a length of {nearest(m.seq_length, p.tp)}"
        )
    if p.cp > 1 and m.seq_length % (2 * p.cp):
        yield (
            f"--seq-length {m.seq_length} cannot be cut in 2 x --context-parallel-size {p.cp}; "
            f"use a length of {nearest(m.seq_length, 2 * p.cp)}"
        )


def global_batch(config: RunConfig, world_size: int) -> Iterator[str]:
    """micro batch * dp divides the global batch."""
    t, dp = config.train, data_parallel_size(config, world_size)
    if t.global_batch_size is None or dp is None:
        return
    what = f"--global-batch-size {t.global_batch_size}"
    yield from _whole_microbatches(what, t.global_batch_size, t, dp)


def _whole_microbatches(what: str, size: int, train: TrainConfig, dp: int) -> Iterator[str]:
    unit = train.samples_at_once(dp)
    if size % unit:
        yield (
            f"{what} is not divisible by --micro-batch-size {train.micro_batch_size} x "
            f"data-parallel size {dp} = {unit}; the nearest that are: {nearest(size, unit)}"
        )


def ramp_up(config: RunConfig, world_size: int) -> Iterator[str]:
    """--rampup-batch-size START INCREMENT SAMPLES climbs to the global batch in whole steps."""
    t = config.train
    if not t.rampup_batch_size:
        return
    flag = f"--rampup-batch-size {' '.join(map(str, t.rampup_batch_size))}"
    if t.step_batch_size_schedule is not None:
        yield f"{flag} and --step-batch-size-schedule exclude each other; give one"
    if len(t.rampup_batch_size) != 3:
        yield f"{flag} takes three numbers, START INCREMENT SAMPLES; got {len(t.rampup_batch_size)}"
        return
    start, increment, _ = t.rampup_batch_size
    if t.global_batch_size is None:
        yield f"{flag} needs --global-batch-size, the size it climbs to"
        return
    if start < 1 or increment < 1:
        yield f"{flag}: start {start} and increment {increment} must be at least 1"
        return
    climb = t.global_batch_size - start
    if climb < 0:
        yield f"{flag} starts above --global-batch-size {t.global_batch_size}"
    elif climb % increment:
        yield (
            f"{flag}: from {start} in steps of {increment} never meets --global-batch-size "
            f"{t.global_batch_size}; choose {start + climb // increment * increment} or "
            f"{start + (climb // increment + 1) * increment}, or an increment from "
            f"{one_of(divisors(climb))}"
        )
    dp = data_parallel_size(config, world_size)
    if dp is not None:
        for name, size in (("start", start), ("increment", increment)):
            yield from _whole_microbatches(f"{flag}: {name} {size}", size, t, dp)


def one_batch(config: RunConfig, world_size: int) -> Iterator[str]:
    """A run in samples has one step at least; a schedule in tokens takes the step they end in."""
    t, dp = config.train, data_parallel_size(config, world_size)
    if t.train_samples is None or dp is None or t.step_batch_size_schedule is not None:
        return
    ramp = t.rampup_batch_size
    grows = len(ramp) == 3 and ramp[2] > 0
    first = ramp[0] if grows else t.global_batch_size or t.samples_at_once(dp)
    if t.train_samples < first:
        yield (
            f"--train-samples {t.train_samples} is less than one batch of {first} samples; "
            f"give at least {first}"
        )


def step_schedule(config: RunConfig, world_size: int) -> Iterator[str]:
    """Every entry of the schedule is whole micro batches, and the last is the global batch."""
    t = config.train
    if t.step_batch_size_schedule is None:
        return
    try:
        steps = parse_schedule(t.step_batch_size_schedule)
    except ConfigError as error:
        yield str(error)
        return
    flag, seq = "--step-batch-size-schedule", config.model.seq_length
    for before, after in zip(steps, steps[1:], strict=False):
        sample = after.tokens // seq
        if before.tokens // seq == sample:
            yield (
                f"{flag}: {before.tokens} and {after.tokens} tokens are the same sample {sample} of "
                f"--seq-length {seq}, so that no step would take {before.size}; give at least "
                f"{(sample + 1) * seq} in place of {after.tokens}, or leave one out"
            )
    if t.global_batch_size is not None and steps[-1].size != t.global_batch_size:
        yield (
            f"{flag} ends at {steps[-1].size}, but --global-batch-size is {t.global_batch_size}; "
            "make them equal, or leave --global-batch-size out"
        )
    dp = data_parallel_size(config, world_size)
    if dp is not None:
        for size in dict.fromkeys(step.size for step in steps):
            yield from _whole_microbatches(f"{flag}: {size}", size, t, dp)
