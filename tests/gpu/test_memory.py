"""The planned memory beside torch.cuda.max_memory_allocated of a real step (CPU twin: tests/planner)."""

import pytest
import torch

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner.memory import PlanInputs, memory
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.tiny import make_batches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MODEL = (
    "--num-layers 12 --hidden-size 1024 --num-attention-heads 16 --vocab-size 32000 --lr 1e-4 "
    "--seq-length 1024 --micro-batch-size 4 --global-batch-size 8 --train-iters 1 --mock-data --bf16"
)
ND = "--hidden-dropout 0 --attention-dropout 0"


@pytest.mark.parametrize(
    "flags",
    [
        ND,
        "",
        f"{ND} --attention-backend unfused",
        f"{ND} --attention-backend unfused --recompute-granularity selective",
        f"{ND} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        f"{ND} --swiglu --normalization RMSNorm --position-embedding-type rope",
    ],
)
def test_the_plan_is_within_a_tenth_of_what_a_gpu_allocates(flags) -> None:
    config = parse(f"{MODEL} {flags}".split()).config
    blueprint = draw_up(config, 1)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    run = assemble(config, blueprint, ParallelContext.serial(torch.device("cuda")))
    batches = make_batches(config, blueprint, 0, 0)
    train_step(run, batches, lr=1e-4, weight_decay=0.01)  # libraries take their workspaces
    torch.cuda.reset_peak_memory_stats()
    train_step(run, batches, lr=1e-4, weight_decay=0.01)
    measured = torch.cuda.max_memory_allocated() - before
    asked = PlanInputs(config.parallel, config.precision, config.train.micro_batch_size)
    (planned,) = memory(blueprint, asked)
    assert planned.allocated == pytest.approx(measured, rel=0.10)
