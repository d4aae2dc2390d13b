"""What tools/plan.py can be asked: its own flags in groups, and which of them go together."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.exit import ToolParser
from megatron_lite.planner import launch
from megatron_lite.planner.work import StageTimes

DEVICE = "h100"
"""Planned for where --hardware is left out."""

TOP = 15

_RUN = (
    "the run is said by the flags of tools/pretrain_gpt.py: model, batch, layout, precision, data "
    "(docs/FLAGS.md); --config and --preset too"
)


def parser(description: str) -> ArgumentParser:
    """The flags of tools/plan.py alone; a run's are left over."""
    found = ToolParser(
        description=description,
        epilog=_RUN,
        prog="plan.py",
        usage="plan.py [--hardware NAME] [--nodes N] [option ...] "
        "[torchrun ... pretrain_gpt.py] <flags of pretrain_gpt.py>",
        formatter_class=RawDescriptionHelpFormatter,
    )
    _machines(found)
    _question(found)
    _run(found)
    _output(found)
    return found


def _machines(found: ArgumentParser) -> None:
    group = found.add_argument_group("machines")
    group.add_argument("--hardware", metavar="NAME|FILE.yaml", help=f"left out: {DEVICE}")
    group.add_argument("--list-hardware", action="store_true", help="all devices, with sources")
    group.add_argument(
        "--nodes", type=launch.at_least_one, metavar="N", help="nodes of the cluster"
    )
    group.add_argument(
        "--gpus-per-node",
        type=launch.at_least_one,
        metavar="N",
        help="devices of a node, or of an NVLink domain",
    )
    group.add_argument(
        "--link-gb-s",
        type=_measure,
        metavar="GB/S",
        help="between devices of a node, one direction",
    )
    group.add_argument(
        "--network-gb-s", type=_measure, metavar="GB/S", help="between nodes, per device"
    )


def _question(found: ArgumentParser) -> None:
    group = found.add_argument_group(
        "the question; left out: memory, time and cost of the run as it is"
    )
    group.add_argument("--search", action="store_true", help="rank all layouts that fit")
    group.add_argument(
        "--top",
        type=launch.at_least_one,
        metavar="N",
        help=f"layouts --search shows; {TOP} by default",
    )
    group.add_argument("--advise", action="store_true",
                       help="on the learning rate and the batch, instead of memory and time")  # fmt: skip
    group.add_argument(
        "--draw", metavar="-|FILE", help="timeline: - as text, FILE.svg, FILE.json (Chrome trace)"
    )
    group.add_argument(
        "--draw-microbatches", type=launch.at_least_one, metavar="N",
        help="how many to draw; 2 pp by default",
    )  # fmt: skip
    group.add_argument("--beside", metavar="FILE.json",
                       help="with --draw: a real timeline below, as --profile-timeline writes it")  # fmt: skip


def _run(found: ArgumentParser) -> None:
    group = found.add_argument_group("the run, beside its own flags")
    group.add_argument(
        "--tokens", type=_tokens_number, metavar="300B", help="tokens to train on; K, M, B or T"
    )
    group.add_argument(
        "--price-per-gpu-hour", type=_measure, metavar="PRICE",
        help="adds what it costs, in the currency of the price",
    )  # fmt: skip
    group.add_argument("--measured-seconds", type=_measure, metavar="S",
                       help="rates of a step that took so long, instead of the predicted one")  # fmt: skip
    group.add_argument(
        "--stage-times-ms",
        type=_not_negative,
        nargs=4,
        metavar=("F", "B", "W", "COMM"),
        help="measured milliseconds of a micro batch on a pipeline rank (forward, backward "
        "for the input, for the weights) and of a message, instead of predicted ones",
    )


def _output(found: ArgumentParser) -> None:
    group = found.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="machine-readable, all numbers in SI units"
    )
    group.add_argument("--output", metavar="FILE", help="write there instead of the terminal")


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number < float("inf"):
        raise ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise ArgumentTypeError(f"{text!r} must be a number above 0")
    return number


def _measure(text: str) -> float:
    """A number that is one of the world: no rate or time of it is beyond."""
    number = _positive(text)
    if not 1e-9 <= number <= 1e12:
        raise ArgumentTypeError(f"{text!r} must be from 1e-9 to 1e12")
    return number


def _tokens_number(text: str) -> float:
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        return _positive(text[:-1]) * scale if scale else _positive(text)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{text!r} is no number of tokens such as 300B or 1.5T") from None


def stage_times(own: Namespace) -> StageTimes | None:
    """What --stage-times-ms says, in seconds."""
    if own.stage_times_ms is None:
        return None
    forward, inputs, weights, message = (ms / 1e3 for ms in own.stage_times_ms)
    if min(forward, inputs, weights) == 0.0:
        raise ConfigError("--stage-times-ms: only the message may take no time")
    return StageTimes(forward, inputs, weights, message)


def check_together(own: Namespace) -> None:
    """Nothing that is asked for goes unheard."""
    price, times = {"--price-per-gpu-hour": own.price_per_gpu_hour}, measured_times(own)
    if own.advise and (own.search or own.draw):
        raise ConfigError(
            "--advise has a report of its own: leave out --search and --draw, or ask twice"
        )
    if own.search:
        _unheard(
            {"--draw": own.draw, "--tokens": own.tokens, **price, **times}, "--search's ranking"
        )
    elif own.advise:
        _unheard(price, "--advise's report")
    if own.top is not None and not own.search:
        raise ConfigError(f"--top {own.top} is of --search: give both or neither")
    if own.draw is None:
        alone = {"--beside": own.beside, "--draw-microbatches": own.draw_microbatches}
        for flag in (flag for flag, value in alone.items() if value is not None):
            raise ConfigError(f"{flag} is of a drawing: give --draw as well")
    if own.draw == "-" and own.json:
        raise ConfigError("--draw - is text, which --json is not: draw to a file, or leave one out")


def check_times_of_advice(own: Namespace, exit_duration_in_mins: float | None) -> None:
    """Of --advise only the step at which a limit of time ends the run is a matter of seconds."""
    if exit_duration_in_mins is None:
        _unheard(measured_times(own), "--advise's report without --exit-duration-in-mins")


def measured_times(own: Namespace) -> dict[str, object]:
    """Flags that replace what is predicted."""
    return {"--measured-seconds": own.measured_seconds, "--stage-times-ms": own.stage_times_ms}


def check_price(own: Namespace, tokens: float | None) -> None:
    """A price is one of a whole run."""
    if own.price_per_gpu_hour is not None and not tokens:
        raise ConfigError(
            f"--price-per-gpu-hour {own.price_per_gpu_hour:g} is for a run of known length: give --tokens, "
            "--train-iters or --train-samples, or leave it out"
        )


def _unheard(flags: dict[str, object], what: str) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise ConfigError(f"{flag} changes nothing of {what}: leave one out")
