"""Elements of gradients that have memory while a backward runs, where data-parallel ranks share them.

A bucket is open from the backward of the first layer that it has a parameter of until it is packed for the
owners of its rows; IN_FLIGHT packed ones, and the rows that come of them, are on their way at once.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from functools import lru_cache

from megatron_lite.blueprint.buckets import IN_FLIGHT
from megatron_lite.blueprint.figure.parts import Figure, Matrix, Parts, Tensor


@dataclass(frozen=True, slots=True)
class Awake:
    """forward: of the micro batch before; head, blocks: at most while these compute backward, in its order.

    end: at most while the embedding does and the last buckets are packed.
    """

    forward: float
    head: float
    blocks: tuple[float, ...]
    end: float


@lru_cache(maxsize=64)  # a search asks for few, thousands of times
def awake(figure: Figure, *, tp: int, bucket: int, ranks: int, again: bool) -> Awake:
    """Of a micro batch's backward through all layers of a model; bucket: elements that fill one.

    again: buckets of the micro batch before are still on their way when it begins.
    """
    units = [_parameters(figure.head, tp)]
    units += [_parameters(layer, tp) for layer in reversed(figure.layers)]
    units += [_parameters(figure.embedding, tp)]
    buckets, of_unit = _filled(units, bucket)
    table = of_unit[-1][-1:] if figure.tied and not figure.tokens.frozen else []
    of_unit[0] = of_unit[0] + table  # the head's product adds to the gradient of a tied table
    missing = Counter(number for touched in of_unit for number in touched)
    packed = [size * (1 + 1 / ranks) for size in buckets]
    flying = deque(range(len(packed))[-IN_FLIGHT:] if again else ())
    before, opened, following, levels = sum(packed[n] for n in flying), set[int](), 0, []
    for touched in of_unit:
        opened.update(touched)
        level = sum(buckets[n] for n in opened) + sum(packed[n] for n in flying)
        most = level
        missing.subtract(touched)
        while following < len(buckets) and missing[following] == 0:
            while following in flying or len(flying) == IN_FLIGHT:
                level -= packed[flying.popleft()]
            flying.append(following)
            most = max(most, level + buckets[following])  # both, for a moment
            level += packed[following] - buckets[following]
            opened.discard(following)
            following += 1
        levels.append(float(most))
    return Awake(float(before), levels[0], tuple(levels[1:-1]), levels[-1])


def _filled(units: list[list[int]], bucket: int) -> tuple[list[int], list[list[int]]]:
    """Sizes of all buckets, and for each unit the bucket of each parameter, in order of backward."""
    buckets: list[int] = []
    of_unit: list[list[int]] = []
    for sizes in units:
        numbers = []
        for size in sizes:
            if not buckets or buckets[-1] >= bucket:
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
