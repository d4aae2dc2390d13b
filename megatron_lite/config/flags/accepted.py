"""Megatron's flags that change nothing here, each with its reason, and refused where that does not hold."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.flags.legacy_flag import Legacy, no_op


def _each(reason: str, flags: str, **what: object) -> Iterator[Legacy]:
    """One row for each of the flags."""
    for flag in flags.split():
        yield no_op(flag, reason, **what)


_VALUE = {"takes_value": True}
_MANY = {"many": True, "takes_value": True}

_SPEED = "changes the speed only, not the result"
_OVERLAP = "changes the overlap only, not the result"
_FORMAT = "there is one checkpoint format, for every layout, and every rank writes its part"
_EXPERTS = "has a say only with --num-experts, which is refused above 1"
_LATENT = "has a say only with --multi-latent-attention, which is refused"
_FP8 = "has a say only with --fp8-format, which is refused"
_SERVICES = "nothing is sent to a service: metrics.jsonl, TensorBoard and W&B hold the run"
_MODEL = "flags say the model; a checkpoint of another model is refused by name at load"

NO_OPS: tuple[Legacy, ...] = (
    no_op("--data-impl", "token files are always memory mapped", "mmap", "infer"),
    no_op("--mmap-warmup", "the operating system reads mapped files as needed"),
    no_op("--DDP-impl", "there is one data-parallel engine", "local", "torch"),
    no_op(
        "--transformer-impl",
        "the kernel table chooses; see --attention-backend",
        "local",
        "transformer_engine",
    ),
    no_op("--use-mcore-models", "there is one implementation of each model"),
    no_op("--use-legacy-models", "there is one implementation of each model"),
    no_op("--use-cpu-initialization", "weights do not depend on where they are drawn"),
    no_op("--no-async-tensor-model-parallel-allreduce", "changes the overlap only, not the result"),
    no_op("--no-overlap-p2p-communication", "changes the overlap only, not the result"),
    no_op("--overlap-p2p-communication", "receives are always posted early"),
    no_op("--no-persist-layer-norm", "the kernel table chooses the norm's kernel"),
    no_op("--no-rope-fusion", "the kernel table chooses the rotary kernel"),
    no_op(
        "--cross-entropy-loss-fusion", "head and loss are fused in any case; see --logits-chunk-mib"
    ),
    no_op("--tp-comm-overlap", "changes the overlap only, not the result"),
    no_op("--decoupled-weight-decay", "adam is AdamW and sgd's decay is coupled, as in Megatron"),
    no_op("--create-attention-mask-in-dataloader", "masks are made where attention runs"),
    no_op("--no-create-attention-mask-in-dataloader", "masks are made where attention runs"),
    no_op("--attention-mask-in-fp32", "what is masked is minus infinity in every format"),
    no_op(
        "--deepspeed-activation-checkpointing",
        "recomputation needs no DeepSpeed; --checkpoint-activations or --recompute-* decide",
    ),
    *_each(
        "sizes and copies of DeepSpeed's buffers; see --ddp-bucket-size",
        "--zero-reduce-scatter --zero-contigious-gradients",
    ),
    *_each(
        "sizes and copies of DeepSpeed's buffers; see --ddp-bucket-size",
        "--zero-reduce-bucket-size --zero-allgather-bucket-size",
        **_VALUE,
    ),
    *_each(
        "--recompute-* say what is recomputed; this is only how",
        "--contigious-checkpointing --synchronize-each-layer --profile-backward",
    ),
    no_op("--remote-device", "weights stay on the device", "none"),
    *_each(
        "only buffers of a portion of the update are pinned, two each way",
        "--no-pin-cpu-grads --no-pin-cpu-params",
    ),
    no_op(
        "--overlap-cpu-optimizer-d2h-h2d",
        "copies to and from the host always run beside the update",
    ),
    no_op("--use-torch-optimizer-for-cpu-offload", "the rules of --optimizer run on the host, too"),
    no_op("--tile-factor", "1 is whole", "1"),
    no_op(
        "--deepspeed-mpi", "RANK and WORLD_SIZE count; without them mpirun is refused with the way"
    ),
    no_op("--check-for-large-grads", "--grad-norm-spike-factor is on unless it is 0"),
    no_op("--disable-straggler-on-startup", "the straggler report only reads clocks"),
    no_op(
        "--straggler-ctrlr-port",
        "no port is opened: --log-straggler says whether there is a report",
        takes_value=True,
    ),
    no_op("--repeated-dataloader", "training data repeat by themselves"),
    no_op("--universal-checkpoint", "every checkpoint loads at every parallel layout"),
    no_op(
        "--log-optimizer-states-to-tensorboard",
        "not written; --log-params-norm and the gradient norm are",
    ),
    no_op("--use-dist-ckpt", "there is one checkpoint format, for every layout"),
    no_op("--auto-detect-ckpt-format", "there is one checkpoint format, for every layout"),
    no_op(
        "--ckpt-format",
        "there is one checkpoint format, for every layout",
        "torch_dist",
        "torch",
        "torch_dcp",
        "fsdp_dtensor",
        "zarr",
    ),
    no_op("--dist-ckpt-format", "there is one checkpoint format", "torch_dist", "zarr"),
    no_op("--num-experts", "one expert is the dense model", "1"),
    no_op("--expert-model-parallel-size", "one expert is the dense model", "1"),
    no_op(
        "--ds-sequence-parallel-size",
        "1 changes nothing; a sequence that ranks share is --context-parallel-size",
        "1",
    ),
    no_op("--local-rank", "the launcher's LOCAL_RANK counts", takes_value=True),
    no_op(
        "--no-position-embedding",
        "rotary or no positions have no table that could be left out",
        needs={"model.position_embedding_type": ("rope", "none")},
        otherwise="a learned table is a position embedding; use --position-embedding-type none or rope",
    ),
    no_op(
        "--empty-unused-memory-level",
        "unused memory is given back where an allocation would fail; to do so at every step only "
        "costs time",
        "0",
        "1",
        "2",
    ),
    no_op("--legacy-tokenizer", "there is one implementation of each tokenizer"),
    no_op(
        "--dist-ckpt-strictness",
        "names and shapes must match, or the checkpoint is refused with what does not",
        **_VALUE,
    ),
    no_op("--use-persistent-ckpt-worker", "--async-save writes in a thread of each rank"),
    no_op("--async-strategy", "--async-save writes in a thread of each rank", **_VALUE),
    *_each(
        _FORMAT,
        "--dist-ckpt-optim-fully-reshardable --dist-ckpt-optim-save-fully-reshardable "
        "--dist-ckpt-save-pre-mcore-014 --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save "
        "--ckpt-fully-parallel-load --ckpt-assume-constant-structure "
        "--ckpt-load-validate-sharding-integrity --ckpt-convert-update-legacy-dist-opt-format",
    ),
    no_op("--dist-ckpt-workers", _FORMAT, **_VALUE),
    no_op("--load-main-params-from-ckpt", "fp32 masters are loaded where a checkpoint has them"),
    *_each(
        _MODEL,
        "--use-checkpoint-args --use-mp-args-from-checkpoint-args "
        "--use-tokenizer-model-from-checkpoint-args --no-use-tokenizer-model-from-checkpoint-args",
    ),
    *_each(
        _OVERLAP,
        "--tp-comm-overlap-ag --tp-comm-overlap-rs --tp-comm-overlap-rs-dgrad --tp-comm-bulk-dgrad "
        "--tp-comm-bulk-wgrad --disable-tp-comm-overlap-ag --disable-tp-comm-overlap-rs "
        "--disable-tp-comm-bulk-dgrad --disable-tp-comm-bulk-wgrad --disable-tp-comm-split-ag "
        "--disable-tp-comm-split-rs --defer-embedding-wgrad-compute --delay-wgrad-compute "
        "--overlap-p2p-communication-warmup-flush --overlap-param-gather-with-optimizer-step "
        "--align-grad-reduce --no-align-grad-reduce --align-param-gather --no-align-param-gather "
        "--ddp-pad-buckets-for-high-nccl-busbw --deallocate-pipeline-outputs",
    ),
    no_op("--wgrad-deferral-limit", _OVERLAP, **_VALUE),
    no_op("--tp-comm-overlap-cfg", _OVERLAP, **_VALUE),
    no_op("--tp-comm-bootstrap-backend", _OVERLAP, **_VALUE),
    no_op("--pipeline-model-parallel-comm-backend", _OVERLAP, **_VALUE),
    no_op("--ddp-num-buckets", f"{_OVERLAP}; --ddp-bucket-size is the size of a bucket", **_VALUE),
    no_op("--ddp-average-in-collective", "gradients are divided once, by the step's tokens"),
    *_each(
        _SPEED,
        "--enable-cuda-graph --external-cuda-graph --nccl-ub --use-nccl-ub --use-sharp "
        "--disable-jit-fuser --batch-p2p-communication --no-batch-p2p-communication "
        "--use-ring-exchange-p2p --no-scatter-gather-tensors-in-pipeline --use-te-activation-func "
        "--use-transformer-engine-op-fuser --clone-scatter-output-in-embedding "
        "--no-clone-scatter-output-in-embedding --gradient-reduce-div-fusion "
        "--no-gradient-reduce-div-fusion --use-pin-memory",
    ),
    *_each(
        _SPEED,
        "--cuda-graph-impl --cuda-graph-warmup-steps --sharp-enabled-group "
        "--nccl-communicator-config-path",
        **_VALUE,
    ),
    *_each(_SPEED, "--cuda-graph-scope --high-priority-stream-groups", **_MANY),
    no_op(
        "--cross-entropy-fusion-impl",
        "head and loss are fused in any case; see --logits-chunk-mib",
        "native",
        "te",
        "linear",
    ),
    no_op("--cp-comm-type", "has a say only with --context-parallel-size above 1", **_MANY),
    no_op("--disable-gloo-process-groups", "a group is made where something calls it"),
    no_op("--enable-gloo-process-groups", "a group is made where something calls it"),
    no_op("--barrier-with-L1-time", "timers put no barrier between the parts they measure"),
    no_op(
        "--no-barrier-with-level-1-timing", "timers put no barrier between the parts they measure"
    ),
    no_op("--init-model-with-meta-device", "weights do not depend on where they are drawn"),
    no_op("--te-rng-tracker", "random numbers are functions of counters and need no tracker"),
    no_op(
        "--inference-rng-tracker", "random numbers are functions of counters and need no tracker"
    ),
    no_op("--enable-experimental", "there is no hidden feature to switch on"),
    no_op("--test-mode", "metrics.jsonl holds all numbers of every step"),
    no_op("--log-progress", "metrics.jsonl holds the progress of every step"),
    no_op("--log-tokens-per-second", "TGS is always in the log line"),
    no_op("--log-energy", "energy is not measured"),
    no_op("--logging-level", "the log has one level; warnings are marked", **_VALUE),
    no_op("--config-logger-dir", "config.yaml of the run folder holds the whole config", **_VALUE),
    *_each(_SERVICES, "--enable-one-logger --no-one-logger --one-logger-async"),
    *_each(
        _SERVICES,
        "--one-logger-project --one-logger-run-name --app-tag-run-name --app-tag-run-version",
        **_VALUE,
    ),
    no_op("--run-workload-inspector-server", "no port is opened"),
    no_op("--enable-ft-package", "lost and hanging ranks are noticed without it"),
    no_op(
        "--inprocess-restart", "--max_restarts of tools/launch.py starts again from a checkpoint"
    ),
    no_op("--exit-signal-handler-for-dataloader", "data are read by threads, which get no signals"),
    no_op(
        "--exit-signal",
        "SIGTERM, SIGUSR1 and Ctrl-C all stop with a checkpoint",
        "SIGTERM",
        "SIGINT",
        "SIGUSR1",
    ),
    no_op("--error-injection-rate", "0 injects nothing", "0", "0.0"),
    no_op("--error-injection-type", "has a say only with --error-injection-rate above 0", **_VALUE),
    no_op("--manual-gc-eval", "evaluation leaves no garbage that has to be collected apart"),
    no_op("--no-manual-gc-eval", "evaluation leaves no garbage that has to be collected apart"),
    no_op("--disable-msc", "data are read from files"),
    no_op("--num-dataset-builder-threads", "indices are made by as many threads as pay", **_VALUE),
    no_op(
        "--sequences-per-dataset-path", "the index beside each file says its sequences", **_VALUE
    ),
    *_each(
        "an index is made once, kept in the cache, and found by every rank of a node",
        "--dataloader-fast-cache-load --fast-cache-load --dataloader-defer-npy-index-mmap "
        "--no-shared-fs",
    ),
    no_op("--allow-ambiguous-pad-tokens", "samples are never padded"),
    no_op("--trust-remote-code", "no code of a tokenizer or model is ever run"),
    no_op("--tokenizer-hf-use-fast", "ids equal the reference's, whichever engine is the fastest"),
    no_op("--vocab-extra-ids", "0 adds nothing", "0"),
    no_op("--expert-tensor-parallel-size", "one expert is the dense model", **_VALUE),
    no_op("--num-distributed-optimizer-instances", "1 is the optimizer that is here", "1"),
    no_op("--main-grads-dtype", "gradients are accumulated in fp32", "fp32"),
    no_op("--main-params-dtype", "masters are fp32", "fp32"),
    no_op(
        "--muon-tp-mode",
        "each matrix is gathered whole on one tp rank: the result is that of both",
        "duplicated",
        "distributed",
    ),
    no_op("--muon-scalar-optimizer", "Muon's tables, norms and biases are AdamW's", "adam"),
    no_op("--softmax-type", "the softmax has no offset", "vanilla"),
    *_each(
        _EXPERTS,
        "--moe-grouped-gemm --moe-use-legacy-grouped-gemm --moe-permute-fusion --moe-router-fusion "
        "--moe-shared-expert-overlap --moe-shared-expert-gate --moe-per-layer-logging "
        "--moe-router-pre-softmax --moe-router-enable-expert-bias --moe-pad-expert-input-to-capacity "
        "--moe-extended-tp --moe-layer-recompute --moe-use-upcycling --moe-enable-deepep "
        "--moe-router-force-load-balancing --moe-router-padding-for-fp8 --moe-apply-probs-on-input "
        "--overlap-moe-expert-parallel-comm",
    ),
    *_each(
        _EXPERTS,
        "--moe-router-topk --moe-router-load-balancing-type --moe-router-dtype "
        "--moe-router-score-function --moe-router-num-groups --moe-router-group-topk "
        "--moe-router-topk-scaling-factor --moe-router-topk-limited-devices "
        "--moe-router-bias-update-rate --moe-aux-loss-coeff --moe-z-loss-coeff --moe-input-jitter-eps "
        "--moe-token-dispatcher-type --moe-expert-capacity-factor --moe-token-drop-policy "
        "--moe-ffn-hidden-size --moe-shared-expert-intermediate-size --moe-layer-freq "
        "--moe-deepep-num-sms --moe-upcycling-granularity",
        **_VALUE,
    ),
    no_op("--cache-mla-latents", _LATENT),
    *_each(
        _LATENT,
        "--q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim "
        "--rotary-scaling-factor --mscale --mscale-all-dim --original-max-position-embeddings",
        **_VALUE,
    ),
    *_each(
        _FP8,
        "--fp8-param-gather --no-fp8-wgrad --fp8-dot-product-attention --fp8-multi-head-attention "
        "--first-last-layers-bf16 --keep-fp8-transpose-cache --tp-only-amax-red "
        "--reuse-grad-buf-for-mxfp8-param-ag",
    ),
    *_each(
        _FP8,
        "--fp8-margin --fp8-interval --fp8-amax-history-len --fp8-amax-compute-algo "
        "--num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16",
        **_VALUE,
    ),
)
