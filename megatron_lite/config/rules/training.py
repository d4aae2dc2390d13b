"""Rules about the run: its length, learning rate, precision, recomputation, data and checkpoints.

Each function yields the problems of one rule; table.py lists them and runs them all.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator

from megatron_lite.config.blend import blends, data_sources
from megatron_lite.config.errors import ConfigError
from megatron_lite.config.objectives import OBJECTIVES
from megatron_lite.config.param_groups import optimizers_asked_for
from megatron_lite.config.rules.layout import nearest
from megatron_lite.config.rules.model_identity import CHANGEABLE, named, not_changeable
from megatron_lite.config.sections.parallel import RECOMPUTE_MODULES
from megatron_lite.config.sections.run import RunConfig


def objective(config: RunConfig, world_size: int) -> Iterator[str]:
    """What is optimised is known."""
    name = config.train.objective
    if name not in OBJECTIVES:
        yield f"--objective {name} is not known; choose from {', '.join(OBJECTIVES)}"


def precision(config: RunConfig, world_size: int) -> Iterator[str]:
    """One number format; a loss scale that can fall."""
    p = config.precision
    if p.fp16 and p.bf16:
        yield "--fp16 and --bf16 exclude each other; give one"
    if p.loss_scale is None and p.min_loss_scale > p.initial_loss_scale:
        yield (
            f"--min-loss-scale {p.min_loss_scale:g} is above --initial-loss-scale "
            f"{p.initial_loss_scale:g}"
        )
    if config.model.apply_query_key_layer_scaling and not config.model.attention_softmax_in_fp32:
        yield "--apply-query-key-layer-scaling needs --attention-softmax-in-fp32"


def kernels(config: RunConfig, world_size: int) -> Iterator[str]:
    """Each op has one kernel; attention's follow --attention-backend."""
    words = config.precision.kernel
    ops = [word.partition("=")[0] for word in words if "=" in word]
    for word in words:
        if not re.fullmatch(r"([\w-]+=)?[\w.-]+", word):
            yield f"--kernel {word!r} is neither OP=ROW nor ROW; python tools/kernels.py lists both"
    for op in dict.fromkeys(op for op in ops if ops.count(op) > 1):
        yield f"--kernel names {op} {ops.count(op)} times; give it once"
    if "attention" in ops:
        yield "--kernel attention=...: attention is chosen by --attention-backend; use that"


def spikes(config: RunConfig, world_size: int) -> Iterator[str]:
    """A spike is more than the median, and skipped or fatal only where one can be found."""
    g = config.guards
    for flag, factor in (
        ("--loss-spike-factor", g.loss_spike_factor),
        ("--grad-norm-spike-factor", g.grad_norm_spike_factor),
    ):
        if 0.0 < factor <= 1.0:
            yield f"{flag} {factor:g} must be above 1 (times the median), or 0 for no guard"
    if g.on_spike != "warn" and not (g.loss_spike_factor or g.grad_norm_spike_factor):
        yield f"--on-spike {g.on_spike} needs --loss-spike-factor or --grad-norm-spike-factor"
    if not g.check_for_nan_in_loss_and_grad and g.on_non_finite != "stop":
        yield (
            f"--on-non-finite {g.on_non_finite} and --no-check-for-nan-in-loss-and-grad exclude "
            "each other; give one"
        )


def planning(config: RunConfig, world_size: int) -> Iterator[str]:
    """A run is planned or rehearsed, and only a rehearsal chooses ranks."""
    t = config.train
    if t.rehearse and t.dry_run:
        yield "--dry-run and --rehearse exclude each other; give one (a rehearsal checks all rules too)"
    if t.all_ranks and not t.rehearse:
        yield "--all-ranks says which ranks --rehearse takes; give both or neither"


def learning_rate(config: RunConfig, world_size: int) -> Iterator[str]:
    """There is a peak, and floor and start of the warm-up are not above it."""
    lr = config.learning_rate
    if config.optim.adafactor_relative_step:
        return  # see updating.adafactor
    if lr.lr is None:
        yield "--lr is required; give the peak learning rate, e.g. --lr 1e-4"
        return
    for flag, value in (("--min-lr", lr.min_lr), ("--lr-warmup-init", lr.lr_warmup_init)):
        if value > lr.lr:
            yield f"{flag} {value:g} is above --lr {lr.lr:g}"
    if lr.decoupled_lr is None:
        if lr.decoupled_min_lr is not None:
            yield f"--decoupled-min-lr {lr.decoupled_min_lr:g} needs --decoupled-lr; add it"
        return
    least = lr.min_lr if lr.decoupled_min_lr is None else lr.decoupled_min_lr
    if least > lr.decoupled_lr:
        flag = "--min-lr" if lr.decoupled_min_lr is None else "--decoupled-min-lr"
        yield f"{flag} {least:g} is above --decoupled-lr {lr.decoupled_lr:g}; lower it"


def scheduler_on_resume(config: RunConfig, world_size: int) -> Iterator[str]:
    """Either the flags or the checkpoint decide the schedule."""
    lr = config.learning_rate
    if lr.override_opt_param_scheduler and lr.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler exclude "
            "each other; give one"
        )


def weight_decay(config: RunConfig, world_size: int) -> Iterator[str]:
    """A changing weight decay has both ends; a constant one has none."""
    o = config.optim
    ends = {
        "--start-weight-decay": o.start_weight_decay,
        "--end-weight-decay": o.end_weight_decay,
    }
    style = o.weight_decay_incr_style
    for flag, value in ends.items():
        if style == "constant" and value is not None and value != o.weight_decay:
            yield (
                f"{flag} {value:g} needs --weight-decay-incr-style linear or cosine; "
                f"a constant one is --weight-decay {o.weight_decay:g}"
            )
        if style != "constant" and value is None:
            yield f"--weight-decay-incr-style {style} needs {flag}"


_MOMENTS_OF = {"--exp-avg-dtype": ("adam", "lion", "sophiag"), "--exp-avg-sq-dtype": ("adam",)}
"""Whose moments a flag is about."""


def moments(config: RunConfig, world_size: int) -> Iterator[str]:
    """Moments in bf16 are asked for whole, and of the optimizer that has them."""
    o = config.optim
    asked = {"--exp-avg-dtype": o.exp_avg_dtype, "--exp-avg-sq-dtype": o.exp_avg_sq_dtype}
    narrow = {flag: kept for flag, kept in asked.items() if kept != "fp32"}
    if narrow and not o.use_precision_aware_optimizer:
        said = " ".join(f"{flag} {kept}" for flag, kept in narrow.items())
        yield f"{said} needs --use-precision-aware-optimizer; add it, or leave moments in fp32"
        return
    for flag, kept in narrow.items():
        able = _MOMENTS_OF[flag]
        if not set(able) & set(optimizers_asked_for(o)):
            yield (
                f"{flag} {kept} is about a moment of --optimizer {', '.join(able)}, and "
                f"--optimizer {o.optimizer} has none that can be; drop it"
            )


def per_token_loss(config: RunConfig, world_size: int) -> Iterator[str]:
    """Each token weighs alike; anything else makes the loss depend on the layout."""
    if not config.train.calculate_per_token_loss:
        yield (
            "--no-calculate-per-token-loss is not supported: a mean of micro batch means depends "
            "on how the batch is cut; drop it"
        )


def recompute(config: RunConfig, world_size: int) -> Iterator[str]:
    """Full recomputation has a method and a number of layers; selective has neither."""
    p = config.parallel
    if p.recompute_granularity == "full":
        for flag, value in (
            ("--recompute-method uniform|block", p.recompute_method),
            ("--recompute-num-layers N", p.recompute_num_layers),
        ):
            if value is None:
                yield f"--recompute-granularity full needs {flag}"
    elif p.recompute_method is not None or p.recompute_num_layers is not None:
        given = p.recompute_granularity or "not given"
        yield (
            "--recompute-method and --recompute-num-layers need --recompute-granularity full; "
            f"it is {given}"
        )
    strange = [name for name in p.recompute_modules if name not in RECOMPUTE_MODULES]
    if strange or not p.recompute_modules:
        yield (
            f"--recompute-modules {' '.join(strange)}: no part of a block; give some of "
            f"{' '.join(RECOMPUTE_MODULES)}"
        )
    if p.recompute_modules != ["core_attn"] and p.recompute_granularity != "selective":
        yield (
            f"--recompute-modules {' '.join(p.recompute_modules)} needs --recompute-granularity "
            f"selective; it is {p.recompute_granularity or 'not given'}"
        )
    if p.distribute_saved_activations and (
        p.tp == 1 or p.sequence_parallel or p.recompute_granularity != "full"
    ):
        yield (
            "--distribute-saved-activations needs --recompute-granularity full, "
            f"--tensor-model-parallel-size above 1 (it is {p.tp}) and no --sequence-parallel"
        )
    elif p.distribute_saved_activations and config.model.seq_length % p.tp:
        yield (
            f"--distribute-saved-activations cannot cut --seq-length {config.model.seq_length} in "
            f"--tensor-model-parallel-size {p.tp} slices; use a length of "
            f"{nearest(config.model.seq_length, p.tp)}, or leave it out"
        )


def parameter_gather(config: RunConfig, world_size: int) -> Iterator[str]:
    """Gathering parameters late needs shards to gather and reductions that overlap too."""
    p = config.parallel
    if p.overlap_param_gather:
        for flag, given in (
            ("--zero-stage 1", p.shares_state),
            ("--overlap-grad-reduce", p.overlap_grad_reduce),
        ):
            if not given:
                yield f"--overlap-param-gather needs {flag}; add it"


def data_source(config: RunConfig, world_size: int) -> Iterator[str]:
    """Exactly one source of data, with a list and a split that can be read."""
    d = config.data
    if config.train.needs_no_data and not data_sources(d):
        return
    try:
        found = blends(d)
    except ConfigError as error:
        yield str(error)
        return
    no_train = found.split[0] == 0 if found.split else "train" not in found.by_split
    if no_train and not config.train.skip_train:
        yield (
            "no data to train on: the training split is empty; change --split or add "
            "--train-data-path (or give --skip-train)"
        )


def tokenizer(config: RunConfig, world_size: int) -> Iterator[str]:
    """The tokenizer's files are named; a dry run needs none, but NullTokenizer's number of ids."""
    d = config.data
    if d.tokenizer_type == "NullTokenizer" and config.model.vocab_size is None:
        yield "--tokenizer-type NullTokenizer needs --vocab-size"
    if config.train.needs_no_data or d.mock_data or config.model.vocab_size is not None:
        return
    if d.tokenizer_type == "GPT2BPETokenizer":
        for flag, value in (("--vocab-file", d.vocab_file), ("--merge-file", d.merge_file)):
            if value is None:
                yield f"--tokenizer-type GPT2BPETokenizer needs {flag}"
    elif d.tokenizer_model is None and d.tokenizer_type != "NullTokenizer":
        yield f"--tokenizer-type {d.tokenizer_type} needs --tokenizer-model"


def saving(config: RunConfig, world_size: int) -> Iterator[str]:
    """Flags about saving need a place to save."""
    c = config.checkpoint
    if c.save is None or not c.save_checkpoints:
        needed = "--save, the folder of the checkpoints"
        if c.save is not None:
            needed = "checkpoints: leave out --no-save-checkpoints"
        for flag, given in (
            ("--async-save", c.async_save),
            ("--keep-last", c.keep_last is not None),
            ("--save-failure", c.save_failure != "stop"),
            ("--overwrite-run", c.overwrite_run),
        ):
            if given:
                yield f"{flag} needs {needed}"
    if c.keep_every is not None and c.keep_last is None:
        yield (
            f"--keep-every {c.keep_every} says which checkpoints --keep-last spares; give "
            "--keep-last, too, or leave it out: all are kept"
        )


def loading(config: RunConfig, world_size: int) -> Iterator[str]:
    """Flags about loading need something to load."""
    c = config.checkpoint
    if c.load is None:
        for flag, given in (
            ("--finetune", c.finetune),
            ("--ckpt-step", c.ckpt_step is not None),
            ("--exit-on-missing-checkpoint", c.exit_on_missing_checkpoint),
            ("--allow-data-change", c.allow_data_change),
            ("--allow-model-change", c.allow_model_change is not None),
        ):
            if given:
                yield f"{flag} needs --load, the folder of the checkpoints"
    if c.keep_optim and not c.finetune:
        yield (
            "--keep-optim is for --finetune, which starts a run from --load's weights: a run that is "
            "resumed keeps its optimizer's state in any case"
        )
    if c.keep_optim and not c.load_optim:
        yield "--keep-optim and --no-load-optim contradict each other: leave one of them out"
    for name in not_changeable(named(c.allow_model_change)):
        yield (
            f"--allow-model-change {name}: training can only resume with another "
            f"{', '.join(CHANGEABLE)}"
        )


def profiling(config: RunConfig, world_size: int) -> Iterator[str]:
    """Profiled steps and ranks exist."""
    t = config.telemetry
    if not (t.profile or t.profile_timeline):
        return
    if t.profile_step_end <= t.profile_step_start:
        yield (
            f"--profile-step-end {t.profile_step_end} must be above --profile-step-start "
            f"{t.profile_step_start}"
        )
    for rank in t.profile_ranks:
        if rank >= world_size:
            yield f"--profile-ranks {rank}: there are ranks 0 to {world_size - 1}"


def weights_and_biases(config: RunConfig, world_size: int) -> Iterator[str]:
    """A W&B project needs a run name, and the package where something is trained."""
    t = config.telemetry
    if not t.wandb_project:
        return
    if not t.wandb_exp_name:
        yield f"--wandb-project {t.wandb_project} needs --wandb-exp-name"
    if not config.train.needs_no_data and importlib.util.find_spec("wandb") is None:
        yield (
            f"--wandb-project {t.wandb_project} needs the package wandb; pip install wandb, or "
            "use --tensorboard-dir (metrics.jsonl is always written)"
        )
