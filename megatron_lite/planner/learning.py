"""What to know of a run's learning rate before it starts: its curve, a law's advice, what is unusual."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from megatron_lite.blueprint.draw_up import Blueprint
from megatron_lite.planner import statement
from megatron_lite.planner.advice import tokens_warning
from megatron_lite.planner.columns import aligned
from megatron_lite.planner.curve import Point, run_curve
from megatron_lite.planner.forecast import Forecast
from megatron_lite.planner.law import (
    LAW_RANGE,
    SOURCE,
    Budget,
    budget_of,
    compute_optimal,
    flops_of_a_token,
)

FAR = 4.0
"""A rate so many times above or below the law's is worth a word."""
FINE_TUNING = 20.0
"""A rate so many times below it is one for weights that have learned already."""
OF_THE_LAW = ("adam", "adam8bit", "apex-adam")
_POINTS = 25
_WIDTH, _HEIGHT = 72, 10


class RateCurve(Protocol):
    """A learning rate as a function of samples; LearningRateSchedule is one."""

    @property
    def max_lr(self) -> float:
        """The peak."""

    @property
    def min_lr(self) -> float:
        """The floor."""

    @property
    def style(self) -> str:
        """--lr-decay-style."""

    @property
    def warmup_samples(self) -> float:
        """Samples of the warm-up."""

    @property
    def decay_samples(self) -> float:
        """Samples at which the floor is reached."""

    def at(self, lr_samples: int) -> float:
        """Learning rate after so many samples."""

    def bends(self) -> list[float]:
        """Samples where the curve changes its course."""


def _flops(blueprint: Blueprint) -> int:
    return flops_of_a_token(blueprint.figure, blueprint.model.seq_length)


def law_of(blueprint: Blueprint) -> Budget:
    """The law's word on a model and the tokens of its run, whose length is known."""
    assert blueprint.train_samples is not None
    return budget_of(_flops(blueprint), blueprint.train_samples * blueprint.model.seq_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A run as its learning rate sees it.

    begins: whether it starts from nothing.  stop: its last step where --exit-duration-in-mins ends
    it, by the predicted time of a step.
    """

    blueprint: Blueprint
    rates: RateCurve
    begins: bool
    stop: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def iterations(self) -> int:
        """Of the whole run."""
        assert self.blueprint.train_iters is not None, "a run of known length"
        return self.blueprint.train_iters

    @property
    def samples(self) -> int:
        """Of the whole run."""
        assert self.blueprint.train_samples is not None
        return self.blueprint.train_samples

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.samples * self.blueprint.model.seq_length

    @property
    def tokens_per_parameter(self) -> float:
        """All parameters counted, padding included."""
        return self.tokens / self.blueprint.num_parameters

    @property
    def here(self) -> Budget:
        """The law's word on this model and these tokens."""
        return law_of(self.blueprint)

    @property
    def optimal(self) -> Budget:
        """The law's word on this model."""
        return compute_optimal(_flops(self.blueprint))

    def curve(self) -> tuple[Point, ...]:
        """The whole of it."""
        return run_curve(self.blueprint, self.rates.at, bends=self.rates.bends(), points=_POINTS)

    def at_step(self, iteration: int) -> float:
        """The rate before a step."""
        return self.rates.at(self.blueprint.batch_schedule.samples_after(iteration))

    def undecayed(self, iteration: int) -> float:
        """Share of the way from the peak to the floor that is still ahead before a step."""
        rates = self.rates
        if rates.max_lr <= rates.min_lr:
            return 1.0
        return (self.at_step(iteration) - rates.min_lr) / (rates.max_lr - rates.min_lr)


def rate_warnings(outlook: Outlook) -> Iterator[str]:
    """What is unusual."""
    if outlook.begins:
        yield from tokens_warning(outlook.tokens_per_parameter)
    yield from _shape(outlook)
    yield from _height(outlook)


def _shape(outlook: Outlook) -> Iterator[str]:
    rates, steps = outlook.rates, outlook.iterations
    if rates.warmup_samples >= outlook.samples:
        yield (
            f"the warm-up of {rates.warmup_samples:,.0f} samples is not over when the run is, after "
            f"{outlook.samples:,}: --lr is never reached; shorten the warm-up"
        )
        return
    if rates.style == "constant" or rates.max_lr <= rates.min_lr:
        why = "--lr-decay-style constant" if rates.style == "constant" else "--min-lr is --lr"
        yield f"the rate never decays: {why}; a decay lowers the loss at the end (cosine, WSD)"
    elif rates.style != "inverse-square-root" and 2 * rates.decay_samples < outlook.samples:
        yield (
            f"the decay is over after {rates.decay_samples:,.0f} of {outlook.samples:,} samples: the rest of "
            f"the run is at --min-lr {rates.min_lr:g}; leave out --lr-decay-iters or -samples"
        )
    elif outlook.undecayed(steps) > 0.5:
        yield (
            f"the rate never decays in this run: it ends after {outlook.samples:,} samples at "
            f"{outlook.at_step(steps):.2e}, {outlook.undecayed(steps):.0%} of the way to --min-lr still ahead, "
            f"and the decay is of {rates.decay_samples:,.0f} samples; leave out --lr-decay-iters or -samples"
        )
    elif (
        outlook.stop is not None and outlook.stop < steps and outlook.undecayed(outlook.stop) > 0.5
    ):
        yield (
            f"the rate never decays before --exit-duration-in-mins stops the run, at about step "
            f"{outlook.stop:,} of {steps:,} by the predicted time of a step: it is at "
            f"{outlook.at_step(outlook.stop):.2e} then; if nothing follows, --train-iters {outlook.stop}"
        )


def _height(outlook: Outlook) -> Iterator[str]:
    if not outlook.begins or outlook.blueprint.optim.optimizer not in OF_THE_LAW:
        return
    asked, law = outlook.rates.max_lr, outlook.here.learning_rate
    if asked * FINE_TUNING <= law:
        yield (
            f"--lr {asked:g} is 1/{law / asked:.0f} of the law's {law:.2e}: such rates are for fine-tuning, "
            "and this run begins with nothing learned"
        )
    elif not law / FAR <= asked <= law * FAR:
        times = f"{asked / law:.1f} times" if asked > law else f"1/{law / asked:.1f} of"
        yield f"--lr {asked:g} is {times} the law's {law:.2e} for this model and these tokens"


def rate_notes(outlook: Outlook) -> Iterator[str]:
    """What a reader should know of the numbers."""
    low, high = LAW_RANGE
    if not low <= outlook.here.flops <= high:
        yield (
            f"the law was fitted from {low:.0e} to {high:.0e} FLOPs; this run takes {outlook.here.flops:.2e}"
        )
    if outlook.blueprint.optim.optimizer not in OF_THE_LAW:
        yield (
            f"the law is one of AdamW: --optimizer {outlook.blueprint.optim.optimizer} has rates of its own, "
            "and --lr is not compared with it"
        )
    if not outlook.begins:
        yield "the law is one of pretraining from nothing: --lr is not compared with it"
    yield from outlook.notes


def outlook_json(outlook: Outlook, plan: Forecast) -> dict[str, object]:
    """All of it as plain values."""
    blueprint = outlook.blueprint
    return {
        **statement.statement_json(plan),
        "model": {**statement.model_json(blueprint), "law_flops_per_token": _flops(blueprint)},
        "run": {"iterations": outlook.iterations, "samples": outlook.samples, "tokens": outlook.tokens,
                "tokens_per_parameter": outlook.tokens_per_parameter,
                "learning_rate": outlook.rates.max_lr,
                "batch_tokens": _batch(blueprint)},
        "law": {"source": SOURCE, "this_run": outlook.here._asdict(),
                "compute_optimal": outlook.optimal._asdict()},
        "curve": [dataclasses.asdict(point) for point in outlook.curve()],
        "warnings": list(rate_warnings(outlook)),
        "notes": list(rate_notes(outlook)),
    }  # fmt: skip


def outlook_text(outlook: Outlook, plan: Forecast) -> str:
    """The curve as a picture and a table, the law's word beside what was asked, warnings."""
    sections = (
        statement.statement_lines(plan), _head(outlook), _picture(outlook),
        _table(outlook.curve()), _law(outlook),
        (f"warning: {warning}" for warning in rate_warnings(outlook)),
        (f"note: {note}" for note in rate_notes(outlook)),
    )  # fmt: skip
    return "\n".join(line for section in sections for line in section)


def _batch(blueprint: Blueprint) -> int:
    return blueprint.batch_schedule.final_batch_size * blueprint.model.seq_length


def _head(outlook: Outlook) -> Iterator[str]:
    yield (
        f"{outlook.blueprint.num_parameters:,} parameters: {outlook.iterations:,} steps, "
        f"{outlook.samples:,} samples, {outlook.tokens:,} tokens: "
        f"{outlook.tokens_per_parameter:.1f} tokens per parameter"
    )


def _picture(outlook: Outlook) -> Iterator[str]:
    """A column for each equal part of the steps."""
    steps = [round(column * outlook.iterations / (_WIDTH - 1)) for column in range(_WIDTH)]
    rates = [outlook.at_step(step) for step in steps]
    top = max(rates)
    heights = [round((_HEIGHT - 1) * rate / top) if top else 0 for rate in rates]
    yield ""
    for height in reversed(range(_HEIGHT)):
        label = f"{top * height / (_HEIGHT - 1):.1e}" if height % 3 == 0 else ""
        yield f"{label:>9} |{''.join('*' if height == one else '.' for one in heights)}|"
    yield f"{'step':>9} |0{outlook.iterations:>{_WIDTH - 1},}|"


def _table(curve: tuple[Point, ...]) -> Iterator[str]:
    yield ""
    rows = [["iteration", "samples", "tokens", "batch", "learning rate"]]
    rows += [
        [
            f"{p.iteration:,}",
            f"{p.samples:,}",
            f"{p.tokens:,}",
            f"{p.global_batch_size:,}",
            f"{p.lr:.4e}",
        ]
        for p in curve
    ]
    yield from aligned(rows, least=12)


def _law(outlook: Outlook) -> Iterator[str]:
    length = outlook.blueprint.model.seq_length
    yield ""
    yield (
        f"the law of {SOURCE}, for {_flops(outlook.blueprint):.4g} FLOPs a token without the vocabulary's:"
    )
    batch = _batch(outlook.blueprint)
    rows = [["", "FLOPs", "tokens", "learning rate", "batch in tokens", "sequences"]]
    for name, flops, tokens, rate, size in (
        ("for this run's tokens", *outlook.here),
        ("compute-optimal for the model", *outlook.optimal),
        ("asked for", outlook.here.flops, outlook.tokens, outlook.rates.max_lr, batch),
    ):
        rows.append(
            [
                name,
                f"{flops:.3e}",
                f"{tokens:.3e}",
                f"{rate:.3e}",
                f"{size:.3e}",
                f"{size / length:,.0f}",
            ]
        )
    yield from aligned(rows, least=10)
