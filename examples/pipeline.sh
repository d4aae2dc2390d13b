# shellcheck shell=bash
# What run.sh of the examples shares; to be sourced where ROOT is the repository.

PYTHON=${PYTHON:-python3}
export PYTHON OMP_NUM_THREADS=1

die() { printf 'FATAL[2] rank=- step=-: %s\n' "$1" >&2; exit 2; }
step() { printf '\n== %s  [%d s]\n' "$1" "$SECONDS"; }
# shellcheck source=examples/signals.sh
. "$ROOT/examples/signals.sh"
