"""One record of every kind."""

from __future__ import annotations

import math

from megatron_lite.telemetry.record import EvaluationRecord, SaveRecord, StepRecord, TimingRecord

STEP = StepRecord(
    iteration=5,
    train_iters=10,
    samples=7680,
    tokens=15728640,
    seconds_per_iteration=344.65612,
    learning_rate=2.2704e-05,
    weight_decay=0.1,
    global_batch_size=1536,
    loss=11.0007812,
    loss_scale=4294967296.0,
    grad_norm=1.23456,
    seq_length=2048,
    skipped_iterations=2,
    nan_iterations=0,
    samples_per_second=4.45661,
    tokens_per_second_per_gpu=142.6117,
    tflops_per_gpu=153.3816,
    tflops_causal=151.44,
    mfu=0.49161,
    data_seconds=0.01,
    world_size=64,
    eta_seconds=1723.3,
)
EVALUATION = EvaluationRecord(iteration=5, split="test", samples=80, loss=2.5, seconds=0.5)
TIMING = TimingRecord(
    iteration=5, samples=80, smallest={"optimizer": 0.5}, largest={"optimizer": math.inf}
)
SAVE = SaveRecord(iteration=5, bytes=123, seconds=0.1, folder="f")
