#!/usr/bin/env bash
# DPT whose second stage knows its labels to be wrong at times, beside plain DPT:  bash run_tdsm.sh [options]
# The options are those of run_all.sh, of which this is --stage2 tdsm.
#
# Pseudo-labels are noisy labels. TDSM (Na et al., "Label-Noise Robust Diffusion Models", ICLR 2024) needs to know how
# they err: the transition matrix p(pseudo-label | class). It is estimated from stage 1, or learned together with the
# classifier of noisy images (VolMinNet).

source "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --stage2 tdsm "$@"
transition=${transition:-predictions}
[[ $transition == predictions || $transition == held-out || $transition == volmin ]] ||
    fail "--transition: expected predictions, held-out or volmin, got '$transition'"
[[ $transition == held-out && -n $held_out || $transition != held-out && -z $held_out ]] ||
    fail "--transition held-out needs --held-out N, the number of further labels, and --held-out N needs it"

experiment() {  # of one seed
    set_names
    set_names_of_tdsm
    look_at_data
    [[ $stages != *1* ]] || stage_1
    [[ $stages != *2* || -n $only_tdsm ]] || stage_2
    [[ $stages != *2* ]] || stage_2_tdsm
    [[ $stages != *3* || -n $only_tdsm ]] || stage_3
    [[ $stages != *3* ]] || train_again "classifier again tdsm" "Stage 3 with the images of TDSM" "$run3_tdsm" \
        "$generated_tdsm"
    [[ $stages != *2* || -z $judge ]] || judge
    [ -z "$controls" ] || controls
    report
}

set_names_of_tdsm() {
    local kind=tdsm-$transition${held_out:+-$held_out}
    local tag=${kind//-/_}
    matrix=$run1/transition_$tag.json
    [ "$transition" != volmin ] || matrix=""
    model_tdsm=$models/$zip_name-$kind
    generated_tdsm=$images/${name}_$tag/nums_$last
    run3_tdsm=${run3}_$tag
    report_flags=("--tdsm_stage3=$run3_tdsm" "--tdsm_images=$generated_tdsm"
                  "--tdsm_stage2=$(from_torchssl "$model_tdsm")")
    [ -z "$matrix" ] || report_flags+=("--tdsm_transition=$matrix")
    [ -z "$judge" ] || report_flags+=("--judged=$(from_torchssl "$model_tdsm-judged")")
}

stage_2_tdsm() {
    local noise=(--precond=edm_vm --noise_type=learn "${volmin[@]}") learned=(--noise_type=learn)
    if [ -n "$matrix" ]; then
        local how=(--method=predictions)
        [ -z "$held_out" ] || how=(--method=held_out "--held_out=$held_out")
        step transition TorchSSL "How the pseudo-labels err, estimated from stage 1"
        run python estimate_transition.py "--dataset=$dataset" "${elsewhere[@]}" "--load_path=$run1/$checkpoint" \
            "--save_path=$run1" "--dest=$matrix" "--seed=$seed" "${how[@]}" "${anew[@]}"
        noise=(--noise_type=file "--transition=$(from_edm "$matrix")" "${noise_classifier[@]}") learned=()
    fi
    step "noise classifier" EDM "Stage 2, TDSM: a classifier of noisy images, corrected for wrong labels"
    run "${launch[@]}" train_classifier.py "--outdir=$model_tdsm-classifier" --nosubdir "--data=$data" --cond=1 \
        --arch=ddpmpp "${noise[@]}" "--seed=$seed" "${more_classifier[@]}" "${anew[@]}"
    step "diffusion model tdsm" EDM "Stage 2, TDSM: train the diffusion model on what labels may mean"
    run "${launch[@]}" train_noise.py "--outdir=$model_tdsm" --nosubdir "--data=$data" --cond=1 --arch=ddpmpp \
        "--cls=$model_tdsm-classifier/network-snapshot-latest.pkl" "${learned[@]}" "${diffusion[@]}" "--seed=$seed" \
        "${more2[@]}" "${anew[@]}"
    generate "generated images tdsm" "$model_tdsm" "$(from_edm "$generated_tdsm")"
}

# How many generated images show their class.
judge() {
    local kind folder
    for kind in plain tdsm; do
        folder=$generated
        [ $kind = plain ] || folder=$generated_tdsm
        [[ $kind == plain && -n $only_tdsm ]] && continue
        step "judged $kind" EDM "How many generated images show their class, by a judge trained with all true labels"
        run python evaluate.py "--outdir=$model_tdsm-judged-$kind" "--data=$dataset" "--images=$(from_edm "$folder")" \
            --metrics=accuracy "--judge-dir=$models/judge-$dataset" "${anew[@]}"
    done
}

for_every_seed "$labels$choice" TorchSSL report.py
