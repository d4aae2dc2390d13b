"""What is logged, where, and how often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """Console, metrics.jsonl, TensorBoard, Weights & Biases, profiler."""

    log_interval: int = 100
    """Iterations between console lines."""

    log_format: Literal["auto", "megatron", "short", "json"] = "auto"
    """Megatron's long lines, short ones, or records as JSON; auto is short on a terminal, else Megatron's."""

    tensorboard_dir: str | None = None
    """Folder of TensorBoard events."""

    tensorboard_log_interval: int = 1
    """Iterations between TensorBoard points."""

    tensorboard_queue_size: int = 1000
    """Points TensorBoard keeps before writing."""

    log_throughput: bool = True
    """TFLOP/s and TGS in the log line (always printed; kept for Megatron's flag)."""

    log_params_norm: bool = False
    """The parameters' norm in every record."""

    log_num_zeros_in_grad: bool = False
    """How many gradient elements are zero in every record."""

    log_timers_to_tensorboard: bool = False
    """Timers as TensorBoard scalars."""

    log_batch_size_to_tensorboard: bool = True
    """Batch size as a TensorBoard scalar."""

    log_learning_rate_to_tensorboard: bool = field(
        default=True, metadata={"aliases_off": ["--no-log-learnig-rate-to-tensorboard"]}
    )
    """Learning rate as a TensorBoard scalar."""

    log_loss_scale_to_tensorboard: bool = True
    """Loss scale as a TensorBoard scalar."""

    log_validation_ppl_to_tensorboard: bool = False
    """Validation perplexity as a TensorBoard scalar."""

    log_memory_to_tensorboard: bool = False
    """Device memory as TensorBoard scalars."""

    log_world_size_to_tensorboard: bool = False
    """World size as a TensorBoard scalar."""

    log_straggler: bool | None = None
    """Print at every log interval how long each rank worked without waiting for others; without the
    flag only of a rank that stays slow, with --no-log-straggler never."""

    straggler_minmax_count: int = 1
    """How many of the slowest and of the fastest ranks are named."""

    log_memory_interval: int | None = None
    """Iterations between reports of the most memory each rank has held."""

    timing_log_level: Literal[0, 1, 2] = 0
    """0 the step only, 1 its parts, 2 each action of the pipeline."""

    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    """Which ranks' times are printed."""

    wandb_project: str = ""
    """Weights & Biases project; empty switches it off."""

    wandb_exp_name: str = ""
    """Weights & Biases run name."""

    wandb_save_dir: str = ""
    """Weights & Biases folder."""

    wandb_entity: str = ""
    """Weights & Biases entity."""

    profile: bool = field(default=False, metadata={"one_start": True})
    """Profile the steps from --profile-step-start to --profile-step-end."""

    profile_step_start: int = 10
    """First profiled iteration."""

    profile_step_end: int = 12
    """Profiling stops before this iteration."""

    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""

    profile_timeline: bool = field(default=False, metadata={"one_start": True})
    """Record the same steps on every rank: actions, waits, collectives; as one timeline in the run folder."""

    use_pytorch_profiler: bool = True
    """Use torch.profiler (a Chrome trace in the run folder)."""

    def watches(self, num_ranks: int) -> bool:
        """Whether ranks measure their own time: one alone only where that was asked for."""
        return num_ranks > 1 if self.log_straggler is None else self.log_straggler
