#!/usr/bin/env bash
# Make .venv beside this repository, ready for the demo and the tests; instant when nothing changed.
#   PYTHON           the python to use; python3, or the newest python3.x >= 3.10 on PATH
#   VENV             the folder; .venv
#   TORCH_INDEX_URL  package index torch itself comes from, e.g. one with CPU builds
# An installed torch >= 2.10 is used as it is; otherwise the one pinned in requirements/torch.txt comes.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=${VENV:-.venv}
STAMP=$VENV/setup-stamp
EXTRAS=tokenizers,fast,sentencepiece,tiktoken,zstd,parquet,tensorboard,plot,huggingface,bench,dev

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
    local name
    if [[ -n ${PYTHON:-} ]]; then
        is_python "$PYTHON" || die "PYTHON=$PYTHON is not a working Python >= 3.10"
        printf '%s\n' "$PYTHON"
        return
    fi
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if is_python "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    die "no Python >= 3.10 on PATH; install one, or name one: PYTHON=/path/to/python3 make setup"
}

# Prints the version of the torch this python has, if it is >= 2.10 and can be imported.
torch_of() {
    "$1" - 2>/dev/null <<'PY' || true
import re
import torch

if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 10):
    print(torch.__version__)
PY
}

# What the environment itself depends on: another one of these makes it anew.
foundation() {
    "$1" -c 'import sys; print(sys.version, sys.prefix)'
    printf '%s %s\n' "$ROOT" "$(grep '^torch' requirements/torch.txt)"
}

# What the installation depends on: another pin or source installs again.
fingerprint() {
    {
        foundation "$1"
        cat setup.py pyproject.toml requirements/*.txt tools/setup.sh
        find csrc -type f | LC_ALL=C sort | xargs -r cat
    } | cksum
}

# A fresh environment; a Debian python without ensurepip lends it its own pip.
make_venv() {
    local python=$1
    shift
    "$python" -m venv --clear "$@" "$VENV" >/dev/null 2>&1 && return
    if "$python" -m venv --clear --without-pip "$@" "$VENV" >/dev/null 2>&1 &&
        "$python" -m pip --python "$VENV/bin/python" install -q pip; then
        return
    fi
    rm -rf "$VENV"
    die "$python cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"
}

# A python that is itself in a virtual environment has its torch where --system-site-packages does not look.
lend_torch() {
    local site
    site=$("$1" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
    "$VENV/bin/python" - "$site" <<'PY'
import pathlib
import sys
import sysconfig

pathlib.Path(sysconfig.get_path("purelib"), "torch-of-parent.pth").write_text(sys.argv[1] + "\n")
PY
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check "$@" >>"$VENV/setup.log" 2>&1 && return
    tail -n 40 "$VENV/setup.log" >&2
    die "pip failed; all it said is in $VENV/setup.log"
}

python=$(find_python)
now=$(fingerprint "$python")
if [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$now" ]]; then
    exit 0
fi

rm -f "$STAMP"
torch=
if [[ -x $VENV/bin/python && -f $VENV/setup-python && $(<"$VENV/setup-python") == "$(foundation "$python")" ]]; then
    torch=$(torch_of "$VENV/bin/python")
fi
if [[ -n $torch ]]; then
    say "$VENV is there with torch $torch; installing what changed"
elif torch=$(torch_of "$python") && [[ -n $torch ]]; then
    say "$("$python" --version) ($(command -v "$python")): torch $torch is installed and is used as it is"
    make_venv "$python" --system-site-packages
    [[ $(torch_of "$VENV/bin/python") == "$torch" ]] || lend_torch "$python"
    [[ $(torch_of "$VENV/bin/python") == "$torch" ]] || die "torch $torch of $python cannot be imported in $VENV"
else
    say "$("$python" --version) ($(command -v "$python")) without torch >= 2.10"
    make_venv "$python"
fi

# Our own copy of the constraints: the pins, and the one torch that is allowed from here on, so that
# nothing that wants "torch" can bring another one.
constraints=$VENV/constraints.txt
if [[ -n $torch ]]; then
    { cat requirements/constraints.txt && printf 'torch==%s\n' "$torch"; } >"$constraints"
else
    cat requirements/constraints.txt requirements/torch.txt >"$constraints"
fi

pip_install -c "$constraints" pip setuptools wheel pybind11 numpy
if [[ -z $torch ]]; then
    # torch's own needs first, from the usual index: an index of torch builds may not hold these versions
    pip_install -c "$constraints" filelock typing-extensions sympy networkx jinja2 fsspec
    if [[ -z ${TORCH_INDEX_URL:-} ]] && ! command -v nvidia-smi >/dev/null; then
        say "no NVIDIA driver here: TORCH_INDEX_URL=<index of CPU builds> can save gigabytes"
    fi
    say "installing $(grep '^torch' requirements/torch.txt)${TORCH_INDEX_URL:+ from TORCH_INDEX_URL}"
    pip_install -c "$constraints" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
fi
say "installing megatron_lite[$EXTRAS]"
pip_install -c "$constraints" --no-build-isolation -e ".[$EXTRAS]"
# A ruff lent by another environment does not find its own program.
"$VENV/bin/python" -m ruff --version >/dev/null 2>&1 ||
    pip_install -c "$constraints" --ignore-installed --no-deps ruff
"$VENV/bin/python" -c 'import matplotlib, numpy, pytest, tensorboard, tokenizers, torch, transformers; torch.from_numpy(numpy.zeros(1))'

foundation "$python" >"$VENV/setup-python"
printf '%s\n' "$now" >"$STAMP"
say "done: $("$VENV/bin/python" -c 'import torch; print("torch", torch.__version__)') in $VENV"
