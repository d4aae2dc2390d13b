#!/usr/bin/env bash
# A GPT-2 from nothing: four corpora with keys of their own, counted and mixed 0.33 / 0.23 / 0.33 / 0.11, a
# Chinese byte-level BPE learned in one pass, a run that is stopped and resumed, on real text and two CPU cores.
# FULL=1: the sizes of the system that this follows.  See README.md.
#   PYTHON   a python with megatron_lite's requirements; python3
#   OUT      the folder everything is written to; demo/gpt_from_zero in the repository
#   CACHE    keeps the packages that were downloaded; demo/packages
#   TEXT     a folder of your own corpora instead: news.jsonl {"Content"}, crawler.jsonl {"段落": [{"内容"}]},
#            zhihu.jsonl {"问", "答"}, en.jsonl {"text"}
#   STEPS    optimizer steps; 160, and with FULL=1 300000 (the system's 100 epochs)
#   RESTARTS times that the cosine starts again; 1, and with FULL=1 0
#   FULL=1   336M parameters, bf16; needs TEXT; GPUS of this node (1)
#   DRY_RUN=1   with FULL=1: check every rule, print memory and time on HARDWARE (a100-40g), start nothing;
#               PLAN_ARGS: further words for tools/plan.py
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${OUT:-$ROOT/demo/gpt_from_zero}
CACHE=${CACHE:-$ROOT/demo/packages}
FULL=${FULL:-0} DRY_RUN=${DRY_RUN:-0} TEXT=${TEXT:-}
read -ra PLAN_ARGS <<<"${PLAN_ARGS:-}"
# shellcheck source=examples/pipeline.sh
. "$ROOT/examples/pipeline.sh"

# -- what is trained ---------------------------------------------------------------------------------
# GPT-2: LayerNorm, GELU, a learned table of positions, tied ends
RUN=(--adam-beta1 0.9 --adam-beta2 0.98 --weight-decay 0.01 --clip-grad 1.0 --lr-decay-style cosine
    --init-method-std 0.02 --seed 1234)
if [[ $FULL == 1 ]]; then
    GPUS=${GPUS:-1} STEPS=${STEPS:-300000} RESTARTS=${RESTARTS:-0} VOCAB=32768
    RUN+=(--preset gpt-from-zero-300m --bf16 --micro-batch-size 56 --global-batch-size 560
        --lr 4e-4 --lr-warmup-iters 1500 --log-interval 200 --eval-interval 400 --eval-iters 10
        --save-interval 1000 --keep-last 5)
else
    GPUS=2 STEPS=${STEPS:-160} RESTARTS=${RESTARTS:-1} VOCAB=2048
    RUN+=(--num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 128
        --max-position-embeddings 128 --micro-batch-size 4 --global-batch-size 8
        --hidden-dropout 0 --attention-dropout 0 --lr 4e-3 --lr-warmup-iters 10
        --log-interval 20 --eval-interval 80 --eval-iters 4
        --save-interval "$((STEPS / 2))" --num-workers 1 --use-cpu)
fi
RUN+=(--lr-restarts "$RESTARTS")

if [[ $FULL == 1 && $DRY_RUN == 1 ]]; then
    exec "$PYTHON" "$ROOT/tools/plan.py" --hardware "${HARDWARE:-a100-40g}" --gpus-per-node "$GPUS" \
        "${RUN[@]}" --train-iters "$STEPS" --save "$OUT/whole" --load "$OUT/whole" "${PLAN_ARGS[@]}"
fi
[[ $DRY_RUN == 0 ]] || die "DRY_RUN=$DRY_RUN is for FULL=1: the small run is started, it takes minutes"
[[ $FULL == 0 || -n $TEXT ]] || die "FULL=1 and TEXT is not set: TEXT=FOLDER with news, crawler, zhihu and en.jsonl"
((STEPS % 2 == 0)) || die "STEPS=$STEPS: the run is stopped half-way, so give an even number"

mkdir -p "$OUT"
rm -rf -- "$OUT"/text "$OUT"/tokenizer "$OUT"/tokens "$OUT"/whole "$OUT"/stopped
mkdir -p "$OUT/tokens"

# -- four corpora ------------------------------------------------------------------------------------
step "text: four corpora, each with keys of its own"
if [[ -z $TEXT ]]; then
    "$PYTHON" "$ROOT/examples/chinese/make_corpus.py" gpt-from-zero "$OUT/text" --cache "$CACHE"
    "$PYTHON" "$ROOT/tools/demo_corpus.py" "$OUT/text/english" --megabytes 1
    mv -- "$OUT/text/english/docs.json" "$OUT/text/en.jsonl"
    rm -r -- "$OUT/text/english"
    TEXT=$OUT/text
fi
for name in news crawler zhihu en; do
    [[ -f $TEXT/$name.jsonl ]] || die "TEXT=$TEXT holds no $name.jsonl: give news, crawler, zhihu and en.jsonl"
done

step "vocabulary: one pass over all of them, words of Han by themselves"
"$PYTHON" "$ROOT/tools/train_tokenizer.py" --input "$TEXT"/{news,crawler,zhihu,en}.jsonl \
    --template '{Content?}\n{段落[].内容?}\n{问?}\n{答?}\n{text?}' \
    --vocab-size "$VOCAB" --max-token-chars 8 --han-runs --output-dir "$OUT/tokenizer"
WORDS=(--tokenizer-type GPT2BPETokenizer --vocab-file "$OUT/tokenizer/gpt2-vocab.json"
    --merge-file "$OUT/tokenizer/gpt2-merges.txt")
"$PYTHON" "$ROOT/tools/tokenizer.py" "${WORDS[@]}" --text "如果你使用 Debian 系统，请阅读 README。"

step "token files: whole documents, each with an end"
preprocess() { # name, then what of a record is its text
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$TEXT/$1.jsonl" --output-prefix "$OUT/tokens/$1" \
        "${@:2}" "${WORDS[@]}" --append-eod --workers 2 --log-interval 100000
}
preprocess news --json-keys Content
preprocess crawler --template '{段落[].内容}'
preprocess zhihu --template '问：{问}答：{答}'
preprocess en --json-keys text
BLEND=(0.33 "$OUT/tokens/news_Content_document" 0.23 "$OUT/tokens/crawler_text_document"
    0.33 "$OUT/tokens/zhihu_text_document" 0.11 "$OUT/tokens/en_text_document")

step "the token counter: what is there, and how often this run reads it"
LENGTH=128 BATCH=8
[[ $FULL == 0 ]] || LENGTH=256 BATCH=560
"$PYTHON" "$ROOT/tools/dataset_stats.py" --table "${BLEND[@]}" --tokens "$((STEPS * BATCH * LENGTH))"

# -- train, stop, resume -----------------------------------------------------------------------------
train() { # run folder, more flags
    passing_signals_on "$PYTHON" "$ROOT/tools/launch.py" --nproc_per_node "$GPUS" "$ROOT/tools/pretrain_gpt.py" \
        "${RUN[@]}" "${WORDS[@]}" --data-path "${BLEND[@]}" --split 98,2,0 --train-iters "$STEPS" \
        --save "$1" --data-cache-path "$OUT/tokens/cache" "${@:2}"
}
if [[ $FULL == 1 ]]; then
    step "train; the same command resumes"
    train "$OUT/whole" --load "$OUT/whole"
    exit
fi
step "advice: the whole curve of the rate, and what a scaling law says of this model and these tokens"
"$PYTHON" "$ROOT/tools/plan.py" --advise --hardware cpu --gpus-per-node "$GPUS" "${RUN[@]}" --vocab-size "$VOCAB" \
    --train-iters "$STEPS"
step "train: $STEPS steps without a stop"
train "$OUT/whole"
step "train the same again, and stop after $((STEPS / 2))"
train "$OUT/stopped" --load "$OUT/stopped" --exit-interval "$((STEPS / 2))"
step "resume: the same command"
train "$OUT/stopped" --load "$OUT/stopped"

# -- look at it --------------------------------------------------------------------------------------
step "sample"
"$PYTHON" "$ROOT/tools/generate.py" --load "$OUT/stopped" --prompt "问：如何" "系统" "软件包" \
    --max-new-tokens 40 --temperature 0.7 --top-k 40 --seed 1 --use-cpu
step "the loss, and whether the stop can be seen"
"$PYTHON" "$ROOT/tools/report.py" "$OUT/stopped"
"$PYTHON" "$ROOT/examples/gpt_from_zero/verdict.py" "$OUT/whole" "$OUT/stopped"
printf 'gpt_from_zero took %d s\n' "$SECONDS"
