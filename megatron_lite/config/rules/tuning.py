"""What goes with --objective sft, and what only it has."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.objectives import SFT
from megatron_lite.config.sections.run import RunConfig


def own_borders(config: RunConfig, world_size: int) -> Iterator[str]:
    """Its samples bring masks and borders of their own, and are files."""
    d = config.data
    if config.train.objective != SFT:
        if not d.sft_packing:
            yield f"--no-sft-packing is about the samples of --objective {SFT}; leave it out"
        if config.train.neftune_alpha:
            yield (
                f"--neftune-alpha {config.train.neftune_alpha:g} is for --objective {SFT}: in pretraining "
                "noise only costs; leave it out"
            )
        return
    if d.mock_data:
        yield (
            f"--objective {SFT} learns answers, and --mock-data has none; give --data-path, a prefix "
            "of tools/preprocess_data.py --chat"
        )
    for flag, given in (
        ("--reset-position-ids", d.reset_position_ids),
        ("--reset-attention-mask", d.reset_attention_mask),
        ("--eod-mask-loss", d.eod_mask_loss),
    ):
        if given:
            yield (
                f"{flag} goes by end-of-document tokens; the samples of --objective {SFT} have borders "
                "and masks of their own: leave it out"
            )
