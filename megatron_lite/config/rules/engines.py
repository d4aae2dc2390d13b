"""Rules about --engine: what another library's engine does not run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.deepspeed.passed import DEEPSPEED, read_passed
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.param_groups import optimizers_asked_for
from megatron_lite.config.sections.run import RunConfig

_ITS_OPTIMIZERS = ("adam", "sgd")
_WAY_OUT = "drop --engine, or"


def deepspeed(config: RunConfig, world_size: int) -> Iterator[str]:
    """DeepSpeed's engine shares over data-parallel ranks alone, and has a loss scale of its own."""
    p, o = config.parallel, config.optim
    if p.engine != DEEPSPEED:
        if p.deepspeed_keys:
            keys = p.deepspeed_keys[0]
            yield f"--deepspeed-keys {keys} is about --engine deepspeed; add it, or drop the keys"
        return
    try:
        read_passed(p.deepspeed_keys)
    except ConfigError as error:
        yield str(error)
    for flag, size in (
        ("--tensor-model-parallel-size", p.tp),
        ("--pipeline-model-parallel-size", p.pp),
    ):
        if size > 1:
            yield (
                f"--engine deepspeed with {flag} {size}: its ZeRO shares between data-parallel ranks, the "
                f"layers are whole; {_WAY_OUT} {flag} 1"
            )
    if config.precision.fp16:
        yield (
            "--engine deepspeed with --fp16: DeepSpeed scales the loss and skips steps by itself, which the "
            f"guards here would not hear of; {_WAY_OUT} --bf16"
        )
    if config.precision.bf16 and not p.shares_state:
        yield (
            "--engine deepspeed with --bf16 without ZeRO: DeepSpeed's optimizer for that drifts from its own "
            f"other stages; {_WAY_OUT} --zero-stage 1"
        )
    strange = [name for name in optimizers_asked_for(o) if name not in _ITS_OPTIMIZERS]
    if strange:
        yield (
            f"--engine deepspeed with --optimizer {', '.join(strange)}: DeepSpeed's flat partitions are "
            f"updated by torch's or its own {' and '.join(_ITS_OPTIMIZERS)}; {_WAY_OUT} one of these"
        )
    elif len(set(optimizers_asked_for(o))) > 1:
        yield f"--engine deepspeed has one optimizer for all tensors; {_WAY_OUT} --param-groups without rule="
    if o.moments != ("fp32", "fp32"):
        yield f"--engine deepspeed keeps moments in fp32; {_WAY_OUT} --use-precision-aware-optimizer"
    if o.lisa_layers is not None:
        yield (
            "--engine deepspeed with --lisa-layers: what DeepSpeed trains is chosen once, at its start; "
            f"{_WAY_OUT} --lisa-layers"
        )
    if p.optimizer_cpu_offload and not p.shares_state:
        yield (
            "--engine deepspeed with --optimizer-cpu-offload without ZeRO: DeepSpeed offloads what ZeRO cuts; "
            f"{_WAY_OUT} --zero-stage 1"
        )
    if p.optimizer_cpu_offload and p.on_host < 1.0 and p.zero_stage < 3:
        yield (
            f"--engine deepspeed with --optimizer-offload-fraction {p.on_host:g}: DeepSpeed has a share at "
            f"stage 3 alone; {_WAY_OUT} --optimizer-offload-fraction 1"
        )
    if p.overlap_param_gather:
        yield (
            "--engine deepspeed with --overlap-param-gather: DeepSpeed's step ends with all weights gathered "
            f"(stage 3 gathers by layer); {_WAY_OUT} --overlap-param-gather"
        )
