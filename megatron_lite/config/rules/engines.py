"""Rules about --engine: what another library's engine does not run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.deepspeed.passed import DEEPSPEED, read_passed
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.param_groups import optimizers_asked_for
from megatron_lite.config.sections.run import RunConfig

ITS_OPTIMIZERS = ("adam", "sgd")
"""Those that DeepSpeed's engine runs; engines/deepspeed/written.py knows their states."""


def deepspeed(config: RunConfig, world_size: int) -> Iterator[str]:
    """DeepSpeed's engine shares over data-parallel ranks alone, and has a loss scale of its own."""
    keys = config.parallel.deepspeed_keys
    if config.parallel.engine != DEEPSPEED:
        if keys:
            yield f"--deepspeed-keys {keys[0]} is about --engine deepspeed; add it, or drop the keys"
        return
    try:
        read_passed(keys)
    except ConfigError as error:
        yield str(error)
    for holds, what, way_out in (*_layout(config), *_update(config)):
        if holds:
            yield f"--engine deepspeed {what}; drop --engine, or {way_out}"


def _layout(config: RunConfig) -> Iterator[tuple[bool, str, str]]:
    """(whether it is asked for, what and why not, what to do instead)."""
    p = config.parallel
    for flag, size in (
        ("--tensor-model-parallel-size", p.tp),
        ("--pipeline-model-parallel-size", p.pp),
    ):
        why = "its ZeRO shares between data-parallel ranks, the layers are whole"
        yield size > 1, f"with {flag} {size}: {why}", f"use {flag} 1"
    yield (
        p.optimizer_cpu_offload and not p.shares_state,
        "with --optimizer-cpu-offload without ZeRO: DeepSpeed offloads what ZeRO cuts",
        "use --zero-stage 1",
    )
    yield (
        p.optimizer_cpu_offload and p.on_host < 1.0 and p.zero_stage < 3,
        f"with --optimizer-offload-fraction {p.on_host:g}: DeepSpeed has a share at stage 3 alone",
        "drop --optimizer-offload-fraction",
    )
    yield (
        p.overlap_param_gather,
        "with --overlap-param-gather: DeepSpeed's step ends with all weights gathered",
        "drop --overlap-param-gather",
    )


def _update(config: RunConfig) -> Iterator[tuple[bool, str, str]]:
    """Likewise."""
    o, precision = config.optim, config.precision
    yield (
        precision.fp16,
        "with --fp16: DeepSpeed scales the loss and skips steps by itself, unheard by the guards",
        "use --bf16",
    )
    yield (
        precision.bf16 and not config.parallel.shares_state,
        "with --bf16 without ZeRO: DeepSpeed's optimizer for that drifts from its own other stages",
        "use --zero-stage 1",
    )
    asked = optimizers_asked_for(o)
    strange = [name for name in asked if name not in ITS_OPTIMIZERS]
    its = " and ".join(ITS_OPTIMIZERS)
    yield (
        bool(strange),
        f"with --optimizer {', '.join(strange)}: flat partitions are updated by torch's or its own {its}",
        "use one of these",
    )
    yield (
        not strange and len(asked) > 1,
        f"with {' and '.join(asked)}: it has one optimizer for all tensors",
        "use --param-groups without rule=",
    )
    yield (
        o.moments != ("fp32", "fp32"),
        "with moments in bf16: it keeps them in fp32",
        "drop --use-precision-aware-optimizer",
    )
    yield (
        o.lisa_layers is not None,
        "with --lisa-layers: what DeepSpeed trains is chosen once, at its start",
        "drop --lisa-layers",
    )
    yield (
        config.lora.lora_rank is not None and config.lora.lora_variant == "dora",
        "with --lora-variant dora: lengths of rows are set after DeepSpeed has copied the weights",
        "use --lora-variant lora",
    )
    yield (
        config.model.rope_scaling_type == "clex",
        "with --rope-scaling-type clex: the gradient of what it learns comes after DeepSpeed's last backward",
        "use another type",
    )
