"""Draws command lines over all features that touch a layout, and runs them as the tool does.

A case is refused before anything starts (exit 2, naming a flag and a way out), or it trains on its
ranks and its losses, gradient norms and evaluation are those of the same model on one rank.

    python -m tests.train.any_config 1000 1100      seeds to explore beyond the suite's
    python -m tests.train.any_config choose         EVERY_PAIR and EVERY_REASON anew, if draw() changed
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules import table as rules
from tests.train.runs import argv, evaluations, on_ranks, steps

COMMON = ("--mock-data", "--lr-decay-style", "constant", "--lr-warmup-iters", "0",
          "--save-interval", "100", "--initial-loss-scale", "1024")  # fmt: skip

EVERY_PAIR = (
    155, 6366, 518, 569, 2437, 4045, 9, 7339, 6726, 104, 2048, 4583, 388, 2173, 7713, 7270,
    2409, 854, 491, 4083, 7427, 870, 5730, 4185, 4695, 5597, 410, 2955, 265, 135, 2864, 1860,
    2503, 7540, 1042, 1147, 1803, 2376, 4661, 5738, 654, 3464, 4665, 6137, 1857, 2228, 3258,
    1019, 2207, 4247, 4915, 100, 146, 643, 875, 1336, 2177, 4119, 4793, 95, 275, 2686, 3657,
    4150, 4810, 45, 65, 68, 79, 157, 283, 326, 331, 384, 693, 1261, 4875, 5212,
)  # fmt: skip
"""Seeds that train, most pairs of features first: together every pair that is ever accepted."""

EVERY_REASON = (
    11, 14, 20, 27, 31, 43, 49, 55, 64, 66, 71, 72, 73, 77, 97, 111, 113, 127, 133, 154, 164,
    203, 224, 255, 267, 309, 310, 321, 359, 405, 557, 629, 663, 769, 914, 922, 1189, 1361, 2682,
    3756, 6175,
)  # fmt: skip
"""Seeds that are refused, each for a reason that none before it has."""

WAY_OUT = re.compile(
    r"\b(use|choose|drop|add|give|leave|start|make|needs?|must|use one|exclude each other|"
    r"nearest|takes|without them|lower|raise)\b"
)
"""A message tells what to do with one of these words."""


@dataclass
class Flags:
    """Flags as drawn; `shared` ones are the serial run's too.  features: what was drawn, to count."""

    shared: list[str] = field(default_factory=list)
    layout: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)

    def share(self, *words: object, feature: str | None = None) -> None:
        """A flag that changes what is computed."""
        self._take(self.shared, words, feature)

    def lay(self, *words: object, feature: str | None = None) -> None:
        """A flag that changes how it is computed."""
        self._take(self.layout, words, feature)

    def _take(self, into: list[str], words: tuple[object, ...], feature: str | None) -> None:
        into += map(str, words)
        if feature != "":
            self.features.add(feature or " ".join(map(str, words)))


@dataclass(frozen=True)
class Case:
    """One drawn configuration."""

    seed: int
    ranks: int
    shared: tuple[str, ...]
    layout: tuple[str, ...]
    features: frozenset[str]

    @property
    def words(self) -> list[str]:
        """All flags of the tool."""
        return argv(*COMMON, *self.shared, *self.layout)

    @property
    def command(self) -> str:
        """What a person would type to see it again."""
        start = f"torchrun --nproc_per_node {self.ranks} tools/pretrain_gpt.py"
        return f"seed {self.seed}: {start} {shlex.join(self.words)}"

    @property
    def half(self) -> bool:
        """Whether numbers are rounded to 16 bits."""
        return bool({"--bf16", "--fp16"} & set(self.shared))


_LAYOUTS = [
    (ranks, tp, pp)
    for ranks, often in ((1, 1), (2, 2), (3, 1), (4, 2))
    for tp in (1, 2, 3, 4)
    for pp in (1, 2, 3, 4)
    if ranks % (tp * pp) == 0
    for _ in range(often * (2 if pp > 1 else 1))
]


def draw(seed: int) -> Case:
    """The case of a seed: mostly plausible sizes, sometimes anything."""
    r = random.Random(seed)
    wild = r.random() < 0.1
    flags = Flags()
    ranks, tp, pp = r.choice(_LAYOUTS)
    if wild:
        tp, pp = r.choice([1, 2, 3, 4]), r.choice([1, 2, 3, 4])
    dp = max(ranks // (tp * pp), 1)
    flags.lay("--tensor-model-parallel-size", tp, feature=f"tp{tp}")
    flags.lay("--pipeline-model-parallel-size", pp, feature=f"pp{pp}")
    flags.features.add(f"dp{dp}")
    schedule = _pipeline(r, flags, pp)
    _model(r, flags, r.choice([2, 3, 6]) if wild else 3 if tp == 3 else 4)
    _batch(r, flags, dp, pp if schedule == "interleaved" and r.random() < 0.8 else 1, wild)
    _memory(r, flags, tp)
    _data_parallel(r, flags, dp)
    _data(r, flags, dp)
    return Case(seed, ranks, tuple(flags.shared), tuple(flags.layout), frozenset(flags.features))


def _maybe(r: random.Random, chance: float) -> bool:
    return r.random() < chance


def _pipeline(r: random.Random, flags: Flags, pp: int) -> str:
    schedule = r.choice(["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"])
    if pp == 1 and _maybe(r, 0.9):
        schedule = r.choice(["1f1b", "gpipe", "zb-h1"])
    flags.features.add(schedule)
    chunks = {"interleaved": r.choice([2, 2, 3]), "zb-v": 2}.get(schedule, 1)
    if schedule != "interleaved" or _maybe(r, 0.5):
        flags.lay("--pipeline-schedule", schedule, feature="")
    per_stage = r.choice([1, 1, 2]) if pp * chunks <= 4 else 1
    layers = pp * chunks * per_stage
    how = r.choice(["even", "even", "even", "layout", "ends", "counted", "anything"])
    if how == "layout":
        counts = [r.choice([1, 1, 2]) for _ in range(pp * chunks)]
        if pp * chunks > 1 and _maybe(r, 0.4):
            counts[r.choice([0, -1])] = 0
        layers = sum(counts)
        drawn = "|".join("t" * count for count in counts)
        flags.lay("--pipeline-model-parallel-layout", f"E{drawn}L", feature="layout string")
    elif schedule == "interleaved":
        if _maybe(r, 0.7):
            flags.lay("--num-virtual-stages-per-pipeline-rank", chunks, feature=f"{chunks} chunks")
        else:
            flags.lay(
                "--num-layers-per-virtual-pipeline-stage", per_stage, feature="layers per chunk"
            )
    if how == "ends":
        first = r.choice([1, 2]) * chunks
        layers += first - per_stage * chunks
        flags.lay("--decoder-first-pipeline-num-layers", first, feature="uneven end")
    elif how == "counted":
        for which in r.choice([["embedding"], ["loss"], ["embedding", "loss"]]):
            flag = f"--account-for-{which}-in-pipeline-split"
            flags.lay(flag)
            layers -= 1
    elif how == "anything":
        layers = r.randint(1, 6)
    flags.share("--num-layers", max(layers, 1), feature="")
    return schedule


def _model(r: random.Random, flags: Flags, heads: int) -> None:
    flags.share("--hidden-size", 24 if heads in (3, 6) else 32, feature="")
    flags.share("--num-attention-heads", heads, feature="")
    flags.share("--seq-length", r.choice([8, 10, 12, 24]) if heads != 4 else 16, feature="")
    flags.share("--vocab-size", r.choice([7, 30, 60]), feature="")
    flags.share("--seed", r.choice([1, 2]), feature="")
    for chance, words in (
        (0.25, ("--swiglu", "--ffn-hidden-size", 48)),
        (0.25, ("--normalization", "RMSNorm")),
        (0.25, ("--disable-bias-linear",)),
        (0.4, ("--untie-embeddings-and-output-weights",)),
        (0.2, ("--group-query-attention", "--num-query-groups", 3 if heads == 3 else 2)),
        (0.2, ("--apply-query-key-layer-scaling",)),
        (0.2, ("--no-masked-softmax-fusion",)),
        (0.4, ("--hidden-dropout", 0.1)),
        (0.3, ("--attention-dropout", 0.1)),
        (0.2, ("--optimizer", "sgd")),
        (0.2, ("--clip-grad", 0)),
        (0.1, ("--log-params-norm",)),
        (0.1, ("--log-num-zeros-in-grad",)),
        (0.15, ("--no-accumulate-allreduce-grads-in-fp32",)),
    ):
        if _maybe(r, chance):
            flags.share(*words)
    if _maybe(r, 0.4):
        flags.share("--position-embedding-type", r.choice(["rope", "none"]))
    precision = r.choice([None, None, None, "--bf16", "--fp16"])
    if precision:
        flags.share(precision)
    if _maybe(r, 0.12):
        flags.lay("--no-gradient-accumulation-fusion")
    if precision is None and "--no-accumulate-allreduce-grads-in-fp32" in flags.shared:
        flags.shared.remove("--no-accumulate-allreduce-grads-in-fp32")


def _batch(r: random.Random, flags: Flags, dp: int, group: int, wild: bool) -> None:
    micro = r.choice([1, 2, 3])
    flags.share("--micro-batch-size", micro, feature="")
    unit, times = micro * dp * group, r.choice([1, 2, 3, 4, 5])
    size = r.randint(1, 12) if wild else unit * times
    flags.share("--global-batch-size", size, feature="")
    flags.features.add("few micro batches" if size // max(micro * dp, 1) < 3 else "many")
    how = r.choice(["fixed", "fixed", "fixed", "ramp", "steps"])
    if how == "ramp" and size > unit:
        flags.share("--rampup-batch-size", unit, unit, 3 * size, feature="ramp-up")
    elif how == "steps" and size > unit:
        flags.share(
            "--step-batch-size-schedule", f"0:{unit} {32 * unit}:{size}", feature="batch by tokens"
        )
    flags.share("--train-iters", 3 if how != "fixed" else 2, feature="")
    if _maybe(r, 0.4):
        flags.share("--eval-iters", 1, "--eval-interval", 2, feature="evaluation")


def _memory(r: random.Random, flags: Flags, tp: int) -> None:
    if (tp > 1 and _maybe(r, 0.5)) or _maybe(r, 0.1):
        flags.lay("--sequence-parallel")
    how = r.choice([None, "uniform", "block", "selective", "selective"])
    if how in ("uniform", "block"):
        flags.lay("--recompute-granularity", "full", "--recompute-method", how, feature=how)
        flags.lay("--recompute-num-layers", r.choice([1, 2, 3]), feature="")
        fits = tp > 1 and "--sequence-parallel" not in flags.layout
        if _maybe(r, 0.6 if fits else 0.05):
            flags.lay("--distribute-saved-activations")
    elif how == "selective":
        named = r.choice([["core_attn"], ["mlp"], ["layernorm"], ["core_attn", "mlp", "layernorm"]])
        flags.lay("--recompute-granularity", how, "--recompute-modules", *named)


def _data_parallel(r: random.Random, flags: Flags, dp: int) -> None:
    if _maybe(r, 0.5):
        flags.lay("--use-distributed-optimizer")
        if _maybe(r, 0.5):
            flags.lay("--overlap-param-gather")
    if _maybe(r, 0.05 if "--overlap-param-gather" in flags.layout else 0.2):
        flags.lay("--no-overlap-grad-reduce")
    if _maybe(r, 0.5):
        flags.lay("--ddp-bucket-size", r.choice([500, 3000]), feature="small buckets")
    if _maybe(r, 0.2):
        flags.lay("--use-tp-pp-dp-mapping")


def _data(r: random.Random, flags: Flags, dp: int) -> None:
    for flag in ("--reset-attention-mask", "--reset-position-ids", "--eod-mask-loss"):
        if _maybe(r, 0.25):
            flags.share(flag)
    if _maybe(r, 0.25) and dp == 1:  # the order is one of the data-parallel size
        flags.share("--dataloader-type", "cyclic")
    flags.share("--num-workers", r.choice([0, 2]), feature="")


def refusal(case: Case) -> str | None:
    """Why the case is not started, as `parse`, the rules and the blueprint say; None: it is."""
    try:
        config = parse(case.words).config
        rules.check_config(config, case.ranks)
        blueprint = draw_up(config, case.ranks)
        blueprint.actions(blueprint.microbatches())
    except ConfigError as error:
        assert error.exit_code == 2
        return str(error)
    return None


def unhelpful(message: str) -> list[str]:
    """The problems in a refusal that name no flag or no way out."""
    return [p for p in problems(message) if "--" not in p or not WAY_OUT.search(p)]


@dataclass(frozen=True)
class Numbers:
    """What a run reports that no layout may change."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    evaluated: tuple[float, ...]


def train(ranks: int, words: tuple[str, ...]) -> Numbers:
    """Run the tool; AssertionError with what it said unless it ends well."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = on_ranks(ranks, *words, "--save", folder)
        assert outcome.rc == 0, f"exit {outcome.rc}: {outcome.err[-3000:]}"
        found = steps(Path(folder))
        assert not any(step.skipped_iterations for step in found)
        return Numbers(
            tuple(step.loss for step in found),
            tuple(step.grad_norm for step in found),
            tuple(record.loss for record in evaluations(Path(folder))),
        )


@functools.lru_cache(maxsize=64)
def serial(shared: tuple[str, ...]) -> Numbers:
    """The same model, data and batches on one rank."""
    return train(1, (*COMMON, *shared))


def differences(case: Case) -> Iterator[str]:
    """Where the case's numbers are not the serial run's."""
    ours = train(case.ranks, (*COMMON, *case.shared, *case.layout))
    theirs = serial(case.shared)
    exact = {"losses": 1e-5, "grad_norms": 1e-4, "evaluated": 1e-5}
    # Adam's first steps are the gradients' signs, so rounding moves what comes after them
    loose = {"losses": 1e-2, "grad_norms": 1e-1, "evaluated": 2e-2}
    for what, limit in (loose if case.half else exact).items():
        mine, wanted = getattr(ours, what), getattr(theirs, what)
        if len(mine) != len(wanted) or not all(map(math.isfinite, mine)):
            yield f"{what}: {mine}, serial {wanted}"
        elif any(abs(a - b) > limit * abs(b) for a, b in zip(mine, wanted, strict=True)):
            yield f"{what}: {mine}, serial {wanted}, beyond {limit:g}"


def verdict(case: Case) -> str:
    """`trained` or `refused`; AssertionError with the command line for anything else."""
    message = refusal(case)
    if message is not None:
        assert not unhelpful(message), f"{case.command}\nis refused without a way out:\n{message}"
        return "refused"
    try:
        wrong = list(differences(case))
    except AssertionError as error:
        raise AssertionError(f"{case.command}\n{error}") from None
    assert not wrong, "\n".join([case.command, *wrong])
    return "trained"


def problems(message: str) -> list[str]:
    """The single problems of a refusal."""
    found = re.split(r"\n  \d+\. ", message)
    return found[1:] or found


def pairs(case: Case) -> frozenset[frozenset[str]]:
    """Every two of its features."""
    return frozenset(map(frozenset, itertools.combinations(case.features, 2)))


def choose(seeds: range) -> tuple[list[int], list[int]]:
    """(EVERY_PAIR, EVERY_REASON) among these seeds: greedily, what adds most first."""
    accepted: dict[int, frozenset[frozenset[str]]] = {}
    reasons: dict[str, int] = {}
    for case in map(draw, seeds):
        message = refusal(case)
        if message is None:
            accepted[case.seed] = pairs(case)
            continue
        for problem in problems(message):
            reasons.setdefault(re.sub(r"\d+", "N", problem), case.seed)
    chosen: list[int] = []
    covered: set[frozenset[str]] = set()
    while True:
        best = max(accepted, key=lambda seed: len(accepted[seed] - covered))
        if not accepted[best] - covered:
            return chosen, sorted(set(reasons.values()))
        chosen.append(best)
        covered |= accepted[best]


def main() -> int:
    """Run the seeds from the first to before the second argument; print what fails."""
    if sys.argv[1:] == ["choose"]:
        print(*choose(range(8000)), sep="\n")
        return 0
    seeds = EVERY_PAIR if sys.argv[1:] == ["pairs"] else range(*map(int, sys.argv[1:3]))
    failed, counts = 0, {"trained": 0, "refused": 0}
    for seed in seeds:
        try:
            counts[verdict(draw(seed))] += 1
        except AssertionError as error:
            failed += 1
            print(f"--- {error}", flush=True)
    print(f"{counts}, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
