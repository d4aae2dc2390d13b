#!/usr/bin/env bash
# A small Chinese Llama, from text to a chat: a vocabulary, pretraining, answers learned by full tuning and by LoRA,
# texts four times as long by YaRN, perplexity and C-Eval, on real text and two CPU cores.
# FULL=1: the sizes of the system that this follows.  See README.md.
#   PYTHON   a python with megatron_lite's requirements; python3
#   OUT      the folder everything is written to; demo/baby_llama in the repository
#   CACHE    keeps the packages that were downloaded; demo/packages
#   TEXT     a folder of your own texts instead: wiki.json [{"completion"}], baike.jsonl {"title", "summary",
#            "sections": [{"title", "content"}]}, alpaca.json [{"instruction", "input", "output"}],
#            held_out.jsonl {"text"}, ceval/ in C-Eval's layout
#   CHATGLM  ChatGLM2's tokenizer.model instead of a vocabulary of its own
#   STEPS    optimizer steps: of pretraining (300), STEPS_SFT of answers (150), STEPS_LORA (60), STEPS_LONG of YaRN (30)
#   FULL=1   58M parameters, fp16; needs TEXT and CHATGLM; GPUS of this node (4)
#   DRY_RUN=1   with FULL=1: check every rule, print memory and time on HARDWARE (v100-32g), start nothing
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${OUT:-$ROOT/demo/baby_llama}
CACHE=${CACHE:-$ROOT/demo/packages}
FULL=${FULL:-0} DRY_RUN=${DRY_RUN:-0} TEXT=${TEXT:-} CHATGLM=${CHATGLM:-}
# shellcheck source=examples/pipeline.sh
. "$ROOT/examples/pipeline.sh"

# -- what is trained ---------------------------------------------------------------------------------
# Llama: RMSNorm, SwiGLU, rotary positions, no bias, tied ends; small, the preset's parts with sizes of their own
MODEL=(--preset baby-llama-58m)
RUN=(--adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0 --lr-decay-style cosine --seed 1337)
if [[ $FULL == 1 ]]; then
    GPUS=${GPUS:-4} STEPS=${STEPS:-80000} STEPS_SFT=${STEPS_SFT:-50000} STEPS_LORA=${STEPS_LORA:-5000}
    STEPS_LONG=${STEPS_LONG:-400} LENGTH=512
    RUN+=(--fp16 --initial-loss-scale 65536 --micro-batch-size 32 --global-batch-size 128 --log-interval 100
        --save-interval 10000 --eval-interval 1000 --eval-iters 10)
    PRETRAIN=(--lr 3e-4 --min-lr 1e-5 --lr-warmup-iters 1000 --weight-decay 0.1)
    SFT=(--lr 2e-5 --min-lr 1e-6 --weight-decay 1e-4)
    LORA=(--lr 2e-4 --weight-decay 0 --lora-rank 16 --lora-alpha 32)
    LONG=(--lr 2e-5 --weight-decay 0.1 --micro-batch-size 8 --global-batch-size 32)
else
    GPUS=2 STEPS=${STEPS:-300} STEPS_SFT=${STEPS_SFT:-150} STEPS_LORA=${STEPS_LORA:-60}
    STEPS_LONG=${STEPS_LONG:-30} LENGTH=128
    MODEL+=(--num-layers 4 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4)
    RUN+=(--micro-batch-size 8 --global-batch-size 16 --num-workers 1 --use-cpu --log-interval 20
        --save-interval 1000 --eval-interval 1000 --eval-iters 4)
    PRETRAIN=(--lr 4e-3 --lr-warmup-iters 20 --weight-decay 0.1)
    SFT=(--lr 2e-3 --lr-warmup-iters 10 --weight-decay 1e-4)
    LORA=(--lr 5e-3 --lr-warmup-iters 5 --weight-decay 0 --lora-rank 8 --lora-alpha 16)
    LONG=(--lr 3e-4 --lr-warmup-iters 5 --weight-decay 0.1 --micro-batch-size 1 --global-batch-size 2)
fi
SHORT=(--seq-length "$LENGTH" --max-position-embeddings "$LENGTH")

if [[ $FULL == 1 && $DRY_RUN == 1 ]]; then
    exec "$PYTHON" "$ROOT/tools/plan.py" --hardware "${HARDWARE:-v100-32g}" --world-size "$GPUS" --gpus-per-node "$GPUS" \
        "${MODEL[@]}" "${SHORT[@]}" "${RUN[@]}" "${PRETRAIN[@]}" --train-iters "$STEPS" --save "$OUT/pretrained"
fi
[[ $DRY_RUN == 0 ]] || die "DRY_RUN=$DRY_RUN is for FULL=1: the small run is started, it takes minutes"
if [[ $FULL == 1 ]]; then
    [[ -n $TEXT ]] || die "FULL=1 and TEXT is not set: TEXT=FOLDER with wiki.json, baike.jsonl, alpaca.json, held_out.jsonl, ceval"
    [[ -n $CHATGLM ]] || die "FULL=1 and CHATGLM is not set: CHATGLM=tokenizer.model (ChatGLM2's SentencePiece file)"
fi
[[ -z $CHATGLM || -f $CHATGLM ]] || die "CHATGLM=$CHATGLM is no file: give ChatGLM2's tokenizer.model"

mkdir -p "$OUT"
rm -rf -- "$OUT"/text "$OUT"/tokenizer "$OUT"/tokens "$OUT"/pretrained "$OUT"/answers "$OUT"/adapters "$OUT"/long "$OUT"/exported
mkdir -p "$OUT/tokens"

# -- text, vocabulary, token files -------------------------------------------------------------------
step "text: wiki, encyclopedia, instructions, what is held out, an exam"
if [[ -z $TEXT ]]; then
    "$PYTHON" "$ROOT/examples/chinese/make_corpus.py" baby-llama "$OUT/text" --cache "$CACHE"
    TEXT=$OUT/text
fi
for name in wiki.json baike.jsonl alpaca.json held_out.jsonl ceval; do
    [[ -e $TEXT/$name ]] || die "TEXT=$TEXT holds no $name: give wiki.json, baike.jsonl, alpaca.json, held_out.jsonl and ceval"
done

step "vocabulary: ChatGLM2's, or SentencePiece learned in one pass"
if [[ -n $CHATGLM ]]; then
    WORDS=(--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$CHATGLM" --chatglm-special-tokens)
else
    "$PYTHON" "$ROOT/tools/train_tokenizer.py" --input "$TEXT"/{wiki.json,baike.jsonl,alpaca.json} \
        --template '{completion?}\n{title?}{summary?}\n{sections[].content?}\n{instruction?}\n{output?}' \
        --type sentencepiece-bpe --vocab-size 2048 --character-coverage 0.98 --max-token-chars 6 --output-dir "$OUT/tokenizer"
    WORDS=(--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$OUT/tokenizer/tokenizer.model")
fi

step "token files: whole documents with an end; conversations with a mask of what is learned"
preprocess() { # name of the files, input, more flags
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --output-prefix "$OUT/tokens/$1" --input "$TEXT/$2" "${@:3}" \
        "${WORDS[@]}" --workers 2 --log-interval 100000
}
preprocess wiki wiki.json --json-keys completion --append-eod
preprocess baike baike.jsonl --template '{title}：{summary}\n{sections[].content}' --append-eod
preprocess held_out held_out.jsonl --json-keys text --append-eod
preprocess answers alpaca.json --chat --chat-template plain --seq-length "$LENGTH"
BLEND=(0.3 "$OUT/tokens/wiki_completion_document" 0.7 "$OUT/tokens/baike_text_document")
"$PYTHON" "$ROOT/tools/dataset_stats.py" --table "${BLEND[@]}"

# -- pretrain, learn to answer -----------------------------------------------------------------------
train() { # run folder, steps, data, more flags
    passing_signals_on "$PYTHON" "$ROOT/tools/launch.py" --nproc_per_node "$GPUS" "$ROOT/tools/pretrain_gpt.py" \
        "${MODEL[@]}" "${RUN[@]}" "${WORDS[@]}" --save "$OUT/$1" --train-iters "$2" --split 98,2,0 \
        --data-cache-path "$OUT/tokens/cache" --data-path "${@:3}"
}
step "pretrain: $STEPS steps on $GPUS ranks"
train pretrained "$STEPS" "${BLEND[@]}" "${SHORT[@]}" "${PRETRAIN[@]}"

step "answers: all weights learn them; what is asked is read and not learned"
train answers "$STEPS_SFT" "$OUT/tokens/answers" "${SHORT[@]}" "${SFT[@]}" --objective sft --neftune-alpha 5 \
    --load "$OUT/pretrained" --finetune

step "answers by LoRA: adapters beside the frozen model, saved alone"
train adapters "$STEPS_LORA" "$OUT/tokens/answers" "${SHORT[@]}" "${LORA[@]}" --objective sft \
    --load "$OUT/pretrained" --finetune

# -- texts four times as long ------------------------------------------------------------------------
step "YaRN: from $LENGTH to $((4 * LENGTH)) tokens"
train long "$STEPS_LONG" "${BLEND[@]}" "${LONG[@]}" --seq-length $((4 * LENGTH)) \
    --max-position-embeddings $((4 * LENGTH)) --rope-scaling-type yarn --rope-scaling-factor 4 \
    --rope-original-length "$LENGTH" --load "$OUT/pretrained" --finetune \
    --allow-model-change seq_length,rope_scaling_type

# -- what it is worth --------------------------------------------------------------------------------
DEVICE=() && [[ $FULL == 1 ]] || DEVICE=(--use-cpu)
evaluate() { "$PYTHON" "$ROOT/tools/evaluate.py" --load "$OUT/$1" "${DEVICE[@]}" "${@:2}"; }
step "perplexity of what was held out: as pretrained, and stretched, at both lengths"
evaluate pretrained --tokens "$OUT/tokens/held_out_text_document" --window "$LENGTH" --json "$OUT/pretrained.json"
evaluate long --tokens "$OUT/tokens/held_out_text_document" --window "$LENGTH" --json "$OUT/long-short.json"
evaluate long --tokens "$OUT/tokens/held_out_text_document" --window $((4 * LENGTH)) --json "$OUT/long.json"
step "an exam in C-Eval's layout"
evaluate answers --ceval "$TEXT/ceval" --shots 0 --json "$OUT/exam.json"

step "chat: with the model that has learned to answer, and through the adapters"
for name in answers adapters; do
    printf '%s\n' "命令 ls 是做什么的？" /reset "什么是 Debian GNU/Linux？" |
        "$PYTHON" "$ROOT/tools/chat.py" --load "$OUT/$name" --chat-template plain --temperature 0 --max-new-tokens 40 "${DEVICE[@]}"
done
step "a folder for transformers, the adapters merged"
"$PYTHON" "$ROOT/tools/convert.py" "$OUT/adapters" "$OUT/exported" --merge --dtype f32
"$PYTHON" "$ROOT/tools/report.py" "$OUT/pretrained"
"$PYTHON" "$ROOT/examples/baby_llama/verdict.py" "$OUT"
printf 'baby_llama took %d s\n' "$SECONDS"
