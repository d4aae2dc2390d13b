"""Named model figures as literals: GPT-2 (Radford 2019, table 2) and GPT-3 (arXiv:2005.14165,
table 2.1).

The names of GPT-2 carry the counts of the released weights (the paper's are smaller).  Only the
model is set: batch size, learning rate and length of the run stay the user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from megatron_lite.config.errors import ConfigError


def _gpt(layers: int, hidden: int, heads: int, *, sequence: int) -> Mapping[str, int]:
    return {
        "model.num_layers": layers,
        "model.hidden_size": hidden,
        "model.num_attention_heads": heads,
        "model.seq_length": sequence,
        "model.max_position_embeddings": sequence,
        "model.vocab_size": 50257,
    }


PRESETS: Mapping[str, Mapping[str, int]] = {
    "gpt2-124m": _gpt(12, 768, 12, sequence=1024),
    "gpt2-355m": _gpt(24, 1024, 16, sequence=1024),
    "gpt2-774m": _gpt(36, 1280, 20, sequence=1024),
    "gpt2-1.5b": _gpt(48, 1600, 25, sequence=1024),
    "gpt3-125m": _gpt(12, 768, 12, sequence=2048),
    "gpt3-350m": _gpt(24, 1024, 16, sequence=2048),
    "gpt3-760m": _gpt(24, 1536, 16, sequence=2048),
    # the table says 24 heads of 128 at width 2048; only 16 give its 1.3 B parameters
    "gpt3-1.3b": _gpt(24, 2048, 16, sequence=2048),
    "gpt3-2.7b": _gpt(32, 2560, 32, sequence=2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, sequence=2048),
    # the table says 5140, which 40 heads of 128 do not make
    "gpt3-13b": _gpt(40, 5120, 40, sequence=2048),
    "gpt3-175b": _gpt(96, 12288, 96, sequence=2048),
}
"""Preset name -> section.field -> value."""


def preset(name: str) -> Mapping[str, int]:
    """The values of a preset; ConfigError with a suggestion for an unknown name."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"--preset {name}: no such preset; {hint}there are {', '.join(PRESETS)}")


def list_presets() -> str:
    """One line per preset, for --list-presets."""
    lines = [f"{'preset':<12}{'layers':>8}{'hidden':>8}{'heads':>8}{'sequence':>10}"]
    for name, values in PRESETS.items():
        layers, hidden, heads, sequence = list(values.values())[:4]
        lines.append(f"{name:<12}{layers:>8}{hidden:>8}{heads:>8}{sequence:>10}")
    return "\n".join(lines)
