#!/usr/bin/env bash
# Long-tailed dual pseudo training:  bash run_longtail.sh [options]
# The options are those of run_all.sh, of which this is --stage1 daso.
#
# Stage 1 trains DASO (Oh et al., CVPR 2022) on long-tailed labelled and unlabelled images and labels the latter; stage 2
# trains a diffusion model on all of them and generates as many images of every class; stage 3 trains DASO with these
# among the labelled ones.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/recipes/common.sh" --stage1 daso "$@"
[ -n "$imbalance_default" ] || fail "--stage1 daso: expected --dataset digits, cifar10 or cifar100, got $dataset"
[ "$stage2" = edm ] || fail "--stage2 tdsm does not go with --stage1 daso"
[ "${stage3:-daso}" = daso ] || fail "--stage3 $stage3 does not go with --stage1 daso, which trains itself again in it"
imbalance=${imbalance:-$imbalance_default} labelled=${labels:-$labelled}

# Folders as typed in DASO/, but models as typed in EDM/.
saved=outputs/dpt images=data-aug models=training-runs
[ -z "$out" ] || saved=$out/saved_models images=$out/data-aug models=$out/training-runs
from_edm() { [[ $1 == /* ]] && echo "$1" || echo "../DASO/$1"; }

experiment() {  # of one seed
    # main.py names the folders of its runs by their settings.
    run1=$saved/DASO_${dataset}_l_${labelled}_${imbalance}_ul_${unlabelled}_${imbalance}_seed_$seed
    run3=${run1}_aug$last
    name=daso_${dataset}_${labelled}_imb${imbalance}_$seed
    data=$(from_edm "$run1/$name$shape.zip") model=$models/$name generated=$images/$name/nums_$last
    [[ $stages != *1* ]] || stage_1
    [[ $stages != *2* ]] || stage_2
    [[ $stages != *3* ]] || stage_3
    [ -z "$controls" ] || controls
    report
}

stage_1() {
    step classifier DASO "Stage 1: train DASO on the long-tailed images"
    daso "${more1[@]}"
    step pseudo-labels DASO "Label the unlabelled images"
    run python get_labels.py --run "$run1" --per_class $((last + 1)) "${anew[@]}"
    step zip EDM "Convert them for EDM"
    run python dataset_tool.py "--source=$(from_edm "$run1/pseudo_label.npz")" "--dest=$data" "${anew[@]}"
}

stage_2() {
    step "diffusion model" EDM "Stage 2: train the diffusion model on the pseudo-labels"
    run "${launch[@]}" train.py "--outdir=$model" --nosubdir "--data=$data" --cond=1 --arch=ddpmpp "${diffusion[@]}" \
        "--seed=$seed" "${more2[@]}" "${anew[@]}"
    generate "generated images" "$model" "$(from_edm "$generated")"
}

stage_3() {
    step "classifier again" DASO "Stage 3: train DASO with the generated images among the labelled ones"
    daso DATASET.AUG_PATH "$generated" MEMO "aug$last" "${more3[@]}"
}

controls() {
    step "control twice" DASO "Control: stage 1 with the iterations of stages 1 and 3 together"
    daso "${more1[@]}" SOLVER.MAX_ITER $((2 * $(iterations))) MEMO twice
    step "control real" DASO "Control: as many real images of every class, under their pseudo-labels"
    daso DATASET.AUG_PATH "$run1/real_balanced" MEMO real_balanced "${more3[@]}"
}

# SOLVER.MAX_ITER of stage 1, in its configuration file or in --stage1-args.
iterations() {
    { cat "$root/DASO/configs/$dataset/fixmatch_daso.yaml"; echo "${more1[*]}"; } |
        grep -Eo 'MAX_ITER:? +[0-9]+' | grep -Eo '[0-9]+$' | tail -n 1 || echo 250000
}

# Run DASO with further keys and values.
daso() {
    local section elsewhere=()
    section=DATASET.$(tr '[:lower:]' '[:upper:]' <<< "$dataset")
    [ -z "$data_dir" ] || elsewhere=(DATASET.ROOT "$data_dir")
    run python main.py --config-file "configs/$dataset/fixmatch_daso.yaml" "${anew[@]}" \
        "$section.NUM_LABELED_HEAD" "$labelled" "$section.IMB_FACTOR_L" "$imbalance" \
        "$section.NUM_UNLABELED_HEAD" "$unlabelled" "$section.IMB_FACTOR_UL" "$imbalance" SEED "$seed" OUTPUT_DIR "$saved" "${elsewhere[@]}" "$@"
}

report() {
    local flags=()
    [ -z "$controls" ] || flags=("--control=${run1}_twice" "--control=${run1}_real_balanced")
    step report DASO "The report: what each class gained"
    show python dpt_report.py "--out=$(typed)" "--stage1=$run1" "--stage3=$run3" "${flags[@]}"
}

for_every_seed "imbalance$imbalance" DASO dpt_report.py
