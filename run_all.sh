#!/usr/bin/env bash
# Dual pseudo training end to end, from a fresh clone: bash run_all.sh [--dataset NAME] ...; --help lists the options.
# Sets up Python once (shared/env.sh), then runs the commands of the README in order (TorchSSL/dpt.py).
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
options=("$@")
set --

source "$root/shared/env.sh" --no-install || exit $?
for option in "${options[@]}"; do
    case "$option" in --help | -h | --dry-run | -n) exec "$fewlabel_python" "$root/TorchSSL/dpt.py" "${options[@]}" ;; esac
done
# A mistake in the options shows before anything is installed.
"$fewlabel_python" "$root/TorchSSL/dpt.py" --dry-run "${options[@]}" >/dev/null || exit $?
source "$root/shared/env.sh" || exit $?
exec "$fewlabel_python" "$root/TorchSSL/dpt.py" "${options[@]}"
