#!/usr/bin/env bash
# The system's run on two GPUs by its ds.json: ZeRO-2, the optimizer's state in host memory.  On two CPU cores with
# random numbers as they are; FULL=1: the sizes of the system.  See README.md.
#   PYTHON    a python with megatron_lite's requirements; python3
#   ENGINE    zero, this project's, or deepspeed, DeepSpeed's own (pip install -e '.[deepspeed]')
#   LAUNCHER  deepspeed, the command; without it tools/launch.py
#   DATA      prefix of a token file that run.sh has made, with TOKENIZER, its SentencePiece model; random numbers
#   STEPS     optimizer steps: 12; 10000 with FULL=1
#   SAVE      the run folder; none, or with FULL=1 demo/macrogpt/run-deepspeed
#   FULL=1    1.47B parameters on GPUS of this node (2); needs DATA and TOKENIZER
#   DRY_RUN=1 print memory and time on HARDWARE (a100-80g), start nothing
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
FULL=${FULL:-0} DRY_RUN=${DRY_RUN:-0} GPUS=${GPUS:-2} ENGINE=${ENGINE:-zero} LAUNCHER=${LAUNCHER:-}
DATA=${DATA:-} TOKENIZER=${TOKENIZER:-} SAVE=${SAVE:-}
# shellcheck source=examples/pipeline.sh
. "$ROOT/examples/pipeline.sh"

# -- what is trained ---------------------------------------------------------------------------------
# the batch is the flags', all else of the update is the file's
RUN=(--deepspeed --deepspeed_config "$ROOT/examples/macrogpt/ds.json" --engine "$ENGINE" --preset macrogpt-1.3b)
if [[ $FULL == 1 ]]; then
    STEPS=${STEPS:-10000} SAVE=${SAVE:-$ROOT/demo/macrogpt/run-deepspeed}
    RUN+=(--micro-batch-size 4 --global-batch-size $((4 * 32 * GPUS)) --recompute-granularity full
        --recompute-method uniform --recompute-num-layers 1 --log-interval 20 --save-interval 384
        --eval-interval 384 --eval-iters 10)
else
    STEPS=${STEPS:-12}
    RUN+=(--num-layers 2 --hidden-size 64 --ffn-hidden-size 768 --num-attention-heads 2 --seq-length 64
        --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size $((4 * GPUS)) --num-workers 1 --use-cpu
        --log-interval 4 --eval-iters 0)
fi
RUN+=(--train-iters "$STEPS" --make-vocab-size-divisible-by 4)
[[ -z $SAVE ]] || RUN+=(--save "$SAVE" --keep-last 3)

if [[ $DRY_RUN == 1 ]]; then
    exec "$PYTHON" "$ROOT/tools/plan.py" --hardware "${HARDWARE:-a100-80g}" --gpus-per-node "$GPUS" "${RUN[@]}" \
        --tokenizer-type GPTSentencePieceTokenizer
fi
if [[ -n $DATA ]]; then
    [[ -n $TOKENIZER ]] || die "DATA=$DATA and TOKENIZER is not set: TOKENIZER=tokenizer.model, which made it"
    RUN+=(--data-path "$DATA" --split "98,2,0" --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$TOKENIZER")
elif [[ $FULL == 1 ]]; then
    die "FULL=1 and DATA is not set: DATA=PREFIX of a token file (run.sh makes them), with TOKENIZER=tokenizer.model"
else
    RUN+=(--mock-data --tokenizer-type NullTokenizer --vocab-size 500)
fi

# -- train -------------------------------------------------------------------------------------------
if [[ -n $LAUNCHER ]]; then
    exec "$LAUNCHER" --num_gpus="$GPUS" "$ROOT/tools/pretrain_gpt.py" "${RUN[@]}"
fi
exec "$PYTHON" "$ROOT/tools/launch.py" --nproc_per_node "$GPUS" "$ROOT/tools/pretrain_gpt.py" "${RUN[@]}"
