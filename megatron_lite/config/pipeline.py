"""What is asked of the pipeline: its schedule, chunks per rank, and layers per stage.

    --num-layers 8, pp 2                        1f1b          4 | 4
    ... --num-virtual-stages-per-pipeline-rank 2  interleaved   2 | 2 | 2 | 2   stage s on rank s % 2
    ... --pipeline-schedule zb-v                zb-v          2 | 2 | 2 | 2   on ranks 0 1 1 0

Rules ask here whether layers divide evenly; the blueprint asks for the result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.parallel import ParallelConfig

ONE_CHUNK = ("1f1b", "gpipe", "zb-h1")
"""Schedules with one stage per rank; zb-v has two, interleaved two or more."""

SPLIT_BACKWARD = ("zb-h1", "zb-v")
"""Schedules that defer wgrads."""

_PP = "--pipeline-model-parallel-size"
_PER_CHUNK = "--num-layers-per-virtual-pipeline-stage"
_CHUNKS = "--num-virtual-stages-per-pipeline-rank"
_LAYOUT = "--pipeline-model-parallel-layout"
_ENDS = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
_MAX_SYMBOLS = 10_000
_MAX_DEPTH = 20


@dataclass(frozen=True, slots=True)
class Pipeline:
    """layers[s] is the number of layers of stage s; there are pp * chunks stages."""

    schedule: str
    chunks: int
    layers: tuple[int, ...]


def pipeline(num_layers: int, parallel: ParallelConfig) -> Pipeline:
    """The schedule and the stages asked for; ConfigError where they do not come out even."""
    pp = parallel.pp
    chunks = _num_chunks(num_layers, parallel)
    name = parallel.pipeline_schedule or ("interleaved" if chunks > 1 else "1f1b")
    if pp == 1 and (chunks > 1 or name == "interleaved"):
        what, instead = (
            "virtual pipeline stages need",
            "leave them out, or use --pipeline-schedule 1f1b",
        )
        if name == "zb-v":
            what, instead = "--pipeline-schedule zb-v needs", "use it, or zb-h1 or 1f1b"
        raise ConfigError(f"{what} {_PP} of at least 2; {instead}")
    if name in ONE_CHUNK and chunks > 1:
        raise ConfigError(
            f"--pipeline-schedule {name} has one stage per rank, not {chunks}; use interleaved"
            f"{' or zb-v' if chunks == 2 else ''}, or leave virtual stages out"
        )
    if name == "zb-v" and chunks != 2:
        raise ConfigError(
            f"--pipeline-schedule zb-v has 2 stages per rank, not {chunks}; "
            "leave the number of virtual stages out"
        )
    if name == "interleaved" and chunks < 2:
        raise ConfigError(
            f"--pipeline-schedule interleaved needs 2 or more stages per rank; add {_CHUNKS} 2, "
            "or use 1f1b"
        )
    layers = _layers(num_layers, parallel, name, chunks)
    for stage, count in enumerate(layers):
        if count < 0 or (count == 0 and 0 < stage < len(layers) - 1):
            raise ConfigError(
                f"pipeline stage {stage} of {len(layers)} would get {count} of --num-layers "
                f"{num_layers}; use a smaller {_PP} or fewer virtual stages"
            )
    return Pipeline(name, chunks, layers)


def _num_chunks(num_layers: int, parallel: ParallelConfig) -> int:
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    layout, pp = parallel.pipeline_model_parallel_layout, parallel.pp
    if per_chunk is not None and chunks is not None:
        raise ConfigError(
            f"{_PER_CHUNK} {per_chunk} and {_CHUNKS} {chunks} say the same thing; give one"
        )
    if layout is not None:
        if per_chunk is not None or chunks is not None:
            raise ConfigError(
                f"{_LAYOUT} says how many stages a rank has; leave "
                f"{_PER_CHUNK if chunks is None else _CHUNKS} out"
            )
        stages = len(parse_layout(layout))
        if stages % pp:
            raise ConfigError(
                f"{_LAYOUT} {layout!r} has {stages} stages, no multiple of {_PP} {pp}"
            )
        return stages // pp
    if chunks is not None:
        return chunks
    if per_chunk is None:
        return 2 if parallel.pipeline_schedule == "zb-v" else 1
    if _ends(parallel) != (None, None):
        raise ConfigError(f"{_PER_CHUNK} counts equal stages; with uneven ones use {_CHUNKS}")
    dealt = num_layers + sum(_counted(parallel))
    if dealt % pp == 0 and (dealt // pp) % per_chunk:
        raise ConfigError(
            f"{_PER_CHUNK} {per_chunk} does not divide the {dealt // pp} layers of a stage; "
            f"choose from {_divisors(dealt // pp)}"
        )
    return max(dealt // pp // per_chunk, 1)


def _ends(parallel: ParallelConfig) -> tuple[int | None, int | None]:
    return parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers


def _counted(parallel: ParallelConfig) -> tuple[int, int]:
    """Layers that embedding and head stand for."""
    return (
        int(parallel.account_for_embedding_in_pipeline_split),
        int(parallel.account_for_loss_in_pipeline_split),
    )


def _layers(num_layers: int, parallel: ParallelConfig, name: str, chunks: int) -> tuple[int, ...]:
    ways = {
        _LAYOUT: parallel.pipeline_model_parallel_layout is not None,
        "--decoder-first-pipeline-num-layers": _ends(parallel)[0] is not None,
        "--decoder-last-pipeline-num-layers": _ends(parallel)[1] is not None,
        _ENDS[0]: bool(_counted(parallel)[0]),
        _ENDS[1]: bool(_counted(parallel)[1]),
    }
    given = [flag for flag, asked in ways.items() if asked]
    if len({flag.split("-")[2] for flag in given}) > 1:
        raise ConfigError(f"{' and '.join(given)} each say how layers are dealt; use one way")
    if parallel.pipeline_model_parallel_layout is not None:
        return _by_layout(num_layers, parallel.pipeline_model_parallel_layout)
    if _ends(parallel) != (None, None):
        if name == "zb-v":
            raise ConfigError(
                f"{given[0]} names one rank's layers, but zb-v puts both ends on the first rank; "
                f"use {_LAYOUT}"
            )
        return _uneven(num_layers, parallel, chunks)
    first, last = _counted(parallel)
    dealt, stages = num_layers + first + last, parallel.pp * chunks
    if dealt % stages:
        raise ConfigError(_not_even(num_layers, first + last, parallel.pp, chunks))
    counts = [dealt // stages] * stages
    counts[0] -= first
    counts[-1] -= last
    return tuple(counts)


def _by_layout(num_layers: int, layout: str) -> tuple[int, ...]:
    counts = parse_layout(layout)
    if sum(counts) != num_layers:
        raise ConfigError(
            f"{_LAYOUT} {layout!r} has {sum(counts)} layers (t), --num-layers is {num_layers}"
        )
    return counts


def _uneven(num_layers: int, parallel: ParallelConfig, chunks: int) -> tuple[int, ...]:
    """First and last rank as told, the others alike; each rank's layers in equal chunks."""
    first, last = _ends(parallel)
    told = " and ".join(
        f"--decoder-{end}-pipeline-num-layers {count}"
        for end, count in (("first", first), ("last", last))
        if count is not None
    )
    middle = parallel.pp - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    if middle < 0:
        raise ConfigError(f"{told} need {_PP} of at least 2")
    if rest < middle or (rest % middle if middle else rest):
        raise ConfigError(
            f"{told} of --num-layers {num_layers} leave {rest} layers for {middle} ranks "
            "between or beside; they must share them evenly"
        )
    ranks = [rest // middle if middle else 0] * parallel.pp
    if first is not None:
        ranks[0] = first
    if last is not None:
        ranks[-1] = last
    if any(count % chunks for count in ranks):
        raise ConfigError(
            f"{told}: {', '.join(map(str, ranks))} layers per rank do not all divide into "
            f"{_CHUNKS} {chunks}"
        )
    return tuple(count // chunks for count in ranks) * chunks


def _not_even(num_layers: int, extra: int, pp: int, chunks: int) -> str:
    dealt, stages = num_layers + extra, pp * chunks
    counted = f" + {extra} for embedding and loss" if extra else ""
    below = dealt // stages * stages - extra
    layers = [str(n) for n in (below, below + stages) if n > 0]
    what = f"--num-layers {num_layers}{counted} cannot be dealt to {_PP} {pp}"
    # as Llama 3's 126 layers on 16 stages
    both = {1: " or ", 2: " and "}.get(-num_layers % stages)
    counts = f", or count ends as layers: {both.join(_ENDS)}" if both and not extra else ""
    if chunks > 1:
        return f"{what} x {chunks} stages per rank; use {' or '.join(layers)} layers, or {_LAYOUT}{counts}"
    return (
        f"{what} stages; choose pp from {_divisors(dealt)}, or {' or '.join(layers)} layers{counts}"
    )


def _divisors(number: int) -> str:
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(found if len(found) <= 12 else [*found[:9], "...", found[-1]])


def parse_layout(text: str) -> tuple[int, ...]:
    """Layers of each stage of a layout such as Et*3|(tt|)*29,m|L.

    E is the embedding, t a layer, L head and loss, | the border of two stages; x*n and (...)*n
    repeat, commas and spaces only separate.  Raises ConfigError with the place of what is wrong.
    """
    symbols = _Layout(text).read()
    stages = symbols.split("|")
    if not (
        symbols.startswith("E")
        and symbols.endswith("L")
        and symbols.count("E") == symbols.count("L") == 1
    ):
        raise ConfigError(f"{_LAYOUT} {text!r} must begin with its only E and end with its only L")
    return tuple(stage.count("t") for stage in stages)


class _Layout:
    """A reader of layout strings, by descent."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def read(self) -> str:
        """The whole text, repetitions written out."""
        symbols = self._sequence(0)
        if self.at < len(self.text):
            raise self._error("a ) without its (")
        return symbols

    def _sequence(self, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise self._error(f"more than {_MAX_DEPTH} ( in each other")
        found: list[str] = []
        while self.at < len(self.text) and self.text[self.at] != ")":
            found.append(self._item(depth))
            if sum(map(len, found)) > _MAX_SYMBOLS:
                raise self._error(f"more than {_MAX_SYMBOLS} layers and borders")
        return "".join(found)

    def _item(self, depth: int) -> str:
        symbol = self.text[self.at]
        if symbol not in "EtL|(, ":
            built = "multi-token prediction (m) is not built" if symbol == "m" else f"{symbol!r}"
            raise self._error(f"{built}; it knows E, t, L, |, (...) and *n")
        self.at += 1
        if symbol in ", ":
            return ""
        if symbol == "(":
            symbol = self._sequence(depth + 1)
            if self.at == len(self.text):
                raise self._error("a ( without its )")
            self.at += 1
        times = re.compile(r"\*([0-9]{1,5})(?![0-9])").match(self.text, self.at)
        if times is None:
            if self.text[self.at : self.at + 1] == "*":
                raise self._error("a * without a number of at most 5 digits")
            return symbol
        self.at = times.end()
        count = int(times[1])
        if len(symbol) * count > _MAX_SYMBOLS:
            raise self._error(f"more than {_MAX_SYMBOLS} layers and borders")
        return symbol * count

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"{_LAYOUT} {self.text[:80]!r}, place {self.at + 1}: {what}")
