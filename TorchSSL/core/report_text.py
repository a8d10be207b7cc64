"""A DPT report in words, and over several seeds: Markdown from the content of report.json."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.report.table_report import difference, known, markdown_table, mean, std

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
SUBTRAHENDS = {"stage3_minus_stage1_accuracy": "stage 1",
               "stage3_minus_stage1_two_runs": "the mean of two stage-1 runs (the cautious figure)",
               **{f"stage3_minus_control_{name}": title for name, title in CONTROLS.items()}}
TDSM_SUBTRAHENDS = {"stage3_tdsm_minus_stage3_accuracy": "stage 3 of plain DPT",
                    "stage3_tdsm_minus_stage1_accuracy": "stage 1"}
Content = Mapping[str, Any]  # of report.json


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


# ---------------------------------------------------------------- one seed


def run_markdown(content: Content) -> str:
    """Return the report of one seed."""
    found = {"stage 1": content["accuracy"]["stage1"], "stage 3 (with generated images)": content["accuracy"]["stage3"],
             TDSM: content["accuracy"].get("stage3_tdsm"),
             **{CONTROLS[name]: values for name, values in content["controls"].items()}}
    accuracies = [[title, *(percent(values[key]) for key in ("last", "median_of_last_20", "best_on_test"))]
                  for title, values in found.items() if values]
    head = ["", "last iteration", "median of the last 20 evaluations", "best on the test set"]
    parts = [_heading(content), f"Seed {content['seed']}.", markdown_table(head, accuracies)]
    if content["difference"] is not None:
        parts.append(f"Stage 3 minus stage 1: {points(content['difference'])} points, one seed, at equal iterations a "
                     "stage. `--seeds 10 --controls` shows the spread and other explanations.")
    parts += _tdsm(content["tdsm"]) if "tdsm" in content else []
    if content["pseudo_label_accuracy"] is not None:
        by_class = content["pseudo_label_accuracy_by_class"]
        counts = content["pseudo_label_counts"] or [None] * len(by_class)
        rows = [[name, percent(value), str(count)]
                for (name, value), count in zip(by_class.items(), counts, strict=True)]
        head = ["class", "right among images of this class, %", "images with this pseudo-label"]
        parts += [f"Pseudo-labels of the training images: {percent(content['pseudo_label_accuracy'])} % are right.",
                  markdown_table(head, rows)]
    generated = content["generated"]
    if generated:
        parts.append(f"{generated['images']} generated images. Distance to the training images: "
                     f"{generated['feature_distance']:.3f}; real test images: "
                     f"{generated['feature_distance_of_test_images']:.3f}. {generated['feature_distance_is']}.")
    parts += [f"![{name}]({name})" for name in content["pictures"]]
    return "\n\n".join([*parts, *_closing(content)]) + "\n"


def _tdsm(found: Content) -> list[str]:
    """Return the effect of TDSM in the second stage, in one seed."""
    parts, transition, right = [], found["transition"], found["images_of_the_right_class"]
    if found["minus_stage3"] is not None:
        parts.append(f"Stage 3 with images of TDSM minus stage 3 of plain DPT: {points(found['minus_stage3'])} points, "
                     "one seed, at equal iterations.")
    if right:
        names = {"plain": "plain EDM", "tdsm": "TDSM"}
        fractions = ", ".join(f"{names[kind]} {percent(value)} %" for kind, value in right.items())
        parts.append(f"Generated images that show their class, by a classifier trained with all true labels (itself "
                     f"right on {percent(found['judge_accuracy'])} % of the test images): {fractions}.")
    if transition is None:
        return [*parts, "The transition matrix of the pseudo-labels was learned with the classifier (VolMinNet)."]
    how = {"predictions": "from the predictions of stage 1, without further labels",
           "held_out": f"from {transition.get('held_out')} further labelled images, which plain DPT did not have"}
    text = f"The transition matrix of the pseudo-labels was estimated {how[transition['method']]}."
    if "error" in transition:
        text += (f" Its rows are {transition['error']:.3f} from the true ones (total variation); those of a matrix "
                 f"without noise are {transition['error_of_no_noise']:.3f} from them.")
    return [*parts, text]


def run_summary(content: Content) -> str:
    """Return the few lines for the console."""
    gain = "" if content["difference"] is None else f"  ({points(content['difference'])} points)"
    lines = [f"stage 1, accuracy on the test set   {percent(content['stage1_accuracy'])} %",
             f"pseudo-labels that are right        {percent(content['pseudo_label_accuracy'])} %",
             f"stage 3, accuracy on the test set   {percent(content['stage3_accuracy'])} %{gain}"]
    if "tdsm" in content:
        lines.append(f"stage 3, the same with TDSM         {percent(content['stage3_tdsm_accuracy'])} %  "
                     f"({points(content['tdsm']['minus_stage3'])} over plain DPT)")
    return "\n".join([*lines, f"seconds                             {content['seconds'].get('total', 0):.0f}"])


# ---------------------------------------------------------------- several seeds


def over_seeds(reports: Sequence[Content]) -> dict[str, Any]:
    """Return the aggregate of the report.json contents of single seeds, of one data set and number of labels.

    Accuracies are those of the last iteration. The plain keys (stage1_accuracy, ...) are means over the seeds;
    differences are paired.
    """
    values = {name: [report.get(name) for report in reports] for name in
              ("stage1_accuracy", "pseudo_label_accuracy", "stage3_accuracy", "stage3_tdsm_accuracy")}
    for kind in ("plain", "tdsm"):
        values[f"images_right_{kind}"] = [report.get("tdsm", {}).get("images_of_the_right_class", {}).get(kind)
                                          for report in reports]
    for name in dict.fromkeys(name for report in reports for name in report["controls"]):
        values[f"control_{name}"] = [report["controls"].get(name, {}).get("last") for report in reports]
    values["stage1_two_runs"] = [
        (first + second) / 2 if None not in (first, second) else None
        for first, second in zip(values["stage1_accuracy"], values.get("control_other_seed", []), strict=False)]

    differences = {f"stage3_minus_{name}": difference(values["stage3_accuracy"], found)
                   for name, found in values.items()
                   if name in ("stage1_accuracy", "stage1_two_runs") or name.startswith("control_")}
    differences |= {f"stage3_tdsm_minus_{name}": difference(values["stage3_tdsm_accuracy"], values[name])
                    for name in ("stage3_accuracy", "stage1_accuracy")}
    first = reports[0]
    means = {name: mean(values[name]) for name in ("stage1_accuracy", "pseudo_label_accuracy", "stage3_accuracy",
                                                   "stage3_tdsm_accuracy")}
    if means["stage3_tdsm_accuracy"] is None:
        del means["stage3_tdsm_accuracy"]
    return {
        **{key: first[key] for key in ("dataset", "labels", "training_images", "test_images", "iterations")},
        "seeds": [report["seed"] for report in reports], **means,
        "pseudo_label_accuracy_by_class": {
            name: mean([report["pseudo_label_accuracy_by_class"].get(name) for report in reports])
            for name in first["pseudo_label_accuracy_by_class"]},
        "seconds": {name: mean([report["seconds"].get(name) for report in reports])
                    for name in dict.fromkeys(name for report in reports for name in report["seconds"])},
        "summary": {name: {"mean": mean(found), "standard_deviation": std(found), "seeds": len(known(found)),
                           "by_seed": found} for name, found in values.items() if known(found)},
        "differences": {name: found for name, found in differences.items() if found},
        "hardware": first["hardware"], "versions": first["versions"]}


def seeds_markdown(content: Content) -> str:
    """Return the report over several seeds."""
    summary = content["summary"]
    shown = [name for name in ROWS if name in summary]
    accuracies = [[ROWS[name], percent(summary[name]["mean"]), percent(summary[name]["standard_deviation"]),
                   str(summary[name]["seeds"])] for name in shown]
    by_seed = [[str(seed), *(percent(summary[name]["by_seed"][i]) for name in shown)]
               for i, seed in enumerate(content["seeds"])]
    parts = [_heading(content), f"Seeds {', '.join(map(str, content['seeds']))}.",
             markdown_table(["last iteration", "mean", "standard deviation", "seeds"], accuracies),
             "Paired differences, in points, at equal iterations a stage:",
             _differences(content, "stage 3 minus", SUBTRAHENDS)]
    if "stage3_tdsm_accuracy" in summary:
        parts.append(_differences(content, "stage 3 with images of TDSM minus", TDSM_SUBTRAHENDS))
    parts.append(markdown_table(["seed", *(ROWS[name] for name in shown)], by_seed))
    return "\n\n".join([*parts, *_closing(content)]) + "\n"


def _differences(content: Content, title: str, subtrahends: Mapping[str, str]) -> str:
    rows = [[text, points(found["mean"]), percent(found["standard_error"]), f"{found['positive']} of {found['seeds']}"]
            for name, text in subtrahends.items() if (found := content["differences"].get(name))]
    return markdown_table([title, "mean", "standard error", "above 0"], rows)


# ---------------------------------------------------------------- both


def _heading(content: Content) -> str:
    return (f"# DPT on {content['dataset']}: {content['labels']} labels\n\n"
            f"{content['training_images']} training images, {content['test_images']} test images; "
            f"{content['iterations'].get('stage1')} iterations in stage 1, {content['iterations'].get('stage3')} in "
            "stage 3. Accuracies are those of the averaged weights on the test set, in percent.")


def _closing(content: Content) -> list[str]:
    """Return seconds, hardware and versions."""
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in content["seconds"].items() if value is not None)
    hardware = [f"{stage}: {found['hardware']} ({found['device']}, {found['threads']} threads, {found['processes']} "
                f"process(es), {found['precision']})" for stage, found in content["hardware"].items()]
    return [f"Seconds: {seconds}.", "Computed on " + "; ".join(hardware) + ".",
            "Versions: " + ", ".join(f"{name} {value}" for name, value in content["versions"].items()) + "."]
