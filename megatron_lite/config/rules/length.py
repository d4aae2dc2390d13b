"""Rules about how long a run is, and about what of the learning rate is said in the same unit."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.blend import blends
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.objectives import LANGUAGE_MODEL
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.config.sections.train import TrainConfig


def given_lengths(train: TrainConfig) -> dict[str, int]:
    """Flag -> its value, of those that say how long the run is."""
    given = {
        "--train-iters": train.train_iters,
        "--train-samples": train.train_samples,
        "--train-epochs": train.train_epochs,
    }
    return {flag: value for flag, value in given.items() if value is not None}


def begins_from_nothing(config: RunConfig) -> bool:
    """Whether a run is what the laws of pretraining are about."""
    tuned = config.checkpoint.finetune or config.lora.lora_rank
    return config.train.objective == LANGUAGE_MODEL and not tuned


def one_length(config: RunConfig, world_size: int) -> Iterator[str]:
    """The run's length is said in iterations, in samples or in epochs."""
    given = [f"{flag} {value}" for flag, value in given_lengths(config.train).items()]
    if len(given) > 1:
        yield f"{' and '.join(given)} exclude each other; give one"


def countable_epochs(config: RunConfig, world_size: int) -> Iterator[str]:
    """What is read so often has an end, and a length that its weights do not change."""
    t, d = config.train, config.data
    if t.train_epochs is None:
        if t.epoch_samples is not None:
            yield (
                f"--epoch-samples {t.epoch_samples} says how long an epoch of --train-epochs is; give "
                "both or neither"
            )
        return
    if d.mock_data:
        yield (
            f"--train-epochs {t.train_epochs}: --mock-data has no end; give --train-iters, or files with "
            "--data-path"
        )
        return
    try:
        found = blends(d)
    except ConfigError:
        return  # training.data_source
    blend = found.by_split.get("train") or found.shared
    if blend is not None and blend.weights is not None and len(blend.prefixes) > 1:
        yield (
            f"--train-epochs {t.train_epochs}: by the weights of the data, some files are read more often "
            "than others; leave the weights out, or give --train-iters or --train-samples"
        )


def length(config: RunConfig, world_size: int) -> Iterator[str]:
    """The run has a length, and what goes with it is in the same unit."""
    given, lr = given_lengths(config.train), config.learning_rate
    if not given:
        yield "how long to train is missing; give --train-iters, --train-samples or --train-epochs"
    if len(given) != 1:
        return  # one_length
    in_iters = {
        "--lr-decay-iters": lr.lr_decay_iters,
        "--lr-warmup-iters": lr.lr_warmup_iters,
        "--lr-wsd-decay-iters": lr.lr_wsd_decay_iters,
    }
    in_samples = {
        "--lr-decay-samples": lr.lr_decay_samples,
        "--lr-warmup-samples": lr.lr_warmup_samples,
        "--lr-wsd-decay-samples": lr.lr_wsd_decay_samples,
    }
    (base,) = given
    foreign, unit = (in_samples, "iters") if base == "--train-iters" else (in_iters, "samples")
    for flag, value in foreign.items():
        if value:
            fitting = f"{flag.rsplit('-', 1)[0]}-{unit}"
            if base == "--train-epochs" and flag == "--lr-warmup-iters":
                fitting += " or --lr-warmup-fraction"
            yield f"{flag} {value} does not go with {base}; use {fitting}"


def warm_up(config: RunConfig, world_size: int) -> Iterator[str]:
    """The warm-up is said once and ends before the decay."""
    lr, t = config.learning_rate, config.train
    explicit = {
        "--lr-warmup-iters": lr.lr_warmup_iters,
        "--lr-warmup-samples": lr.lr_warmup_samples,
    }
    if lr.lr_warmup_fraction is not None:
        for flag, value in explicit.items():
            if value:
                yield (
                    f"--lr-warmup-fraction {lr.lr_warmup_fraction:g} and {flag} {value} exclude "
                    "each other; give one"
                )
        return
    unit, warm = "samples", lr.lr_warmup_samples
    decay = lr.lr_decay_samples or t.samples_asked
    if t.train_iters is not None:
        unit, decay, warm = "iters", lr.lr_decay_iters or t.train_iters, lr.lr_warmup_iters
    if decay is not None and warm >= decay:
        yield (
            f"--lr-warmup-{unit} {warm} must be below the decay's {decay} {unit} "
            f"(--lr-decay-{unit}, or --train-{unit})"
        )


def stable_decay(config: RunConfig, world_size: int) -> Iterator[str]:
    """WSD names the length of its final decay, and only WSD does."""
    lr, t = config.learning_rate, config.train
    unit = "samples" if t.train_samples is not None or t.train_epochs is not None else "iters"
    wsd = lr.lr_wsd_decay_samples if unit == "samples" else lr.lr_wsd_decay_iters
    if lr.lr_decay_style != "WSD":
        for flag, value in (
            ("--lr-wsd-decay-iters", lr.lr_wsd_decay_iters),
            ("--lr-wsd-decay-samples", lr.lr_wsd_decay_samples),
        ):
            if value is not None:
                yield f"{flag} {value} needs --lr-decay-style WSD; it is {lr.lr_decay_style}"
        return
    if wsd is None:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its final decay"
        return
    decay = (
        lr.lr_decay_samples or t.samples_asked
        if unit == "samples"
        else lr.lr_decay_iters or t.train_iters
    )
    if decay is not None and wsd > decay:
        yield f"--lr-wsd-decay-{unit} {wsd} is longer than the whole decay, {decay} {unit}"


def restarts(config: RunConfig, world_size: int) -> Iterator[str]:
    """Only a cosine starts again."""
    lr = config.learning_rate
    if lr.lr_restarts and lr.lr_decay_style != "cosine":
        yield (
            f"--lr-restarts {lr.lr_restarts} needs --lr-decay-style cosine; it is {lr.lr_decay_style}"
        )
