#!/usr/bin/env bash
# Make docs/results/index.html: the tables of the papers, with the runs in docs/results/runs/, and "not run" elsewhere.
# A run is a folder runs/<paper>/<table>-<scale>/<job>/seed_<s>/ with the run.json that `python -m <paper>.tables` wrote.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")"
source ../../shared/env.sh

pages=$(mktemp -d)
trap 'rm -rf "$pages"' EXIT
for table in TorchSSL/{dpt,cifar10,cifar100,stl10,svhn,imagenet,digits} EDM/{edm,edm-64,tdsm} DDAE/{cifar10,dit} \
    MetaSemi/{ablation,imagenet} DASO/{matched,mismatched,digits}; do
    for scale in paper tiny; do
        paper=${table%/*} name=${table#*/}
        [ "$scale" = paper ] || [ -d "runs/$table-tiny" ] || continue
        python -m "$paper.tables" "$name" --scale "$scale" --aggregate --out "runs/$paper" > /dev/null
        mkdir -p "$pages/$table-$scale"
        find "runs/$paper" -name 'table.*' -exec mv -t "$pages/$table-$scale" {} +
        # Printed numbers alone are no picture.
        grep -q '"commit":' "$pages/$table-$scale/table.json" || rm "$pages/$table-$scale/table.png"
    done
done
find runs -name .lock -delete
find runs -mindepth 1 -type d -empty -delete
python -m shared.report "$pages"/* --out index.html --title "fewlabel: results"
