"""Flags of Megatron's public examples and test configurations: each works, changes nothing, or is refused.

The names are written out here, so that a row that goes missing is noticed.  What works is tried
where it works; here it must be a field, or set one.
"""

from __future__ import annotations

import re

import pytest

from megatron_lite.config.errors import ConfigError
from megatron_lite.config.flags.legacy import LEGACY
from megatron_lite.config.flags.parser import parse, spellings
from megatron_lite.config.rules.table import check_config

WORKS = """
--qk-layernorm --window-size --add-qkv-bias --rotary-interleaved
--accumulate-allreduce-grads-in-fp32 --adam-beta1 --adam-beta2 --adam-eps --apply-layernorm-1p
--decoupled-lr --decoupled-min-lr
--apply-query-key-layer-scaling --async-save --attention-backend --attention-dropout
--attention-softmax-in-fp32 --bf16 --bias-swiglu-fusion --calculate-per-token-loss
--check-for-nan-in-loss-and-grad --check-weight-hash-across-dp-replicas-interval --ckpt-step
--clip-grad --context-parallel-size --data-args-path --data-cache-path --data-path
--dataloader-type --ddp-bucket-size --decoder-first-pipeline-num-layers
--decoder-last-pipeline-num-layers --deterministic-mode
--disable-bias-linear --distribute-saved-activations --distributed-backend
--distributed-timeout-minutes --enable-zbh1-pipeline --encoder-num-layers --encoder-seq-length
--end-weight-decay --eod-mask-loss --eval-interval --eval-iters --exit-duration-in-mins
--exit-interval --exit-on-missing-checkpoint --exit-signal-handler --ffn-hidden-size --finetune
--fp16 --global-batch-size --grad-reduce-in-bf16 --group-query-attention --hidden-dropout
--hidden-size --hysteresis --init-method-std --initial-loss-scale --kv-channels
--layernorm-epsilon --load --log-batch-size-to-tensorboard --log-interval --log-memory-interval
--log-memory-to-tensorboard --log-num-zeros-in-grad --log-params-norm --log-straggler
--log-throughput --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
--log-world-size-to-tensorboard --loss-scale --loss-scale-window --lr --lr-decay-iters
--lr-decay-samples --lr-decay-style --lr-warmup-fraction --lr-warmup-init --lr-warmup-iters
--lr-warmup-samples --lr-wsd-decay-iters --lr-wsd-decay-samples --lr-wsd-decay-style
--make-vocab-size-divisible-by --manual-gc --manual-gc-interval --max-position-embeddings
--merge-file --micro-batch-size --mid-level-dataset-surplus --min-loss-scale --min-lr --mock-data
--no-bias-dropout-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion
--no-check-for-nan-in-loss-and-grad --no-data-sharding --no-gradient-accumulation-fusion
--no-load-optim --no-load-rng --no-log-loss-scale-to-tensorboard --no-masked-softmax-fusion
--no-mmap-bin-files --no-query-key-layer-scaling --no-save-optim --no-save-rng --norm-epsilon
--normalization --num-attention-heads --num-layers --num-layers-per-virtual-pipeline-stage
--num-query-groups --num-virtual-stages-per-pipeline-rank --num-workers --openai-gelu --optimizer
--optimizer-cpu-offload --cpu-optimizer --optimizer-offload-fraction
--overlap-grad-reduce --overlap-param-gather --override-opt-param-scheduler
--per-split-data-args-path --pipeline-model-parallel-layout --pipeline-model-parallel-size
--position-embedding-type --profile --profile-ranks --profile-step-end --profile-step-start
--rampup-batch-size --recompute-activations --recompute-granularity --recompute-method
--recompute-modules --recompute-num-layers --rerun-mode --reset-attention-mask
--reset-position-ids --rope-scaling-factor --rotary-base --rotary-percent
--rotary-seq-len-interpolation-factor --use-rope-scaling --save --save-interval --save-retain-interval
--seed --seq-length --sequence-parallel --sgd-momentum --skip-train --split --start-weight-decay
--step-batch-size-schedule --straggler-minmax-count --swiglu --tensor-model-parallel-size
--tensorboard-dir --tensorboard-log-interval --tensorboard-queue-size --test-data-path
--tiktoken-num-special-tokens --tiktoken-pattern --tiktoken-special-tokens --timing-log-level
--timing-log-option --tokenizer-model --tokenizer-type --train-data-path --train-iters
--train-samples --untie-embeddings-and-output-weights --use-checkpoint-opt-param-scheduler
--use-distributed-optimizer --use-flash-attn --use-pytorch-profiler
--use-rotary-position-embeddings --use-tp-pp-dp-mapping --valid-data-path --vocab-file
--vocab-size --wandb-entity --wandb-exp-name --wandb-project --wandb-save-dir --weight-decay
--weight-decay-incr-style
--override-lr-scheduler --rotary-position-embeddings-theta --kill-switch-path
"""
CHANGES_NOTHING = """
--data-impl --mmap-warmup --DDP-impl --transformer-impl --use-mcore-models --use-legacy-models
--use-cpu-initialization --no-async-tensor-model-parallel-allreduce --no-overlap-p2p-communication
--overlap-p2p-communication --no-persist-layer-norm --no-rope-fusion --cross-entropy-loss-fusion
--tp-comm-overlap --decoupled-weight-decay --create-attention-mask-in-dataloader
--no-create-attention-mask-in-dataloader --attention-mask-in-fp32
--deepspeed-activation-checkpointing --check-for-large-grads --disable-straggler-on-startup
--straggler-ctrlr-port --repeated-dataloader --universal-checkpoint
--log-optimizer-states-to-tensorboard --use-dist-ckpt --auto-detect-ckpt-format --ckpt-format
--dist-ckpt-format --num-experts --expert-model-parallel-size --ds-sequence-parallel-size
--local-rank --no-position-embedding --empty-unused-memory-level --legacy-tokenizer
--dist-ckpt-strictness --use-persistent-ckpt-worker --async-strategy
--dist-ckpt-optim-fully-reshardable --dist-ckpt-optim-save-fully-reshardable
--dist-ckpt-save-pre-mcore-014 --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save
--ckpt-fully-parallel-load --ckpt-assume-constant-structure
--ckpt-load-validate-sharding-integrity --ckpt-convert-update-legacy-dist-opt-format
--dist-ckpt-workers --load-main-params-from-ckpt --use-checkpoint-args
--use-mp-args-from-checkpoint-args --use-tokenizer-model-from-checkpoint-args
--no-use-tokenizer-model-from-checkpoint-args --tp-comm-overlap-ag --tp-comm-overlap-rs
--tp-comm-overlap-rs-dgrad --tp-comm-bulk-dgrad --tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag
--disable-tp-comm-overlap-rs --disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad
--disable-tp-comm-split-ag --disable-tp-comm-split-rs --defer-embedding-wgrad-compute
--delay-wgrad-compute --overlap-p2p-communication-warmup-flush
--overlap-param-gather-with-optimizer-step --align-grad-reduce --no-align-grad-reduce
--align-param-gather --no-align-param-gather --ddp-pad-buckets-for-high-nccl-busbw
--deallocate-pipeline-outputs --wgrad-deferral-limit --tp-comm-overlap-cfg
--tp-comm-bootstrap-backend --pipeline-model-parallel-comm-backend --ddp-num-buckets
--ddp-average-in-collective --enable-cuda-graph --external-cuda-graph --nccl-ub --use-nccl-ub
--use-sharp --disable-jit-fuser --batch-p2p-communication --no-batch-p2p-communication
--use-ring-exchange-p2p --no-scatter-gather-tensors-in-pipeline --use-te-activation-func
--use-transformer-engine-op-fuser --clone-scatter-output-in-embedding
--no-clone-scatter-output-in-embedding --gradient-reduce-div-fusion
--no-gradient-reduce-div-fusion --use-pin-memory --cuda-graph-impl --cuda-graph-warmup-steps
--sharp-enabled-group --nccl-communicator-config-path --cuda-graph-scope
--high-priority-stream-groups --cross-entropy-fusion-impl --cp-comm-type
--disable-gloo-process-groups --enable-gloo-process-groups --barrier-with-L1-time
--no-barrier-with-level-1-timing --init-model-with-meta-device --te-rng-tracker
--inference-rng-tracker --enable-experimental --test-mode --log-progress --log-tokens-per-second
--log-energy --logging-level --config-logger-dir --enable-one-logger --no-one-logger
--one-logger-async --one-logger-project --one-logger-run-name --app-tag-run-name
--app-tag-run-version --run-workload-inspector-server --enable-ft-package --inprocess-restart
--exit-signal-handler-for-dataloader --exit-signal --error-injection-rate --error-injection-type
--manual-gc-eval --no-manual-gc-eval --disable-msc --num-dataset-builder-threads
--sequences-per-dataset-path --dataloader-fast-cache-load --fast-cache-load
--dataloader-defer-npy-index-mmap --no-shared-fs --allow-ambiguous-pad-tokens --trust-remote-code
--tokenizer-hf-use-fast --vocab-extra-ids --expert-tensor-parallel-size
--num-distributed-optimizer-instances --main-grads-dtype --main-params-dtype
--muon-scalar-optimizer --muon-tp-mode
--softmax-type --moe-grouped-gemm --moe-use-legacy-grouped-gemm
--moe-permute-fusion --moe-router-fusion --moe-shared-expert-overlap --moe-shared-expert-gate
--moe-per-layer-logging --moe-router-pre-softmax --moe-router-enable-expert-bias
--moe-pad-expert-input-to-capacity --moe-extended-tp --moe-layer-recompute --moe-use-upcycling
--moe-enable-deepep --moe-router-force-load-balancing --moe-router-padding-for-fp8
--moe-apply-probs-on-input --overlap-moe-expert-parallel-comm --moe-router-topk
--moe-router-load-balancing-type --moe-router-dtype --moe-router-score-function
--moe-router-num-groups --moe-router-group-topk --moe-router-topk-scaling-factor
--moe-router-topk-limited-devices --moe-router-bias-update-rate --moe-aux-loss-coeff
--moe-z-loss-coeff --moe-input-jitter-eps --moe-token-dispatcher-type --moe-expert-capacity-factor
--moe-token-drop-policy --moe-ffn-hidden-size --moe-shared-expert-intermediate-size
--moe-layer-freq --moe-deepep-num-sms --moe-upcycling-granularity --cache-mla-latents
--q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim
--rotary-scaling-factor --mscale --mscale-all-dim --original-max-position-embeddings
--fp8-param-gather --no-fp8-wgrad --fp8-dot-product-attention --fp8-multi-head-attention
--first-last-layers-bf16 --keep-fp8-transpose-cache --tp-only-amax-red
--reuse-grad-buf-for-mxfp8-param-ag --fp8-margin --fp8-interval --fp8-amax-history-len
--fp8-amax-compute-algo --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16
--zero-reduce-scatter --zero-contigious-gradients --zero-reduce-bucket-size
--zero-allgather-bucket-size --contigious-checkpointing --synchronize-each-layer
--profile-backward --remote-device --tile-factor --deepspeed-mpi
--moe-expert-parallel-size --moe-loss-coeff --moe-train-capacity-factor --moe-eval-capacity-factor
--moe-min-capacity --topk --expert-interval --mlp-type --disable-moe-token-dropping
--disable-moe-top2-2nd-expert-sampling --create-moe-param-group --enable-expert-tensor-parallelism
--use-tutel --force-ds-sequence-parallel --ds-sequence-parallel-fpdt
--ds-sequence-parallel-fpdt-offloading --ds-sequence-parallel-fpdt-chunk-size --ds-fused-adam
--cpu-torch-adam --mem-efficient-ln --custom-token-counting --enable-zbh1-exact-semantics
--sync-tp-duplicated-parameters --abort-on-unmet-fused-kernel-constraints --log-level
--log-level-replica
--no-pin-cpu-grads --no-pin-cpu-params --overlap-cpu-optimizer-d2h-h2d
--use-torch-optimizer-for-cpu-offload
"""
REFUSED = """
--batch-size --warmup --model-parallel-size --deepscale --deepscale-config --scattered-embeddings
--split-transformers --memory-centric-tiled-linear
--no-decoupled-weight-decay --muon-no-split-qkv --partition-activations --checkpoint-in-cpu
--train-data-exact-num-epochs --load-tag --decrease-batch-size-if-needed
--train-weighted-split-paths --valid-weighted-split-paths --test-weighted-split-paths
--squared-relu --use-torch-fsdp2 --data-parallel-sharding-strategy
--fp8-format --fp8-recipe --full-validation --multi-latent-attention --no-initialization
--qk-l2-norm --qk-clip --quick-geglu --attention-output-gate
--activation-func-clamp-value --window-attn-skip-freq
--relative-attention-num-buckets --relative-attention-max-distance --mtp-num-layers
--mtp-loss-scaling-factor --spec --is-hybrid-model --hybrid-override-pattern
--hybrid-attention-ratio --hybrid-mlp-ratio --heterogeneous-layers-config-path
--init-method-xavier-uniform --embedding-init-method-std --fp32-residual-connection
--fp16-lm-cross-entropy --data-parallel-random-init --use-megatron-fsdp --use-custom-fsdp
--torch-fsdp2-no-reshard-after-forward --enable-cpu-offloading --cpu-offloading-num-layers --fp4-format
--microbatch-group-size-per-virtual-pipeline-stage --pipeline-model-parallel-split-rank
--padded-vocab-size --distributed-timeout-seconds-after-init --eval-micro-batch-size
--eval-global-batch-size --multiple-validation-sets --phase-transition-iterations
--non-persistent-save-interval --non-persistent-ckpt-type --pretrained-checkpoint
--ckpt-convert-format --ckpt-convert-save --log-max-attention-logit --record-memory-history
--memory-snapshot-path --decoder-num-layers --decoder-seq-length --adlr-autoresume-interval
--adlr-autoresume --enable-msc --object-storage-cache-path --s3-cache-path --fim-data --sft
--tokenizer-prompt-format --sft-tokenizer-prompt-format --tokenizer-special-tokens
--tokenizer-metadata --tokenizer-hf-include-special-tokens --tokenizer-sentencepiece-legacy
--curriculum-learning-legacy --data-efficiency-curriculum-learning --random-ltd
--compression-training --kd --mos --kd-alpha-ce --kd-beta-ce --kd-temp --num-layers-teacher
--hidden-size-teacher --num-attention-heads-teacher --num-experts-teacher --load-teacher
--use-dataset-only --embed-layernorm --train-idx-path --train-desc-path --train-doc-idx-path
--train-sample-idx-path --train-shuffle-idx-path --return-data-index --inference --ds-inference
--profile-name --reset-iteration --no-load-lr-state --enable-each-rank-log --pad-vocab-size-to
"""

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16"


@pytest.mark.parametrize("flag", WORKS.split())
def test_it_works(flag: str) -> None:
    row = LEGACY.get(flag)
    assert flag in spellings() or (row is not None and row.kind == "mapped"), flag


def beside(flag: str) -> str:
    """What must stand beside a flag for it to change nothing."""
    needs = LEGACY[flag].needs
    return " ".join(
        f"--{key.split('.')[1].replace('_', '-')} {allowed[0]}" for key, allowed in needs.items()
    )


@pytest.mark.parametrize("underscores", [False, True])
@pytest.mark.parametrize("flag", CHANGES_NOTHING.split())
def test_it_changes_nothing_and_says_why(flag: str, underscores: bool) -> None:
    row = LEGACY[flag]
    written = f"--{flag[2:].replace('-', '_')}" if underscores else flag
    given = [written, *((row.values or ("7",))[-1:] if row.takes_value else ())]
    parsed = parse([*given, *beside(flag).split()])
    assert parsed.config == parse(beside(flag).split()).config
    assert parsed.notices == (f"{' '.join(given)}: accepted, changes nothing: {row.say}",)
    if row.values:
        with pytest.raises(
            ConfigError, match=f"takes only {' or '.join(map(re.escape, row.values))}"
        ):
            parse([flag, "something-else"])
    if row.many:
        assert len(parse([flag, "a", "b"]).notices) == 1


@pytest.mark.parametrize("flag", REFUSED.split())
def test_it_is_refused_with_a_way_out(flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse([flag, "1"])
    assert str(caught.value) == f"{flag} 1: not supported; {LEGACY[flag].say}"
    assert re.search(r"\b(use|drop|give|say|shows|copy|blends|takes)\b", LEGACY[flag].say)


def test_the_lists_are_the_table() -> None:
    kinds = {"no-op": CHANGES_NOTHING, "refused": REFUSED}
    for kind, names in kinds.items():
        assert set(names.split()) == {flag for flag, row in LEGACY.items() if row.kind == kind}


def test_a_flag_that_holds_only_beside_others_says_so_elsewhere() -> None:
    parsed = parse(["--grad-reduce-in-bf16"])
    assert parsed.config == parse([]).config
    assert parsed.notices == (
        "--grad-reduce-in-bf16: accepted, changes nothing: it is about --bf16, which is not given",
    )
    own = "--bf16 --grad-reduce-in-bf16 --accumulate-allreduce-grads-in-fp32"
    assert parse(own.split()).config.parallel.accumulate_allreduce_grads_in_fp32
    with pytest.raises(ConfigError, match="use --position-embedding-type none or rope"):
        parse(["--no-position-embedding"])
    rope = parse(["--no-position-embedding", "--use-rotary-position-embeddings"])
    assert rope.config.model.position_embedding_type == "rope"


def test_a_dry_run_needs_no_wandb() -> None:
    words = f"{MODEL} --lr 1e-3 --train-iters 2 --mock-data --vocab-size 60 --wandb-project p"
    check_config(parse(f"{words} --wandb-exp-name e --dry-run".split()).config, 1)
    with pytest.raises(ConfigError, match="--wandb-project p needs --wandb-exp-name"):
        check_config(parse(f"{words} --dry-run".split()).config, 1)


@pytest.mark.parametrize("method", ["", "--recompute-method block"])
def test_full_recomputation_without_a_count_is_layer_by_layer(method: str) -> None:
    parsed = parse(f"--recompute-granularity full {method}".split())
    asked = parsed.config.parallel
    assert (asked.recompute_method, asked.recompute_num_layers) == (method[-5:] or "uniform", 1)
    assert (
        "--recompute-granularity full without --recompute-num-layers: 1 is taken" in parsed.notices
    )
