"""The forms in which public scripts of Megatron-DeepSpeed pass --deepspeed, its file and what goes with it."""

from __future__ import annotations

import pytest

from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules.table import check_config

GPT3 = """
--tensor-model-parallel-size 2 --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32
--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 16 --train-iters 50 --lr 6.0e-5
--min-lr 6.0e-6 --lr-decay-style cosine --log-interval 10 --eval-iters 4 --eval-interval 100 --split 98,2,0
--data-path d --vocab-file v --merge-file m --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9
--adam-beta2 0.95 --init-method-std 0.006 --fp16 --data-impl mmap --distributed-backend nccl
"""
TEMPLATE = """{
  "train_batch_size" : 16,
  "train_micro_batch_size_per_gpu": 2,
  "steps_per_print": 10,

  "zero_optimization": {
    "stage": ZERO_STAGE
  },

  "gradient_clipping": 1.0,
  "prescale_gradients": true,

  "fp16": {
    "enabled": true,
    "loss_scale": 0,
    "loss_scale_window": 500,
    "hysteresis": 2,
    "min_loss_scale": 1,
    "initial_scale_power": 11
  },

  "wall_clock_breakdown" : true
}
"""
FILE = "--deepspeed_config={} --zero-stage={stage}"
FORMS = {
    "spaces": "--deepspeed --deepspeed_config {} --zero-stage {stage} --no-pipeline-parallel",
    "equals": f"--no-pipeline-parallel {FILE} --deepspeed",
    "dashes": "--deepspeed --deepspeed-config {} --zero_stage={stage}",
    "recomputing": f"--deepspeed {FILE} --deepspeed-activation-checkpointing --checkpoint-activations",
    "mpi": f"{FILE} --deepspeed_mpi --deepspeed --pipeline-model-parallel-size 1",
    "launcher": f"--local_rank=1 --deepspeed {FILE} --ds-sequence-parallel-size 1",
    "buffers": f"--deepspeed {FILE} --zero-contigious-gradients --zero-reduce-bucket-size 500000000 "
    "--remote-device none --use-pin-memory",
    "rebased": f"--deepspeed {FILE} --override-opt_param-scheduler --no-async-tensor-model-parallel-allreduce "
    "--tensorboard-queue-size 1 --log-optimizer-states-to-tensorboard --hysteresis 2",
    "one expert": f"--deepspeed {FILE} --num-experts 1 --moe-expert-parallel-size 1 --moe-loss-coeff 0.01 "
    "--moe-train-capacity-factor 1.0 --moe-eval-capacity-factor 1.0 --moe-min-capacity 4",
    "rotary": f"--deepspeed {FILE} --use-rotary-position-embeddings --rotary-percent 0.25 "
    "--rotary-position-embeddings-theta 100000000 --ds-sequence-parallel-size 1 --force-ds-sequence-parallel",
    "curriculum": f"--deepspeed {FILE} --override-lr-scheduler --no-masked-softmax-fusion",
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_public_scripts_run(ds, form, stage) -> None:
    ds.write(TEMPLATE.replace("ZERO_STAGE", str(stage)))
    words = FORMS[form].format(ds.file, stage=stage)
    parsed = parse([*GPT3.split(), *words.split()]).on(4)
    check_config(parsed.config, 4)
    c = parsed.config
    assert c.parallel.zero_stage == stage
    assert (c.train.global_batch_size, c.precision.initial_loss_scale) == (16, 2.0**11)
    assert c.learning_rate.lr_decay_style == "cosine" and c.telemetry.timing_log_level == 1
    assert (c.parallel.recompute_granularity == "full") == (form == "recomputing")


def test_stages_of_file_and_flag_must_be_the_same(ds) -> None:
    differ = ds.refusal(TEMPLATE.replace("ZERO_STAGE", "2"), "--zero-stage 1")
    assert "ds.json:7: zero_optimization.stage 2 contradicts --zero-stage 1; keep one" in differ
    ds.write(TEMPLATE.replace("ZERO_STAGE", "2"))
    more = parse(
        [
            *GPT3.split(),
            "--deepspeed",
            "--deepspeed_config",
            str(ds.file),
            "--use-distributed-optimizer",
        ]
    )
    assert more.config.parallel.zero_stage == 2


def test_an_offload_of_a_training_script_that_is_off_is_off(ds) -> None:
    config = {
        "zero_optimization": {
            "stage": 1,
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "none"},
        }
    }
    assert ds.parse(config).notices == ()
    assert not ds.parse(config).config.parallel.optimizer_cpu_offload
    said = ds.refusal(config, "--cpu-optimizer")
    assert 'offload_optimizer.device "none" contradicts --cpu-optimizer; keep one' in said


def test_a_share_of_an_offload_that_is_off_has_no_say(ds) -> None:
    config = {"zero_optimization": {"offload_optimizer": {"device": "none", "ratio": 0.5}}}
    parsed = ds.parse(config)
    assert parsed.config.parallel.optimizer_offload_fraction == 1.0
    assert any('ratio 0.5: has a say only with device "cpu"' in line for line in parsed.notices)


def test_a_constant_rate_is_what_a_file_without_scheduler_says(ds) -> None:
    config = {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}}
    rate = ds.parse(config, "--lr-decay-style constant").config.learning_rate
    assert (rate.lr, rate.lr_decay_style) == (1e-4, "constant")


def test_a_stage_of_auto_is_that_of_the_flag(ds) -> None:
    config = {"zero_optimization": {"stage": "auto"}}
    assert ds.parse(config, "--zero-stage 3").config.parallel.zero_stage == 3
    assert 'stage "auto" takes the value of --zero-stage, which is not given' in ds.refusal(config)
