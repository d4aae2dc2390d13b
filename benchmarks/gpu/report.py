"""What is printed of a case: a table, what was asked and whether it is met, and the kernels."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from benchmarks.gpu.cases import Case
from benchmarks.gpu.turns import Found
from megatron_lite.blueprint.draw_up import draw_up
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.planner.forecast import forecast
from megatron_lite.planner.hardware import Cluster, find_device
from megatron_lite.planner.memory import PlanInputs
from megatron_lite.train.measuring.device import device_peak

LOSS_TOLERANCE = 0.02  # of first losses: bf16 in another order, and rows of padding that one counts
BASELINE_SHARE = 0.97

Verdict = tuple[str, bool]
"""What was asked and found, in words; whether it is met."""


@dataclass(frozen=True)
class Line:
    """One contestant of one case."""

    case: str
    row: str
    tokens_per_second: float | None
    ms_per_step: float | None
    mfu: float | None
    memory_gib: float | None
    waits: int | None
    first_loss: float | None
    note: str = ""


def flops_per_token(case: Case) -> int:
    """Attention as a full square, as Megatron counts; see docs/GLOSSARY.md."""
    return draw_up(parse(case.flags.split()).config, 1).flops_per_token_full


def lines(case: Case, found: Found, device: torch.device) -> list[Line]:
    """The table's rows."""
    peak = device_peak(device)
    flops = flops_per_token(case)
    made = []
    for name in case.rows:
        seen = found[name]
        if isinstance(seen, str):
            made.append(Line(case.key, name, None, None, None, None, None, None, seen))
            continue
        seconds = statistics.median(seen.seconds)
        rate = case.tokens / seconds
        mfu = rate * flops / 1e12 / peak if peak else None
        made.append(
            Line(case.key, name, rate, 1e3 * seconds, mfu, seen.memory_gib, seen.waits,
                 seen.losses[0], _note(case, name, rate))
        )  # fmt: skip
    return made


def _note(case: Case, name: str, rate: float) -> str:
    """Whether a baseline is as fast as it should be; judged on the card its number is of."""
    if name != case.baseline or case.reference is None:
        return ""
    if not torch.cuda.is_available() or "H100" not in torch.cuda.get_device_name():
        return f"not judged here ({case.reference:,.0f} on an H100)"
    slow = rate < BASELINE_SHARE * case.reference
    return f"baseline too slow: {case.reference:,.0f} was measured" if slow else "as fast as known"


def verdicts(case: Case, found: Found, made: list[Line]) -> list[Verdict]:
    """What was asked of this case, in words, and whether it is met."""
    by_name = {line.row: line for line in made}
    out: list[Verdict] = []
    for asked in case.asked:
        one, other = found[asked.row], found[asked.against]
        if isinstance(one, str) or isinstance(other, str):
            continue
        each = [b / a for a, b in zip(one.seconds, other.seconds, strict=True)]
        ratio = statistics.median(each)
        spread = f"{min(each):.3f}-{max(each):.3f}"
        text = f"{asked.row} / {asked.against}: {ratio:.3f} ({spread}), asked {asked.ratio}"
        void = by_name[asked.against].note.startswith("baseline too slow")
        out.append((text + (" - does not count, the baseline is too slow" if void else ""),
                    ratio >= asked.ratio and not void))  # fmt: skip
    compiled = by_name.get("ours, compiled")
    if compiled is not None and compiled.memory_gib is not None and case.most_gib is not None:
        out.append((f"memory {compiled.memory_gib:.1f} GiB, asked at most {case.most_gib}",
                    compiled.memory_gib <= case.most_gib))  # fmt: skip
    if compiled is not None and compiled.mfu is not None and case.least_mfu is not None:
        out.append((f"MFU {compiled.mfu:.1%}, asked {case.least_mfu:.0%}",
                    compiled.mfu >= case.least_mfu))  # fmt: skip
    if compiled is not None and compiled.waits is not None:
        out.append((f"waits for the device per step {compiled.waits}, asked 0", not compiled.waits))
    losses = {
        n: s.losses[0] for n, s in found.items() if not isinstance(s, str) and "dropout" not in n
    }
    spread = max(losses.values()) - min(losses.values())
    out.append((f"first losses within {spread:.4f} of one another, asked {LOSS_TOLERANCE}",
                spread <= LOSS_TOLERANCE))  # fmt: skip
    return out


def planned_ms(case: Case, device: torch.device) -> float | None:
    """What the planner says of our compiled row on this card, in ms; None where it knows no such card."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    try:
        cluster = Cluster(device=find_device(name), world_size=1, devices_per_node=1)
    except ConfigError:
        return None
    config = parse([*case.flags.split(), "--torch-compile"]).config
    asked = PlanInputs.of(
        config.parallel, config.precision, config.train, config.data, on_gpu=device.type == "cuda"
    )
    return 1e3 * forecast(draw_up(config, 1), asked, cluster).rates.step_seconds


def report(case: Case, found: Found, device: torch.device) -> tuple[list[Line], list[Verdict]]:
    """Print one case; returns its rows and verdicts."""
    made = lines(case, found, device)
    print(f"\n{case.key}: {case.title}\n")
    print("| | tokens/s | ms/step | MFU | GiB | waits/step | first loss | |")
    print("|---|---|---|---|---|---|---|---|")
    for line in made:
        cells = [
            _number(line.tokens_per_second, ",.0f"), _number(line.ms_per_step, ".1f"),
            _number(line.mfu, ".1%"), _number(line.memory_gib, ".1f"),
            _number(line.waits, "d"), _number(line.first_loss, ".4f"), line.note,
        ]  # fmt: skip
        print(f"| {line.row} | {' | '.join(cells)} |")
    judged = verdicts(case, found, made)
    planned = planned_ms(case, device)
    ours = next((line for line in made if line.row == "ours, compiled"), None)
    if planned is not None and ours is not None and ours.ms_per_step:
        off = planned / ours.ms_per_step - 1
        judged.append(
            (f"planned step {planned:.1f} ms, {off:+.1%}, asked within 10 %", abs(off) <= 0.10)
        )
    print()
    for text, met in judged:
        print(f"{'met   ' if met else 'MISSED'}  {text}")
    for name, seen in found.items():
        if not isinstance(seen, str) and seen.kernels:
            print(f"\n    {name}: kernels of most time")
            for kernel, share in seen.kernels:
                print(f"    {share:6.1%}  {kernel[:96]}")
    return made, judged


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
