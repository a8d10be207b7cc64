# Source this (bash): afterwards `python` and `torchrun` have the packages and find fewlabel from any folder.
# The active Python is used when it satisfies pyproject.toml, otherwise .venv is made from requirements.txt.
# Arguments go to shared/environment.py (--extra test).

fewlabel_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fewlabel_python=""
for candidate in python python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        fewlabel_python="$candidate"
        break
    fi
done
if [ -z "$fewlabel_python" ]; then
    echo "error: Python 3.11 or newer is needed and none is on the PATH: install it, then run the same command again" >&2
    return 1
fi
fewlabel_bin="$("$fewlabel_python" "$fewlabel_root/shared/environment.py" "$@")" || return $?
export PATH="$fewlabel_bin:$PATH"
export PYTHONPATH="$fewlabel_root${PYTHONPATH:+:$PYTHONPATH}"
unset fewlabel_root fewlabel_python fewlabel_bin candidate
