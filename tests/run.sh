#!/usr/bin/env bash
# Set up, then ruff and pytest:  bash tests/run.sh [--all] [pytest arguments]
# --all also runs the slow tests. Everything else goes to pytest, e.g. `bash tests/run.sh tests/edm -k sampler`; the
# files are shared out over the cores, and -n 0 runs them one after another in this process.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

selection=(-m "not slow")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi
arguments=("$@")
source shared/env.sh --extra test || exit $?

status=0
ruff check . || status=$?
python -m pytest -q -n logical --dist loadfile "${selection[@]}" "${arguments[@]}" || status=$?
exit "$status"
