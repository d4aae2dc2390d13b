"""Where a run ends and how many samples it reads until then; decided here and nowhere else.

--train-iters I     I steps, whatever their sizes
--train-samples S   the whole steps within S; with --step-batch-size-schedule the step that S
                    ends in, too (both as Megatron)
--train-epochs N    N times the samples of an epoch, and what fills the last step
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from megatron_lite.blueprint.batches import BatchSchedule
from megatron_lite.config.sections.train import TrainConfig


class Length(NamedTuple):
    """The steps and samples of a whole run, those before a resume included."""

    iterations: int
    samples: int


class _Counts(TypedDict):
    train_samples: int
    valid_samples: int
    test_samples: int


class SampleCounts(_Counts, total=False):
    """Samples to provide of each split; as arguments of build_datasets.

    repeats: several files without weights are read as often as it takes; left out where each is read once.
    """

    repeats: bool


def run_length(train: TrainConfig, batches: BatchSchedule) -> Length | None:
    """Where the run ends; None where it was not given."""
    if train.train_iters is not None:
        return Length(train.train_iters, batches.samples_after(train.train_iters))
    asked = train.samples_asked
    if asked is None:
        return None
    iterations = batches.iterations_within(asked)
    filled = train.step_batch_size_schedule or train.train_epochs
    if filled and batches.samples_after(iterations) < asked:
        iterations += 1
    return Length(iterations, batches.samples_after(iterations))


def told_of_epochs(train: TrainConfig, length: Length | None) -> list[str]:
    """What --train-epochs comes to, in a line; none without, or where an epoch is not counted."""
    if train.train_epochs is None or train.epoch_samples is None or length is None:
        return []
    each, asked = train.epoch_samples, train.train_epochs * train.epoch_samples
    fill = length.samples - asked
    rest = f", the last of them filled with {fill} of one epoch more" if fill > 0 else ""
    return [
        f"--train-epochs {train.train_epochs}: an epoch is {each} samples of --seq-length, so {asked} in "
        f"{length.iterations} iterations{rest}"
    ]


def sample_counts(
    train: TrainConfig, batches: BatchSchedule, *, validation_samples: int = 0
) -> SampleCounts:
    """What datasets must hold: all that will be read, and at least what Megatron asks for.

    Megatron's number decides how often the data repeat and so their order: full batches throughout,
    in a ramp as well.  batches: from where the run stands; validation_samples: read before.
    """
    length = run_length(train, batches)
    assert length is not None, "rules.check wants a length, and its epochs are counted"
    full, per_evaluation = batches.final_batch_size, train.eval_iters * batches.final_batch_size
    reads = length.samples
    if train.samples_asked is not None:
        reads = max(reads, train.samples_asked)
    else:
        reads += max(0, length.iterations * full - batches.anew().samples_after(length.iterations))
    if train.skip_train:
        return SampleCounts(
            train_samples=0, valid_samples=per_evaluation, test_samples=per_evaluation
        )
    valid = (_evaluations(train, 0, length.iterations) + 1) * per_evaluation
    if per_evaluation:
        ahead = _evaluations(train, batches.done[0], length.iterations) + 1
        valid = max(valid, validation_samples + ahead * per_evaluation)
    counts = SampleCounts(train_samples=reads, valid_samples=valid, test_samples=per_evaluation)
    if train.train_epochs is not None:
        counts["repeats"] = True
    return counts


def _evaluations(train: TrainConfig, first: int, last: int) -> int:
    """Evaluations after the steps first + 1 to last; one more follows the training."""
    every = train.eval_interval
    return max(0, last // every - first // every) if every else 0
