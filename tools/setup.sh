#!/usr/bin/env bash
# Make .venv beside this repository, ready for the demo and the tests; instant when nothing changed.
#   tools/setup.sh           the extra "test" of setup.py in .venv, at the versions of constraints.txt
#   tools/setup.sh oracles   that and what nightly tests compare with, in .venv-oracles, an environment
#                            of its own: constraints-oracles.txt has other versions of what .venv has, too
#   PYTHON           the python to use; python3, or the newest python3.x >= 3.10 on PATH
#   VENV             the folder; .venv
#   VENV_ORACLES     the folder of oracles; .venv-oracles
#   TORCH_INDEX_URL  package index torch itself comes from, e.g. one with CPU builds
# An installed torch >= 2.10 is used as it is; otherwise the one pinned in requirements/torch.txt comes.
#
# An environment that is there stays, whatever PATH says: activated and plain shells mean the same, and
# only PYTHON asks for another.  A new one is made beside the old one and takes its place when it is
# complete.  What this script did not make is completed where it is an environment, and never replaced.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$ROOT"
case $#${1:-} in
    0) WHAT=test NAME=${VENV:-.venv} ;;
    1oracles) WHAT=oracles NAME=${VENV_ORACLES:-.venv-oracles} ;;
    *) echo 'usage: tools/setup.sh [oracles]' >&2 && exit 2 ;;
esac
VENV=$(readlink -m -- "$NAME")
NEW=$VENV.setup-new # the next one, while it is made
OLD=$VENV.setup-old # the last one, between two renames
LOG=$VENV.setup-log
PIN=$(grep '^torch' requirements/torch.txt)

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 </dev/null; }

# Version, prefix and path of a python, a line each.
identity() {
    "$1" -c '
import os, sys
print(" ".join(sys.version.split()), os.path.realpath(sys.prefix), sys.executable, sep="\n")
' 2>/dev/null </dev/null || true
}

# Is this the environment's own python, as `python3` is in an activated shell?
is_own() { [[ $(identity "$1" | sed -n 2p) == "$VENV" ]]; }

# PYTHON, the one that made the environment, or the first on PATH; never the environment's own.
find_python() {
    local name path
    if [[ -n ${PYTHON:-} ]] && ! is_own "$PYTHON"; then
        printf '%s\n' "$PYTHON"
        return
    fi
    while IFS= read -r path; do
        if is_python "$path" && ! is_own "$path"; then
            printf '%s\n' "$path"
            return
        fi
    done < <(
        printf '%s\n' "${made[2]:-/nowhere}"
        for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
            type -aP "$name" || true
        done
    )
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

# What the environment says of itself, in `made`: version, prefix and path of the python that made it
# ("adopted" for the prefix where this script did not), the repository, the pinned torch or "borrowed".
read_record() {
    made=()
    [[ ! -f $VENV/setup-python ]] || mapfile -t made <"$VENV/setup-python"
}

is_foreign() {
    [[ -e $VENV && -n $(ls -A -- "$VENV") ]] && [[ ${#made[@]} == 0 || ${made[1]:-} == adopted ]]
}

# Does PYTHON ask for another python than the environment's?
is_other_asked() {
    local asked version
    [[ -n ${PYTHON:-} ]] || return 1
    version=$(identity "$VENV/bin/python" | sed -n 1p)
    mapfile -t asked < <(identity "$PYTHON")
    [[ ${asked[1]} != "$VENV" ]] || return 1
    [[ ${asked[0]} != "$version" ]] || { ! is_foreign && [[ ${asked[1]} != "${made[1]:-}" ]]; }
}

# Is there an environment made for this repository, by a python that is still the same?
is_kept() {
    [[ -n ${made[0]:-} && ${made[0]} == "$(identity "$VENV/bin/python" | sed -n 1p)" ]] || return 1
    [[ ${made[3]:-} == "$ROOT" && ${made[4]:-} == @("$PIN"|borrowed) ]] && ! is_other_asked
}

# The versions of this environment; those of oracles come before the others'.
pins() {
    local files=(requirements/constraints.txt)
    [[ $WHAT == test ]] || files=(requirements/constraints-oracles.txt "${files[@]}")
    awk -F'[=;]' 'FILENAME == ARGV[1] { own[$1] } FILENAME == ARGV[1] || !($1 in own)' "${files[@]}"
}

# What the installation depends on: another torch, pin or source installs again.
fingerprint() {
    {
        cat "$1/setup-python"
        "$1/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>&1
        pins
        cat setup.py pyproject.toml requirements/torch.txt tools/setup.sh
        find csrc -type f | LC_ALL=C sort | xargs -r cat
    } | cksum
}

is_complete() {
    read_record
    is_kept && [[ -f $VENV/setup-stamp && $(<"$VENV/setup-stamp") == "$(fingerprint "$VENV")" ]]
}

# A fresh environment at $NEW; a Debian python without ensurepip lends it its own pip.
make_venv() {
    local python=$1
    shift
    set -- --clear --prompt "$(basename -- "$VENV")" "$@"
    "$python" -m venv "$@" "$NEW" >/dev/null 2>&1 && return
    if "$python" -m venv --without-pip "$@" "$NEW" >/dev/null 2>&1 &&
        "$python" -m pip --python "$NEW/bin/python" install -q pip; then
        return
    fi
    die "$python cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"
}

# A python that is itself in a virtual environment has its torch where --system-site-packages does not look.
lend_torch() {
    local site
    site=$("$1" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))')
    "$NEW/bin/python" - "$site" <<'PY'
import pathlib
import sys
import sysconfig

pathlib.Path(sysconfig.get_path("purelib"), "torch-of-parent.pth").write_text(sys.argv[1] + "\n")
PY
}

pip_try() { "$env/bin/python" -m pip install --disable-pip-version-check "$@" >>"$LOG" 2>&1; }

pip_install() {
    ! pip_try "$@" || return 0
    tail -n 40 "$LOG" >&2
    die "pip failed; all it said is in $LOG"
}

# Everything into $env, with torch as it is where $torch is its version, or the pinned one.
install_all() {
    # Our own copy of the constraints: the pins, and the one torch that is allowed from here on, so that
    # nothing that wants "torch" can bring another one.
    local constraints=$env/constraints.txt
    { pins && printf '%s\n' "${torch:+torch==}${torch:-$PIN}"; } >"$constraints"

    pip_install -c "$constraints" pip setuptools wheel pybind11 numpy
    if [[ -z $torch ]]; then
        # torch's own needs first, from the usual index: an index of torch builds may not hold these versions
        pip_install -c "$constraints" filelock typing-extensions sympy networkx jinja2 fsspec
        if [[ -z ${TORCH_INDEX_URL:-} ]] && ! command -v nvidia-smi >/dev/null; then
            say "no NVIDIA driver here: TORCH_INDEX_URL=<index of CPU builds> can save gigabytes"
        fi
        say "installing $PIN${TORCH_INDEX_URL:+ from TORCH_INDEX_URL}"
        pip_install -c "$constraints" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
    fi
    say "installing megatron_lite[test]"
    pip_install -c "$constraints" --no-build-isolation -e ".[test]"
    # A ruff lent by another environment does not find its own program.
    "$env/bin/python" -m ruff --version >/dev/null 2>&1 ||
        pip_install -c "$constraints" --ignore-installed --no-deps ruff
    "$env/bin/python" -c 'import matplotlib, numpy, pytest, tensorboard, tokenizers, torch, transformers; torch.from_numpy(numpy.zeros(1))'
}

# Each by itself, so that one that is not to be had here keeps no other away; the next setup tries again.
install_oracles() {
    local need
    while IFS= read -r need; do
        say "installing $need"
        pip_try -c "$env/constraints.txt" "$need" && continue
        say "$need cannot be installed here, so its tests will be skipped: $(grep -a ^ERROR "$LOG" | tail -n 1)"
        lacking+=("$need")
    done < <("$env/bin/python" -c '
import ast
for node in ast.parse(open("setup.py", encoding="utf-8").read()).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS":
        print(*ast.literal_eval(node.value)["oracles"], sep="\n")')
    say "left out, as they need a CUDA compiler: flash-attn, transformer-engine, apex"
    install_chromium
}

# Debian's browser, in which the page that tools/serve.py serves is tested; pip has none.
install_chromium() {
    ! command -v chromium >/dev/null || return 0
    local why="this is not root"
    if ! command -v apt-get >/dev/null; then
        why="there is no apt-get"
    elif [[ $(id -u) == 0 ]]; then
        say "installing chromium"
        if apt_try update && apt_try install -y --no-install-recommends chromium &&
            command -v chromium >/dev/null; then
            return 0
        fi
        why="apt-get could not: $(grep -a ^E: "$LOG" | tail -n 1 || true)"
        lacking+=(chromium) # the next setup tries again
    fi
    say "no chromium, so the tests of the page will be skipped, as $why; as root: apt-get install chromium"
}

apt_try() { DEBIAN_FRONTEND=noninteractive apt-get -q "$@" >>"$LOG" 2>&1 </dev/null; }

# Programs, activate scripts and pyvenv.cfg hold the path of their environment: at $NEW, let it be $VENV.
readdress() {
    "$NEW/bin/python" - "$NEW" "$VENV" <<'PY'
import os
import sys

here, there = map(os.fsencode, sys.argv[1:])
scripts = [os.path.join(here, b"bin", name) for name in os.listdir(os.path.join(here, b"bin"))]
for path in [*scripts, os.path.join(here, b"pyvenv.cfg")]:
    if os.path.isfile(path) and not os.path.islink(path):
        with open(path, "r+b") as file:
            content = file.read()
            if here in content and b"\0" not in content:
                file.seek(0)
                file.truncate()
                file.write(content.replace(here, there))
PY
}

take_place() {
    [[ $env != "$VENV" ]] || return 0
    readdress
    [[ ! -e $VENV ]] || mv -T -- "$VENV" "$OLD"
    mv -T -- "$NEW" "$VENV"
    rm -rf -- "$OLD"
}

# One setup at a time, and what one that was killed left is put away.
begin_alone() {
    mkdir -p -- "$(dirname -- "$VENV")"
    if command -v flock >/dev/null; then
        exec 9<"$(dirname -- "$VENV")"
        flock -n 9 || { say "another setup is at work on $NAME; waiting" && flock 9; }
    fi
    rm -rf -- "$NEW"
    if [[ -e $OLD && ! -e $VENV ]]; then
        mv -T -- "$OLD" "$VENV" # killed between the two renames
    fi
    rm -rf -- "$OLD"
}

[[ -z ${PYTHON:-} ]] || is_python "$PYTHON" || die "PYTHON=$PYTHON is not a working Python >= 3.10"
! is_complete || exit 0
begin_alone
! is_complete || exit 0
# An activated shell may have exported the constraints of the environment as it was.
[[ $(readlink -m -- "${PIP_CONSTRAINT:-/}") != "$VENV/constraints.txt" ]] || unset PIP_CONSTRAINT
: >"$LOG"

env=$NEW torch=
if is_kept || { is_foreign && is_python "$VENV/bin/python" && ! is_other_asked; }; then
    torch=$(torch_of "$VENV/bin/python")
    [[ -z $torch && ${made[4]:-} == borrowed ]] || env=$VENV # or its torch went away
elif is_foreign; then
    die "setup did not make $NAME and cannot use it as it is: remove it, or name another: VENV=folder make setup"
fi
if [[ $env == "$VENV" ]]; then
    rm -f -- "$VENV/setup-stamp"
    say "$NAME is there${torch:+ with torch $torch}; installing what changed"
    is_kept || { identity "$env/bin/python" | sed 2s/.*/adopted/ && printf '%s\n' "$ROOT" "$PIN"; } >"$env/setup-python"
else
    ! mountpoint -q -- "$VENV" 2>/dev/null || NEW=$VENV env=$VENV # nothing can take its place
    trap '[[ $NEW == "$VENV" ]] || rm -rf -- "$NEW"' EXIT
    python=$(find_python)
    torch=$(torch_of "$python")
    if [[ -n $torch ]]; then
        say "$("$python" --version) ($(command -v "$python")): torch $torch is installed and is used as it is"
        make_venv "$python" --system-site-packages
        [[ $(torch_of "$NEW/bin/python") == "$torch" ]] || lend_torch "$python"
        [[ $(torch_of "$NEW/bin/python") == "$torch" ]] || die "torch $torch of $python cannot be imported in $NAME"
    else
        say "$("$python" --version) ($(command -v "$python")) without torch >= 2.10"
        make_venv "$python"
    fi
    { identity "$python" && printf '%s\n' "$ROOT" "${torch:+borrowed}"; } | sed "5s/^\$/$PIN/" >"$NEW/setup-python"
fi
install_all
lacking=()
[[ $WHAT == test ]] || install_oracles
((${#lacking[@]})) || fingerprint "$env" >"$env/setup-stamp"
take_place
mv -- "$LOG" "$VENV/setup.log"
say "done: $("$VENV/bin/python" -c 'import torch; print("torch", torch.__version__)') in $NAME"
