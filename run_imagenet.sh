#!/usr/bin/env bash
# DPT with a frozen encoder, the experiment on ImageNet, end to end: on ImageNet, on a folder of photographs, or on the
# digits. Each command is printed before it runs and followed by its time.
#
#     bash run_imagenet.sh [options]
#
# You et al., "Diffusion Models and Semi-Supervised Learners Benefit Mutually with Few Labels", NeurIPS 2023 (arXiv
# 2302.10586). Stage 1 fits a classifier to the features of few labelled images and labels all others; stage 2 trains a
# latent diffusion model on these pseudo-labels and draws images of every class; stage 3 fits the classifier again, to
# these and the labelled ones. The same command again skips what is complete and continues what is not. Options
# [default]:
#
#   --dataset NAME          digits (needs no download), imagenet, or the path of your own photographs: a folder with
#                           train/<class>/, test/<class>/ and, if there is one, unlabeled/ [digits]
#   --config NAME           configuration, a file of EDM/imagenet/configs [digits; imagenet:
#                           accelerate_b4_subset1_2img_k_128_large; your own: own]
#   --labels N              labelled images of every class, drawn at random; 0: all in train/<class>/ [digits 1, your
#                           own 0; imagenet: the configuration's list]
#   --encoder NAME          frozen encoder: a file or folder of MSN, or timm:NAME[@FILE|@pretrained]
#                           [train_msn.py makes one of the images themselves; imagenet: the configuration's]
#   --images-per-class N    generated images [the configuration's]
#   --seed S                first seed, of labelled images and models [1]
#   --seeds N               repeat with N seeds; report mean, standard deviation and differences [1]
#   --controls              also fit the classifier to pseudo-labelled training images in place of generated ones
#   --gpus N                GPUs to use [all visible ones]
#   --stages LIST           which stages to run [1,2,3]
#   --data-dir DIR          folder of the published data sets [TorchSSL/data]
#   --out DIR               put everything below DIR [runs/imagenet_...; imagenet: the published folders]
#   --encoder-args "..."    further flags of train_msn.py
#   --stage2-args "..."     further flags of train_ldm.py, such as "--repa=ENCODER"
#   --config-args "..."     settings of all stages, such as "--config.train.n_steps=20000 --config.sample.scale=0.2"
#   --overwrite             make anew what other settings or inputs have made
#   --verbose               show what the programs print; otherwise it is in logs/ beside the report
#   -n, --dry-run           print the commands and run nothing

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
set -eo pipefail
dataset=digits config="" labels="" encoder="" images_per_class="" seed=1 seeds=1 controls="" gpus="" stages=1,2,3
data_dir="" out="" encoder_args="" stage2_args="" config_args="" overwrite=""
source "$root/shared/stages.sh"
read_options "$root/run_imagenet.sh" "$@"
set --
source "$root/shared/env.sh" --no-install
whole_number seed 0
whole_number labels 0
for option in images-per-class seeds gpus; do
    whole_number $option 1
done
[[ $stages =~ ^[123](,[123])*$ ]] || fail "--stages: expected some of 1,2,3 separated by commas, got '$stages'"
split encoder-args "$encoder_args" && more_msn=("${words[@]}")
split stage2-args "$stage2_args" && more2=("${words[@]}")
split config-args "$config_args" && settings=("${words[@]}")
for word in "${settings[@]}"; do
    [[ $word == --config.*=* ]] || fail "--config-args: expected --config.KEY=VALUE, got $word"
done
[ -z "$images_per_class" ] || settings+=("--config.augmentation_K=$images_per_class")

msn=() recipe_labels="" one_thread="" chosen=$config title=$dataset
case $dataset in
    digits) source "$root/recipes/imagenet_digits.sh" ;;
    imagenet) source "$root/recipes/imagenet.sh" ;;
    *)
        [ -d "$dataset" ] || fail "--dataset $dataset: neither digits, imagenet nor a folder that exists"
        dataset=$(absolute "$dataset") title=$(basename "$dataset")
        source "$root/recipes/imagenet_own.sh" ;;
esac
config=${chosen:-$config} labels=${labels:-$recipe_labels}
[ -f "$root/EDM/imagenet/configs/$config.py" ] || fail "--config: there is no EDM/imagenet/configs/$config.py"
[[ $dataset != imagenet || $seeds$labels$encoder == 1 ]] ||
    fail "--labels, --encoder and --seeds are for digits and your own photographs; imagenet has lists of labels, which a \
configuration names"
settle_launch
[[ ! -e $encoder ]] || encoder=$(absolute "$encoder")
[ -z "$out" ] || out=$(absolute "$out")
[ -z "$data_dir" ] || data_dir=$(absolute "$data_dir")
discrete=""
[[ $config != *huge* ]] || discrete=_discrete

relative() { "$fewlabel_python" -c 'import os, sys; print(os.path.relpath(*sys.argv[1:]))' "$1" "$2"; }

experiment() {  # of one seed, in the folder $work
    here=$(relative "$work" "$root") scripts=$(relative "$root/EDM/imagenet" "$work")/
    given=(--config=config.py)
    if [ "$dataset" = imagenet ]; then
        scripts="" given=("--config=configs/$config.py" "${settings[@]}")
    else
        prepare
    fi
    [[ $stages != *1* ]] || stage_1
    [[ $stages != *2* ]] || stage_2
    [[ $stages != *3* ]] || stage_3
    step report "$here" "The report"
    show python "${scripts}report.py" "${given[@]:0:1}" "--out=$(relative "$report" "$work")" \
        "--history=$(relative "$history" "$work")"
}

prepare() {
    local images=$dataset
    [[ $dataset == /* ]] || images=images
    step prepare "$here" "The images, their labels, and the configuration"
    run python "${scripts}prepare.py" "--config=${scripts}configs/$config.py" "--dataset=$dataset" --dest=. \
        "--data_dir=${data_dir:-$(relative "$root/TorchSSL/data" "$work")}" "--labels=$labels" "--seed=$seed" \
        "--stages=$stages" ${encoder:+"--encoder=$encoder"} "${settings[@]}" "${anew[@]}"
    [[ -z $encoder && $stages == *1* ]] || return 0
    step encoder "$here" "Pre-train an encoder on the images, without labels"
    run "${launch[@]}" "$(relative "$root/TorchSSL" "$work")/train_msn.py" "--dataset=$images" --outdir=msn "--seed=$seed" \
        "${msn[@]}" "${more_msn[@]}" "${anew[@]}"
}

classifier() {  # name of the step, what it does, function of train_classifier.py, further flags
    step "$1" "$here" "$2"
    run "${launch[@]}" "${scripts}train_classifier.py" "${given[@]}" "--func=$3" "${@:4}" "${anew[@]}"
}

stage_1() {
    classifier "classifier" "Stage 1: fit the classifier to the few labels" train_classifier_stage1 \
        --config.output_path=log/stage1_log
    classifier "features" "Features of all training images" get_all_features
    classifier "pseudo-labels" "Their pseudo-labels" get_cluster
}

stage_2() {
    step latents "$here" "Stage 2: latents of all training images"
    run "${launch[@]}" "${scripts}extract_imagenet_features_semi.py" "${given[@]}" "${anew[@]}"
    step "diffusion model" "$here" "Train the diffusion model on the pseudo-labels"
    run "${launch[@]}" "${scripts}train_ldm$discrete.py" "${given[@]}" "${more2[@]}" "${anew[@]}"
    step "generated images" "$here" "Draw images of every class"
    run "${launch[@]}" "${scripts}sample_ldm${discrete}_all.py" "${given[@]}" --output_path=log/sample_log "${anew[@]}"
}

stage_3() {
    classifier "generated features" "Stage 3: features of the generated images" get_aug_features
    classifier "classifier again" "Fit the classifier to generated and labelled images" train_classifier_stage3 \
        --config.output_path=log/stage3_log
    [ -z "$controls" ] || classifier "control" "Control: pseudo-labelled training images in place of generated ones" \
        train_classifier_stage3 --rows=real --config.output_path=log/control_log
}

last_seed=$((seed + seeds - 1)) span=$seed
[ "$seeds" = 1 ] || span=$seed-$last_seed
top=${out:-$root/runs/imagenet_${title}_${labels:-$config}_$span}
[ -n "$dry_run" ] || source "$root/shared/env.sh" ""
[ -n "$dry_run" ] || hold "$top"
if [[ -n $one_thread && -z $OMP_NUM_THREADS ]]; then
    echo "export OMP_NUM_THREADS=1"
    export OMP_NUM_THREADS=1
fi
folders=()
for ((; seed <= last_seed; seed++)); do
    work=$top
    [ "$seeds" = 1 ] || work=$top/seed_$seed
    report=$work/report history=$work/commands.jsonl
    folders+=("--seed_report=$report")
    [ "$dataset" != imagenet ] || work=$root/EDM/imagenet
    [ -n "$dry_run" ] || mkdir -p "$work" "$report"
    experiment
done
[ "$seeds" = 1 ] && exit
history=$top/commands.jsonl
step "report of all seeds" EDM/imagenet "Mean and standard deviation over the seeds"
show python report.py "--out=$top/report" "${folders[@]}"
