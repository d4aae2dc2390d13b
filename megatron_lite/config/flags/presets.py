"""Named models as literals, each with the place its numbers are from.

Only the model is set: batch size, learning rate and length of the run stay the user's.  A name
carries the count of the released weights; where a paper's table disagrees with it, a comment says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.model import ModelConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """A model and where its numbers are from; its vocabulary gives way to a tokenizer's."""

    model: ModelConfig
    source: str
    given: tuple[str, ...]
    """Fields of the model that it sets; the others are the flags' defaults."""

    @property
    def values(self) -> Mapping[str, object]:
        """section.field -> value."""
        return {f"model.{name}": getattr(self.model, name) for name in self.given}


def _preset(source: str, *, sequence: int, **fields: object) -> Preset:
    values = {"seq_length": sequence, "max_position_embeddings": sequence} | fields
    return Preset(ModelConfig(**values), source, tuple(values))  # type: ignore[arg-type]


def _gpt(
    source: str, layers: int, hidden: int, heads: int, *, sequence: int,
    vocabulary: int = 50257, **more: object,
) -> Preset:  # fmt: skip
    return _preset(
        source, sequence=sequence, num_layers=layers, hidden_size=hidden,
        num_attention_heads=heads, vocab_size=vocabulary, **more,
    )  # fmt: skip


def _llama(
    source: str, layers: int, hidden: int, heads: int, *, ffn: int, sequence: int,
    vocabulary: int, groups: int | None = None, tied: bool = False, **more: object,
) -> Preset:  # fmt: skip
    """RMSNorm, SwiGLU, rotary positions, no bias, no dropout; groups: key/value heads, if fewer."""
    grouped = {} if groups is None else {"group_query_attention": True, "num_query_groups": groups}
    return _gpt(
        source, layers, hidden, heads, sequence=sequence, vocabulary=vocabulary,
        ffn_hidden_size=ffn, swiglu=True, normalization="RMSNorm", add_bias_linear=False,
        position_embedding_type="rope", untie_embeddings_and_output_weights=not tied,
        hidden_dropout=0.0, attention_dropout=0.0, **grouped, **more,
    )  # fmt: skip


def _llama2(layers: int, hidden: int, heads: int, ffn: int, groups: int | None = None) -> Preset:
    source = "arXiv:2307.09288, table 1; config.json of Llama-2"
    return _llama(source, layers, hidden, heads, ffn=ffn, groups=groups,
                  sequence=4096, vocabulary=32000)  # fmt: skip


def _llama3(
    source: str, layers: int, hidden: int, heads: int, ffn: int, *,
    tied: bool = False, stretched: float | None = None,
) -> Preset:  # fmt: skip
    """stretched: its factor from the 8,192 tokens of a sample to 131,072 positions, of 3.1 on."""
    scaled: dict[str, object] = {} if stretched is None else {
        "max_position_embeddings": 131072, "rope_scaling_type": "llama3",
        "rope_scaling_factor": stretched, "rope_original_length": 8192,
        "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0,
    }  # fmt: skip
    return _llama(source, layers, hidden, heads, ffn=ffn, groups=8, tied=tied, sequence=8192,
                  vocabulary=128256, rotary_base=500000.0, **scaled)  # fmt: skip


def _qwen25(
    layers: int, hidden: int, heads: int, groups: int, ffn: int, *,
    tied: bool = False, epsilon: float = 1e-6,
) -> Preset:  # fmt: skip
    """The rows of the vocabulary are those of the released table, which holds more than the tokenizer."""
    source = "arXiv:2412.15115, table 1; config.json of Qwen2.5"
    return _llama(
        source, layers, hidden, heads, ffn=ffn, groups=groups, tied=tied, sequence=32768,
        vocabulary=151936 if tied else 152064, rotary_base=1e6, norm_epsilon=epsilon,
        add_qkv_bias=True,
    )  # fmt: skip


def _qwen3(layers: int, hidden: int, heads: int, ffn: int, *, tied: bool = False) -> Preset:
    source = "arXiv:2505.09388, table 1; config.json of Qwen3-Base"
    return _llama(
        source, layers, hidden, heads, ffn=ffn, groups=8, tied=tied, sequence=32768,
        vocabulary=151936, rotary_base=1e6, norm_epsilon=1e-6, kv_channels=128, qk_layernorm=True,
    )  # fmt: skip


_GPT2 = "Radford et al. 2019, table 2"
_GPT3 = "arXiv:2005.14165, table 2.1"
_BABY = "github.com/DLLXW/baby-llama2-chinese"
_LLAMA32 = "config.json of Llama-3.2"

PRESETS: Mapping[str, Preset] = {
    "gpt2-124m": _gpt(_GPT2, 12, 768, 12, sequence=1024),
    "gpt2-355m": _gpt(_GPT2, 24, 1024, 16, sequence=1024),
    "gpt2-774m": _gpt(_GPT2, 36, 1280, 20, sequence=1024),
    "gpt2-1.5b": _gpt(_GPT2, 48, 1600, 25, sequence=1024),
    "gpt3-125m": _gpt(_GPT3, 12, 768, 12, sequence=2048),
    "gpt3-350m": _gpt(_GPT3, 24, 1024, 16, sequence=2048),
    "gpt3-760m": _gpt(_GPT3, 24, 1536, 16, sequence=2048),
    # the table says 24 heads of 128 at width 2048; only 16 give its 1.3 B parameters
    "gpt3-1.3b": _gpt(_GPT3, 24, 2048, 16, sequence=2048),
    "gpt3-2.7b": _gpt(_GPT3, 32, 2560, 32, sequence=2048),
    "gpt3-6.7b": _gpt(_GPT3, 32, 4096, 32, sequence=2048),
    # the table says 5140, which 40 heads of 128 do not make
    "gpt3-13b": _gpt(_GPT3, 40, 5120, 40, sequence=2048),
    "gpt3-175b": _gpt(_GPT3, 96, 12288, 96, sequence=2048),
    "llama2-7b": _llama2(32, 4096, 32, 11008),
    "llama2-13b": _llama2(40, 5120, 40, 13824),
    "llama2-70b": _llama2(80, 8192, 64, 28672, groups=8),
    "llama3-8b": _llama3("config.json of Meta-Llama-3-8B", 32, 4096, 32, 14336),
    "llama3-70b": _llama3("config.json of Meta-Llama-3-70B", 80, 8192, 64, 28672),
    "llama3-405b": _llama3(
        "arXiv:2407.21783, table 3; config.json of Llama-3.1-405B", 126, 16384, 128, 53248,
        stretched=8.0,
    ),
    "llama3.2-1b": _llama3(_LLAMA32, 16, 2048, 32, 8192, tied=True, stretched=32.0),
    "llama3.2-3b": _llama3(_LLAMA32, 28, 3072, 24, 8192, tied=True, stretched=32.0),
    "mistral-7b": _llama(
        "arXiv:2310.06825, table 1; config.json of Mistral-7B-v0.1", 32, 4096, 32, ffn=14336,
        groups=8, sequence=8192, vocabulary=32000, max_position_embeddings=32768,
        window_size="4095,0",  # 4096 tokens with its own
    ),
    "qwen2.5-0.5b": _qwen25(24, 896, 14, 2, 4864, tied=True),
    "qwen2.5-1.5b": _qwen25(28, 1536, 12, 2, 8960, tied=True),
    "qwen2.5-3b": _qwen25(36, 2048, 16, 2, 11008, tied=True),
    "qwen2.5-7b": _qwen25(28, 3584, 28, 4, 18944),
    "qwen2.5-14b": _qwen25(48, 5120, 40, 8, 13824, epsilon=1e-5),
    "qwen2.5-32b": _qwen25(64, 5120, 40, 8, 27648, epsilon=1e-5),
    "qwen2.5-72b": _qwen25(80, 8192, 64, 8, 29568, epsilon=1e-5),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),
    "macrogpt-1.3b": _llama(
        "MacroGPT-Pretrain, config_macrogpt_1b3_float32.json", 32, 1024, 32, ffn=12288,
        sequence=2048, vocabulary=64076,
    ),
    # called 92M where it is from: there the tied table is counted twice
    "baby-llama-58m": _llama(
        _BABY, 8, 512, 8, ffn=1376, sequence=512, vocabulary=64793, tied=True
    ),
    "baby-llama-218m": _llama(
        _BABY, 12, 1024, 8, ffn=2752, sequence=1024, vocabulary=64793, tied=True
    ),
    "gpt-from-zero-300m": _gpt(
        "github.com/CPSparrow/GPT-from-Zero", 24, 1024, 16, sequence=256, vocabulary=32768
    ),
    "open-gpt-6.8m": _gpt(
        "Open GPT Training: a nanoGPT of --n_layer=2 --n_head=2 --n_embd=128", 2, 128, 2,
        sequence=64, vocabulary=50304, layernorm_bias=False, add_bias_linear=False, gelu="erf",
    ),
}  # fmt: skip
"""Preset name -> what it sets."""


def preset(name: str) -> Mapping[str, object]:
    """The values of a preset; ConfigError with a suggestion for an unknown name."""
    if name in PRESETS:
        return PRESETS[name].values
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"--preset {name}: no such preset; {hint}there are {', '.join(PRESETS)}")


def list_presets() -> str:
    """One line per preset, for --list-presets."""
    lines = [
        f"{'preset':<20}{'layers':>8}{'hidden':>8}{'heads':>8}{'sequence':>10}{'vocabulary':>12}"
        "  source"
    ]
    for name, row in PRESETS.items():
        m = row.model
        lines.append(
            f"{name:<20}{m.num_layers:>8}{m.hidden_size:>8}{m.num_attention_heads:>8}"
            f"{m.seq_length:>10}{m.vocab_size:>12}  {row.source}"
        )
    return "\n".join(lines)
