"""Where, how often, and what is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

ONE_START = {"one_start": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Saving and loading."""

    save: str | None = None
    """Folder of the run: checkpoints, resolved config, metrics, errors, index cache."""

    overwrite_run: bool = field(default=False, metadata=ONE_START)
    """Remove the run whose checkpoints lie in --save; without it such a start is refused."""

    load: str | None = None
    """Folder to resume from; nothing there is a fresh start with a loud line."""

    save_interval: int | None = 1000
    """Iterations between checkpoints; the last step is saved whatever it is, with 0 nothing else."""

    save_checkpoints: bool = True
    """Write checkpoints to --save; without them a run that is only measured leaves its metrics there."""

    ckpt_step: int | None = field(default=None, metadata=ONE_START)
    """Load this iteration instead of the newest."""

    finetune: bool = field(default=False, metadata=ONE_START)
    """Load the weights only: iteration, samples, optimizer and learning rate start anew."""

    keep_optim: bool = field(default=False, metadata=ONE_START)
    """With --finetune: keep the optimizer's state and the loss scale, too, for new data."""

    load_optim: bool = field(default=True, metadata=ONE_START)
    """Load the optimizer's state."""

    load_rng: bool = field(default=True, metadata=ONE_START)
    """Kept for Megatron's --no-load-rng; the random generator is counter-based and has no state."""

    save_optim: bool = True
    """Save the optimizer's state."""

    save_rng: bool = True
    """Kept for Megatron's --no-save-rng; the random generator is counter-based and has no state."""

    exit_on_missing_checkpoint: bool = False
    """Exit with code 4 where --load holds no checkpoint."""

    allow_data_change: bool = field(default=False, metadata=ONE_START)
    """Resume although the data or the tokenizer are not those the checkpoint was trained with."""

    allow_model_change: str | None = field(default=None, metadata=ONE_START)
    """Fields of the model that may differ from the checkpoint's, e.g. rotary_base,seq_length."""

    keep_last: int | None = None
    """Remove older checkpoints but the newest N good ones, once the newest is verified."""

    keep_every: int | None = None
    """With --keep-last: also keep those of every M-th iteration for good."""

    async_save: bool = False
    """Training stands still only while a checkpoint is copied to host memory; a thread writes it."""

    save_failure: Literal["stop", "warn"] = "stop"
    """warn continues where a checkpoint cannot be written and tries again at the next; not at the end."""
