#!/usr/bin/env bash
# The main job on real text, small enough for two CPU cores: text, vocabulary, token files, training by four
# ranks (tp 2 x pp 2), continued by two (dp 2), sampled in one process, plotted.  `make demo` calls it.
#   PYTHON  a python with megatron_lite's requirements; python3
#   DEMO    the folder everything is written to; demo/ in the repository
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
DEMO=${DEMO:-$ROOT/demo}
# shellcheck source=examples/pipeline.sh
. "$ROOT/examples/pipeline.sh"
TRAIN=$ROOT/examples/gpt3/train_gpt3_175b_distributed.sh
VOCAB_FILE=$DEMO/tokenizer/gpt2-vocab.json
MERGE_FILE=$DEMO/tokenizer/gpt2-merges.txt
RUN=$DEMO/run

train() { passing_signals_on bash "$TRAIN" "$RUN" "$RUN/tensorboard" "$VOCAB_FILE" "$MERGE_FILE"; }

rm -rf -- "$DEMO/text" "$DEMO/tokenizer" "$DEMO/tokens" "$RUN"
mkdir -p "$DEMO/tokens"

step "text: Python's own documentation, and its library's source"
"$PYTHON" "$ROOT/tools/demo_corpus.py" "$DEMO/text" --megabytes 4

step "vocabulary: a byte-level BPE learned from them"
"$PYTHON" "$ROOT/tools/train_tokenizer.py" --input "$DEMO/text/docs.json" "$DEMO/text/code.json" \
    --vocab-size 1024 --output-dir "$DEMO/tokenizer"

step "preprocess: both corpora into Megatron's token files"
for corpus in docs code; do
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$DEMO/text/$corpus.json" \
        --output-prefix "$DEMO/tokens/$corpus" --vocab-file "$VOCAB_FILE" --merge-file "$MERGE_FILE" \
        --tokenizer-type GPT2BPETokenizer --append-eod --workers 2 --log-interval 100000
done

# The cluster's script; only the sizes are the demo's. What may be exported for other runs is put aside.
unset DATASET DATASET_PATH DATASETCACHE LOAD_PATH DRY_RUN REHEARSE PRINT_COMMAND MAX_RESTARTS MASTER_ADDR MASTER_PORT
unset MAX_POSITION_EMBEDDINGS LR_DECAY_STYLE WEIGHT_DECAY ADAM_BETA1 ADAM_BETA2 CLIP_GRAD
export NUM_NODES=1 NODE_RANK=0 PRECISION=fp32
export DATASET_1=$DEMO/tokens/docs_text_document DATASET_2=$DEMO/tokens/code_text_document SPLIT=90,5,5
export NUM_LAYERS=4 HIDDEN_SIZE=128 NUM_ATTENTION_HEADS=4 SEQ_LENGTH=128 ATTENTION_BACKEND=auto
export MICRO_BATCH_SIZE=8 GLOBAL_BATCH_SIZE=16 INIT_METHOD_STD=0.02
export TRAIN_ITERS=500 LR=6.0e-3 MIN_LR=2.0e-4 LR_DECAY_ITERS=500 LR_WARMUP_FRACTION=.05
export LOG_INTERVAL=50 SAVE_INTERVAL=500 EVAL_INTERVAL=250 EVAL_ITERS=24
FLAGS="--use-cpu --hidden-dropout 0 --attention-dropout 0 --num-workers 1"
FLAGS+=" --position-embedding-type rope --normalization RMSNorm"

step "train: 4 ranks, tp 2 x pp 2, a fifth of the iterations"
GPUS_PER_NODE=4 TP=2 PP=2 EXTRA_ARGS="$FLAGS --exit-interval 100" train

step "continue: the same checkpoint, 2 ranks, dp 2"
GPUS_PER_NODE=2 TP=1 PP=1 EXTRA_ARGS="$FLAGS" train

step "sample: one process, the same checkpoint"
"$PYTHON" "$ROOT/tools/generate.py" --load "$RUN" --prompt "Return the" "class" "    def __init__(self" \
    --max-new-tokens 40 --temperature 0.7 --top-k 40 --seed 1 --use-cpu

step "see: the loss curve, and counting as the mark to beat"
"$PYTHON" "$ROOT/tools/report.py" "$RUN"
"$PYTHON" "$ROOT/tools/ngrams.py" --data-path 0.35 "$DATASET_1" 0.65 "$DATASET_2" --split "$SPLIT" \
    --json "$RUN/ngrams.json" >/dev/null
"$PYTHON" "$ROOT/examples/demo/verdict.py" "$RUN"
printf 'the demo took %d s\n' "$SECONDS"
