"""How the ranks are arranged, and what they overlap, shard and recompute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm")
"""What --recompute-modules knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the ranks are arranged."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's weights (tp)."""

    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers (pp)."""

    context_parallel_size: int = 1
    """Ranks that share one sequence (cp)."""

    sequence_parallel: bool = False
    """Split the activations between tensor-parallel regions along the sequence; needs tp > 1."""

    pipeline_schedule: Literal["1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"] | None = None
    """Order of forwards and backwards; 1f1b unless virtual stages ask for interleaved."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers per chunk of the interleaved schedule."""

    num_virtual_stages_per_pipeline_rank: int | None = None
    """Chunks per rank of the interleaved schedule."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first stage, where stages are uneven."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last stage, where stages are uneven."""

    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when layers are dealt to stages."""

    account_for_loss_in_pipeline_split: bool = False
    """Count the head and the loss as a layer when layers are dealt to stages."""

    pipeline_model_parallel_layout: str | None = None
    """Layers per stage as a string, e.g. Et*3|(tt|)*29,m|L."""

    use_tp_pp_dp_mapping: bool = False
    """Number the ranks tp-cp-pp-dp instead of tp-cp-dp-pp."""

    engine: str = field(default="zero", metadata={"rows": ("zero", "deepspeed")})
    """Who holds weights, gradients and optimizer state, and makes the update."""

    deepspeed_keys: list[str] = field(default_factory=list)
    """KEY=VALUE of DeepSpeed's own configuration, e.g. zero_optimization.sub_group_size=1e8; for its engine."""

    zero_stage: Literal[0, 1, 2, 3] = field(
        default=0,
        metadata={
            "at_least": {"--use-distributed-optimizer": 1},
            "means": {"--no-use-distributed-optimizer": 0},
            "was": {"use_distributed_optimizer": {False: 0, True: 1}},
        },
    )
    """What data-parallel ranks share: masters and optimizer state (1), gradients too (2), weights too (3)."""

    overlap_grad_reduce: bool = True
    """Reduce gradients over dp while the last backward still runs."""

    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward runs; needs --zero-stage 1 or 2."""

    optimizer_cpu_offload: bool = field(default=False, metadata={"aliases": ["--cpu-optimizer"]})
    """Keep masters and optimizer state in the host's memory, and update there."""

    optimizer_offload_fraction: float = 1.0
    """Share of them that --optimizer-cpu-offload takes; the rest stays on the device."""

    ddp_bucket_size: int | None = None
    """Elements per gradient bucket; max(40e6, 1e6 * dp) by default."""

    accumulate_allreduce_grads_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32, for fp16 and bf16 too."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """What is recomputed in backward instead of being kept."""

    recompute_method: Literal["uniform", "block"] | None = None
    """With full: uniform groups of layers, or the first layers of each stage one by one."""

    recompute_num_layers: int | None = None
    """Layers per uniform group, or layers recomputed per stage with block."""

    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With selective: which parts of a block are recomputed."""

    distribute_saved_activations: bool = False
    """Split the kept inputs of recomputed layers over tp."""

    logits_chunk_mib: float | None = None
    """MiB of logits that exist at a time; else 1024, in at most 8 chunks of tokens (zero bubble: 1)."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library; nccl with a GPU, gloo without."""

    check_collectives: bool = False
    """Compare every call with its partners' before it is made, and name what does not fit; slow."""

    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer ends the run with exit code 6."""

    @property
    def on_host(self) -> float:
        """Share of masters and optimizer state that lies in host memory."""
        return self.optimizer_offload_fraction if self.optimizer_cpu_offload else 0.0

    @property
    def shares_state(self) -> bool:
        """Whether each dp rank keeps masters and optimizer state of its rows alone."""
        return self.zero_stage >= 1

    @property
    def shares_gradients(self) -> bool:
        """Whether it keeps their gradients alone, too."""
        return self.zero_stage >= 2

    @property
    def shares_weights(self) -> bool:
        """Whether it keeps their weights alone, too, which are gathered where they are used."""
        return self.zero_stage >= 3

    @property
    def tp(self) -> int:
        """Tensor-parallel size."""
        return self.tensor_model_parallel_size

    @property
    def ranks_per_sample(self) -> int:
        """Ranks that work on one sample together; dp is how often they fit into the world."""
        return self.tp * self.cp * self.pp

    @property
    def splits_sequence(self) -> bool:
        """Whether activations between the linear layers are split over tp; tp 1 has nothing to split."""
        return self.sequence_parallel and self.tp > 1

    @property
    def pp(self) -> int:
        """Pipeline-parallel size."""
        return self.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        """Context-parallel size."""
        return self.context_parallel_size
