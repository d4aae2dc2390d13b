"""OBJECTIVES: --objective -> what it needs of data and model.

Known before any tensor exists, so that a plan counts the right head and the data are opened as they
are read.  How its loss is computed: train/objectives/table.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.registry import Registry


@dataclass(frozen=True, slots=True)
class ObjectiveNeeds:
    """dataset: a row of DATASETS (data/sources.py); head: one of HEADS (blueprint/figure/heads.py).

    loss_name: what the loss is called in every log; LM_LOSS for a mean of -log p, which has a perplexity.
    segments: whether a row of its data holds texts that do not see one another.
    """

    dataset: str
    head: str
    loss_name: str = "loss"
    segments: bool = False


LM_LOSS = "lm loss"
"""As Megatron calls it."""

LANGUAGE_MODEL = "language-model"
"""What runs were trained on before there was a choice."""

SFT = "sft"
"""Next-token prediction of what a mask says, of samples that do not see one another."""

OBJECTIVES: Registry[ObjectiveNeeds] = Registry(
    "train.objective",
    {
        LANGUAGE_MODEL: ObjectiveNeeds(dataset="pretrain", head="vocabulary", loss_name=LM_LOSS),
        # supervised fine-tuning: the answers of conversations
        SFT: ObjectiveNeeds("tuning", head="vocabulary", loss_name=LM_LOSS, segments=True),
    },
)


def has_segments(objective: str, *, reset_attention_mask: bool) -> bool:
    """Whether attention stays within parts of a row: by the objective's data, or as a flag asks."""
    return reset_attention_mask or (objective in OBJECTIVES and OBJECTIVES[objective].segments)
