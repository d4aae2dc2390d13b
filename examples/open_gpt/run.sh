#!/usr/bin/env bash
# AdamW against Sophia-G on nanoGPT's flat token files: the same learning rates for both, several seeds, at least 20,000
# tokens in every evaluation, on real text and two CPU cores.  FULL=1: the sizes of the system that this follows.  See README.md.
#   PYTHON   a python with megatron_lite's requirements; python3
#   OUT      the folder everything is written to; demo/open_gpt in the repository.  Runs that are there are not made again
#   TEXT     a folder of your own instead: train.bin and val.bin as nanoGPT's prepare.py writes them, and the
#            gpt2-vocab.json and gpt2-merges.txt of their ids
#   OPTIMIZERS, RATES, SEEDS   the grid; "adam sophiag", "3e-4 6e-4 1e-3 2e-3", "1 2 3"
#   RHO      Sophia-G's factor on the curvature; 0.05
#   STEPS    optimizer steps of a run; 300, and with FULL=1 2000
#   JOBS     runs at a time; 2, and with FULL=1 1
#   FULL=1   6.83M parameters, fp16, on a GPU; needs TEXT
#   RECIPE   GPUS x MICRO BATCH x ACCUMULATIONS, of product 480: one run of 125M on one node; needs TEXT and OPTIMIZERS
#   DRY_RUN=1   with FULL=1 or RECIPE: check every rule, print memory and time on HARDWARE (a100-40g), start nothing
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
OUT=${OUT:-$ROOT/demo/open_gpt}
FULL=${FULL:-0} RHO=${RHO:-0.05} RECIPE=${RECIPE:-} DRY_RUN=${DRY_RUN:-0} TEXT=${TEXT:-}
read -ra OPTIMIZERS <<<"${OPTIMIZERS:-adam sophiag}"
read -ra RATES <<<"${RATES:-3e-4 6e-4 1e-3 2e-3}"
read -ra SEEDS <<<"${SEEDS:-1 2 3}"
# shellcheck source=examples/pipeline.sh
. "$ROOT/examples/pipeline.sh"

# -- what is trained ---------------------------------------------------------------------------------
# nanoGPT's GPT-2: no biases, the exact GELU, tied ends
MODEL=(--disable-bias-linear --no-layernorm-bias --gelu erf --init-method-std 0.02)
RUN=(--lr-decay-style cosine --clip-grad 1.0)
SMALL=(--num-layers 2 --hidden-size 128 --num-attention-heads 2 --seq-length 64 --max-position-embeddings 64)
DEVICE=() GPUS=1
if [[ -n $RECIPE ]]; then
    [[ $RECIPE =~ ^([1-9][0-9]*)x([1-9][0-9]*)x([1-9][0-9]*)$ ]] || die "RECIPE=$RECIPE: give GPUS x MICRO BATCH x ACCUMULATIONS, 8x12x5"
    GPUS=${BASH_REMATCH[1]} MICRO=${BASH_REMATCH[2]}
    ((GPUS * MICRO * BASH_REMATCH[3] == 480)) || die "RECIPE=$RECIPE is a batch of $((GPUS * MICRO * BASH_REMATCH[3])), not of 480: 8x12x5 and 10x8x6 are"
    STEPS=${STEPS:-100000} WARMUP=2000
    MODEL+=(--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024
        --hidden-dropout 0 --attention-dropout 0)
    RUN+=(--bf16 --micro-batch-size "$MICRO" --global-batch-size 480 --log-interval 100 --eval-interval 1000 --eval-iters 10
        --save-interval 5000)
elif [[ $FULL == 1 ]]; then
    STEPS=${STEPS:-2000} JOBS=${JOBS:-1} WARMUP=$((STEPS / 10))
    MODEL+=("${SMALL[@]}" --hidden-dropout 0.1 --attention-dropout 0.1)
    RUN+=(--fp16 --initial-loss-scale 65536 --micro-batch-size 480 --global-batch-size 480 --log-interval 10
        --eval-interval 100 --eval-iters 1)
else
    STEPS=${STEPS:-300} JOBS=${JOBS:-2} WARMUP=$((STEPS / 10))
    MODEL+=("${SMALL[@]}" --hidden-dropout 0 --attention-dropout 0)
    RUN+=(--micro-batch-size 24 --global-batch-size 24 --log-interval 10 --eval-interval $((STEPS / 10)) --eval-iters 14
        --num-workers 0)
    DEVICE=(--use-cpu)
fi
for name in "${OPTIMIZERS[@]}"; do
    [[ $name == adam || $name == sophiag ]] || die "OPTIMIZERS=$name: adam and sophiag are compared"
done
for rate in "${RATES[@]}"; do
    [[ $rate =~ ^[0-9.]+e-[0-9]$ ]] || die "RATES=$rate: write a rate as 6e-4"
done
optimizer() { # name, learning rate: the published settings of each
    case $1 in
        adam) printf '%s\n' --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 ;;
        sophiag) printf '%s\n' --optimizer sophiag --sophia-rho "$RHO" --weight-decay 0.2 ;;
    esac
    printf '%s\n' --lr "$2" --min-lr "${2%e-*}e-$((${2#*e-} + 1))" # a tenth, as nanoGPT's
    printf '%s\n' --lr-warmup-iters "$WARMUP" --train-iters "$STEPS"
}

if [[ $DRY_RUN == 1 ]]; then
    [[ $FULL == 1 || -n $RECIPE ]] || die "DRY_RUN=1 is for FULL=1 and RECIPE: the small runs are started, they take minutes"
    mapfile -t WORDS < <(optimizer "${OPTIMIZERS[0]}" 6e-4)
    exec "$PYTHON" "$ROOT/tools/plan.py" --hardware "${HARDWARE:-a100-40g}" --gpus-per-node "$GPUS" --world-size "$GPUS" \
        "${MODEL[@]}" "${RUN[@]}" "${WORDS[@]}" --vocab-size 50304
fi
[[ ($FULL == 0 && -z $RECIPE) || -n $TEXT ]] || die "TEXT is not set: TEXT=FOLDER with train.bin, val.bin, gpt2-vocab.json and gpt2-merges.txt"

# -- nanoGPT's files ---------------------------------------------------------------------------------
mkdir -p "$OUT/tokens" "$OUT/runs"
if [[ -z $TEXT ]]; then
    TEXT=$OUT/text
    if [[ ! -f $TEXT/val.bin ]]; then
        step "text: Python's own documentation; a vocabulary of 512; train.bin and val.bin"
        "$PYTHON" "$ROOT/tools/demo_corpus.py" "$TEXT" --megabytes 8
        "$PYTHON" "$ROOT/tools/train_tokenizer.py" --input "$TEXT/docs.json" --vocab-size 512 --output-dir "$TEXT"
        "$PYTHON" "$ROOT/examples/open_gpt/prepare.py" "$TEXT/docs.json" "$TEXT" \
            --vocab-file "$TEXT/gpt2-vocab.json" --merge-file "$TEXT/gpt2-merges.txt"
    fi
fi
for name in train.bin val.bin gpt2-vocab.json gpt2-merges.txt; do
    [[ -f $TEXT/$name ]] || die "TEXT=$TEXT holds no $name: give train.bin, val.bin, gpt2-vocab.json and gpt2-merges.txt"
done
WORDS=(--tokenizer-type GPT2BPETokenizer --vocab-file "$TEXT/gpt2-vocab.json" --merge-file "$TEXT/gpt2-merges.txt")
step "an index beside each flat file; of train.bin a part that is measured, too"
END=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["<|endoftext|>"])' "$TEXT/gpt2-vocab.json")
ln -sf "$(realpath "$TEXT/train.bin")" "$OUT/tokens/train.bin"
ln -sf "$(realpath "$TEXT/val.bin")" "$OUT/tokens/val.bin"
head -c 65536 "$TEXT/train.bin" >"$OUT/tokens/seen.bin"
for name in train val seen; do
    "$PYTHON" "$ROOT/tools/convert_flat.py" "$OUT/tokens/$name.bin" --eod "$END" --overwrite
done
DATA=(--train-data-path "$OUT/tokens/train" --valid-data-path "$OUT/tokens/val" --data-cache-path "$OUT/tokens/cache")

if [[ -n $RECIPE ]]; then
    mapfile -t SETTINGS < <(optimizer "${OPTIMIZERS[0]}" "${RATES[0]}")
    step "train; the same command resumes"
    passing_signals_on "$PYTHON" "$ROOT/tools/launch.py" --nproc_per_node "$GPUS" "$ROOT/tools/pretrain_gpt.py" "${MODEL[@]}" \
        "${RUN[@]}" "${SETTINGS[@]}" "${WORDS[@]}" "${DATA[@]}" --save "$OUT/125m" --load "$OUT/125m"
    exit
fi

# -- the grid ----------------------------------------------------------------------------------------
point() { # optimizer, learning rate, seed: one run, and its losses over all of val.bin and a part of train.bin
    local run=$OUT/runs/$1_$2_$3 words
    mapfile -t words < <(optimizer "$1" "$2")
    words+=("${MODEL[@]}" "${RUN[@]}" "${WORDS[@]}" "${DATA[@]}" "${DEVICE[@]}" --seed "$3" --save "$run" --save-interval "$STEPS")
    if [[ -f $run/losses.json && -f $run/asked && "$(<"$run/asked")" == "${words[*]}" ]]; then
        printf '%s is there\n' "$run" && return
    fi
    rm -rf -- "$run"
    if ! { passing_signals_on "$PYTHON" "$ROOT/tools/pretrain_gpt.py" "${words[@]}" >"$run.log" 2>&1 &&
        passing_signals_on "$PYTHON" "$ROOT/tools/evaluate.py" --load "$run" --tokens "$OUT/tokens/val" "$OUT/tokens/seen" "${DEVICE[@]}" \
            --json "$run/losses.json" >>"$run.log" 2>&1; }; then
        tail -n 5 "$run.log" >&2
        return 1
    fi
    printf '%s' "${words[*]}" >"$run/asked"
    printf '%s: %s\n' "$run" "$(grep "^$OUT/tokens/val " "$run.log")"
}
step "$((${#OPTIMIZERS[@]} * ${#RATES[@]} * ${#SEEDS[@]})) runs of $STEPS steps, $JOBS at a time"
points=()
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for seed in "${SEEDS[@]}"; do
    for rate in "${RATES[@]}"; do
        for name in "${OPTIMIZERS[@]}"; do
            (($(jobs -rp | wc -l) < JOBS)) || wait -n
            points+=("${name}_${rate}_$seed")
            point "$name" "$rate" "$seed" &
        done
    done
done
while (($(jobs -rp | wc -l))); do wait -n; done
trap - EXIT
for name in "${points[@]}"; do # one that failed may have been waited for by nobody
    [[ -f $OUT/runs/$name/losses.json ]] || { printf '%s has failed: its .log says why\n' "$OUT/runs/$name" >&2 && exit 1; }
done

# -- look at it --------------------------------------------------------------------------------------
step "the losses with their spread"
"$PYTHON" "$ROOT/examples/open_gpt/verdict.py" "$OUT"
step "sample from the best of them, as nanoGPT's sample.py does"
printf 'Return the' >"$OUT/prompt.txt"
"$PYTHON" "$ROOT/tools/generate.py" --load "$(<"$OUT/best")" --start "FILE:$OUT/prompt.txt" --num-samples 2 \
    --max-new-tokens 60 --temperature 0.8 --top-k 200 --seed 1337 "${DEVICE[@]}"
printf 'open_gpt took %d s\n' "$SECONDS"
