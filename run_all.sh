#!/usr/bin/env bash
# Dual pseudo training (DPT) end to end: the commands of the README, each printed before it runs and followed by its time.
#
#     bash run_all.sh [options]
#
# You et al., "Diffusion Models and Semi-Supervised Learners Benefit Mutually with Few Labels", NeurIPS 2023 (arXiv
# 2302.10586). Stage 1 trains a classifier on few labels and labels the training images with it; stage 2 trains a
# diffusion model on these pseudo-labels and generates images of every class; stage 3 trains the classifier again with
# the generated images. The same command again skips what is complete and continues what is not. Options [default]:
#
#   --dataset NAME          digits (needs no download), cifar10, cifar100, svhn, stl10, mnist, or the path of your own
#                           images: a folder with train/<class>/ and test/<class>/, or a zip with dataset.json [digits]
#   --resolution WxH        resize your own images, for instance 64x64; needed where they differ or are not square
#   --transform NAME        crop them before: center-crop, center-crop-wide
#   --labels N              labelled images in all [digits 10, cifar100 400, your own: all with a label, others 40]
#   --label-choice NAME     which images get a label: class, equally many of every class; or, knowing no class, typical,
#                           coverage or random (TorchSSL/suggest_labels.py) [class]
#   --images-per-class N    generated images [digits 101, others 1001]
#   --seed S                first seed [1]
#   --seeds N               repeat with N seeds; report mean, standard deviation and differences [1]
#   --controls              also run what else could explain a gain: another training seed, twice the iterations,
#                           pseudo-labelled real images in place of generated ones (all, and as many of every class)
#   --gpus N                GPUs of stage 2 [all visible ones]; stages 1 and 3 use every visible one
#   --stages LIST           which stages to run [1,2,3]
#   --data-dir DIR          folder of the published data sets, fetched into it when missing [TorchSSL/data]
#   --out DIR               put everything below DIR [TorchSSL/saved_models, TorchSSL/data-aug, EDM/training-runs, runs]
#   --stage1 NAME           learner of stage 1, a script of TorchSSL/ [freematch]; or daso, for long-tailed data
#   --stage3 NAME           learner of stage 3 [freematch, with daso: daso]
#   --imbalance G           daso: the most frequent class has G times the images of the rarest, labelled (--labels in
#                           the former) and unlabelled [digits 20, cifar10 100, cifar100 10]
#   --stage2 NAME           diffusion model: edm, or tdsm, which knows that pseudo-labels err, beside it [edm]
#   --transition NAME       how tdsm learns how they err: from the predictions of the unlabelled images, from held-out
#                           labels, or volmin, together with the classifier of noisy images [predictions]
#   --held-out N            labelled images for --transition held-out, in all
#   --only-tdsm             leave out the plain edm that tdsm is compared with
#   --stage1-args "..."     further flags of stage 1's learner
#   --stage2-args "..."     further flags of train.py and train_noise.py
#   --generate-args "..."   further flags of generate.py
#   --stage3-args "..."     further flags of stage 3's learner
#   --classifier-args "..." further flags of train_classifier.py, for tdsm
#   --overwrite             make anew what other settings or inputs have made; runs are moved aside as NAME.replaced-1
#   --verbose               show what the programs print; otherwise it is in logs/ beside the report
#   -n, --dry-run           print the commands and run nothing

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/recipes/common.sh"
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    [ "$stage1" != daso ] || exec bash "$root/run_longtail.sh" "${arguments[@]}"
    [ "$stage2" != tdsm ] || exec bash "$root/run_tdsm.sh" "${arguments[@]}"
fi
labels=${labels:-$recipe_labels} stage3=${stage3:-freematch}
[[ -z $choice || $labels != 0 ]] || fail "--label-choice $label_choice: give --labels N, how many images get a label"
learners=$(cd "$root/TorchSSL/config" && printf '%s ' */ | tr -d /)
for name in "$stage1" "$stage3"; do
    [[ " $learners" == *" $name "* ]] || fail "--stage1, --stage3: expected daso in both or any of $learners; got $name"
done

# The folders of the published commands, as typed in TorchSSL/, but models as typed in EDM/.
saved=./saved_models images=./data-aug models=training-runs elsewhere=() report_flags=()
[ -z "$out" ] || saved=$out/saved_models images=$out/data-aug models=$out/training-runs
[ -z "$data_dir" ] || elsewhere=("--data_dir=$data_dir")
from_edm() { [[ $1 == /* ]] && echo "$1" || echo "../TorchSSL/${1#./}"; }
from_torchssl() { [[ $1 == /* ]] && echo "$1" || echo "../EDM/$1"; }

experiment() {  # of one seed
    set_names
    look_at_data
    [[ $stages != *1* ]] || stage_1
    [[ $stages != *2* ]] || stage_2
    [[ $stages != *3* ]] || stage_3
    [ -z "$controls" ] || controls
    report
}

set_names() {
    name=${stage1}_${title}_${labels}_$seed$choice
    zip_name=$stage1-$labels-seed$seed-$title$choice$shape
    run1=$saved/$name run3=$saved/${name}_aug$last
    [ "$stage3" = "$stage1" ] || run3+=_$stage3
    model=$models/$zip_name generated=$images/$name/nums_$last
    data=$(from_edm "$run1/$zip_name.zip")
    # The published folder of images does not tell data sets and seeds apart, and the published training command numbers
    # its folder: both are kept for the published experiment alone.
    published=""
    [ "$dataset $labels $seed $stage1 $stage3$choice$out$stage2_args$generate_args" != \
        "cifar10 40 1 freematch freematch" ] ||
        published=1 generated=$images/nums_$last
}

look_at_data() {
    step data TorchSSL "The data set: fetched where it is missing; classes, counts, sizes, duplicates"
    show python check_data.py "--dataset=$dataset" --download "${elsewhere[@]}"
}

stage_1() {
    if [ -n "$choice" ]; then
        step "label choice" TorchSSL "Choose the images to label"
        run python suggest_labels.py "--dataset=$dataset" "${elsewhere[@]}" "--budget=$labels" \
            "--strategy=$label_choice" "--seed=$seed" "--save_path=${run1}_labels" "${anew[@]}"
    fi
    step classifier TorchSSL "Stage 1: train the classifier on the few labels"
    learner "$stage1" "$config" "$name" "$seed"
    run "${command[@]}" "${more1[@]}"

    local which=("--dataset=$dataset") from=("--dataset=$dataset" "${elsewhere[@]}") pseudo=$run1/$name-pseudo.npz
    if [ "$dataset" = cifar10 ]; then  # as published; a download is the archive alone, which does as well
        local folder=${data_dir:-./data}/cifar-10-batches-py archive=${data_dir:-./data}/cifar-10-python.tar.gz
        (cd "$root/TorchSSL" && [[ ! -e $folder && -e $archive ]]) && folder=$archive
        from=(--data_path "$folder")
        which=() pseudo=$run1/cifar-10-python.tar.gz
    fi
    step pseudo-labels TorchSSL "Generate pseudo-labels"
    run python get_labels.py "${which[@]}" "${elsewhere[@]}" --load_path "$run1/$checkpoint" --save_path "$run1/" \
        "${anew[@]}" ">>" "${run1#./}/get_labels.log"
    step "pseudo-data set" TorchSSL "Make a data set with pseudo-labels in place of the true ones"
    run python pseudo_dataset.py "${from[@]}" --save_path "$run1" "${anew[@]}"
    step zip TorchSSL "Convert it for EDM"
    run python dataset_tool.py "--source=$pseudo" "--dest=$run1/$zip_name.zip" "${anew[@]}"
}

stage_2() {
    step "diffusion model" EDM "Stage 2: train the diffusion model on the pseudo-labels"
    if [ -n "$published" ]; then
        run "${launch[@]}" train.py "--outdir=$models" "--data=$data" --cond=1 --arch=ddpmpp "${diffusion[@]}" \
            "${anew[@]}"
    else
        run "${launch[@]}" train.py "--outdir=$model" --nosubdir "--data=$data" --cond=1 --arch=ddpmpp \
            "${diffusion[@]}" "--seed=$seed" "${more2[@]}" "${anew[@]}"
    fi
    numbered
    generate "generated images" "$model" "$(from_edm "$generated")"
}

# The published command numbers its folder: ask train.py which one has these settings and this data.
numbered() {
    [ -n "$published" ] || return 0
    model=$models/00000-$zip_name-cond-ddpmpp-edm-gpus$gpus-batch512-fp32
    [[ -n $dry_run || ! -e $root/EDM/$data ]] || model=$(cd "$root/EDM" && python train.py "--outdir=$models" \
        "--data=$data" --cond=1 --arch=ddpmpp "${diffusion[@]}" --dry-run | sed -n 's/^Output directory: *//p')
}

stage_3() {
    train_again "classifier again" "Stage 3: train the classifier with the generated images" "$run3" "$generated"
}

train_again() {  # step, title, run folder, folder of images
    step "$1" TorchSSL "$2"
    learner "$stage3" "${config}_aug$recipe_last" "$(basename "$3")" "$seed"
    run "${command[@]}" "--aug_path=$4" "${more3[@]}"
}

# Set `command` to that of a learner's run; flags say what its configuration file does not.
learner() {  # name of the learner, its file in TorchSSL/config if it is FreeMatch, name of the run, seed
    local count file from=("--dataset=$dataset" "${learner_flags[@]}")
    command=(python "$1.py")
    if [[ $1 == freematch && -n $config ]]; then
        command+=(--c "config/$2.yaml")
        [ "$labels" = "$recipe_labels" ] || command+=("--num_labels=$labels")
        [ "$4" = 1 ] || command+=("--seed=$4")
        [ "$3" = "$2" ] || command+=("--save_name=$3")
    else
        for count in "$config_labels" "$labels"; do
            file=config/$1/$1_${dataset}_${count}_0.yaml
            [[ $1 == freematch || ! -f $root/TorchSSL/$file ]] || from=(--c "$file")
        done
        command+=("${from[@]}" "--num_labels=$labels" "--seed=$4" "--save_name=$3")
    fi
    # The published script of this name would take every label there is.
    [ "$1" != fullysupervised ] || command+=(--all_labels=False)
    [ "$saved" = ./saved_models ] || command+=("--save_dir=$saved")
    [ -z "$choice" ] || command+=("--label_idx=${run1}_labels/sampled_label_idx.npy")
    command+=("${elsewhere[@]}" "${anew[@]}")
}

controls() {
    step "control other_seed" TorchSSL "Control: stage 1 with another training seed and the same labels"
    learner "$stage1" "$config" "${name}_other_seed" $((seed + 1000))
    run "${command[@]}" "--label_idx=$run1/sampled_label_idx.npy" "${more1[@]}"
    step "control twice" TorchSSL "Control: stage 1 with the iterations of stages 1 and 3 together"
    learner "$stage1" "$config" "${name}_twice" "$seed"
    run "${command[@]}" "${more1[@]}" "--num_train_iter=$((2 * $(iterations)))"
    step "real images" TorchSSL "Pseudo-labelled real images: all of them, and as many of every class"
    run python pseudo_folder.py "--dataset=$dataset" "--labels=$run1/pseudo_label.npy" "--dest=$images/$name" \
        "--per_class=$((last + 1))" "--seed=$seed" "${elsewhere[@]}" "${anew[@]}"
    train_again "control real_all" "Control: all pseudo-labelled real images in place of generated ones" \
        "$saved/${name}_real_all" "$images/$name/real_all"
    train_again "control real_balanced" "Control: as many pseudo-labelled real images of every class" \
        "$saved/${name}_real_balanced" "$images/$name/real_balanced"
}

# --num_train_iter of stage 1, in `command`'s configuration file or in --stage1-args.
iterations() {
    { [ "${command[2]}" != --c ] || cat "$root/TorchSSL/${command[3]}"; echo "${more1[*]}"; } |
        grep -Eo '(^|--)num_train_iter[:= ]+[0-9]+' | grep -Eo '[0-9]+$' | tail -n 1 || echo 1048576
}

report() {
    numbered
    step report TorchSSL "The report"
    show python report.py "--out=$(typed)" "--dataset=$dataset" "--stage1=$run1" "--stage2=$(from_torchssl "$model")" \
        "--images=$generated" "--stage3=$run3" "${elsewhere[@]}" "${report_flags[@]}"
}

[ "${BASH_SOURCE[0]}" != "$0" ] || for_every_seed "$labels$choice" TorchSSL report.py
