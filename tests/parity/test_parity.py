"""Parallel equals serial: loss within 1e-5, gradient norm within 1e-4, in every layout."""

import functools

import pytest

from tests.parity.layouts import LAYOUTS, train_layout
from tests.support.spawn import spawn

STEPS = 5
DROPOUT = {"model__hidden_dropout": 0.1}


@functools.cache
def serial(extra: tuple, ragged: bool):
    return spawn(train_layout, 1, dict(extra), STEPS, ragged)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_losses_with_dropout_and_ragged_masks_equal_the_serial_run(layout):
    reference = serial(tuple(DROPOUT.items()), True)
    for curve in spawn(train_layout, layout.ranks, DROPOUT | layout.changes, STEPS, True):
        assert curve.losses == pytest.approx(reference.losses, rel=1e-5)
        assert curve.grad_norms == pytest.approx(reference.grad_norms, rel=1e-4)


def test_the_comparison_would_notice_a_lost_microbatch():
    """The table can fail: another global batch gives other losses."""
    reference = serial(tuple(DROPOUT.items()), True)
    other = serial((*DROPOUT.items(), ("train__global_batch_size", 6)), True)
    assert other.losses != pytest.approx(reference.losses, rel=1e-5)
