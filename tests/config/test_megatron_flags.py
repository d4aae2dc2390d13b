"""Every flag a user of the Megatron 175B scripts has works, is mapped, is noticed or is refused."""

from __future__ import annotations

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.legacy import LEGACY
from megatron_lite.config.flags.parser import parse, spellings
from megatron_lite.config.rules.table import check_config

NATIVE = """
--num-layers 96 | --hidden-size 12288 | --num-attention-heads 96 | --seq-length 2048
--max-position-embeddings 2048 | --attention-backend auto | --attention-backend flash
--attention-backend fused | --attention-backend unfused | --attention-backend local
--micro-batch-size 1 | --global-batch-size 1536 | --rampup-batch-size 16 16 5859375
--step-batch-size-schedule 0:16,2.4B:320 | --train-iters 500000 | --weight-decay 0.1
--adam-beta1 0.9 | --adam-beta2 0.95 | --adam-eps 1e-8 | --init-method-std 0.006 | --clip-grad 1.0
--fp16 | --bf16 | --lr 6.0e-5 | --lr-decay-style cosine | --min-lr 6.0e-6
--lr-warmup-fraction .001 | --lr-decay-iters 430000 | --tensor-model-parallel-size 8
--pipeline-model-parallel-size 16 | --data-path d | --vocab-file v.json | --merge-file m.txt
--split 949,50,1 | --log-interval 100 | --save-interval 10000 | --eval-interval 1000
--eval-iters 10 | --save c | --load c | --tensorboard-dir t
--train-samples 146484375 | --lr-decay-samples 126953125 | --lr-warmup-samples 183105
--lr-warmup-iters 5 | --lr-warmup-init 1e-7 | --sequence-parallel | --distributed-backend nccl
--distributed-backend gloo | --no-query-key-layer-scaling | --disable-bias-linear
--normalization rmsnorm | --normalization RMSNorm | --swiglu
--untie-embeddings-and-output-weights | --tokenizer-model m | --recompute-granularity full
--recompute-granularity selective | --recompute-method uniform | --recompute-method block
--recompute-num-layers 2 | --distribute-saved-activations | --log-batch-size-to-tensorboard
--log-validation-ppl-to-tensorboard | --log-timers-to-tensorboard | --tensorboard-queue-size 5
--override-opt_param-scheduler | --override-opt-param-scheduler | --data-cache-path c
--use-checkpoint-opt_param-scheduler | --use-distributed-optimizer | --overlap-grad-reduce
--overlap-param-gather | --num-layers-per-virtual-pipeline-stage 2
--num-virtual-stages-per-pipeline-rank 2 | --tokenizer-type GPT2BPETokenizer | --log-throughput
--seed 1 | --finetune | --no-load-optim | --no-load-rng | --no-save-optim | --no-save-rng
--exit-interval 10 | --exit-duration-in-mins 230 | --exit-signal-handler
--distributed-timeout-minutes 10 | --num-workers 2 | --initial-loss-scale 65536
--loss-scale 1024 | --loss-scale-window 500 | --hysteresis 2 | --min-loss-scale 1
--make-vocab-size-divisible-by 128 | --mock-data | --train-data-path a | --valid-data-path b
--test-data-path c | --per-split-data-args-path j | --data-args-path f | --log-params-norm
--log-num-zeros-in-grad | --timing-log-level 2 | --timing-log-option minmax | --profile
--profile-step-start 10 | --profile-step-end 12 | --profile-ranks 0 1 | --use-pytorch-profiler
--wandb-project p | --wandb-exp-name n | --wandb-save-dir d | --wandb-entity e
--no-masked-softmax-fusion | --no-bias-gelu-fusion | --no-bias-swiglu-fusion
--no-bias-dropout-fusion | --no-gradient-accumulation-fusion | --hidden-dropout 0.1
--attention-dropout 0.1 | --group-query-attention | --num-query-groups 8
--position-embedding-type rope | --position-embedding-type learned_absolute
--yarn-rotary-scaling-factor 4 | --yarn-original-max-position-embeddings 64
--yarn-beta-fast 16 | --yarn-beta-slow 2 | --no-yarn-correction-range-round-to-int
--rotary-base 10000 | --rotary-percent 0.5 | --manual-gc | --manual-gc-interval 10
--accumulate-allreduce-grads-in-fp32 | --no-accumulate-allreduce-grads-in-fp32
--calculate-per-token-loss | --tensorboard-log-interval 5 | --kv-channels 128
--ffn-hidden-size 49152 | --mid-level-dataset-surplus 0.005 | --sgd-momentum 0.9 | --optimizer adam
--start-weight-decay 0.1 | --end-weight-decay 0.1 | --weight-decay-incr-style constant
--attention-softmax-in-fp32 | --apply-query-key-layer-scaling | --ckpt-step 5
--exit-on-missing-checkpoint | --skip-train | --reset-position-ids | --reset-attention-mask
--check-for-nan-in-loss-and-grad | --no-check-for-nan-in-loss-and-grad | --rerun-mode disabled
--rerun-mode validate_results | --log-straggler | --straggler-minmax-count 16
--log-memory-interval 200 | --check-weight-hash-across-dp-replicas-interval 20000
--deterministic-mode
--eod-mask-loss | --dataloader-type single | --context-parallel-size 1 | --no-mmap-bin-files
"""
MAPPED = {
    "--openai-gelu": {"model.gelu": "tanh"},
    "--bf16 --grad-reduce-in-bf16": {"parallel.accumulate_allreduce_grads_in_fp32": False},
    "--encoder-num-layers 3": {"model.num_layers": 3},
    "--enable-zbh1-pipeline": {"parallel.pipeline_schedule": "zb-h1"},
    "--recompute-activations": {"parallel.recompute_granularity": "selective"},
    "--checkpoint-activations": {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
    },
    "--check-for-spiky-loss": {"guards.loss_spike_factor": 10.0},
    "--check-for-spiky-loss --loss-spike-factor 3": {"guards.loss_spike_factor": 3.0},
    "--save-retain-interval 500": {"checkpoint.keep_every": 500, "checkpoint.keep_last": 1},
    "--checkpoint-activations --checkpoint-num-layers 3": {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 3,
    },
    "--activations-checkpoint-method uniform": {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
    },
    "--activations-checkpoint-method block --activations-checkpoint-num-layers 4": {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "block",
        "parallel.recompute_num_layers": 4,
    },
    "--distribute-checkpointed-activations": {"parallel.distribute_saved_activations": True},
    "--use-flash-attn": {"precision.attention_backend": "flash"},
    "--use-flash-attn-v1": {"precision.attention_backend": "flash"},
    "--use-flash-attn-v2": {"precision.attention_backend": "flash"},
    "--use-flash-attn-triton": {"precision.attention_backend": "flash"},
    "--use-flash-attn-builder": {"precision.attention_backend": "flash"},
    "--use-rotary-position-embeddings": {"model.position_embedding_type": "rope"},
    "--use-rope-scaling --rope-scaling-factor 32": {
        "model.rope_scaling_type": "llama3",
        "model.rope_scaling_factor": 32.0,
    },
    "--rotary-seq-len-interpolation-factor 2": {
        "model.rope_scaling_type": "linear",
        "model.rope_scaling_factor": 2.0,
    },
    "--num-key-value-heads 8": {
        "model.num_query_groups": 8,
        "model.group_query_attention": True,
    },
    "--override-lr-scheduler": {"learning_rate.override_opt_param_scheduler": True},
    "--rotary-position-embeddings-theta 100000000": {"model.rotary_base": 1e8},
    "--kill-switch-path stop": {"train.kill_switch_file": "stop"},
    "--no-pipeline-parallel": {"parallel.pipeline_model_parallel_size": 1},
    "--seq-length 2048 --train-tokens 300000000000": {"train.train_samples": 146484375},
    "--seq-length 2048 --train-tokens 300000000000 --train-samples 999": {
        "train.train_samples": 999
    },
    "--seq-length 2048 --lr-decay-tokens 2049": {"learning_rate.lr_decay_samples": 2},
    "--seq-length 2048 --lr-warmup-tokens 375000000": {"learning_rate.lr_warmup_samples": 183106},
}
REFUSED = {
    "--batch-size 4": "use --micro-batch-size",
    "--warmup 0.01": "use --lr-warmup-fraction",
    "--model-parallel-size 8": "use --tensor-model-parallel-size",
    "--train-data-exact-num-epochs 1": "--train-samples",
    "--load-tag global_step5": "use --ckpt-step",
    "--train-weighted-split-paths a": "use --train-data-path",
    "--squared-relu": "use GELU",
    "--data-impl cached": "takes only mmap or infer here",
    "--num-experts 8": "takes only 1 here",
    "--activations-checkpoint-method custom": "takes only uniform or block here",
    "--train-tokens 3e9": "write 3000000000",
}


def cases(table: str) -> list[str]:
    return [case.strip() for line in table.strip().splitlines() for case in line.split("|")]


IMPLIES = {
    "--disable-bias-linear": 1, "--no-bias-gelu-fusion": 1, "--recompute-granularity full": 2,
}  # fmt: skip
"""How many other values follow from a flag, each with a line."""


@pytest.mark.parametrize("words", cases(NATIVE))
def test_native(words: str) -> None:
    flag, *_ = words.split()
    parsed = parse(words.split())
    key = spellings()[flag.replace("_", "-")].setting.key
    assert parsed.origin[key] == f"flag {flag}"
    assert len(parsed.notices) == IMPLIES.get(words, 0)


@pytest.mark.parametrize("words", MAPPED)
def test_mapped(words: str) -> None:
    parsed = parse(words.split())
    for key, expected in MAPPED[words].items():
        section, name = key.split(".")
        assert getattr(getattr(parsed.config, section), name) == expected
        assert parsed.origin[key].startswith("flag --")
    assert parsed.notices and all(n.startswith("--") and "means" in n for n in parsed.notices)


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words.split())
    assert str(caught.value).startswith(words.split()[0])
    assert REFUSED[words] in str(caught.value)


def test_the_cases_cover_the_whole_table() -> None:
    tried = {word.split("=")[0] for row in MAPPED for word in row.split() if word[:2] == "--"}
    assert {flag for flag, row in LEGACY.items() if row.kind == "mapped"} <= tried


@pytest.mark.parametrize("flag", [flag for flag, row in LEGACY.items() if row.kind == "refused"])
def test_every_refusal_names_the_flag_and_a_way_out(flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([flag, "1"])
    assert str(caught.value) == f"{flag} 1: not supported; {LEGACY[flag].say}"


def test_tokens_and_samples_that_differ_are_refused() -> None:
    words = "--seq-length 100 --lr-decay-tokens 1000 --lr-decay-samples 11"
    with pytest.raises(ConfigError, match="is 10 samples of 100 tokens, but --lr-decay-samples"):
        parse(words.split())


_MODEL_175B = """
--num-layers 96 --hidden-size 12288 --num-attention-heads 96 --seq-length 2048
--max-position-embeddings 2048
"""
_SHARED_175B = f"""{_MODEL_175B}
--micro-batch-size 1 --global-batch-size 1536 --weight-decay 0.1 --adam-beta1 0.9
--adam-beta2 0.95 --init-method-std 0.006 --clip-grad 1.0 --fp16 --lr 6.0e-5
--lr-decay-style cosine --min-lr 6.0e-6 --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
--save ckpt --load ckpt --tensorboard-dir tb
"""
_MLM = f"""{_SHARED_175B}
--train-iters 500000 --lr-warmup-fraction .001 --lr-decay-iters 430000
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --data-path corpus
--split 949,50,1 --log-interval 100 --save-interval 10000 --eval-interval 1000 --eval-iters 10
"""
_STEPS = "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"
_MDS = f"""{_SHARED_175B}
--rampup-batch-size 16 16 5859375 --train-samples 146484375 --lr-decay-samples 126953125
--lr-warmup-samples 183105 --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16
--data-path 0.2 d1 0.3 d2 0.5 d3 --split 98,2,0 --log-interval 10 --save-interval 1000
--eval-interval 1000 --eval-iters 40
"""
_MDS_WITH_MP = """
--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --micro-batch-size 4
--global-batch-size 16 --seq-length 1024 --max-position-embeddings 1024 --train-iters 500000
--lr-decay-iters 320000 --save ckpt --load ckpt --data-path corpus --vocab-file v.json
--merge-file m.txt --data-impl mmap --split 949,50,1 --distributed-backend nccl --lr 0.00015
--lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --clip-grad 1.0
--lr-warmup-fraction .01 --log-interval 100 --save-interval 10000 --eval-interval 1000
--eval-iters 10 --fp16 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
--sequence-parallel
"""
_MDS_LLAMA = f"""{_MODEL_175B}
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --micro-batch-size 1
--global-batch-size 1536 --train-tokens 300000000000 --lr-decay-tokens 260000000000
--lr-warmup-tokens 375000000 --lr 6e-5 --min-lr 6e-6 --lr-decay-style cosine --bf16
--data-path corpus --data-impl mmap --data-cache-path cache
--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model tok.model --split 949,50,1
--use-flash-attn-v2 --num-key-value-heads 8
--no-query-key-layer-scaling --disable-bias-linear --normalization rmsnorm --swiglu
--use-rotary-position-embeddings --untie-embeddings-and-output-weights --attention-dropout 0
--hidden-dropout 0 --weight-decay 0.1 --clip-grad 1 --ffn-hidden-size 32768
--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --log-timers-to-tensorboard
--log-optimizer-states-to-tensorboard --tensorboard-queue-size 1 --override-opt_param-scheduler
--repeated-dataloader --universal-checkpoint --seed 1234 --num-workers 0 --save ckpt
--save-interval 1000 --load ckpt --tensorboard-dir tb --exit-duration-in-mins 30000000
"""


_LLAMA_3 = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
--num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
--seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
--no-position-embedding --rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0
--hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused
--apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear
--micro-batch-size 1 --global-batch-size 128 --train-samples 1_953_125_000
--lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001
--decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0
--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16
--cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
--empty-unused-memory-level 1 --exit-duration-in-mins 235 --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather --tensor-model-parallel-size 4
--pipeline-model-parallel-size 2 --sequence-parallel --mock-data --tokenizer-type NullTokenizer
--vocab-size 128256 --tiktoken-pattern v2 --split '99,1,0'
--no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1 --log-interval 1
--eval-iters 32 --eval-interval 100 --save-interval 0 --log-throughput --ckpt-format torch_dist
--distributed-timeout-minutes 60 --save ckpt --load ckpt --tensorboard-dir tb
--recompute-granularity full --wandb-project w --wandb-exp-name e
"""
_TEST_CASE = """
--num-layers 12 --hidden-size 512 --num-attention-heads 8 --log-params-norm
--log-num-zeros-in-grad --log-validation-ppl-to-tensorboard --log-timers-to-tensorboard
--tensorboard-dir tb --micro-batch-size 4 --global-batch-size 32 --seq-length 1024
--max-position-embeddings 1024 --train-iters 50 --timing-log-level 0 --lr-decay-iters 320000
--save ckpt --load ckpt --data-path 1.0 corpus --vocab-file v.json --merge-file m.txt
--split 949,50,1 --distributed-backend nccl --lr 0.00015 --lr-decay-style cosine --min-lr 1.0e-5
--weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01 --log-interval 1 --save-interval 50
--eval-interval 1000 --eval-iters 10 --transformer-impl transformer_engine
--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
--num-layers-per-virtual-pipeline-stage 3 --sequence-parallel --use-distributed-optimizer
--deterministic-mode --no-gradient-accumulation-fusion --attention-softmax-in-fp32
--use-checkpoint-opt_param-scheduler --use-mcore-models --ckpt-format torch_dist
--dist-ckpt-strictness log_all --use-persistent-ckpt-worker --async-save
--dist-ckpt-optim-fully-reshardable --use-checkpoint-args --ckpt-fully-parallel-load
--ckpt-assume-constant-structure --data-cache-path cache --bf16 --attention-backend unfused
--log-memory-to-tensorboard --exit-interval 50 --legacy-tokenizer --openai-gelu
--check-weight-hash-across-dp-replicas-interval 10 --no-ckpt-fully-parallel-save
"""


@pytest.mark.parametrize(
    "words, world_size",
    [
        (_MLM.split(), 128),
        ([*_MLM.split(), "--attention-backend", "auto"], 128),
        ([*_MLM.split(), "--rampup-batch-size", "16", "16", "5859375"], 128),
        ([*_MLM.split(), "--step-batch-size-schedule", _STEPS], 128),
        (_MDS.split(), 1024),
        (_MDS_WITH_MP.split(), 8),
        (_MDS_LLAMA.split(), 64),
        ([*_LLAMA_3.split(), "--dry-run"], 64),
        (_TEST_CASE.split(), 8),
        ([*_TEST_CASE.split(), "--lr", "1e-3", "--no-bf16"], 8),
    ],
    ids=[
        "mlm",
        "mlm-backend",
        "mlm-rampup",
        "mlm-steps",
        "mds",
        "mds-mp",
        "mds-llama",
        "llama-3",
        "test-case",
        "test-case-and-more",
    ],
)
def test_whole_scripts_pass_all_rules(words: list[str], world_size: int) -> None:
    check_config(parse(words).config, world_size)


def test_the_old_deepspeed_script_recomputes_layer_by_layer() -> None:
    config = parse([*_MDS.split(), "--activations-checkpoint-method", "uniform"]).config
    check_config(config, 1024)
    asked = config.parallel
    assert asked.recompute_granularity == "full"
    assert (asked.recompute_method, asked.recompute_num_layers) == ("uniform", 1)


def test_a_deepspeed_launch_without_its_file_is_refused_flag_by_flag() -> None:
    extra = "--deepspeed --deepspeed_config ds.json --zero-stage 3 --no-pipeline-parallel"
    with pytest.raises(ConfigError) as caught:
        parse([*_MDS_LLAMA.split(), *extra.split()])
    heading, *listed = str(caught.value).splitlines()
    assert heading == "2 problems on the command line:"
    assert [line.split()[1].strip(":") for line in listed] == [
        "--pipeline-model-parallel-size",
        "--deepspeed_config",
    ]
