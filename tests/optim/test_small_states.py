"""Optimizers of small states learn a batch by heart; AdamW ends there at 0.13."""

from __future__ import annotations

import pytest

from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.tiny import context, draw, make_batches, tiny_config

STEPS = 30
ADAFACTOR = {"optim__optimizer": "adafactor"}
PAPER = {"optim__adafactor_relative_step": True, "optim__adafactor_scale_parameter": True}


def loss_after(lr, **changes):
    config = tiny_config(**changes, model__num_layers=2)
    blueprint = draw(config, 1)
    run = assemble(config, blueprint, context(blueprint, 0))
    for _ in range(STEPS):
        batches = make_batches(config, blueprint, 0, 0)
        loss = train_step(run, batches, lr=lr, weight_decay=0.0).loss.item()
    return loss


@pytest.mark.parametrize(
    ("lr", "changes", "most"),
    [
        pytest.param(1e-2, ADAFACTOR, 1.0, id="lr as given"),
        # a hundredth of weights of 0.02 in a step
        pytest.param(1.0, ADAFACTOR | PAPER, 3.8, id="relative step"),
        pytest.param(
            1e-2,
            {"optim__optimizer": "adam8bit", "optim__adam8bit_block_size": 16},
            0.2,
            id="8 bits",
        ),
    ],
)
def test_a_batch_is_learned(lr, changes, most) -> None:
    """From 4.1 for tokens drawn evenly."""
    assert loss_after(lr, **changes) < most
