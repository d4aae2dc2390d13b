"""Update rule, weight decay, clipping, and the learning rate's curve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """Update rule, weight decay and clipping."""

    optimizer: str = field(
        default="adam",
        metadata={
            "rows": (
                "adam",
                "sgd",
                "lion",
                "sophiag",
                "adafactor",
                "adam8bit",
                "muon",
                "galore",
                "apex-adam",
            )
        },
    )
    """Update rule; adam is AdamW (decoupled weight decay), apex-adam the same by apex's kernel on a GPU;
    muon and galore update tables, head, norms and biases by AdamW."""

    weight_decay: float = 0.01
    """Weight decay of matrices, coupled with sgd, decoupled else; biases and norms have none."""

    start_weight_decay: float | None = None
    """Weight decay at the start where --weight-decay-incr-style is not constant."""

    end_weight_decay: float | None = None
    """Weight decay at the end where --weight-decay-incr-style is not constant."""

    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay moves from start to end."""

    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""

    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""

    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""

    adam8bit_block_size: int = 256
    """Neighbours in a row that share a scale in adam8bit's moments."""

    use_precision_aware_optimizer: bool = False
    """Let --exp-avg-dtype and --exp-avg-sq-dtype say what moments are kept in."""

    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the first moment (adam, lion, sophiag); needs --use-precision-aware-optimizer."""

    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of Adam's second moment, which fp16 is too narrow for; needs the same."""

    sgd_momentum: float = 0.9
    """Momentum of SGD."""

    lion_beta1: float = 0.95
    """Share of the momentum in the mean whose sign is Lion's step."""

    lion_beta2: float = 0.98
    """Decay of Lion's momentum."""

    sophia_beta1: float = 0.965
    """Decay of Sophia's momentum."""

    sophia_beta2: float = 0.99
    """Decay of Sophia's curvature, at each pass that observes it."""

    sophia_rho: float = 0.05
    """Factor on Sophia's curvature: the larger, the fewer of its steps are clipped."""

    sophia_hessian_interval: int = 10
    """Iterations from one pass that observes Sophia's curvature to the next."""

    sophia_hessian_fraction: float = 1.0
    """Share of a step's micro batches that such a pass reads, the first ones, rounded up."""

    sophia_clip_hessian_grad: float = 0.0
    """Largest norm of the gradient that such a pass squares, which makes curvature too small; 0: any."""

    adafactor_scale_parameter: bool = False
    """Multiply Adafactor's step by the root mean square of the tensor, at least --adafactor-eps2."""

    adafactor_relative_step: bool = False
    """Let Adafactor choose its step, min(1e-2, 1 / sqrt(updates)), in place of --lr."""

    adafactor_warmup_init: bool = False
    """Begin the relative step with 1e-6 times the updates instead of 1e-2."""

    adafactor_beta1: float | None = None
    """Decay of a first moment of Adafactor's updates, as large as the parameters; none by default."""

    adafactor_decay_rate: float = -0.8
    """Adafactor's second moment forgets by beta2 = 1 - updates to this power."""

    adafactor_clip_threshold: float = 1.0
    """Root mean square of a tensor's Adafactor update above which it is scaled down."""

    adafactor_eps1: float = 1e-30
    """Added to the squared gradient by Adafactor."""

    adafactor_eps2: float = 1e-3
    """Least root mean square of a tensor that --adafactor-scale-parameter multiplies by."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    muon_momentum: float = 0.9
    """Momentum of Muon, a running mean of gradients."""

    muon_nesterov: bool = field(default=False, metadata={"aliases": ["--muon-use-nesterov"]})
    """Make Muon's update of the gradient and the momentum after it, as Nesterov does."""

    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """Size of Muon's update of [rows, columns]: the root of the larger one, of rows / columns, or of that
    and at least 1."""

    muon_extra_scale_factor: float = 1.0
    """Factor on Muon's updates; 0.2 with spectral lets a learning rate of AdamW stay."""

    muon_num_ns_steps: int = 5
    """Newton-Schulz iterations of Muon."""

    muon_coefficient_type: Literal["quintic", "simple", "polar_express", "cans", "aol"] = "quintic"
    """Coefficients of these iterations; simple is the same triple in each."""

    muon_fp32_matmul_prec: Literal["medium", "high", "highest"] = "medium"
    """Their products: in bf16, in TF32 where the device has it, or in fp32."""

    galore_rank: int = 128
    """Singular vectors of a matrix' gradient in whose subspace GaLore runs AdamW."""

    galore_update_proj_gap: int = 200
    """Updates after which GaLore chooses the subspace anew."""

    galore_scale: float = 0.25
    """Factor on GaLore's updates."""

    galore_proj_type: Literal["std", "reverse_std", "left", "right"] = "std"
    """On which side GaLore projects: std on the smaller one, reverse_std on the larger one."""

    param_groups: list[str] = field(default_factory=list)
    """PATTERN:lr=FACTOR,weight_decay=FACTOR,rule=OPTIMIZER of tensors by name or kind; lr=0 freezes."""

    lisa_layers: int | None = None
    """Train so many blocks at a time, drawn anew in intervals, beside embedding, final norm and head (LISA)."""

    lisa_interval: int = 20
    """Updates of the optimizer in an interval of --lisa-layers."""

    @property
    def moments(self) -> tuple[Literal["fp32", "bf16"], Literal["fp32", "bf16"]]:
        """What first and second moments are kept in."""
        if not self.use_precision_aware_optimizer:
            return "fp32", "fp32"
        return self.exp_avg_dtype, self.exp_avg_sq_dtype

    def rate(self, given: LearningRateConfig) -> LearningRateConfig:
        """The learning rate's curve: as given, or a factor of 1 on steps that the optimizer chooses."""
        if not self.adafactor_relative_step:
            return given
        return LearningRateConfig(lr=1.0, lr_decay_style="constant")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateConfig:
    """The learning rate as a function of samples."""

    lr: float | None = None
    """Peak learning rate."""

    min_lr: float = 0.0
    """Learning rate after the decay, and the floor of it."""

    decoupled_lr: float | None = None
    """Peak learning rate of the token embedding and the output layer; --lr by default."""

    decoupled_min_lr: float | None = None
    """Their learning rate after the decay; --min-lr by default."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Curve after the warm-up."""

    lr_decay_iters: int | None = None
    """Iterations until --min-lr; --train-iters by default."""

    lr_decay_samples: int | None = None
    """Samples until --min-lr; --train-samples by default."""

    lr_restarts: int = 0
    """Times that a cosine starts again at --lr: the decay is of N + 1 equal cycles."""

    lr_warmup_fraction: float | None = None
    """Share of the decay that is warm-up."""

    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""

    lr_warmup_samples: int = 0
    """Samples of linear warm-up."""

    lr_warmup_init: float = 0.0
    """Learning rate at the start of the warm-up."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of WSD's final decay."""

    lr_wsd_decay_iters: int | None = None
    """Iterations of WSD's final decay."""

    lr_wsd_decay_samples: int | None = None
    """Samples of WSD's final decay."""

    override_opt_param_scheduler: bool = field(default=False, metadata={"one_start": True})
    """On resume, take the learning-rate flags of this command line without asking."""

    use_checkpoint_opt_param_scheduler: bool = field(default=False, metadata={"one_start": True})
    """On resume, take the learning-rate settings of the checkpoint."""
