"""Published runs as command lines, with what was measured and where it stands.

A run with `calibrates` is one of the third that planner/hardware.py's `sustained` was fitted on;
all others are predictions.  What a source does not say, and what was therefore assumed:
SC21 prints neither micro batches nor chunks: 4 sequences where pp is 1 and 1 elsewhere; the
smallest number of chunks above one that divides a stage's layers.  arXiv:2205.05198 names chunks for
175B and 530B only; 1T follows the same rule, since with one chunk a bubble of 12 % would leave 63 % of
the peak to the rest of the time, more than any A100 run has shown.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

from megatron_lite.blueprint.draw_up import Blueprint, draw_up
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.forecast import Forecast, forecast
from megatron_lite.planner.hardware import Cluster, find_device
from megatron_lite.planner.memory import PlanInputs

SC21 = "arXiv:2104.04473, table 1"
SC21_2 = "arXiv:2104.04473, table 2 (PTD-P)"
K22 = "arXiv:2205.05198, table 5"
BLOOM = "bigscience/bloom 176B, chronicles of the main training: 105.2 s, 149.0 TFLOP/s"
DGXC = "NVIDIA/dgxc-benchmarking, "


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One published measurement; seconds of a step, or TFLOP/s per GPU with full recomputation."""

    name: str
    source: str
    hardware: str
    gpus: int
    flags: str
    seconds: float | None = None
    hardware_tflops: float | None = None
    calibrates: bool = False
    network_gb_s: float | None = None
    """Where the cluster's network is not the device's usual one."""


def plan(run: Run, **device: float) -> Forecast:
    """What we predict for it, with some numbers of the device replaced."""
    blueprint, asked = _drawn(run)
    chosen = dataclasses.replace(find_device(run.hardware), **device)
    if run.network_gb_s is not None:
        chosen = dataclasses.replace(chosen, network_gb_s=run.network_gb_s)
    cluster = Cluster(device=chosen, world_size=run.gpus, devices_per_node=8)
    return forecast(blueprint, asked, cluster)


def error(run: Run, **device: float) -> float:
    """Predicted over measured step time, minus one."""
    predicted = plan(run, **device)
    if run.seconds is not None:
        return predicted.rates.step_seconds / run.seconds - 1
    assert run.hardware_tflops is not None
    return run.hardware_tflops / predicted.rates.tflops_hardware - 1


@cache
def _drawn(run: Run) -> tuple[Blueprint, PlanInputs]:
    # their trainers are not ours, and were not compiled
    flags = f"{run.flags} --train-iters 1 --lr 1e-4 --dry-run --no-torch-compile"
    config = parse(flags.split()).config
    asked = PlanInputs(config.parallel, config.precision, config.train.micro_batch_size)
    return draw_up(config, run.gpus), asked


def gpt(
    layers: int,
    hidden: int,
    heads: int,
    *,
    tp: int,
    pp: int = 1,
    batch: int,
    micro: int = 1,
    seq: int = 2048,
    vocab: int = 51200,
) -> str:
    """Flags that all GPT rows share."""
    return (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} "
        f"--seq-length {seq} --vocab-size {vocab} --tensor-model-parallel-size {tp} "
        f"--pipeline-model-parallel-size {pp} --global-batch-size {batch} "
        f"--micro-batch-size {micro}"
    )  # fmt: skip


FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
OLD = f"--fp16 --attention-backend unfused {FULL}"
CHUNKS = "--num-virtual-stages-per-pipeline-rank"

_TABLE_1 = (
    # parameters, layers, hidden, heads, tp, pp, chunks, GPUs, batch, TFLOP/s per GPU
    (1.7, 24, 2304, 24, 1, 1, 1, 32, 512, 137),
    (3.6, 30, 3072, 32, 2, 1, 1, 64, 512, 138),
    (7.5, 36, 4096, 32, 4, 1, 1, 128, 512, 142),
    (18.4, 40, 6144, 48, 8, 1, 1, 256, 1024, 135),
    (39.1, 48, 8192, 64, 8, 2, 2, 512, 1536, 138),
    (76.1, 60, 10240, 80, 8, 4, 3, 1024, 1792, 140),
    (145.6, 80, 12288, 96, 8, 8, 2, 1536, 2304, 148),
    (310.1, 96, 16384, 128, 8, 16, 2, 1920, 2160, 155),
    (529.6, 105, 20480, 128, 8, 35, 3, 2520, 2520, 163),
    (1008.0, 128, 25600, 160, 8, 64, 2, 3072, 3072, 163),
)


def _sc21(row: tuple[float, ...], calibrates: bool) -> Run:
    size, tflops = row[0], row[-1]
    layers, hidden, heads, tp, pp, chunks, gpus, batch = map(int, row[1:-1])
    flags = gpt(layers, hidden, heads, tp=tp, pp=pp, batch=batch, micro=4 if pp == 1 else 1)
    if chunks > 1:
        flags += f" {CHUNKS} {chunks}"
    return Run(name=f"SC21 {size}B", source=SC21, hardware="a100-80g", gpus=gpus,
               flags=f"{flags} {OLD}", hardware_tflops=tflops, calibrates=calibrates)  # fmt: skip


SC21_RUNS = tuple(_sc21(row, n in (2, 5, 8)) for n, row in enumerate(_TABLE_1))
"""Table 1; the 7.5B, 76.1B and 529.6B rows calibrate."""

SC21_PARAMETERS = tuple(row[0] for row in _TABLE_1)

_TABLE_5 = (
    # name, layers, hidden, heads, pp, chunks, GPUs, batch, micro, full recompute s, present work s
    ("22B", 48, 6144, 64, 1, 1, 8, 4, 4, 1.42, 1.10),
    ("175B", 96, 12288, 96, 8, 3, 64, 64, 1, 18.13, 13.75),
    ("530B", 105, 20480, 128, 35, 3, 280, 280, 1, 49.05, 37.83),
    ("1T", 128, 25600, 160, 64, 2, 512, 512, 1, 94.42, 71.49),
)


def _k22(row: tuple, *, present: bool, calibrates: bool) -> Run:
    name, layers, hidden, heads, pp, chunks, gpus, batch, micro, full, selective = row
    flags = gpt(layers, hidden, heads, tp=8, pp=pp, batch=batch, micro=micro)
    if chunks > 1:
        flags += f" {CHUNKS} {chunks}"
    how = "--sequence-parallel --recompute-granularity selective" if present else FULL
    return Run(name=f"K22 {name} {'present work' if present else 'full recompute'}", source=K22,
               hardware="a100-80g", gpus=gpus,
               flags=f"{flags} --fp16 --attention-backend unfused {how}",
               seconds=selective if present else full, calibrates=calibrates)  # fmt: skip


K22_RUNS = tuple(
    _k22(
        row,
        present=present,
        calibrates=(row[0], present) in (("22B", True), ("530B", False), ("1T", True)),
    )
    for row in _TABLE_5
    for present in (False, True)
)
"""Table 5; 22B and 1T of the present work and 530B with full recomputation calibrate."""

_TABLE_2 = (
    # hidden, layers, heads, pp, chunks, batch, GPUs, TFLOP/s
    (12288, 96, 96, 12, 2, 1536, 384, 153),
    (12288, 96, 96, 12, 2, 1536, 768, 149),
    (12288, 96, 96, 12, 2, 1536, 1536, 141),
    (20480, 105, 128, 35, 3, 2240, 560, 171),
    (20480, 105, 128, 35, 3, 2240, 1120, 167),
    (20480, 105, 128, 35, 3, 2240, 2240, 159),
)
SC21_2_RUNS = tuple(
    Run(name=f"SC21 table 2 {'175B' if h == 12288 else '530B'} {gpus} GPUs", source=SC21_2,
        hardware="a100-80g", gpus=gpus, hardware_tflops=tflops,
        calibrates=(h, gpus) in ((12288, 768), (20480, 2240)),
        flags=f"{gpt(layers, h, a, tp=8, pp=pp, batch=batch)} {CHUNKS} {chunks} {OLD}")
    for h, layers, a, pp, chunks, batch, gpus, tflops in _TABLE_2
)  # fmt: skip
"""Table 2; 175B on 768 and 530B on 2240 GPUs calibrate."""

BLOOM_RUN = Run(
    name="BLOOM 176B", source=BLOOM, hardware="a100-80g", gpus=384, seconds=105.2,
    network_gb_s=6.25,  # Jean Zay: 4 Omni-Path ports of 100 Gb/s for the 8 GPUs of a node
    flags=gpt(70, 14336, 112, tp=4, pp=12, batch=2048, micro=2, vocab=250880)
    + " --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
    "--position-embedding-type none --bf16 --use-distributed-optimizer --hidden-dropout 0 "
    f"--attention-dropout 0 --attention-backend unfused {FULL}",
)  # fmt: skip

_NEMO = (
    "--bf16 --sequence-parallel --use-distributed-optimizer --overlap-param-gather "
    "--hidden-dropout 0 --attention-dropout 0"
)
_NEMOTRON = (
    "--untie-embeddings-and-output-weights --disable-bias-linear --position-embedding-type rope "
    "--group-query-attention --num-query-groups 8"
)


def _h100(
    name: str, source: str, sizes: tuple, flags: str, per_gpu: float, chosen: int
) -> tuple[Run, ...]:
    return tuple(
        Run(name=f"{name} {gpus} GPUs", source=source, hardware="h100", gpus=gpus,
            flags=f"{flags.format(batch=round(gpus * per_gpu))} {_NEMO}", seconds=seconds,
            calibrates=gpus == chosen)
        for gpus, seconds in sizes
    )  # fmt: skip


def _open(
    layers: int, hidden: int, heads: int, tp: int, pp: int, micro: int, seq: int, vocab: int
) -> str:
    text = gpt(
        layers, hidden, heads, tp=tp, pp=pp, batch=987654321, micro=micro, seq=seq, vocab=vocab
    )
    return text.replace("987654321", "{batch}")


H100_RUNS = (
    *_h100("GPT-3 175B", DGXC + "nemo_megatron/README_175b.md (BF16)",
           ((128, 8.309), (256, 8.408), (512, 8.42), (1024, 8.453), (2048, 8.49)),
           f"{_open(96, 12288, 96, 4, 8, 1, 2048, 51200)} {CHUNKS} 12", 2, 512),
    *_h100("Nemotron-4 340B", DGXC + "nemotron/README_340b.md (24.11, BF16)",
           ((256, 4.67), (512, 4.70), (1024, 4.73), (2048, 4.84)),
           f"{_open(96, 18432, 96, 8, 8, 1, 4096, 256000)} {CHUNKS} 12 {_NEMOTRON}", 0.25, 256),
    *_h100("Nemotron-4 15B", DGXC + "nemotron/README_15b.md (BF16)",
           ((16, 2.812), (32, 2.824), (64, 2.845), (128, 2.859), (256, 2.852), (512, 2.875)),
           f"{_open(32, 6144, 48, 4, 1, 4, 4096, 256000)} {_NEMOTRON}", 4, 64),
)  # fmt: skip
"""One size of each model calibrates: three of fifteen."""

_LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--group-query-attention --num-query-groups 8 --untie-embeddings-and-output-weights "
    "--context-parallel-size 2"
)


def _llama(size: str, shape: str, layout: str, rows: tuple[tuple[int, int, float], ...]) -> tuple:
    flags = f"{shape} {_LLAMA} {layout} {_NEMO.replace('--sequence-parallel ', '')}"
    if "tensor" in layout:
        flags += " --sequence-parallel"
    return tuple(
        Run(name=f"Llama 3.1 {size} {gpus} GPUs", hardware="h100", gpus=gpus, seconds=seconds,
            source=f"{DGXC}llama3.1/README_{size.split()[0].lower()}.md (24.09, BF16)",
            flags=f"{flags} --global-batch-size {batch} --micro-batch-size 1")
        for gpus, batch, seconds in rows
    )  # fmt: skip


def _shape(layers: int, hidden: int, heads: int, ffn: int) -> str:
    return (
        f"--num-layers {layers} --hidden-size {hidden} --num-attention-heads {heads} "
        f"--ffn-hidden-size {ffn} --seq-length 8192 --vocab-size 128256"
    )


def _tp_pp(tp: int, pp: int, chunks: int) -> str:
    text = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
    return f"{text} {CHUNKS} {chunks}" if chunks > 1 else text


_405B = (16384, 128, 53248)
LLAMA_RUNS = (
    *_llama("8B", _shape(32, 4096, 32, 14336), "",
            ((8, 128, 12.91), (16, 256, 13.00), (32, 512, 13.05), (64, 1024, 13.08),
             (128, 2048, 13.10))),
    *_llama("70B", _shape(80, 8192, 64, 28672), _tp_pp(4, 4, 5),
            ((64, 128, 14.72), (128, 256, 14.73), (256, 512, 14.8), (512, 1024, 14.89),
             (1024, 2048, 14.92), (2048, 4096, 14.98))),
    *_llama("405B cut to 7 layers", _shape(7, *_405B), _tp_pp(8, 1, 1), ((32, 126, 8.85),)),
    *_llama("405B cut to 21 layers", _shape(21, *_405B), _tp_pp(8, 3, 7), ((96, 126, 8.75),)),
    *_llama("405B cut to 42 layers", _shape(42, *_405B), _tp_pp(8, 3, 7), ((192, 252, 16.93),)),
    *_llama("405B", _shape(126, *_405B), _tp_pp(8, 9, 7),
            ((576, 252, 17.20), (1152, 504, 17.52), (2304, 1008, 17.62))),
)  # fmt: skip
"""None calibrates: the shapes, the length and context parallelism are new to the fit."""

A100_RUNS = (*SC21_RUNS, *K22_RUNS, *SC21_2_RUNS, BLOOM_RUN)
RUNS = (*A100_RUNS, *H100_RUNS, *LLAMA_RUNS)
