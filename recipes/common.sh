# Source this (bash): what run_all.sh, run_tdsm.sh and run_longtail.sh have in common, options and seeds.
# shellcheck disable=SC2034,SC2154

set -eo pipefail
dataset=digits labels="" images_per_class="" seed=1 seeds=1 controls="" gpus="" stages=1,2,3 data_dir="" out=""
stage1=freematch stage2=edm stage3="" imbalance="" transition="" held_out="" only_tdsm="" overwrite=""
resolution="" transform=""
label_choice=class stage1_args="" stage2_args="" generate_args="" stage3_args="" classifier_args=""
source "$root/shared/stages.sh"
arguments=("$@")
read_options "$root/run_all.sh" "$@"
set --
source "$root/shared/env.sh" --no-install

whole_number seed 0
for option in labels images-per-class seeds gpus imbalance held-out; do
    whole_number $option 1
done
[[ $stages =~ ^[123](,[123])*$ ]] || fail "--stages: expected some of 1,2,3 separated by commas, got '$stages'"
[[ $label_choice =~ ^(class|typical|coverage|random)$ ]] ||
    fail "--label-choice: expected class, typical, coverage or random, got '$label_choice'"
[[ $stage1 != daso || $label_choice == class ]] || fail "--label-choice is not for --stage1 daso"
choice=""  # in names
[ "$label_choice" = class ] || choice=_$label_choice
[[ $stage2 == edm || $stage2 == tdsm ]] || fail "--stage2: expected edm or tdsm, got '$stage2'"
[[ $stage1 == daso || -z $imbalance ]] || fail "--imbalance belongs to --stage1 daso"
[[ $stage2 == tdsm || -z $transition$held_out$only_tdsm$classifier_args ]] ||
    fail "--transition, --held-out, --only-tdsm and --classifier-args belong to --stage2 tdsm"
split stage1-args "$stage1_args" && more1=("${words[@]}")
split stage2-args "$stage2_args" && more2=("${words[@]}")
split generate-args "$generate_args" && more_generate=("${words[@]}")
split stage3-args "$stage3_args" && more3=("${words[@]}")
split classifier-args "$classifier_args" && more_classifier=("${words[@]}")

[ -z "$data_dir" ] || data_dir=$(absolute "$data_dir")
[ -z "$out" ] || out=$(absolute "$out")

# Take own images as the set of equal ones that `resize` makes of them.
resized() {
    [[ -n $resolution ]] || fail "--transform needs --resolution, such as --resolution=64x64"
    [[ -d $dataset ]] || fail "--resolution: unpack $dataset into a folder with train/ and test/, and give that"
    originals=$dataset title+=-$resolution${transform:+-$transform}
    dataset=${out:+$out/data}
    dataset=${dataset:-${data_dir:-$root/TorchSSL/data}}/$title
}

source "$root/recipes/defaults.sh"
title=$dataset originals=""
case $dataset in
    digits | cifar10 | cifar100 | svhn | stl10 | mnist) source "$root/recipes/$dataset.sh" ;;
    *)
        [ -e "$dataset" ] ||
            fail "--dataset $dataset: neither digits, cifar10, cifar100, svhn, stl10, mnist nor a path that exists"
        dataset=$(absolute "$dataset") title=$(basename "$dataset" .zip)
        [ -z "$resolution$transform" ] || resized
        source "$root/recipes/own.sh" ;;
esac
[ -n "$originals" ] || [ -z "$resolution$transform" ] ||
    fail "--resolution and --transform are for your own images; those of $dataset have one size"
last=${images_per_class:+$((images_per_class - 1))}
last=${last:-$recipe_last}
settle_launch

# The folder of the report, as typed in any of the papers' folders.
typed() { [ -n "$out" ] && echo "$report" || echo "..${report#"$root"}"; }

generate() {  # step, run folder of the diffusion model, folder of the images; both as typed in EDM/
    local snapshot=$2/network-snapshot-latest.pkl
    [[ $snapshot == /* ]] || snapshot=./$snapshot
    step "$1" EDM "Generate the images 0 to $last of every class"
    run bash generate.sh "$last" "$3" "$snapshot" "$gpus" "${more_generate[@]}" "${anew[@]}"
}

# Make own images equal, as --resolution and --transform say.
resize() {
    local part file
    step "resized images" TorchSSL "Your images, resized"
    for part in train test unlabeled; do
        for file in "$originals/$part" "$originals/$part.zip"; do
            [ -e "$file" ] || continue
            run python dataset_tool.py "--source=$file" "--dest=$dataset/$part.zip" "--resolution=$resolution" \
                ${transform:+"--transform=$transform"} "${anew[@]}"
            break
        done
    done
}

has_packages() { "$fewlabel_python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))'; }

# Run `experiment` for every seed, then report on all of them. Before that, check all that can be known.
for_every_seed() {  # what tells the reports of runs/ apart, folder and name of the script that writes them
    local checked=$stage1_args$stage2_args$generate_args$stage3_args$classifier_args$originals
    [ -d "$dataset" ] && checked=1
    local last_seed=$((seed + seeds - 1)) folders=() span=$seed
    [ "$seeds" = 1 ] || span=$seed-$last_seed
    reports=${out:-$root/runs/${title}_$1_$span} report=$reports
    [ -n "$dry_run" ] || source "$root/shared/env.sh" ""
    if [[ -z $dry_run ]] || { [[ -n $checked ]] && has_packages; }; then
        dry_run=1 all_seeds | "$fewlabel_python" "$root/TorchSSL/check_data.py" --commands >&2
    fi
    [ -n "$dry_run" ] || hold "$reports"
    if [[ -n $one_thread && -z $OMP_NUM_THREADS ]]; then
        echo "export OMP_NUM_THREADS=1"
        export OMP_NUM_THREADS=1
    fi
    all_seeds
    [ "$seeds" = 1 ] && return
    report=$reports history=$reports/commands.jsonl
    step "report of all seeds" "$2" "Mean and standard deviation over the seeds"
    show python "$3" "--out=$(typed)" "${folders[@]}"
}

all_seeds() {
    history=$reports/commands.jsonl
    [ -z "$originals" ] || resize
    for ((; seed <= last_seed; seed++)); do
        report=$reports
        [ "$seeds" = 1 ] || report=$reports/seed_$seed
        [ -n "$dry_run" ] || mkdir -p "$report"
        history=$report/commands.jsonl
        folders+=("--seed_report=$(typed)")
        experiment
    done
}
