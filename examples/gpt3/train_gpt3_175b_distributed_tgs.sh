#!/usr/bin/env bash
# The run of train_gpt3_175b_distributed.sh for 10 iterations, ending with tokens per GPU per second (TGS).
# Same arguments and variables; metrics are written below CHECKPOINT_PATH/tgs, no checkpoint is read or written.
set -euo pipefail

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
TRAIN=$HERE/train_gpt3_175b_distributed.sh

if (($# > 0)) && [[ $1 != -* && -n $1 ]]; then
    RUN_FOLDER=$1/tgs
    set -- "$RUN_FOLDER" "${@:2}"
fi

# the same python as the script below: the summary needs it too
if [[ -z ${PYTHON:-} && -z ${VIRTUAL_ENV:-} && -x $HERE/../../.venv/bin/python ]]; then
    export PYTHON=$HERE/../../.venv/bin/python
fi
export TRAIN_ITERS=${TRAIN_ITERS:-10}
export LOG_INTERVAL=${LOG_INTERVAL:-1}
export EVAL_ITERS=${EVAL_ITERS:-0}
export LOAD_PATH=
# From 2^32 an fp16 run comes down by skipping steps, more of them than are timed here.
SCALE=${INITIAL_LOSS_SCALE:-65536}
if [[ ${PRECISION:-fp16} == fp16 && ! ${EXTRA_ARGS:-} =~ (^|[[:space:]])--(initial-)?loss-scale([=[:space:]]|$) ]]; then
    EXTRA_ARGS="--initial-loss-scale $SCALE ${EXTRA_ARGS:-}"
    (($# < 4)) || printf '%s: fp16 starts at loss scale %s, not 2^32, so that the timed steps run (INITIAL_LOSS_SCALE)\n' "${0##*/}" "$SCALE" >&2
fi
# what is wanted is the metrics; a checkpoint of 175B would be 350 GB without its optimizer
export EXTRA_ARGS="--no-save-checkpoints ${EXTRA_ARGS:-}"

# not exec: the summary comes after it
# shellcheck source=examples/signals.sh
. "$HERE/../signals.sh"
passing_signals_on bash "$TRAIN" "$@"

if [[ ${DRY_RUN:-0} == 0 && ${REHEARSE:-0} == 0 && ${PRINT_COMMAND:-0} == 0 && ${NODE_RANK:-${SLURM_NODEID:-0}} == 0 && -n ${RUN_FOLDER:-} ]]; then
    code=0
    "${PYTHON:-python3}" "$HERE/../../tools/report.py" "$RUN_FOLDER" --tgs || code=$?
    # 5, 141: the summary could not be printed, which is no failure of the run
    ((code == 5 || code == 141)) || exit "$code"
fi
