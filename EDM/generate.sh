#!/usr/bin/env bash
# Generate NUM + 1 images (seeds 0 to NUM) of every class of a class-conditional model:
#
#     bash generate.sh NUM SAVE_DIR MODEL NPROC [further flags of generate.py]
#
# as SAVE_DIR/CLASS/SEED.png, the same as one `generate.py --class=CLASS` per class. NPROC processes share the work, one
# per GPU where there are GPUs. The same command again makes only what is missing.
set -euo pipefail

if [[ $# -lt 4 || ! $1 =~ ^[0-9]+$ || ! $4 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: bash generate.sh NUM SAVE_DIR MODEL NPROC [flags] (NUM: last seed, NPROC: processes)" >&2
    exit 2
fi
num=$1 save_dir=$2 model=$3 nproc=$4

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHONPATH=$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
python=${PYTHON:-python}

launch=("$python")
if (( nproc > 1 )); then
    # torchrun would give every process a single thread.
    cores=$("$python" -c 'import os; print(os.cpu_count() or 1)')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > nproc ? cores / nproc : 1 ))}
    launch=("$python" -m torch.distributed.run --standalone --nproc_per_node="$nproc")
fi
exec "${launch[@]}" "$here/generate.py" --outdir="$save_dir" --seeds="0-$num" --classes=all --network="$model" "${@:5}"
