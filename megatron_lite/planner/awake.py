"""Elements of gradients and weights that have memory while a micro batch runs, where replicas share them.

A bucket of gradients is open from the backward of the first layer that it has a parameter of until it is
packed for the owners of its rows; IN_FLIGHT packed ones, and the rows that come of them, are on their way at
once.  Weights of a layer are whole while it is used, and those of its next IN_FLIGHT uses on their way.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.blueprint.figure.parts import Figure, Matrix, Part, Parts, Table, Tensor
from megatron_lite.blueprint.recompute import RecomputePlan


@dataclass(frozen=True, slots=True)
class Awake:
    """Elements at the moments of a micro batch.

    arriving: while the head's weights come; forward: while it computes forward; head, blocks: at most
    while these compute backward, in its order; end: while the embedding does and the last buckets are packed.
    """

    arriving: float
    forward: float
    head: float
    blocks: tuple[float, ...]
    packing: tuple[float, ...]
    end: float


@dataclass(frozen=True, slots=True)
class Gathered:
    """Weights of a micro batch: when they are whole, and how many its forward and its backward gather.

    awaited: those of its forward that nothing before hides, in a step's first micro batch.  kept: those of
    its last layer, which the next micro batch begins with.  unknown: those gathered once more in the first
    micro batch of a run, which does not know the order of use.
    """

    awake: Awake
    forward: int
    backward: int
    awaited: int
    kept: int
    unknown: int


@lru_cache(maxsize=64)  # a search asks for few, thousands of times
def gradients_awake(
    figure: Figure, *, tp: int, bucket: int | None, ranks: int, again: bool
) -> Awake:
    """Of a backward through all layers of a model; bucket: elements that fill one, None: each layer has one.

    again: buckets of the micro batch before are still on their way when it begins.
    """
    units = [_parameters(figure.head, tp)]
    units += [_parameters(layer, tp) for layer in reversed(figure.layers)]
    units += [_parameters(figure.embedding, tp)]
    buckets, of_unit = _filled(units, bucket)
    if figure.tied and not figure.tokens.frozen:
        of_unit[0] = (
            of_unit[0] + of_unit[-1][-1:]
        )  # the head's product adds to the table's gradient
    missing = Counter(number for touched in of_unit for number in touched)
    packed = [size * (1 + 1 / ranks) for size in buckets]
    flying = deque(range(len(packed))[-IN_FLIGHT:] if again else ())
    before, opened, following = float(sum(packed[n] for n in flying)), set[int](), 0
    levels: list[float] = []
    packing: list[float] = []
    for touched in of_unit:
        opened.update(touched)
        level = most = sum(buckets[n] for n in opened) + sum(packed[n] for n in flying)
        levels.append(float(level))
        missing.subtract(touched)
        while following < len(buckets) and missing[following] == 0:
            while following in flying or len(flying) == IN_FLIGHT:
                level -= packed[flying.popleft()]
            flying.append(following)
            most = max(most, level + buckets[following])  # both, for a moment
            level += packed[following] - buckets[following]
            opened.discard(following)
            following += 1
        packing.append(float(most))
    return Awake(before, before, packing[0], tuple(levels[1:-1]), tuple(packing[1:-1]), packing[-1])


@lru_cache(maxsize=64)
def weights_awake(figure: Figure, *, tp: int, recompute: RecomputePlan) -> Gathered:
    """Of a micro batch through all layers of a model.  The backward of a table reads no weight."""
    size, uses = _uses(figure, tp, recompute)
    turn = len(figure.layers) + 2  # the first use by a backward
    whole, coming, gathered = set[object](), set[object](), [0, 0]
    arriving, computing = [], []
    for now, use in enumerate(uses):
        ahead = [(now + n, part) for n in range(IN_FLIGHT + 1) for part in _at(uses, now + n)]
        arrives = [part for part in use if part not in whole]
        at_once = whole | coming | set(use)
        arriving.append(sum(size[p] for p in at_once) + sum(size[p] for p in arrives))
        for part in {*use} - whole - coming:
            gathered[now >= turn] += size[part]
        whole |= set(use)
        coming -= whole
        for number, part in ahead:
            if part not in whole | coming and len(coming) < IN_FLIGHT:
                gathered[number >= turn] += size[part]
                coming.add(part)
        computing.append(sum(size[part] for part in whole | coming))
        whole &= {part for number, part in ahead if number > now}
    blocks: dict[object, float] = {}
    for number in range(turn + 1, len(uses)):
        (block,) = uses[number]
        most = max(arriving[number], computing[number])
        blocks[block] = float(max(blocks.get(block, 0), most))
    in_order = tuple(blocks[n] for n in reversed(range(len(figure.layers))))
    return Gathered(
        Awake(
            float(arriving[turn - 1]), float(computing[turn - 1]), float(computing[turn]),
            in_order, in_order, 0.0,
        ),
        forward=gathered[0],
        backward=gathered[1],
        awaited=sum(size[part] for part in {*uses[0], *uses[1]}),
        kept=sum(size[part] for part in uses[-1]) if len(uses) > turn + 1 else 0,
        unknown=sum(size[part] for use in uses for part in use) - sum(gathered),
    )  # fmt: skip


def _uses(
    figure: Figure, tp: int, recompute: RecomputePlan
) -> tuple[dict[object, int], list[tuple[object, ...]]]:
    """Shared elements of each part of the model, and the parts that each forward or backward reads."""
    size: dict[object, int] = {n: _shared(layer.parts, tp) for n, layer in enumerate(figure.layers)}
    size["table"] = _shared([figure.tokens], tp)
    size["positions"] = _shared((p for p in figure.embedding.parts if p != figure.tokens), tp)
    size["head"] = _shared(figure.head.parts, tp)
    last: tuple[object, ...] = ("head", "table") if figure.tied else ("head",)
    layers = range(len(figure.layers))
    uses: list[tuple[object, ...]] = [
        ("table", "positions"), *((n,) for n in layers), last, last
    ]  # fmt: skip
    for group, again in reversed(recompute.groups(len(layers))):
        uses += [(n,) for n in group] if again else []
        uses += [(n,) for n in reversed(group)]
    return size, uses


def _at(uses: list[tuple[object, ...]], number: int) -> tuple[object, ...]:
    return uses[number] if number < len(uses) else ()


def _shared(parts: Iterable[Part], tp: int) -> int:
    """Elements of what is gathered: adapters stay whole, and what is packed is no parameter."""
    found = 0
    for part in parts:
        adapter = part.adapter if isinstance(part, Matrix | Table) else None
        own = set() if adapter is None else {tensor.name for tensor in adapter.tensors()}
        found += sum(
            math.prod(tensor.local(tp))
            for tensor in part.tensors()
            if tensor.storage != "nf4" and tensor.name not in own
        )
    return found


def has_adapters(figure: Figure) -> bool:
    """Whether adapters alone are trained."""
    layers = (figure.embedding, *figure.kinds(range(len(figure.layers))), figure.head)
    return any(_adapted(part) for parts in layers for part in parts.parts)


def _adapted(part: Part) -> bool:
    return isinstance(part, Matrix | Table) and part.adapter is not None


def _filled(units: list[list[int]], bucket: int | None) -> tuple[list[int], list[list[int]]]:
    """Sizes of all buckets, and for each unit the bucket of each parameter, in order of backward."""
    buckets: list[int] = []
    of_unit: list[list[int]] = []
    for position, sizes in enumerate(units):
        numbers: list[int] = []
        ends = position in (0, len(units) - 1)  # of whose parts some are read by another layer, too
        for size in sizes:
            begins = ends or not numbers if bucket is None else buckets and buckets[-1] >= bucket
            if begins or not buckets:
                buckets.append(0)
            buckets[-1] += size
            numbers.append(len(buckets) - 1)
        of_unit.append(numbers)
    return buckets, of_unit


def _parameters(parts: Parts, tp: int) -> list[int]:
    """Elements of each parameter that has a gradient, in order of backward; fused ones are one."""
    sizes: list[int] = []
    for part in parts.parts:
        found = [tensor for tensor in part.tensors() if not tensor.frozen]
        if isinstance(part, Matrix) and part.adapter is None:
            for kind in ("weight", "bias"):
                sizes += _together([tensor for tensor in found if tensor.kind == kind], tp)
        else:
            sizes += (math.prod(tensor.local(tp)) for tensor in found)
    return sizes[::-1]


def _together(tensors: list[Tensor], tp: int) -> list[int]:
    return [sum(math.prod(tensor.local(tp)) for tensor in tensors)] if tensors else []
