"""A ds.json beside flags: mapped, told once, or refused with key, file and line."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.parser import parse
from megatron_lite.config.rules.table import checked
from tests.config.ds_files import ADADELTA, MISSPELT

ADAMW = ADADELTA.replace("Adadelta", "AdamW")


def test_adadelta_is_refused_by_name_with_the_way_out_and_nothing_else_is(ds) -> None:
    said = ds.refusal(ADADELTA)
    assert said.startswith(
        'ds.json:10: optimizer.type "Adadelta": not built; Adadelta has no betas (ds.json:11)'
    )
    assert 'write "type": "AdamW", with lr, betas as written' in said
    assert "\n" not in said  # the only problem


def test_all_other_keys_of_that_file_have_their_say(ds) -> None:
    parsed = ds.parse(ADAMW).on(2)
    c = parsed.config
    assert (c.train.micro_batch_size, c.train.global_batch_size) == (4, 4 * 32 * 2)
    assert c.precision.fp16 and c.precision.loss_scale is None
    p = c.precision
    assert (p.initial_loss_scale, p.loss_scale_window, p.hysteresis, p.min_loss_scale) == (
        2.0**16,
        100,
        2,
        1.0,
    )
    assert (c.optim.optimizer, c.optim.adam_beta1, c.optim.adam_beta2, c.optim.weight_decay) == (
        "adam",
        0.9,
        0.95,
        0.0,
    )
    assert c.optim.clip_grad == 1.0
    rate = c.learning_rate
    assert (rate.lr, rate.lr_warmup_init, rate.lr_warmup_iters, rate.lr_decay_style) == (
        5e-5,
        1e-5,
        10,
        "constant",
    )
    assert c.parallel.zero_stage == 2 and c.parallel.overlap_grad_reduce
    assert c.parallel.on_host == 1.0
    assert parsed.origin["optim.clip_grad"] == f"file {ds.file}:4 gradient_clipping"
    said = "\n".join(parsed.notices)
    for words in (
        "contiguous_gradients (21): accepted, changes nothing",
        "offload_optimizer.pin_memory (19): accepted, changes nothing",
        "without warmup_type",
        "AdamW without weight_decay: 0",
        "global batch 256 = micro batch 4 x accumulation 32 x dp 2",
    ):
        assert said.count(words) == 1, words


def test_a_misspelt_key_and_a_peak_of_one_are_refused_with_the_numbers(ds) -> None:
    said = ds.refusal(MISSPELT, "--lr 3e-4")
    assert (
        "ds.json:3: grad_accum_steps: no such key; did you mean gradient_accumulation_steps?"
        in said
    )
    assert "ds.json:10: scheduler.params.warmup_max_lr 1 is the learning rate itself" in said
    assert "3333 x --lr 0.0003: two values for one peak" in said
    alone = ds.refusal(MISSPELT)
    assert "ds.json:10: scheduler.params.warmup_max_lr 1 would be the learning rate itself" in alone
    assert "standard deviation of 0.02" in alone


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "clipping": (
        {"gradient_clipping": 1.0},
        "--clip-grad 0.5",
        "ds.json:2: gradient_clipping 1 contradicts --clip-grad 0.5; keep one",
    ),
    "fp16": (
        {"fp16": {"enabled": False}},
        "--fp16",
        "fp16.enabled false contradicts --fp16; keep one",
    ),
    "fp16-bf16": (
        {"fp16": {"enabled": True}},
        "--bf16",
        "ds.json:3: fp16.enabled true contradicts --bf16; keep one",
    ),
    "bf16-fp16": (
        {"bfloat16": {"enabled": True}},
        "--fp16",
        "ds.json:3: bfloat16.enabled true contradicts --fp16; keep one",
    ),
    "both-formats": (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        "",
        "fp16.enabled true contradicts ds.json:6: bf16.enabled true; keep one",
    ),
    "stage": (
        {"zero_optimization": {"stage": 0}},
        "--use-distributed-optimizer",
        "zero_optimization.stage 0 contradicts --use-distributed-optimizer; keep one",
    ),
    "batch": (
        {"train_batch_size": 8},
        "--global-batch-size 16",
        "train_batch_size 8 contradicts --global-batch-size 16",
    ),
    "micro": (
        {"train_micro_batch_size_per_gpu": 8},
        "--micro-batch-size 1",
        "train_micro_batch_size_per_gpu 8 contradicts --micro-batch-size 1",
    ),
    "betas": (
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}}},
        "--adam-beta2 0.99",
        "optimizer.params.betas [0.9, 0.95] contradicts --adam-beta2 0.99",
    ),
    "lr": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}},
        "--lr 2e-4",
        "optimizer.params.lr 0.0001 contradicts --lr 0.0002",
    ),
    "curve": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-4}}},
        "--lr-decay-style cosine",
        "owns the learning rate, which stays there without a scheduler; --lr-decay-style cosine",
    ),
    "style": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}}},
        "--lr-decay-style cosine",
        'scheduler.type "WarmupLR" contradicts --lr-decay-style cosine',
    ),
    "warmup": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}}},
        "--lr-warmup-fraction .1",
        "warmup_num_steps 1000 contradicts --lr-warmup-fraction 0.1",
    ),
    "floor": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-4}}},
        "--min-lr 1e-5",
        "stays at its peak: --min-lr 1e-05 is never reached",
    ),
    "peaks": (
        {
            "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}},
        },
        "",
        "10 x optimizer.params.lr 0.0001 (ds.json:5)",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_key_and_flag(ds, case) -> None:
    config, flags, words = CONTRADICTIONS[case]
    assert words in ds.refusal(config, flags)


def test_the_same_value_twice_is_no_contradiction(ds) -> None:
    config = {"gradient_clipping": 1.0, "train_batch_size": 8, "zero_optimization": {"stage": 1}}
    parsed = ds.parse(config, "--clip-grad 1 --global-batch-size 8 --use-distributed-optimizer")
    assert parsed.origin["optim.clip_grad"] == "flag --clip-grad"


BATCHES = {  # train, micro, accumulation, flags, ranks -> global, micro
    "all": (64, 4, 4, "", 4, 64, 4),
    "train-micro": (64, 4, None, "", 4, 64, 4),
    "train-steps": (64, None, 4, "", 4, 64, 4),
    "micro-steps": (None, 4, 4, "", 4, 64, 4),
    "train": (64, None, None, "", 4, 64, 16),
    "micro": (None, 4, None, "", 4, 16, 4),
    "steps-and-flag": (None, None, 4, "--micro-batch-size 2", 4, 32, 2),
    "tp": (64, 4, None, "--tensor-model-parallel-size 2", 4, 64, 4),
    "auto": ("auto", "auto", "auto", "--micro-batch-size 2 --global-batch-size 32", 4, 32, 2),
    "auto-train": ("auto", 2, 4, "", 4, 32, 2),
    "auto-steps": (32, 2, "auto", "", 4, 32, 2),
}
NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize("case", BATCHES)
def test_two_of_the_batch_sizes_give_the_third(ds, case) -> None:
    *three, flags, ranks, size, micro = BATCHES[case]
    config = {name: value for name, value in zip(NAMES, three, strict=True) if value is not None}
    train = ds.parse(config, flags).on(ranks).config.train
    assert (train.global_batch_size, train.micro_batch_size) == (size, micro)


@pytest.mark.parametrize(
    ("three", "flags", "words"),
    [
        ((64, 4, 5), "", "is not micro batch 4 x accumulation 5 x dp 4 = 80"),
        ((66, 4, None), "", "train_batch_size 66 is no multiple of micro batch 4 x dp 4 = 16"),
        ((64, None, 3), "", "train_batch_size 64 is no multiple of accumulation 3 x dp 4 = 12"),
        ((None, None, 3), "", "gradient_accumulation_steps 3 alone says no batch"),
        ((0, 4, None), "", "train_batch_size takes a whole number of at least 1, got 0"),
        ((64, 2.5, None), "", "train_micro_batch_size_per_gpu takes a whole number, got 2.5"),
        (("auto", "auto", "auto"), "", "takes the value of --micro-batch-size, which is not given"),
        (("auto", "auto", "auto"), "--micro-batch-size 2", '"auto" takes the value of --global-batch-size'),
        ((64, 2, 8), "--rampup-batch-size 16 16 100", "the batch grows with --rampup-batch-size"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_come_out_even_is_refused(ds, three, flags, words) -> None:
    config = {name: value for name, value in zip(NAMES, three, strict=True) if value is not None}
    assert words in ds.refusal(config, flags, ranks=4)


AUTO = {
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {n: "auto" for n in ("lr", "betas", "eps", "weight_decay")}},
    "scheduler": {"type": "WarmupDecayLR", "params": {
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto",
        "total_num_steps": "auto", "warmup_type": "linear",
    }},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
}  # fmt: skip
AUTO_FLAGS = (
    "--bf16 --clip-grad 0.5 --lr 3e-4 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 "
    "--weight-decay 0.1 --lr-warmup-iters 5 --train-iters 50"
)


def test_auto_takes_the_values_of_the_flags(ds) -> None:
    c = ds.parse(AUTO, AUTO_FLAGS).config
    assert c.precision.name == "bf16" and c.optim.clip_grad == 0.5 and c.optim.adam_beta2 == 0.95
    rate = c.learning_rate
    assert (rate.lr, rate.lr_warmup_iters, rate.lr_decay_style, rate.min_lr) == (
        3e-4,
        5,
        "linear",
        0.0,
    )


@pytest.mark.parametrize(
    "flag",
    [
        "--clip-grad 0.5",
        "--lr 3e-4",
        "--adam-beta2 0.95",
        "--adam-eps 1e-8",
        "--lr-warmup-iters 5",
        "--train-iters 50",
    ],
)
def test_auto_without_its_flag_names_both(ds, flag) -> None:
    said = ds.refusal(AUTO, AUTO_FLAGS.replace(flag, ""))
    wanted = "--lr-decay-iters" if flag.startswith("--train") else flag.split()[0]
    assert '"auto" takes' in said and wanted in said and re.search(r"ds\.json:\d+: ", said)


def test_a_cosine_is_of_shares_of_the_optimizers_rate(ds) -> None:
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4}},
        "scheduler": {"type": "WarmupCosineLR", "params": {
            "total_num_steps": 100, "warmup_num_steps": 10, "warmup_min_ratio": 0.1, "cos_min_ratio": 0.05,
            "warmup_type": "linear",
        }},
    }  # fmt: skip
    rate = ds.parse(config).config.learning_rate
    assert (rate.lr, rate.lr_decay_style, rate.lr_decay_iters, rate.lr_warmup_iters) == (
        2e-4,
        "cosine",
        100,
        10,
    )
    assert rate.lr_warmup_init == pytest.approx(2e-5) and rate.min_lr == pytest.approx(1e-5)


def test_a_schedulers_steps_are_samples_where_the_run_counts_samples(ds) -> None:
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 1e-4, "warmup_num_steps": 10, "warmup_type": "linear"},
        },
    }
    rate = ds.parse(config, "--train-samples 1000").on(2).config.learning_rate
    assert (rate.lr_warmup_samples, rate.lr_warmup_iters) == (80, 0)


UNKNOWN = {
    "overlap_com": (
        {"zero_optimization": {"overlap_com": True}},
        "zero_optimization.overlap_com: no such key; did you mean zero_optimization.overlap_comm?",
    ),
    "moved": (
        {"overlap_comm": True},
        "overlap_comm: no such key; did you mean zero_optimization.overlap_comm?",
    ),
    "case": ({"FP16": {"enabled": True}}, "FP16: no such key; did you mean fp16?"),
    "far": ({"xyz": 1}, "xyz: no such key; docs/guides/deepspeed.md lists all"),
    "no-section": ({"fp16": True}, "fp16 takes an object in braces, got true"),
    "type": ({"fp16": {"enabled": "yes"}}, 'fp16.enabled takes true or false, got "yes"'),
    "text": ({"gradient_clipping": "1.0"}, 'gradient_clipping takes a number, got "1.0"'),
    "stage-4": ({"zero_optimization": {"stage": 4}}, "takes 0, 1, 2 or 3, got 4"),
    "nvme": (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        'offload_optimizer.device "nvme": not supported; state lies on the device or in host memory',
    ),
    "ratio": (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 1.5}}},
        "offload_optimizer.ratio takes a number above 0 and at most 1, got 1.5",
    ),
    "old-offload": (
        {"zero_optimization": {"cpu_offload": "cpu"}},
        'cpu_offload takes true or false, got "cpu"',
    ),
    "two-offloads": (
        {"zero_optimization": {"cpu_offload": False, "offload_optimizer": {"device": "cpu"}}},
        'offload_optimizer.device "cpu" contradicts ds.json:3: zero_optimization.cpu_offload false',
    ),
    "amp": ({"amp": {"enabled": True}}, "amp {...}: not supported; use fp16 or bf16"),
    "coupled": (
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        "optimizer.params.adam_w_mode false: not supported",
    ),
    "lamb": (
        {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}},
        'optimizer.type "Lamb": not built; write "type": "AdamW", with lr as written',
    ),
    "log": (
        {
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_max_lr": 1e-4, "warmup_type": "log"},
            }
        },
        'only "linear" is built',
    ),
    "one-cycle": (
        {"scheduler": {"type": "OneCycle", "params": {}}},
        'scheduler.type "OneCycle" is not built; there are WarmupLR',
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_unknown_or_not_built_is_refused_with_its_line(ds, case) -> None:
    config, words = UNKNOWN[case]
    said = ds.refusal(config)
    assert words in said and re.match(
        r"ds\.json:\d+: ", said.splitlines()[-1].lstrip(" 0123456789.")
    )


def test_a_broken_rule_names_the_key_that_stands_for_its_flag(ds) -> None:
    model = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --vocab-size 61"
    )
    flags = f"{model} --mock-data --tokenizer-type NullTokenizer --train-iters 8"
    with pytest.raises(ConfigError) as caught:
        checked(ds.parse(ADAMW, flags), 1)
    assert "--lr-warmup-iters 10 must be below the decay's 8 iters" in str(caught.value)
    key = "scheduler.params.warmup_num_steps"
    assert str(caught.value).endswith(f"\n  --lr-warmup-iters is {key} here: {ds.file}:15")
    assert checked(ds.parse(ADAMW, flags.replace("iters 8", "iters 11")), 1).batches is None


def test_sections_that_are_off_ask_for_nothing(ds) -> None:
    off = {"enabled": False}
    config = {
        "amp": off,
        "elasticity": off,
        "csv_monitor": off,
        "flops_profiler": off,
        "compression_training": {},
    }
    assert ds.parse(config).notices == ()


def test_a_file_that_is_not_there_and_flags_without_each_other(tmp_path) -> None:
    for words, said in (
        (
            "--deepspeed --deepspeed_config none.json",
            "none.json: cannot be read (No such file or directory)",
        ),
        ("--deepspeed_config none.json", "has no say without --deepspeed"),
        ("--deepspeed", "--deepspeed needs --deepspeed_config FILE"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            parse(words.split())


def test_hugging_faces_form_names_the_file_at_once(ds) -> None:
    ds.write({"gradient_clipping": 0.5})
    assert parse(["--deepspeed", str(ds.file)]).config.optim.clip_grad == 0.5


def test_fp16_begins_at_deepspeeds_first_loss_scale_unless_a_flag_says_another(ds) -> None:
    config = {"fp16": {"enabled": True}}
    parsed = ds.parse(config)
    assert parsed.config.precision.initial_loss_scale == 2.0**16
    assert any("fp16 without initial_scale_power: 16" in line for line in parsed.notices)
    given = ds.parse(config, "--initial-loss-scale 1024")
    assert given.config.precision.initial_loss_scale == 1024.0 and given.notices == ()


def test_an_optimizer_that_is_here_under_flags_of_its_own_says_so(ds) -> None:
    said = ds.refusal({"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "momentum": 0.95}}})
    assert 'optimizer.type "Muon": its parameters have flags of their own here' in said
    assert said.endswith("use --optimizer muon")


def test_lion_has_its_own_betas_and_deepspeeds_defaults(ds) -> None:
    optim = ds.parse({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}).config.optim
    assert (optim.optimizer, optim.lion_beta1, optim.lion_beta2, optim.weight_decay) == (
        "lion",
        0.9,
        0.99,
        0.0,
    )
    given = {
        "optimizer": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.95, 0.98], "eps": 1e-8}}
    }
    assert "optimizer.params.eps 1e-08: Lion has no such parameter" in ds.refusal(given)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            "gradient_clipping",
            "gradient_clipping  (a key of a ds.json, mapped)\n    means --clip-grad",
        ),
        (
            "zero_optimization.sub_group_size",
            "(a key of a ds.json, accepted, changes nothing)\n    sizes and",
        ),
        ("--deepspeed", "--deepspeed              read a ds.json"),
        ("--yaml-cfg", "--config FILE            read a YAML file"),
    ],
)
def test_keys_and_the_command_lines_own_flags_are_explained(capsys, asked, words) -> None:
    with pytest.raises(SystemExit):
        parse(["--explain", asked])
    assert words in capsys.readouterr().out
