"""LOSSES: objective -> how it is made for this rank; what it needs: config/objectives.py."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lite.layers.contexts import StageContext
from megatron_lite.train.objectives.base import Objective
from megatron_lite.train.objectives.language_model import LanguageModel

LOSSES: dict[str, Callable[[StageContext], Objective]] = {
    "language-model": lambda context: LanguageModel(),
    "sft": lambda context: LanguageModel(),  # of tokens that the data's mask leaves
}
"""A row for each of OBJECTIVES."""
