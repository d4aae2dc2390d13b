"""Where documents end in a sample, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.sections.data import DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentEnds:
    """What an end-of-document token changes: three flags, and the token's id.

    A document ends with its EOD, which still belongs to it.  eod_mask_loss: no loss where the
    *input* is one.
    """

    eod: int | None = None
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False

    @classmethod
    def from_config(cls, data: DataConfig, eod: int | None) -> DocumentEnds:
        """Raises ConfigError where a flag asks for an end that the tokenizer does not name."""
        flags = {
            "--eod-mask-loss": data.eod_mask_loss,
            "--reset-position-ids": data.reset_position_ids,
            "--reset-attention-mask": data.reset_attention_mask,
        }
        asked = [flag for flag, given in flags.items() if given]
        if asked and eod is None:
            raise ConfigError(
                f"{', '.join(asked)}: the tokenizer ({data.tokenizer_type}) names no end-of-document "
                "token - use one that does, or drop the flag"
            )
        return cls(
            eod=eod,
            eod_mask_loss=data.eod_mask_loss,
            reset_position_ids=data.reset_position_ids,
            reset_attention_mask=data.reset_attention_mask,
        )

    def find(self, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """inputs: [b, s] -> where a document ends; nowhere, if no flag asks."""
        if not (self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask):
            return np.zeros(inputs.shape, dtype=np.bool_)
        assert self.eod is not None, "the ends of documents need an EOD id"
        found: npt.NDArray[np.bool_] = inputs == self.eod
        return found


WITHOUT_ENDS = DocumentEnds()
"""Documents run on into one another."""
