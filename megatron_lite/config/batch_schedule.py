"""The text of --step-batch-size-schedule: `0:16 2.4B:320 12B:1536`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lite.config.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_ENTRY = re.compile(r"([0-9]+)(?:\.([0-9]+))?([KMBT]?):([0-9]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class BatchStep:
    """From `tokens` consumed tokens on, a step takes `size` sequences."""

    tokens: int
    size: int


def parse_schedule(text: str) -> tuple[BatchStep, ...]:
    """Entries `tokens:size`, separated by spaces or commas; K, M, B, T are 10^3 ... 10^12.

    Raises ConfigError unless the first threshold is 0, thresholds ascend and sizes are >= 1.
    """
    flag = f"--step-batch-size-schedule {text!r}"
    steps: list[BatchStep] = []
    for entry in re.split(r"[,\s]+", text.strip()):
        found = _ENTRY.fullmatch(entry)
        if found is None or len(entry) > 40:
            raise ConfigError(
                f"{flag}: {entry[:40]!r} is not tokens:size, e.g. 0:16 2.4B:320 12B:1536"
            )
        whole, fraction, unit, size = found.groups()
        fraction = fraction or ""
        # decimal digits, not a float: 2.4B is exactly 2,400,000,000
        scaled = int(whole + fraction) * _UNITS[unit.upper()]
        tokens, rest = divmod(scaled, 10 ** len(fraction))
        if rest:
            raise ConfigError(f"{flag}: {entry!r} is not a whole number of tokens")
        steps.append(BatchStep(tokens, int(size)))
    if steps[0].tokens != 0:
        raise ConfigError(f"{flag}: the first entry must start at 0 tokens, as in 0:16")
    for before, after in zip(steps, steps[1:], strict=False):
        if after.tokens <= before.tokens:
            raise ConfigError(
                f"{flag}: thresholds must ascend, but {after.tokens} follows {before.tokens}"
            )
    for step in steps:
        if not 1 <= step.size < 2**31:
            raise ConfigError(f"{flag}: batch size {step.size} must be between 1 and 2^31 - 1")
    return tuple(steps)
