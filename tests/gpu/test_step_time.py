"""The planned step time beside a real step's (CPU twin: tests/planner/test_pieces.py, `make bench-plan`)."""

import time

import pytest
import torch

from megatron_lite.blueprint.devices import short_name
from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner.forecast import forecast
from megatron_lite.planner.hardware import DEVICES, Cluster
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.tiny import make_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MODEL = (
    "--num-layers 12 --hidden-size 768 --num-attention-heads 12 --vocab-size 50257 --lr 1e-4 "
    "--seq-length 1024 --micro-batch-size 16 --global-batch-size 16 --train-iters 1 --mock-data --bf16"
)
ND = "--hidden-dropout 0 --attention-dropout 0"
LLAMA = "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear"
STEPS = 10


@pytest.mark.parametrize("flags", [
    f"{ND} --no-torch-compile", "--no-torch-compile", ND, f"{ND} {LLAMA} --no-torch-compile",
    f"{ND} {LLAMA}",
])  # fmt: skip
def test_the_plan_is_within_a_fifth_of_a_step_on_a_device_that_was_fitted(flags: str) -> None:
    name = short_name(torch.cuda.get_device_name())
    if name not in DEVICES or not DEVICES[name].is_fitted:
        pytest.skip(f"no measured step was fitted on {torch.cuda.get_device_name()}")
    config = parse(f"{MODEL} {flags}".split()).config
    blueprint = draw_up(config, 1)
    run = assemble(config, blueprint, ParallelContext.serial(torch.device("cuda")))
    batches = make_batches(config, blueprint, 0, 0)
    for _ in range(3):  # compiling, workspaces, clocks
        train_step(run, batches, lr=1e-4, weight_decay=0.01)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        train_step(run, batches, lr=1e-4, weight_decay=0.01)
    torch.cuda.synchronize()
    measured = (time.perf_counter() - start) / STEPS
    asked = PlanInputs.of(config.parallel, config.precision, config.train, config.data, on_gpu=True)
    cluster = Cluster(device=DEVICES[name], world_size=1, devices_per_node=1)
    assert forecast(blueprint, asked, cluster).rates.step_seconds == pytest.approx(
        measured, rel=0.2
    )
