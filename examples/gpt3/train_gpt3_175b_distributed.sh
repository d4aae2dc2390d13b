#!/usr/bin/env bash
# GPT-3 175B: tp 8 x pp 8 on 8 nodes of 8 GPUs, fp16, two corpora blended 0.35 / 0.65.
# Run the same line on every node; examples/gpt3/README.md has the table of variables.
set -euo pipefail

usage() {
    cat <<'USAGE'
usage: train_gpt3_175b_distributed.sh CHECKPOINT_PATH TENSORBOARD_LOGS_PATH VOCAB_FILE MERGE_FILE

  CHECKPOINT_PATH        run folder: checkpoints are saved here and resumed from here
  TENSORBOARD_LOGS_PATH  folder of TensorBoard events
  VOCAB_FILE MERGE_FILE  gpt2-vocab.json and gpt2-merges.txt

Every number can be overridden from the environment, for example
  NUM_NODES=1 GPUS_PER_NODE=8 TP=8 PP=1 NUM_LAYERS=12 PRECISION=bf16 DATASET=/data/my_text_document
  EXTRA_ARGS="--seed 7 --log-params-norm"     any further flags of tools/pretrain_gpt.py
  DRY_RUN=1        check every rule, print the plan and start nothing (the paths may be left out);
                   HARDWARE=a100-80g adds memory, time and cost there (PLAN_ARGS="--tokens 300B")
  REHEARSE=1       run ranks of every stage here without memory or data and compare what they say
  PRINT_COMMAND=1  print the command, quoted for a shell, and start nothing
The table of all variables: examples/gpt3/README.md
USAGE
}

die() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

is_count() { [[ $1 =~ ^[0-9]{1,9}$ ]]; }

# Sets the array `words` to the words of $2; quotes keep spaces inside a word, nothing is expanded or run.
split_words() {
    local name=$1 text=$2
    words=()
    [[ $text =~ [^[:space:]] ]] || return 0
    xargs printf '%s\0' <<<"$text" >/dev/null 2>&1 || die "$name has a quote without its partner: $text"
    mapfile -d '' -t words < <(xargs printf '%s\0' <<<"$text")
}

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -x $ROOT/.venv/bin/python ]]; then
    PYTHON=$ROOT/.venv/bin/python # what `make setup` left; an activated environment comes first
fi
PYTHON=${PYTHON:-python3}
type -P "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is no program"
DRY_RUN=${DRY_RUN:-0}
REHEARSE=${REHEARSE:-0}
PRINT_COMMAND=${PRINT_COMMAND:-0}
for name in DRY_RUN REHEARSE PRINT_COMMAND; do
    [[ ${!name} == [01] ]] || die "$name=${!name} is neither 0 nor 1"
done
[[ $DRY_RUN$REHEARSE != 11 ]] || die "DRY_RUN=1 and REHEARSE=1 exclude each other; a rehearsal checks every rule too"

# -- where -----------------------------------------------------------------------------------------
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
if (($# > 4)); then
    die "takes 4 paths, got $#; corpora go into DATASET or DATASET_1 and DATASET_2, flags into EXTRA_ARGS"
fi
if (($# < 4)) && [[ $DRY_RUN$REHEARSE == 00 ]]; then
    usage >&2
    exit 2
fi
for path in "$@"; do
    [[ -n $path ]] || die "one of the four paths is empty"
done
CHECKPOINT_PATH=${1:-checkpoints}
TENSORBOARD_LOGS_PATH=${2:-tensorboard}
VOCAB_FILE=${3:-gpt2-vocab.json}
MERGE_FILE=${4:-gpt2-merges.txt}
LOAD_PATH=${LOAD_PATH-$CHECKPOINT_PATH} # set but empty: start fresh

# -- who -------------------------------------------------------------------------------------------
NUM_NODES=${NUM_NODES:-8}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TP=${TP:-8}
PP=${PP:-8}
MAX_RESTARTS=${MAX_RESTARTS:-0}
for name in NUM_NODES GPUS_PER_NODE TP PP NODE_RANK MAX_RESTARTS; do
    is_count "${!name}" || die "$name=${!name} is not a whole number"
    printf -v "$name" '%d' "$((10#${!name}))" # a leading zero does not mean octal
done
for name in NUM_NODES GPUS_PER_NODE TP PP; do
    ((${!name} > 0)) || die "$name=${!name} must be at least 1"
done
((NODE_RANK < NUM_NODES)) || die "NODE_RANK=$NODE_RANK is not below NUM_NODES=$NUM_NODES"
WORLD_SIZE=$((NUM_NODES * GPUS_PER_NODE))

LAUNCH_ARGS=(--nproc_per_node "$GPUS_PER_NODE" --nnodes "$NUM_NODES" --node_rank "$NODE_RANK")
((MAX_RESTARTS == 0)) || LAUNCH_ARGS+=(--max_restarts "$MAX_RESTARTS")
if ((NUM_NODES == 1)) && [[ -z ${MASTER_PORT:-} ]]; then
    # a free port is found, so that two jobs can share a machine
    LAUNCH_ARGS+=(--standalone --local_addr "${MASTER_ADDR:-localhost}")
else
    LAUNCH_ARGS+=(--master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-6000}")
fi

# -- what ------------------------------------------------------------------------------------------
MODEL_ARGS=(
    --num-layers "${NUM_LAYERS:-96}"
    --hidden-size "${HIDDEN_SIZE:-12288}"
    --num-attention-heads "${NUM_ATTENTION_HEADS:-96}"
    --seq-length "${SEQ_LENGTH:-2048}"
    --max-position-embeddings "${MAX_POSITION_EMBEDDINGS:-${SEQ_LENGTH:-2048}}"
    --attention-backend "${ATTENTION_BACKEND:-flash}"
)

TRAINING_ARGS=(
    --micro-batch-size "${MICRO_BATCH_SIZE:-1}"
    --global-batch-size "${GLOBAL_BATCH_SIZE:-1536}"
    --train-iters "${TRAIN_ITERS:-500000}"
    --weight-decay "${WEIGHT_DECAY:-0.1}"
    --adam-beta1 "${ADAM_BETA1:-0.9}"
    --adam-beta2 "${ADAM_BETA2:-0.95}"
    --init-method-std "${INIT_METHOD_STD:-0.006}"
    --clip-grad "${CLIP_GRAD:-1.0}"
    --lr "${LR:-6.0e-5}"
    --lr-decay-style "${LR_DECAY_STYLE:-cosine}"
    --min-lr "${MIN_LR:-6.0e-6}"
    --lr-warmup-fraction "${LR_WARMUP_FRACTION:-.001}"
    --lr-decay-iters "${LR_DECAY_ITERS:-430000}"
)
PRECISION=${PRECISION:-fp16}
case $PRECISION in
    fp16 | bf16) TRAINING_ARGS+=("--$PRECISION") ;;
    fp32) ;;
    *) die "PRECISION=$PRECISION is none of fp16, bf16, fp32" ;;
esac

PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
)
# Without it the activations of 8 micro batches in flight do not fit beside 47 GiB of state on 80 GB.
((TP == 1)) || PARALLEL_ARGS+=(--sequence-parallel)

DATASET_PATH=${DATASET_PATH:-$ROOT/data}
DATASET_1=${DATASET_1:-$DATASET_PATH/wikipedia_text_document}
DATASET_2=${DATASET_2:-$DATASET_PATH/openwebtext_text_document}
DATASETCACHE=${DATASETCACHE:-$CHECKPOINT_PATH/index-cache}
if [[ -n ${DATASET:-} && -f ${DATASET:-}.idx ]]; then
    words=("$DATASET") # one prefix, its spaces included
elif [[ -n ${DATASET:-} ]]; then
    split_words DATASET "$DATASET"
else
    words=(0.35 "$DATASET_1" 0.65 "$DATASET_2")
fi
DATA_ARGS=(
    --data-path "${words[@]}"
    --data-cache-path "$DATASETCACHE"
    --vocab-file "$VOCAB_FILE"
    --merge-file "$MERGE_FILE"
    --split "${SPLIT:-949,50,1}"
)

OUTPUT_ARGS=(
    --log-interval "${LOG_INTERVAL:-100}"
    --save-interval "${SAVE_INTERVAL:-10000}"
    --eval-interval "${EVAL_INTERVAL:-1000}"
    --eval-iters "${EVAL_ITERS:-10}"
    --save "$CHECKPOINT_PATH"
    --tensorboard-dir "$TENSORBOARD_LOGS_PATH"
)
[[ -z $LOAD_PATH ]] || OUTPUT_ARGS+=(--load "$LOAD_PATH")

split_words EXTRA_ARGS "${EXTRA_ARGS:-}"
ARGS=(
    "$ROOT/tools/pretrain_gpt.py" "${MODEL_ARGS[@]}" "${TRAINING_ARGS[@]}" "${PARALLEL_ARGS[@]}"
    "${DATA_ARGS[@]}" "${OUTPUT_ARGS[@]}" "${words[@]}"
)

# -- go --------------------------------------------------------------------------------------------
# One hardware queue: kernels start in the order they were issued, so communication overlaps compute.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# How long torchrun waits, after SIGTERM, for the step's end and the checkpoint before it kills; its own 30 s
# are less than one step of 175B. A rank that fails is not waited for.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

if [[ $DRY_RUN == 1 && -n ${HARDWARE:-} ]]; then
    split_words PLAN_ARGS "${PLAN_ARGS:-}"
    COMMAND=(
        "$PYTHON" "$ROOT/tools/plan.py" --hardware "$HARDWARE" --nodes "$NUM_NODES"
        --gpus-per-node "$GPUS_PER_NODE" "${words[@]}" "${ARGS[@]}"
    )
elif [[ $DRY_RUN == 1 ]]; then
    COMMAND=("$PYTHON" "${ARGS[@]}" --dry-run --world-size "$WORLD_SIZE")
elif [[ $REHEARSE == 1 ]]; then
    COMMAND=("$PYTHON" "${ARGS[@]}" --rehearse --world-size "$WORLD_SIZE")
else
    # torchrun, ending with the ranks' exit code
    COMMAND=("$PYTHON" "$ROOT/tools/launch.py" "${LAUNCH_ARGS[@]}" "${ARGS[@]}")
fi
if [[ $PRINT_COMMAND == 1 ]]; then
    printf '%s\n' "${COMMAND[*]@Q}"
    exit 0
fi
if [[ $DRY_RUN$REHEARSE == 00 && -z ${MASTER_ADDR:-} ]] && ((NUM_NODES > 1)); then
    die "NUM_NODES=$NUM_NODES and MASTER_ADDR is not set: name node 0 as the others reach it, the same on every node, or NUM_NODES=1"
fi
exec "${COMMAND[@]}"
