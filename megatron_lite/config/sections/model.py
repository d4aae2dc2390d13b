"""The model's figure: sizes, norm, position, activation, tying."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

WINDOW = re.compile(r"\(?\s*(-1|[0-9]{1,9})\s*,\s*(-1|0)\s*\)?", re.ASCII)
"""--window-size as Megatron takes it; -1 is no bound, which causal attention is on the right."""

SCALING = {
    "rope_scaling_factor": ("linear", "ntk", "dynamic", "yarn", "llama3", "longrope", "clex"),
    "rope_original_length": ("llama3", "dynamic", "yarn", "longrope", "clex"),
    "rope_low_freq_factor": ("llama3",),
    "rope_high_freq_factor": ("llama3",),
    "rope_beta_fast": ("yarn",),
    "rope_beta_slow": ("yarn",),
    "rope_whole_channels": ("yarn",),
    "rope_attention_factor": ("yarn", "longrope"),
    "rope_short_factors": ("longrope",),
    "rope_long_factors": ("longrope",),
    "rope_clex_width": ("clex",),
}
"""Parameters of --rope-scaling-type -> the types that have them."""

BY_LENGTH = frozenset({"dynamic", "longrope", "clex"})
"""Types whose frequencies depend on how long a text is."""

ROTARY = ("rotary_base", "rotary_interleaved", "rope_scaling_type", *SCALING)
"""Fields that are refused without rotary positions."""


def listed_numbers(text: str | None) -> tuple[float, ...] | None:
    """Numbers with commas between, as longrope's factors are written; None where there are none."""
    try:
        found = tuple(float(word) for word in (text or "").split(","))
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies turned queries and keys by (arXiv:2309.00071 § 3.4); weight: DeepSeek's mscale."""
    return 0.1 * weight * math.log(max(factor, 1.0)) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model's sizes and parts."""

    num_layers: int = field(default=0, metadata={"required": True})
    """Transformer blocks."""

    hidden_size: int = field(default=0, metadata={"required": True})
    """Width h of the residual stream."""

    num_attention_heads: int = field(default=0, metadata={"required": True})
    """Query heads n."""

    seq_length: int = field(
        default=0, metadata={"required": True, "aliases": ["--encoder-seq-length"]}
    )
    """Tokens per training sample s."""

    max_position_embeddings: int | None = None
    """Rows of the learned position table; at least --seq-length, which is the default."""

    ffn_hidden_size: int | None = None
    """Feed-forward width f; 4h by default, int(4h * 2/3 / 64) * 64 with --swiglu."""

    kv_channels: int | None = None
    """Size d of one head; h / heads by default."""

    group_query_attention: bool = False
    """Share keys and values between groups of query heads; see --num-query-groups."""

    num_query_groups: int | None = None
    """Key/value heads; equal to --num-attention-heads unless grouped."""

    vocab_size: int | None = None
    """Tokens the tokenizer knows; read from the tokenizer when not given."""

    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this times tp; padded columns take no part."""

    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How tokens know where they are."""

    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""

    window_size: str | None = None
    """LEFT,RIGHT: tokens before and after its own that one sees (Mistral); RIGHT is 0. All by default."""

    s2_attention: bool = False
    """While training, tokens see groups alone, in half of the heads moved by half a group (S2-attention, for
    long texts); in evaluation and in use they see all before them."""

    s2_group_size: int | None = None
    """Tokens of a group of --s2-attention; a quarter of --seq-length by default."""

    rotary_percent: float = 1.0
    """Share of a head's channels that are rotated."""

    rotary_interleaved: bool = False
    """Rotate neighbouring channels of a head together (0 1, 2 3, ...), not one of each of its halves."""

    rope_scaling_type: Literal[
        "none", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope", "clex"
    ] = "none"
    """How rotary positions reach beyond the trained length: `linear` divides them all by the factor, `ntk`
    enlarges the base, `dynamic` the more so the longer a text is, `yarn` and `llama3` divide slow channels
    alone, `longrope` every channel by a number of its own, `clex` learns how channels slow down as texts grow;
    see docs/guides/long-context.md."""

    rope_scaling_factor: float = field(
        default=8.0, metadata={"aliases": ["--yarn-rotary-scaling-factor"]}
    )
    """How many times the trained length --rope-scaling-type aims at."""

    rope_original_length: int = field(
        default=8192, metadata={"aliases": ["--yarn-original-max-position-embeddings"]}
    )
    """llama3, yarn: the trained length, whose share a channel's wavelength is measured as; dynamic, longrope,
    clex: texts beyond it are scaled."""

    rope_low_freq_factor: float = 1.0
    """llama3: channels with fewer turns than this in the trained length are slowed by the whole factor."""

    rope_high_freq_factor: float = 4.0
    """llama3: channels with more turns than this in the trained length stay; between, it goes over."""

    rope_beta_fast: float = field(default=32.0, metadata={"aliases": ["--yarn-beta-fast"]})
    """yarn: channels with more turns than this in the trained length stay; between, it goes over."""

    rope_beta_slow: float = field(default=1.0, metadata={"aliases": ["--yarn-beta-slow"]})
    """yarn: channels with fewer turns than this in the trained length are slowed by the whole factor."""

    rope_whole_channels: bool = field(
        default=True,
        metadata={"aliases": ["--yarn-correction-range-round-to-int"],
                  "aliases_off": ["--no-yarn-correction-range-round-to-int"]},
    )  # fmt: skip
    """yarn: where it begins and ends to go over is rounded to whole channels (not so in gpt-oss)."""

    rope_attention_factor: float | None = None
    """yarn, longrope: what turned queries and keys are multiplied by; by default what the papers derive from
    the factor, 0.1 ln(factor) + 1 and sqrt(1 + ln(factor) / ln(trained length))."""

    rope_short_factors: str | None = None
    """longrope: what each pair of channels is slowed by in texts up to the trained length, commas between."""

    rope_long_factors: str | None = None
    """longrope: the same in longer texts."""

    rope_clex_width: int = 1
    """clex: hidden features of what is learned, in multiples of the rotated channels of a head."""

    normalization: Literal["LayerNorm", "RMSNorm"] = field(
        default="LayerNorm", metadata={"case_insensitive": True}
    )
    """Norm before attention, before the MLP, and at the end."""

    layernorm_bias: bool = True
    """A bias in every LayerNorm; an RMSNorm has none."""

    apply_layernorm_1p: bool = False
    """Norms keep their weight less one and add it again, which is finer near one in 16 bits."""

    qk_layernorm: bool = False
    """A norm over the channels of every head's query and key, before they are turned (Qwen3)."""

    norm_epsilon: float = field(default=1e-5, metadata={"aliases": ["--layernorm-epsilon"]})
    """Added to the variance inside a norm."""

    parallel_residual: bool = False
    """Attention and MLP read the same stream, each behind a norm, and are added together (GPT-NeoX)."""

    swiglu: bool = False
    """SwiGLU feed-forward instead of GELU."""

    gelu: Literal["tanh", "erf"] = "tanh"
    """Form of GELU; erf by default with --no-bias-gelu-fusion or --disable-bias-linear."""

    add_bias_linear: bool = field(default=True, metadata={"off": "--disable-bias-linear"})
    """Biases in the linear layers."""

    add_qkv_bias: bool = False
    """Biases of queries, keys and values, also with --disable-bias-linear (Qwen2)."""

    untie_embeddings_and_output_weights: bool = False
    """A head of its own instead of the token embedding used twice."""

    hidden_dropout: float = 0.1
    """Dropout on the embedding and both branches of a block; independent of the parallel layout."""

    attention_dropout: float = 0.1
    """Dropout on attention probabilities."""

    init_method_std: float = 0.02
    """Standard deviation of initial weights; output projections get std / sqrt(2 * layers)."""

    apply_query_key_layer_scaling: bool = field(
        default=False, metadata={"aliases_off": ["--no-query-key-layer-scaling"]}
    )
    """Divide attention scores by the layer number, and multiply inside the softmax (fp16 range)."""

    attention_softmax_in_fp32: bool = True
    """Compute the softmax of the attention in fp32."""

    @property
    def head_size(self) -> int:
        """Channels d of one attention head."""
        return self.kv_channels or self.hidden_size // max(self.num_attention_heads, 1)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        if not self.group_query_attention:
            return self.num_attention_heads
        return self.num_query_groups or self.num_attention_heads

    @property
    def rotary_scale(self) -> float:
        """What turned queries and keys are multiplied by, as --rope-attention-factor says or by default."""
        if self.rope_scaling_type not in SCALING["rope_attention_factor"]:
            return 1.0
        if self.rope_attention_factor is not None:
            return self.rope_attention_factor
        if self.rope_scaling_type == "yarn":
            return yarn_scale(self.rope_scaling_factor)
        stretch = math.log(self.rope_scaling_factor)
        return math.sqrt(1.0 + stretch / math.log(self.rope_original_length))  # arXiv:2402.13753

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that rotary positions turn."""
        rotary = self.position_embedding_type == "rope"
        return int(self.head_size * self.rotary_percent) // 2 * 2 if rotary else 0

    @property
    def group_size(self) -> int | None:
        """Tokens of a group of S2-attention while training; None without."""
        if not self.s2_attention:
            return None
        return self.s2_group_size or self.seq_length // 4

    @property
    def window(self) -> int | None:
        """Tokens that one sees, itself included, None for all before it; see rules for --window-size."""
        found = WINDOW.fullmatch(self.window_size or "")
        return None if found is None or found[1] == "-1" else int(found[1]) + 1

    @property
    def ffn_size(self) -> int:
        """Feed-forward width f."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return int(4 * self.hidden_size * 2 / 3 / 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.max_position_embeddings or self.seq_length
