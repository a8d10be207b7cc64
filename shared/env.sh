# Source this (bash): afterwards `python` and `torchrun` have the packages and find fewlabel from any folder. The active
# Python is used if it has what pyproject.toml asks for (--extra NAME: with that list of it); otherwise .venv is made
# from requirements.txt. --no-install only looks for a Python 3.11. Sets fewlabel_python to the Python found.
# shellcheck disable=SC2015

fewlabel_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$fewlabel_root${PYTHONPATH:+:$PYTHONPATH}"
for fewlabel_python in python python3 python3.14 python3.13 python3.12 python3.11 none; do
    fewlabel_python=$(type -P "$fewlabel_python") && "$fewlabel_python" -c 'import tomllib' 2> /dev/null && break
done
[ -n "$fewlabel_python" ] || { echo "error: no Python 3.11 or newer is on the PATH: install one" >&2; return 1; }

fewlabel_is_complete() {  # the scripts call the Python `python`, so it must have that name
    [ "${fewlabel_python##*/}" = python ] && "$fewlabel_python" - "$fewlabel_root" "$@" 2> /dev/null << 'END'
import sys, tomllib
from importlib.metadata import version
from packaging.requirements import Requirement
project = tomllib.load(open(f"{sys.argv[1]}/pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + sum((project["optional-dependencies"][name] for name in sys.argv[3:]), [])
sys.exit(not all(need.specifier.contains(version(need.name), prereleases=True) for need in map(Requirement, needed)))
END
}

fewlabel_make_venv() (
    venv=$(readlink -f "$fewlabel_root/.venv")  # it may be a link to a larger disk
    stamp=$fewlabel_root$'\n'$(cat "$fewlabel_root/requirements.txt")  # a .venv that was moved does not work
    exec 8>> "$venv.lock" && "$fewlabel_python" -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)' || exit
    [[ ! -x $venv/bin/python || $(cat "$venv/complete.txt" 2> /dev/null) != "$stamp" ]] || exit 0
    echo "Installing the packages of requirements.txt into $venv (once, a few minutes; about 6 GB with CUDA)
" >&2
    "$fewlabel_python" -m venv --clear "$venv" >&2 &&
        "$venv/bin/python" -m pip install --quiet -r "$fewlabel_root/requirements.txt" >&2 &&
        echo "$fewlabel_root" > "$(echo "$venv"/lib/python3*)/site-packages/fewlabel.pth" &&
        echo "$stamp" > "$venv/complete.txt" ||  # last: an interrupted installation is repeated
        { echo "error: requirements.txt could not be installed, see above; then run the same command again" >&2; exit 1; }
)

if [ "${1:-}" != --no-install ]; then
    fewlabel_is_complete "$@" || { fewlabel_make_venv && fewlabel_python=$fewlabel_root/.venv/bin/python; } || return
    export PATH="${fewlabel_python%/*}:$PATH"
fi
