"""Which implementation of each op runs here, why the others do not, and how fast they are.

python tools/kernels.py                                   for this machine, in fp32
python tools/kernels.py --bf16 --torch-compile --kernel liger    with flags of tools/pretrain_gpt.py
python tools/kernels.py --bench --op rms_norm swiglu      measured, forward and backward, against the reference
python tools/kernels.py --bench --preset gpt2-124m --bf16 --micro-batch-size 4 --json    at a model's sizes
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from megatron_lite.config.errors import ConfigError, all_together
from megatron_lite.config.exit import ToolParser, run_tool
from megatron_lite.config.extensions import add_extend_flag, extend
from megatron_lite.config.flags.parser import ParsedFlags, parse
from megatron_lite.config.rules.table import model_problems
from megatron_lite.config.sections.model import ModelConfig
from megatron_lite.config.sections.run import RunConfig
from megatron_lite.kernels.compiled import Compiler
from megatron_lite.kernels.examples import EXAMPLES, Sizes
from megatron_lite.kernels.on_request import ON_REQUEST, rows_of
from megatron_lite.kernels.table import TABLE, Choice, Implementation, Need
from megatron_lite.layers.attention import attention_need, choose_attention
from megatron_lite.layers.choosing import chosen, require_known
from megatron_lite.layers.contexts import StageContext
from megatron_lite.parallel.context import ParallelContext

_SMALL = ModelConfig(num_layers=1, hidden_size=256, num_attention_heads=4, seq_length=256,
                     vocab_size=4096, hidden_dropout=0.1, attention_dropout=0.0)  # fmt: skip
"""Whose sizes are measured where the flags name no model."""


_COMPILED = ", compiled"
"""Behind the name of a row that --torch-compile compiles."""


def main() -> int:
    """Read the flags, look at every row, print."""
    own, flags = _parser().parse_known_args()
    extend(own.extend)
    parsed = parse(flags)
    parsed = parsed.on(parsed.config.train.world_size or parsed.config.parallel.ranks_per_sample)
    config = parsed.config
    require_known(config.precision.kernel)
    context, measured_at = _context(parsed, own), None
    if own.bench:
        measured_at = _sizes(context, config, own)
    ops = own.op or list(TABLE)
    unknown = [op for op in ops if op not in TABLE]
    if unknown:
        raise ConfigError(f"--op {', '.join(unknown)}: there are {', '.join(TABLE)}")
    report = {
        "device": own.device,
        "dtype": config.precision.name,
        "sizes": None if measured_at is None else _in_numbers(measured_at),
        "ops": [
            _op(_look_up(op, context, config.data.reset_attention_mask), measured_at, own.seconds)
            for op in ops
        ],
    }
    print(json.dumps(report, indent=1) if own.json else "\n".join(_text(report)))
    return 0


def _parser() -> ToolParser:
    parser = ToolParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda", "meta"], help="what to choose for, and to measure on",
    )  # fmt: skip
    parser.add_argument(
        "--capability", type=_capability, default=(9, 0), metavar="MAJOR.MINOR",
        help="of the GPU, where none is here (9.0 by default: an H100)",
    )  # fmt: skip
    parser.add_argument("--op", nargs="+", help="only these")
    parser.add_argument("--bench", action="store_true", help="measure every row that can run")
    parser.add_argument("--seconds", type=float, default=0.2, help="for which a row is measured")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_extend_flag(parser)
    return parser


def _capability(text: str) -> tuple[int, int]:
    major, separator, minor = text.partition(".")
    if not (separator and major.isdigit() and minor.isdigit()):
        raise ArgumentTypeError(f"{text!r} is no capability such as 9.0")
    return int(major), int(minor)


def _model(parsed: ParsedFlags) -> ModelConfig:
    """The one that the flags name, or a small one with what they say of it."""
    model = parsed.config.model
    if model.num_layers > 0:
        model = replace(model, vocab_size=model.vocab_size or _SMALL.vocab_size)
    else:
        asked = [f.name for f in fields(model) if parsed.origin[f"model.{f.name}"] != "default"]
        model = replace(_SMALL, **{name: getattr(model, name) for name in asked})
    if problems := model_problems(model):
        raise all_together(problems, "with the model")
    return model


def _context(parsed: ParsedFlags, own: Namespace) -> StageContext:
    """What the layers of one rank would choose with, on a device that need not be here."""
    ctx = replace(ParallelContext.serial(), device=torch.device(own.device))
    config, model = parsed.config, _model(parsed)
    assert model.vocab_size is not None
    elsewhere = own.device == "cuda" and not torch.cuda.is_available()
    return StageContext(
        model, ctx, model.vocab_size, model.vocab_size, precision=config.precision,
        capability=own.capability if elsewhere else None,
        compiler=Compiler() if config.precision.compiles(on_gpu=own.device == "cuda") else None,
    )  # fmt: skip


def _sizes(context: StageContext, config: RunConfig, own: Namespace) -> Sizes:
    if own.device == "meta" or (own.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--bench --device {own.device}: there is nothing to measure on; use cpu")
    if not 0.0 < own.seconds < math.inf:
        raise ConfigError(f"--seconds {own.seconds:g} must be above 0 and finite")
    model = context.model
    assert model.vocab_size is not None
    return Sizes(
        tokens=model.seq_length, samples=config.train.micro_batch_size, hidden=model.hidden_size,
        heads=model.num_attention_heads, kv_heads=model.num_kv_heads, head_size=model.head_size,
        ffn=model.ffn_size, vocabulary=model.vocab_size, dropout=model.hidden_dropout,
        window=model.window, documents=4 if config.data.reset_attention_mask else 1,
        device=context.ctx.device, dtype=context.dtype,
    )  # fmt: skip


def _in_numbers(sizes: Sizes) -> dict[str, object]:
    named = {name: getattr(sizes, name) for name in Sizes.__dataclass_fields__}
    return {name: value for name, value in named.items() if isinstance(value, int | float)}


class _Looked(NamedTuple):
    """An op, what a layer would run of it, what its rows were asked, and what compiles them."""

    op: str
    choice: Choice
    need: Need
    compiler: Compiler | None


def _look_up(op: str, context: StageContext, segments: bool) -> _Looked:
    if op == "attention":
        need = attention_need(context, training=True, segments=segments)
        choice = choose_attention(context, training=True, segments=segments)
    else:
        need = context.need()
        choice = chosen(op, need, context.precision.kernel)
    compiles = context.compiler is not None and choice.implementation.fusible
    return _Looked(op, choice, need, context.compiler if compiles else None)


def _op(found: _Looked, sizes: Sizes | None, seconds: float) -> dict[str, Any]:
    """All rows of it, measured where there are sizes."""
    op = found.op
    ways = [(row, row.run, "") for row in rows_of(op)]
    if found.compiler is not None:
        row = found.choice.implementation
        ways.insert(0, (row, found.compiler.piece(op, row.run, row.uncompiled), _COMPILED))
    said = [_row(row, compiled, found) for row, _, compiled in ways]
    if sizes is not None and op in EXAMPLES:
        for (_, run, _), of in zip(ways, said, strict=True):
            if of["reason"] is None:
                of["milliseconds"] = 1e3 * _seconds(run, EXAMPLES[op](sizes), sizes, seconds)
        reference = next(of["milliseconds"] for of in said if of["name"] == "reference")
        for of in said:
            if of["milliseconds"] is not None:
                of["speed"] = reference / of["milliseconds"]
    runs = next(of["name"] for of in said if of["runs"])
    return {"op": op, "runs": runs, "why": found.choice.why, "rows": said}


def _row(row: Implementation, compiled: str, found: _Looked) -> dict[str, Any]:
    reason = row.usable(found.need)
    if row.for_masks and not (found.need.segments or found.need.window):
        reason = "is for documents (--reset-attention-mask) and windows (--window-size)"
    chosen_one = row.name == found.choice.implementation.name
    return {
        "name": row.name + compiled,
        "runs": chosen_one and bool(compiled) == (found.compiler is not None),
        "on_request": row in ON_REQUEST.get(found.op, ()),
        "reason": reason,
        "milliseconds": None,
        "speed": None,
    }


def _seconds(run: Callable[..., Any], inputs: list[Any], sizes: Sizes, limit: float) -> float:
    """The median of forward and backward, for as long as the limit says, at least three times."""
    needed = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def once() -> None:
        found = run(*inputs)
        results = [y for y in (found if isinstance(found, tuple) else (found,))]
        if needed:
            torch.autograd.grad(results, needed, [torch.ones_like(y) for y in results],
                                allow_unused=True)  # fmt: skip
        if sizes.device.type == "cuda":
            torch.cuda.synchronize()  # waits for the device

    once()  # what is compiled or tuned is so now
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < limit:
        before = time.perf_counter()
        once()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _text(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['device']}, {report['dtype']}: what runs of each op, and what else there is"
    if report["sizes"] is not None:
        sizes = ", ".join(f"{name} {value}" for name, value in report["sizes"].items())
        yield f"milliseconds of forward and backward, times as fast as the reference; {sizes}"
    for op in report["ops"]:
        for n, row in enumerate(op["rows"]):
            name = op["op"] if n == 0 else ""
            yield f"{name:<24}{row['name']:<22}{_said(op['op'], row)}".rstrip()


def _said(op: str, row: dict[str, Any]) -> str:
    """`runs`, `no (why)`, or how it is asked for; and how fast it was."""
    if row["runs"]:
        state = "runs"
    elif row["reason"] is not None:
        state = f"no ({row['reason']})"
    elif row["on_request"]:
        state = f"--kernel {op}={row['name']}"
    else:
        state = "can run"
    if row["milliseconds"] is None:
        return state
    return f"{state:<28}{row['milliseconds']:>10.3f} ms{row['speed']:>8.2f} x"


def start() -> NoReturn:
    """Run it, and end the process with its exit code."""
    sys.exit(run_tool(main, results=True))


if __name__ == "__main__":
    start()
