"""Adapters that are trained instead of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

NF4_BLOCK = 64
"""Neighbours of a row that share a scale (arXiv:2305.14314 § 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685): the model is frozen, small matrices beside its own are trained."""

    lora_rank: int | None = None
    """Train adapters of this rank and nothing else; checkpoints hold them alone (docs/guides/lora.md)."""

    lora_alpha: float = 32.0
    """What an adapter adds is scaled by this over the rank; with rslora over the rank's root."""

    lora_dropout: float = 0.0
    """Dropout on what goes into the adapters of linear layers."""

    lora_targets: list[str] = field(default_factory=lambda: ["linear"])
    """What has adapters: linear (all matrices of a layer), embedding, all, or names: q_proj, linear_qkv, ..."""

    lora_variant: Literal["lora", "rslora", "dora"] = "lora"
    """lora; rslora (arXiv:2312.03732); dora, which trains the length of each row, too (arXiv:2402.09353)."""

    lora_base: Literal["bf16", "nf4"] = "bf16"
    """How the layers' frozen matrices are kept: bf16, as the run computes; nf4, 4 bits (arXiv:2305.14314)."""

    lora_load: str | None = field(default=None, metadata={"one_start": True})
    """Begin with the adapters of this folder of PEFT's; rank, alpha, targets and variant must be its own."""

    @property
    def packs(self) -> bool:
        """Whether frozen matrices are kept in 4 bits."""
        return self.lora_base == "nf4"

    @property
    def on(self) -> bool:
        """Whether adapters are trained."""
        return self.lora_rank is not None

    @property
    def scale(self) -> float:
        """The factor on what an adapter adds."""
        assert self.lora_rank is not None
        root = self.lora_variant == "rslora"
        return self.lora_alpha / (self.lora_rank**0.5 if root else self.lora_rank)
