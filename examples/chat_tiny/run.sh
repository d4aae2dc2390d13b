#!/usr/bin/env bash
# A small model that talks: pretrained on real text, tuned on questions and answers that are made up here, then
# asked all of them, by tools/chat.py. Two CPU cores, some minutes. See README.md.
#   PYTHON   a python with megatron_lite's requirements; python3
#   OUT      the folder everything is written to; demo/chat_tiny in the repository
#   TALKS    your own conversations instead, JSON lines of {"messages": [...]} or another shape (docs/guides/finetune.md)
#   STEPS    optimizer steps of pretraining; 120
#   LEAST    the share of answers that must be right; 0.95
#   EPOCHS   how often the answers are read; 48
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${OUT:-$ROOT/demo/chat_tiny}
TALKS=${TALKS:-} STEPS=${STEPS:-120} EPOCHS=${EPOCHS:-48}
# shellcheck source=examples/pipeline.sh
. "$ROOT/examples/pipeline.sh"

for name in STEPS EPOCHS; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name}: give a whole number of at least 1"
done
[[ -z $TALKS || -f $TALKS ]] || die "TALKS=$TALKS is no file: give JSON lines of conversations"

mkdir -p "$OUT"
rm -rf -- "$OUT"/text "$OUT"/tokenizer "$OUT"/tokens "$OUT"/base "$OUT"/tuned
mkdir -p "$OUT/tokens"

step "text, a vocabulary, token files"
"$PYTHON" "$ROOT/tools/demo_corpus.py" "$OUT/text" --megabytes 1
"$PYTHON" "$ROOT/tools/train_tokenizer.py" --input "$OUT/text/docs.json" --vocab-size 1024 \
    --output-dir "$OUT/tokenizer"
WORDS=(--tokenizer-type GPT2BPETokenizer --vocab-file "$OUT/tokenizer/gpt2-vocab.json"
    --merge-file "$OUT/tokenizer/gpt2-merges.txt")
"$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$OUT/text/docs.json" --output-prefix "$OUT/tokens/text" \
    "${WORDS[@]}" --append-eod --workers 2 --log-interval 100000

MODEL=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128 --swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
    --clip-grad 1.0 --seed 1234 --num-workers 1 --use-cpu
    --log-interval 20)
train() {
    passing_signals_on "$PYTHON" "$ROOT/tools/launch.py" --nproc_per_node 2 "$ROOT/tools/pretrain_gpt.py" \
        "${MODEL[@]}" "${WORDS[@]}" "$@"
}
step "pretrain: $STEPS steps"
train --micro-batch-size 4 --global-batch-size 8 --data-path "$OUT/tokens/text_text_document" --split 98,2,0 --train-iters "$STEPS" --lr 4e-3 \
    --lr-decay-style cosine --lr-warmup-fraction 0.05 --eval-iters 0 --save "$OUT/base"

step "questions and answers, and which of their tokens are learned"
if [[ -z $TALKS ]]; then
    TALKS=$OUT/text/talks.jsonl
    "$PYTHON" "$ROOT/examples/chat_tiny/make_talks.py" "$TALKS"
fi
"$PYTHON" "$ROOT/tools/preprocess_data.py" --chat --chat-template plain --input "$TALKS" --seq-length 128 \
    --output-prefix "$OUT/tokens/talks" "${WORDS[@]}" --workers 2

step "tune: the answers alone are learned"
TUNE=(--objective sft --data-path "$OUT/tokens/talks" --split "1,0,0" --lr 3e-3 --lr-decay-style cosine
    --micro-batch-size 2 --global-batch-size 4 --eval-iters 0 --load "$OUT/base" --finetune --save "$OUT/tuned")
train "${TUNE[@]}" --train-epochs "$EPOCHS"

step "talk"
"$PYTHON" "$ROOT/examples/chat_tiny/verdict.py" "$TALKS" "$OUT/tuned" --least "${LEAST:-0.95}"
printf 'chat_tiny took %d s\n' "$SECONDS"
