"""How long, how much at once, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Batch sizes, length of the run, evaluation and exit conditions."""

    micro_batch_size: int = 1
    """Sequences per forward on one data-parallel rank."""

    global_batch_size: int | None = None
    """Sequences per optimizer step over all ranks; micro batch * dp by default."""

    rampup_batch_size: list[int] = field(default_factory=list)
    """Start size, increment, samples: the batch grows by the increment until the global size."""

    step_batch_size_schedule: str | None = None
    """Batch size by tokens consumed, e.g. "0:16 2.4B:320 12B:1536"."""

    train_iters: int | None = None
    """Optimizer steps; give this, --train-samples or --train-epochs."""

    train_samples: int | None = None
    """Samples to train on; give this, --train-iters or --train-epochs."""

    train_epochs: int | None = None
    """Times that all training data are read; the last batch is filled from one time more."""

    epoch_samples: int | None = field(default=None, metadata={"one_start": True})
    """Samples of an epoch, to plan --train-epochs where the data are not there; counted where they are."""

    objective: str = field(default="language-model", metadata={"rows": ("language-model", "sft")})
    """What is optimised: a row of OBJECTIVES, which says the data and the head it needs."""

    neftune_alpha: float = 0.0
    """With --objective sft: noise on token embeddings (NEFTune); 5 to 15 is usual, 0 is none."""

    seed: int = 1234
    """Seed of weights, dropout and data order."""

    deterministic_mode: bool = field(default=False, metadata={"aliases": ["--deterministic"]})
    """Only kernels that give the same bits every time: two runs are then equal on a GPU, too."""

    eval_interval: int | None = 1000
    """Iterations between evaluations on the validation set."""

    eval_iters: int = 100
    """Batches per evaluation; 0 switches evaluation off."""

    exit_interval: int | None = None
    """Stop, with a checkpoint, when the iteration is a multiple of this."""

    exit_duration_in_mins: float | None = None
    """Stop, with a checkpoint, after this many minutes."""

    exit_signal_handler: bool = True
    """Stop cleanly, with a checkpoint, on SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGXCPU or Ctrl-C."""

    kill_switch_file: str | None = None
    """Stop cleanly, with a checkpoint, when this file appears; rank 0 looks once a second."""

    exit_code_on_preemption: Literal[75, 0] = 75
    """Exit code after a signal or the kill switch: 75 asks a scheduler to start again."""

    skip_train: bool = field(default=False, metadata={"one_start": True})
    """Only evaluate the loaded checkpoint."""

    manual_gc: bool = False
    """Collect Python garbage at fixed steps on all ranks together."""

    manual_gc_interval: int = 0
    """Steps between collections with --manual-gc; 0 never collects."""

    calculate_per_token_loss: bool = True
    """Weigh each token alike over the whole step; the negation is refused."""

    dry_run: bool = field(default=False, metadata={"one_start": True})
    """Check every rule, print the plan and stop; needs no accelerator and no data."""

    rehearse: bool = field(default=False, metadata={"one_start": True})
    """Run ranks of the world here, one by one, without data or accelerator, and compare what they say."""

    all_ranks: bool = field(default=False, metadata={"one_start": True})
    """Rehearse every rank, not only those that stand for all."""

    world_size: int | None = field(default=None, metadata={"one_start": True})
    """Ranks to plan for with --dry-run and --rehearse; a real run counts its processes."""

    use_cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    print_state_hash: bool = False
    """Print a hash over all parameters and optimizer moments at the end."""

    def samples_at_once(self, dp: int) -> int:
        """Samples of one micro batch on each of dp data-parallel ranks; every batch is a multiple."""
        return self.micro_batch_size * dp

    @property
    def samples_asked(self) -> int | None:
        """Samples to train on; None where the length is in iterations or an epoch is not counted yet."""
        if self.train_epochs is None:
            return self.train_samples
        return None if self.epoch_samples is None else self.train_epochs * self.epoch_samples

    @property
    def needs_no_data(self) -> bool:
        """Whether the run is only planned or rehearsed."""
        return self.dry_run or self.rehearse
