"""The planned memory beside what real layers and real training steps keep alive on the CPU."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.distributed._tools.mem_tracker import MemTracker

from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.blueprint.figure.transformer import figure_of
from megatron_lite.blueprint.recompute import RecomputePlan
from megatron_lite.config.flags.parser import parse
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.kernels.segments import Segments
from megatron_lite.layers.contexts import ForwardContext, StageContext
from megatron_lite.layers.dropout import step_dropout
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planner.activations import block_items, shared_mask_bytes, stage_bytes
from megatron_lite.planner.memory import PlanInputs, memory
from megatron_lite.train.assemble import assemble
from megatron_lite.train.step import train_step
from tests.support.memory import Alive, compare
from tests.support.models import fill
from tests.support.spawn import spawn
from tests.support.tiny import make_batches

SMALL = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --vocab-size 1000 --seq-length 128 "
    "--lr 1e-4 --train-iters 1 --mock-data"
)
ND = "--hidden-dropout 0 --attention-dropout 0"
UNFUSED = "--attention-backend unfused"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
LLAMA = "--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear"
GROUPED = "--group-query-attention --num-query-groups 2"
DOCUMENTS = "--reset-attention-mask"

LAYERS = [
    "--micro-batch-size 2",
    "--micro-batch-size 1",
    f"--micro-batch-size 1 {ND}",
    f"--micro-batch-size 2 {ND}",
    "--micro-batch-size 2 --bf16",
    f"--micro-batch-size 2 --bf16 {ND}",
    f"--micro-batch-size 2 --bf16 {ND} {UNFUSED}",
    f"--micro-batch-size 2 --bf16 {ND} {UNFUSED} --no-attention-softmax-in-fp32",
    "--micro-batch-size 2 --bf16 --hidden-dropout 0",
    "--micro-batch-size 2 --bf16 --attention-dropout 0",
    "--micro-batch-size 2 --fp16 --apply-query-key-layer-scaling",
    f"--micro-batch-size 2 --bf16 {ND} {LLAMA} {GROUPED}",
    f"--micro-batch-size 2 {ND} {LLAMA}",
    f"--micro-batch-size 1 --bf16 {GROUPED}",
    "--micro-batch-size 1 --bf16 --position-embedding-type rope",
    "--micro-batch-size 2 --bf16 --position-embedding-type rope",
    f"--micro-batch-size 2 {SELECTIVE} core_attn",
    f"--micro-batch-size 2 --bf16 {ND} {SELECTIVE} core_attn",
    f"--micro-batch-size 2 {ND} {SELECTIVE} mlp",
    f"--micro-batch-size 2 --bf16 {SELECTIVE} layernorm",
    f"--micro-batch-size 2 --bf16 {ND} {LLAMA} {SELECTIVE} layernorm mlp core_attn",
    f"--micro-batch-size 2 --bf16 {ND} {DOCUMENTS}",
    f"--micro-batch-size 2 {ND} {UNFUSED} {DOCUMENTS}",
    f"--micro-batch-size 2 --bf16 {ND} {SELECTIVE} core_attn {DOCUMENTS}",
    f"--micro-batch-size 2 --bf16 {ND} --window-size 15,0",
    f"--micro-batch-size 2 --bf16 {ND} --s2-attention",
    f"--micro-batch-size 1 --bf16 {ND} --s2-attention --position-embedding-type rope",
    f"--micro-batch-size 2 {ND} {LLAMA} {GROUPED} --s2-attention",
    f"--micro-batch-size 2 {ND} {LLAMA} {UNFUSED} --s2-attention --s2-group-size 32",
    f"--micro-batch-size 2 --bf16 {ND} --s2-attention {DOCUMENTS}",
    f"--micro-batch-size 2 --bf16 {ND} --parallel-residual",
    f"--micro-batch-size 2 --bf16 {ND} {LLAMA} {GROUPED} --qk-layernorm",
    f"--micro-batch-size 2 {ND} {LLAMA} {GROUPED} --qk-layernorm",
    f"--micro-batch-size 2 --bf16 {ND} --qk-layernorm",
    f"--micro-batch-size 2 {ND} {LLAMA} {UNFUSED} --window-size 15,0",
]


def kept_by(flags: str, num_layers: int) -> int:
    """Bytes alive between forward and backward of so many blocks."""
    config = parse(f"{SMALL} {flags}".split()).config
    context = StageContext(
        model=config.model, ctx=ParallelContext.serial(), padded_vocab_size=1024, vocab_size=1000,
        precision=config.precision, recompute=RecomputePlan.from_config(config.parallel),
        compiler=Compiler("aot_eager") if config.precision.compiles(on_gpu=False) else None,
    )  # fmt: skip
    blocks = Decoder(context, range(num_layers), has_embedding=False, has_head=False)
    fill(blocks)
    samples, tokens = config.train.micro_batch_size, config.model.seq_length
    x = torch.randn(tokens, samples, config.model.hidden_size).to(context.dtype)
    x.requires_grad_()
    at = ForwardContext(
        samples=torch.arange(samples), index=torch.arange(tokens), training=True,
        dropout=step_dropout(context, 0),
    )  # fmt: skip
    if config.data.reset_attention_mask:
        rows = torch.arange(0, samples * tokens + 1, tokens, dtype=torch.int32)
        at = dataclasses.replace(at, segments=Segments(rows, tokens, samples, tokens))
    if context.compiler is not None:
        return saved_by(blocks, x, at)
    alive = Alive()
    for parameter in blocks.parameters():
        alive.see(parameter.data)
    before = alive.now
    alive.see(x.data)
    with alive:
        y = blocks(x, at)
        edge = get_gradient_edge(y)
        del y
        gc.collect()
        kept = alive.now - before
    assert edge is not None
    return kept


def saved_by(blocks: Decoder, x: torch.Tensor, at: ForwardContext) -> int:
    """Bytes that autograd keeps: no compiled code runs under a mode that sees every operation."""
    weights = {p.untyped_storage()._cdata for p in blocks.parameters()}
    found: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        assert blocks(x, at).requires_grad
    return sum(size for storage, size in found.items() if storage not in weights)


def planned_of(flags: str, num_layers: int) -> float:
    """What the plan says that so many blocks keep."""
    config = parse(f"{SMALL} {flags}".split()).config
    micro, documents = config.train.micro_batch_size, config.data.reset_attention_mask
    sections = (config.model, config.parallel, config.precision)
    layer = figure_of(config.model, 128).layers[0]
    items = block_items(layer, *sections, micro_batch_size=micro, on_gpu=False, segments=documents)
    width = 4 if config.precision.name == "fp32" else 2
    stream = float(config.model.seq_length * micro * config.model.hidden_size * width)
    mask = shared_mask_bytes(*sections, micro_batch_size=micro, on_gpu=False) if documents else 0.0
    return stage_bytes([items] * num_layers, config.parallel, layer_input=stream, shared=mask).kept


@pytest.mark.parametrize("flags", LAYERS)
def test_a_block_keeps_what_the_plan_counts_item_by_item(flags: str) -> None:
    """Within 2 percent, three blocks less one: statistics of norms are the rest."""
    measured = (kept_by(flags, 3) - kept_by(flags, 1)) / 2
    planned = planned_of(flags, 3) - planned_of(flags, 2)
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.ci
@pytest.mark.parametrize(
    "flags", ["--micro-batch-size 2", f"--micro-batch-size 2 --bf16 {LLAMA} {GROUPED}"]
)
def test_so_it_does_of_a_compiled_block(flags: str) -> None:
    """Its pieces traced and cut into forward and backward as for a GPU; nothing but autograd keeps here."""
    flags += " --torch-compile --attention-dropout 0"
    measured = (kept_by(flags, 3) - kept_by(flags, 1)) / 2
    planned = planned_of(flags, 3) - planned_of(flags, 2)
    assert planned == pytest.approx(measured, rel=0.02)
    assert planned < planned_of(flags.replace("--torch-compile", "--no-torch-compile"), 1)


@pytest.mark.parametrize("how", ["", "--bf16", UNFUSED, f"{SELECTIVE} core_attn"])
def test_what_documents_take_on_top_is_counted_to_the_byte(how: str) -> None:
    """A mask for all blocks together, and what each kernel makes of it."""
    plain = f"--micro-batch-size 2 {ND} {how}"
    packed = f"{plain} {DOCUMENTS}"
    assert planned_of(packed, 3) - planned_of(plain, 3) == kept_by(packed, 3) - kept_by(plain, 3)


@pytest.mark.parametrize(("how", "dense"), [("--bf16", False), ("", True), ("--fp16", False)])
def test_a_window_on_a_gpu_takes_nothing_on_top_where_a_fused_kernel_has_it(
    how: str, dense: bool
) -> None:
    kept = []
    for window in ("", "--window-size 15,0"):
        config = parse(f"{SMALL} {ND} {how} {window}".split()).config
        sections = (config.model, config.parallel, config.precision)
        layer = figure_of(config.model, 128).layers[0]
        kept.append(block_items(layer, *sections, micro_batch_size=2, on_gpu=True).core)
    assert (kept[1] > kept[0]) == dense


@pytest.mark.parametrize("how", [
    "", "--recompute-granularity selective",
    "--recompute-granularity selective --recompute-modules core_attn mlp",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
])  # fmt: skip
def test_a_stage_without_layers_keeps_and_recomputes_nothing(how: str) -> None:
    """The embedding or the loss alone, where both count in the split: Llama-3 405B's first stage."""
    config = parse(f"{SMALL} {how}".split()).config
    held = stage_bytes([], config.parallel, layer_input=1e6)
    assert (held.kept, held.again, held.backward) == (0.0, 0.0, 0.0)


# 63 million parameters; activations and optimizer state are of one size
MODEL = (
    "--num-layers 8 --hidden-size 768 --num-attention-heads 8 --vocab-size 8000 --lr 1e-4 "
    "--train-iters 1 --mock-data"
)
UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers"
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers"
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"

CI = [
    # ranks, samples of a step, flags
    (1, 2, ""),
    (1, 2, f"--bf16 {ND}"),
    (1, 2, f"{UNIFORM} 4"),
    (2, 2, f"{TP2} --sequence-parallel --bf16 {ND}"),
    (2, 6, f"{PP2} {ND}"),
    (2, 6, f"{PP2} --bf16 --pipeline-schedule zb-h1"),
    (2, 4, f"--use-distributed-optimizer --bf16 {ND} --ddp-bucket-size 2000000"),
]
GROUPED_LLAMA = f"{ND} {LLAMA} --group-query-attention --num-query-groups 4"
FAMILIES = {
    "mistral": f"{GROUPED_LLAMA} --window-size 63,0",
    "qwen2": f"{GROUPED_LLAMA} --add-qkv-bias",
    "qwen3": f"{GROUPED_LLAMA} --qk-layernorm",
    "gpt_neox": f"{ND} --position-embedding-type rope --rotary-percent 0.25 --parallel-residual "
    "--gelu erf --untie-embeddings-and-output-weights",
}
"""What each family has beyond GPT-2 and Llama, which other rows have."""

SLOW = [
    *((1, 2, flags) for flags in FAMILIES.values()),
    (1, 4, "--bf16"),
    (1, 4, ND),
    (1, 4, f"--bf16 {ND} {LLAMA} --group-query-attention --num-query-groups 4 "
           "--untie-embeddings-and-output-weights"),
    (1, 4, f"{ND} --optimizer sgd"),
    (1, 4, f"{SELECTIVE} core_attn"),
    (1, 4, f"--bf16 {ND} {UNFUSED} {SELECTIVE} core_attn"),
    (1, 4, f"{SELECTIVE} mlp"),
    (1, 4, f"{SELECTIVE} layernorm"),
    (1, 4, f"--bf16 {ND} {LLAMA} {SELECTIVE} core_attn mlp layernorm"),
    (1, 4, f"{UNIFORM} 1"),
    (1, 4, f"--bf16 {UNIFORM} 2"),
    (1, 4, f"{BLOCK} 3"),
    (1, 1, f"--bf16 {ND} {UNFUSED} --seq-length 1024 --micro-batch-size 1"),
    (1, 2, "--fp16 --seq-length 512 --micro-batch-size 1"),
    (2, 4, TP2),
    (2, 4, f"{TP2} --sequence-parallel"),
    (2, 4, f"{TP2} {UNIFORM} 1 --distribute-saved-activations"),
    (2, 4, f"{TP2} --bf16 {UNIFORM} 4 --distribute-saved-activations"),
    (2, 8, f"{PP2}"),
    (2, 8, f"{PP2} --bf16 {UNIFORM} 2"),
    (2, 8, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    (2, 8, f"{PP2} --pipeline-schedule zb-h1"),
    (2, 8, f"{PP2} --pipeline-schedule zb-v"),
    (2, 8, f"{PP2} --pipeline-schedule gpipe"),
    (2, 4, ""),
    (2, 4, "--use-distributed-optimizer --ddp-bucket-size 2000000"),
    (2, 4, "--use-distributed-optimizer --bf16 --ddp-bucket-size 2000000 --overlap-param-gather"),
    (4, 8, f"{TP2} {PP2} --sequence-parallel --bf16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "samples", "flags"),
    [pytest.param(*row, marks=pytest.mark.ci) for row in CI]
    + [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW],
)
def test_the_plan_is_within_a_tenth_of_a_real_step(
    ranks: int, samples: int, flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, gradients and optimizer state to the percent, all else and the sum to a tenth."""
    flags = f"{MODEL} --global-batch-size {samples} {flags}"
    for usual in ("--seq-length 256", "--micro-batch-size 2"):
        if usual.split()[0] not in flags:
            flags += f" {usual}"
    assert draw_up(parse(flags.split()).config, ranks).num_parameters > 50e6
    found = spawn(compare, ranks, flags, deadline=500)
    with capsys.disabled():
        for rank in found:
            shown = " ".join(f"{kind} {off:+.1%}" for kind, off in rank.errors().items())
            print(f"\npp {rank.pp_rank}: {shown}", end="  ")
    for rank in found:
        off = rank.errors()
        assert max(abs(off[kind]) for kind in ("working", "total")) < 0.10
        assert max(abs(off.get(kind, 0.0)) for kind in rank.static) < 0.01


@pytest.mark.ci
def test_torchs_own_memory_tracker_agrees() -> None:
    """It cannot follow modules through several micro batches, so the step has one."""
    step = "--seq-length 256 --micro-batch-size 2 --global-batch-size 2"
    config = parse(f"{MODEL} {step} {SELECTIVE} core_attn".split()).config
    blueprint = draw_up(config, 1)
    run = assemble(config, blueprint, ParallelContext.serial())
    tracker = MemTracker()
    state = [part.data for part in run.engine.state(owned=False)]
    state += [accumulator for _, accumulator in run.engine.accumulators()]
    modules = [stage.module for stage in run.pipeline.stages.values()]
    tracker.track_external(*modules, *state)
    with tracker:
        train_step(run, make_batches(config, blueprint, 0, 0), lr=1e-4, weight_decay=0.01)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    asked = PlanInputs(config.parallel, config.precision, 2, on_gpu=False)
    (planned,) = memory(blueprint, asked)
    assert planned.allocated == pytest.approx(peak, rel=0.10)
