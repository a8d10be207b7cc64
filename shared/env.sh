# Source this (bash): afterwards `python` and `torchrun` have the packages and find fewlabel from any folder.
# The active Python is used when it satisfies pyproject.toml, otherwise .venv is made from requirements.txt.
# Arguments go to shared/environment.py (--extra test), or: --no-install, to find a Python 3.11 and nothing else.
# Sets fewlabel_python to the Python found.

fewlabel_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$fewlabel_root${PYTHONPATH:+:$PYTHONPATH}"
fewlabel_python=""
for candidate in python python3 python3.14 python3.13 python3.12 python3.11; do
    fewlabel_python="$("$candidate" -c 'import sys; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null)"
    [ -z "$fewlabel_python" ] || break
done
unset candidate
if [ -z "$fewlabel_python" ]; then
    echo "error: Python 3.11 or newer is needed and none is on the PATH: install it, then run the same command again" >&2
    return 1
fi
if [ "${1:-}" != --no-install ]; then
    fewlabel_python="$("$fewlabel_python" "$fewlabel_root/shared/environment.py" "$@")" || return $?
    export PATH="$(dirname "$fewlabel_python"):$PATH"
fi
unset fewlabel_root
