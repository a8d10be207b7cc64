"""The text of a DPT report: Markdown from the content of report.json."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTROLS = {"other_seed": "stage 1, another training seed, same labels",
            "twice": "stage 1, the iterations of stages 1 and 3 together",
            "real_all": "stage 3 with all pseudo-labelled real images in place of generated ones",
            "real_balanced": "stage 3 with as many pseudo-labelled real images of every class"}
TDSM = "stage 3 with images of TDSM, which knows that pseudo-labels err"
ROWS = {"stage1_accuracy": "stage 1", "stage3_accuracy": "stage 3 (with generated images)",
        "stage3_tdsm_accuracy": TDSM, "images_right_plain": "generated images that show their class",
        "images_right_tdsm": "generated images that show their class, TDSM",
        "pseudo_label_accuracy": "pseudo-labels of the training images",
        **{f"control_{name}": title for name, title in CONTROLS.items()}}
MINUENDS = {"stage3_minus_stage1_accuracy": "stage 1",
            "stage3_minus_stage1_two_runs": "the mean of two stage-1 runs (the cautious figure)",
            **{f"stage3_minus_control_{name}": title for name, title in CONTROLS.items()}}
TDSM_MINUENDS = {"stage3_tdsm_minus_stage3_accuracy": "stage 3 of plain DPT",
                 "stage3_tdsm_minus_stage1_accuracy": "stage 1"}


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def heading(content: dict[str, Any]) -> str:
    return (f"# DPT on {content['dataset']}: {content['labels']} labels\n\n"
            f"{content['training_images']} training images, {content['test_images']} test images; "
            f"{content['iterations'].get('stage1')} iterations in stage 1, {content['iterations'].get('stage3')} in "
            "stage 3. Accuracies are those of the averaged weights on the test set, in percent.")


def run_markdown(content: dict[str, Any]) -> str:
    """Return the report of one seed."""
    found = {"stage 1": content["accuracy"]["stage1"], "stage 3 (with generated images)": content["accuracy"]["stage3"],
             TDSM: content["accuracy"].get("stage3_tdsm"),
             **{CONTROLS[name]: values for name, values in content["controls"].items()}}
    accuracies = table(
        ["", "last iteration", "median of the last 20 evaluations", "best on the test set"],
        [[title, percent(v["last"]), percent(v["median_of_last_20"]), percent(v["best_on_test"])]
         for title, v in found.items() if v])
    parts = [heading(content), f"Seed {content['seed']}.", accuracies]
    if content["difference"] is not None:
        parts.append(f"Stage 3 minus stage 1: {points(content['difference'])} points, one seed, at equal iterations a "
                     "stage. `--seeds 10 --controls` shows the spread, and what else could explain the difference.")
    parts += tdsm_markdown(content["tdsm"]) if "tdsm" in content else []
    if content["pseudo_label_accuracy"] is not None:
        by_class = content["pseudo_label_accuracy_by_class"]
        counts = content["pseudo_label_counts"] or [None] * len(by_class)
        parts += [f"Pseudo-labels of the training images: {percent(content['pseudo_label_accuracy'])} % are right.",
                  table(["class", "right among images of this class, %", "images with this pseudo-label"],
                        [[name, percent(value), str(count)]
                         for (name, value), count in zip(by_class.items(), counts, strict=True)])]
    generated = content["generated"]
    if generated:
        parts.append(f"{generated['images']} generated images. Distance to the training images: "
                     f"{generated['feature_distance']:.3f}; real test images: "
                     f"{generated['feature_distance_of_test_images']:.3f}. {generated['feature_distance_is']}.")
    parts += [f"![{name}]({name})" for name in content["pictures"]]
    return "\n\n".join([*parts, *closing(content)]) + "\n"


def tdsm_markdown(found: dict[str, Any]) -> list[str]:
    """Return what the second stage with TDSM has changed, in one seed."""
    parts, transition = [], found["transition"]
    if found["minus_stage3"] is not None:
        parts.append(f"Stage 3 with images of TDSM minus stage 3 of plain DPT: {points(found['minus_stage3'])} points, "
                     "one seed, at equal iterations.")
    right = found["images_of_the_right_class"]
    if right:
        names = {"plain": "plain EDM", "tdsm": "TDSM"}
        shares = ", ".join(f"{names[kind]} {percent(value)} %" for kind, value in right.items())
        parts.append(f"Generated images that show their class, by a classifier trained with all true labels (itself "
                     f"right on {percent(found['judge_accuracy'])} % of the test images): {shares}.")
    if transition is None:
        parts.append("The transition matrix of the pseudo-labels was learned with the classifier (VolMinNet).")
    else:
        how = {"predictions": "from the predictions of stage 1, without further labels",
               "held_out": f"from {transition.get('held_out')} further labelled images, which plain DPT did not have"}
        text = f"The transition matrix of the pseudo-labels was estimated {how[transition['method']]}."
        if "error" in transition:
            text += (f" Its rows are {transition['error']:.3f} from the true ones (total variation); those of a matrix "
                     f"without noise are {transition['error_of_no_noise']:.3f} from them.")
        parts.append(text)
    return parts


def run_summary(content: dict[str, Any]) -> str:
    """Return the few lines for the console."""
    stage3 = percent(content["stage3_accuracy"]) + " %"
    if content["difference"] is not None:
        stage3 += f"  ({points(content['difference'])} points)"
    return (f"stage 1, accuracy on the test set   {percent(content['stage1_accuracy'])} %\n"
            f"pseudo-labels that are right        {percent(content['pseudo_label_accuracy'])} %\n"
            f"stage 3, accuracy on the test set   {stage3}\n"
            f"{tdsm_summary(content)}"
            f"seconds                             {content['seconds'].get('total', 0):.0f}")


def tdsm_summary(content: dict[str, Any]) -> str:
    if "tdsm" not in content:
        return ""
    accuracy, gain = percent(content["stage3_tdsm_accuracy"]), points(content["tdsm"]["minus_stage3"])
    return f"stage 3, the same with TDSM         {accuracy} %  ({gain} over plain DPT)\n"


def seeds_markdown(content: dict[str, Any]) -> str:
    """Return the report over several seeds."""
    summary = content["summary"]
    seeds = ", ".join(map(str, content["seeds"]))
    accuracies = table(["last iteration", "mean", "standard deviation", "seeds"],
                       [[title, percent(summary[name]["mean"]), percent(summary[name]["standard_deviation"]),
                         str(summary[name]["seeds"])] for name, title in ROWS.items() if name in summary])
    differences = table(["stage 3 minus", "mean", "standard error", "above 0"],
                        [[title, points(d["mean"]), percent(d["standard_error"]), f"{d['positive']} of {d['seeds']}"]
                         for name, title in MINUENDS.items() if (d := content["differences"].get(name))])
    tdsm = table(["stage 3 with images of TDSM minus", "mean", "standard error", "above 0"],
                 [[title, points(d["mean"]), percent(d["standard_error"]), f"{d['positive']} of {d['seeds']}"]
                  for name, title in TDSM_MINUENDS.items() if (d := content["differences"].get(name))])
    shown = [name for name in ROWS if name in summary]
    by_seed = table(["seed", *(ROWS[name] for name in shown)],
                    [[str(seed), *(percent(summary[name]["by_seed"][i]) for name in shown)]
                     for i, seed in enumerate(content["seeds"])])
    return "\n\n".join([heading(content), f"Seeds {seeds}.", accuracies,
                        "Paired differences, in points, at equal iterations a stage:", differences,
                        *([tdsm] if "stage3_tdsm_accuracy" in summary else []), by_seed,
                        *closing(content)]) + "\n"


def closing(content: dict[str, Any]) -> list[str]:
    """Return seconds, hardware and versions."""
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in content["seconds"].items() if value is not None)
    hardware = [f"{stage}: {found['hardware']} ({found['device']}, {found['threads']} threads, {found['processes']} "
                f"process(es), {found['precision']})" for stage, found in content["hardware"].items()]
    return [f"Seconds: {seconds}.", "Computed on " + "; ".join(hardware) + ".",
            "Versions: " + ", ".join(f"{name} {value}" for name, value in content["versions"].items()) + "."]
