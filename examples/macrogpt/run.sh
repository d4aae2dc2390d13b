#!/usr/bin/env bash
# A Llama pretrained in fp16 on one shard of a corpus, continued on the next, drawn and sampled from, on real
# Chinese text and two CPU cores; FULL=1: the sizes of the system that this follows.  See README.md.
#   PYTHON   a python with megatron_lite's requirements; python3
#   OUT      the folder everything is written to; demo/macrogpt in the repository
#   CACHE    keeps the packages that were downloaded; demo/packages
#   TEXT     a folder of your own shards instead, in the order of their names: JSON arrays of {"i", "a"}, *.json
#   STEPS    optimizer steps on the first shard (200) and STEPS_NEXT on each later one (100)
#   FULL=1   1.47B parameters; needs TEXT and TOKENIZER (a SentencePiece .model of 64,076 ids), GPUS of this node (1)
#   DRY_RUN=1   with FULL=1: check every rule, print memory and time on HARDWARE (a100-80g), start nothing
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${OUT:-$ROOT/demo/macrogpt}
CACHE=${CACHE:-$ROOT/demo/packages}
FULL=${FULL:-0} DRY_RUN=${DRY_RUN:-0} TEXT=${TEXT:-}
# shellcheck source=examples/pipeline.sh
. "$ROOT/examples/pipeline.sh"

# -- what is trained ---------------------------------------------------------------------------------
# Llama: RMSNorm, SwiGLU twelve times as wide as the stream, rotary positions, no bias, a head of its own; small, the
# preset's parts with sizes of their own
MODEL=(--preset macrogpt-1.3b)
# fp16 with fp32 masters, Adafactor at the learning rate as given, and a loss scale that starts where 16 bits can follow
RUN=(--fp16 --initial-loss-scale 65536 --clip-grad 1.0 --weight-decay 0.0
    --optimizer adafactor --lr-decay-style linear --lr-warmup-fraction 0.01)
if [[ $FULL == 1 ]]; then
    GPUS=${GPUS:-1} STEPS=${STEPS:-10000} STEPS_NEXT=${STEPS_NEXT:-10000}
    RUN+=(--micro-batch-size 4 --global-batch-size 128 --lr 3e-4 --recompute-granularity full
        --recompute-method uniform --recompute-num-layers 1 --loss-scale-window 100
        --log-interval 20 --save-interval 384 --eval-interval 384 --eval-iters 10)
    KEEP=6 KEEP_NEXT=3
else
    GPUS=2 STEPS=${STEPS:-200} STEPS_NEXT=${STEPS_NEXT:-100}
    MODEL+=(--num-layers 2 --hidden-size 64 --ffn-hidden-size 768 --num-attention-heads 2
        --seq-length 64 --max-position-embeddings 64)
    RUN+=(--micro-batch-size 2 --global-batch-size 4 --lr 4e-3 --num-workers 1 --use-cpu
        --log-interval 20 --save-interval 100 --eval-interval 100 --eval-iters 20)
    KEEP=2 KEEP_NEXT=2
fi

if [[ $FULL == 1 && $DRY_RUN == 1 ]]; then
    exec "$PYTHON" "$ROOT/tools/plan.py" --hardware "${HARDWARE:-a100-80g}" --gpus-per-node "$GPUS" \
        "${MODEL[@]}" "${RUN[@]}" --train-iters "$STEPS" --make-vocab-size-divisible-by 4 \
        --tokenizer-type GPTSentencePieceTokenizer --save "$OUT/run-1" --keep-last "$KEEP"
fi
[[ $DRY_RUN == 0 ]] || die "DRY_RUN=$DRY_RUN is for FULL=1: the small run is started, it takes minutes"
if [[ $FULL == 1 ]]; then
    [[ -n $TEXT ]] || die "FULL=1 and TEXT is not set: TEXT=FOLDER with the shards, JSON arrays of {\"i\", \"a\"}"
    [[ -n ${TOKENIZER:-} ]] || die "FULL=1 and TOKENIZER is not set: TOKENIZER=tokenizer.model (SentencePiece)"
fi

mkdir -p "$OUT"
rm -rf -- "$OUT"/text "$OUT"/tokenizer "$OUT"/tokens "$OUT"/run-*
mkdir -p "$OUT/tokens"

# -- text, tokenizer, token files --------------------------------------------------------------------
step "text: arrays of {\"i\", \"a\"}"
if [[ -z $TEXT ]]; then
    "$PYTHON" "$ROOT/examples/chinese/make_corpus.py" macrogpt "$OUT/text" --cache "$CACHE"
    TEXT=$OUT/text
fi
shopt -s nullglob
SHARDS=("$TEXT"/*.json)
((${#SHARDS[@]} > 1)) || die "TEXT=$TEXT holds ${#SHARDS[@]} *.json files: the run continues on the next shard, so give two"

step "tokenizer: SentencePiece, learned in one pass"
if [[ -z ${TOKENIZER:-} ]]; then
    "$PYTHON" "$ROOT/tools/train_tokenizer.py" --input "${SHARDS[@]}" --json-keys a --type sentencepiece-bpe \
        --vocab-size 2048 --character-coverage 0.98 --max-token-chars 6 --output-dir "$OUT/tokenizer"
    TOKENIZER=$OUT/tokenizer/tokenizer.model
fi
WORDS=(--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$TOKENIZER")

step "token files: once, not at every start"
PREFIXES=()
for shard in "${SHARDS[@]}"; do
    name=$(basename "$shard" .json)
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$shard" --json-keys a --output-prefix "$OUT/tokens/$name" \
        "${WORDS[@]}" --append-eod --workers 2 --log-interval 100000
    PREFIXES+=("$OUT/tokens/${name}_a_document")
done
"$PYTHON" "$ROOT/tools/dataset_stats.py" --table "${PREFIXES[@]}"

# -- train on the first shard, continue on each next one ---------------------------------------------
train() { # run folder, prefix, steps, checkpoints kept, more flags
    local save=$1 prefix=$2 steps=$3 keep=$4
    shift 4
    passing_signals_on "$PYTHON" "$ROOT/tools/launch.py" --nproc_per_node "$GPUS" "$ROOT/tools/pretrain_gpt.py" \
        "${MODEL[@]}" "${RUN[@]}" "${WORDS[@]}" --make-vocab-size-divisible-by 4 --data-path "$prefix" --split 98,2,0 \
        --save "$save" --keep-last "$keep" --train-iters "$steps" "$@"
}
step "train: the first shard, $GPUS ranks"
train "$OUT/run-1" "${PREFIXES[0]}" "$STEPS" "$KEEP"
for ((at = 1; at < ${#PREFIXES[@]}; at++)); do
    step "continue: shard $((at + 1)), with the weights and the optimizer of the last"
    train "$OUT/run-$((at + 1))" "${PREFIXES[$at]}" "$STEPS_NEXT" "$KEEP_NEXT" --load "$OUT/run-$at" --finetune --keep-optim
done
LAST=$OUT/run-${#PREFIXES[@]}

# -- look at it --------------------------------------------------------------------------------------
step "sample"
"$PYTHON" "$ROOT/tools/generate.py" --load "$LAST" --prompt "系统" "这个文件" "如果你" \
    --max-new-tokens 32 --temperature 0.7 --top-k 40 --seed 1 --use-cpu
step "the loss: a picture of each shard"
for ((at = 1; at <= ${#PREFIXES[@]}; at++)); do "$PYTHON" "$ROOT/tools/report.py" "$OUT/run-$at"; done
"$PYTHON" "$ROOT/examples/macrogpt/verdict.py" "$OUT/run-1" "$LAST"
printf 'macrogpt took %d s\n' "$SECONDS"
