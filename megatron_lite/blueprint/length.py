"""Where a run ends and how many samples it reads until then; decided here and nowhere else.

--train-iters I     I steps, whatever their sizes
--train-samples S   the whole steps within S; with --step-batch-size-schedule the step that S
                    ends in, too (both as Megatron)
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from megatron_lite.blueprint.batches import BatchSchedule
from megatron_lite.config.sections.train import TrainConfig


class Length(NamedTuple):
    """The steps and samples of a whole run, those before a resume included."""

    iterations: int
    samples: int


class SampleCounts(TypedDict):
    """Samples to provide of each split; as arguments of build_datasets."""

    train_samples: int
    valid_samples: int
    test_samples: int


def run_length(train: TrainConfig, batches: BatchSchedule) -> Length | None:
    """Where the run ends; None where it was not given."""
    if train.train_iters is not None:
        return Length(train.train_iters, batches.samples_after(train.train_iters))
    if train.train_samples is None:
        return None
    iterations = batches.iterations_within(train.train_samples)
    if train.step_batch_size_schedule and batches.samples_after(iterations) < train.train_samples:
        iterations += 1
    return Length(iterations, batches.samples_after(iterations))


def sample_counts(
    train: TrainConfig, batches: BatchSchedule, *, validation_samples: int = 0
) -> SampleCounts:
    """What datasets must hold: all that will be read, and at least what Megatron asks for.

    Megatron's number decides how often the data repeat and so their order: full batches throughout,
    in a ramp as well.  batches: from where the run stands; validation_samples: read before.
    """
    length = run_length(train, batches)
    assert length is not None, "rules.check wants --train-iters or --train-samples"
    full, per_evaluation = batches.final_batch_size, train.eval_iters * batches.final_batch_size
    reads = length.samples
    if train.train_samples is not None:
        reads = max(reads, train.train_samples)
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
    return SampleCounts(train_samples=reads, valid_samples=valid, test_samples=per_evaluation)


def _evaluations(train: TrainConfig, first: int, last: int) -> int:
    """Evaluations after the steps first + 1 to last; one more follows the training."""
    every = train.eval_interval
    return max(0, last // every - first // every) if every else 0
