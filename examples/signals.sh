# shellcheck shell=bash
# For scripts that go on after a run, and so cannot exec it.

# Runs the words as a command and returns its code; a signal that asks for a stop reaches it, and only once:
# as a job of its own (set -m) it does not hear the terminal's Ctrl-C besides.
passing_signals_on() {
    local child name code=0 signalled=1
    set -m
    "$@" &
    child=$!
    set +m
    for name in TERM INT HUP QUIT USR1 XCPU; do
        # shellcheck disable=SC2064 # the child of now
        trap "signalled=1; kill -s $name $child 2>/dev/null || true" "$name"
    done
    while ((signalled)); do
        signalled=0 code=0
        wait "$child" || code=$? # of a signal, or the child's own
    done
    trap - TERM INT HUP QUIT USR1 XCPU
    return "$code"
}
