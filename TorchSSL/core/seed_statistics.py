"""DPT over several seeds: mean, standard deviation, and paired differences with their standard errors."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shared.report.aggregate import deviation, difference, known, mean


def over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the aggregate of the report.json contents of single seeds, of one data set and number of labels.

    Accuracies are those of the last iteration. The plain keys (stage1_accuracy, ...) are means over the seeds.
    """
    columns: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "stage1_accuracy": lambda report: report["stage1_accuracy"],
        "pseudo_label_accuracy": lambda report: report["pseudo_label_accuracy"],
        "stage3_accuracy": lambda report: report["stage3_accuracy"],
        "stage3_tdsm_accuracy": lambda report: report.get("stage3_tdsm_accuracy")}
    for kind in ("plain", "tdsm"):
        columns[f"images_right_{kind}"] = \
            lambda report, kind=kind: report.get("tdsm", {}).get("images_of_the_right_class", {}).get(kind)
    for name in dict.fromkeys(name for report in reports for name in report["controls"]):
        columns[f"control_{name}"] = lambda report, name=name: report["controls"].get(name, {}).get("last")
    values = {name: [read(report) for report in reports] for name, read in columns.items()}
    values["stage1_two_runs"] = [
        (first + second) / 2 if None not in (first, second) else None
        for first, second in zip(values["stage1_accuracy"], values.get("control_other_seed", []), strict=False)]

    stage3 = values["stage3_accuracy"]
    differences = {f"stage3_minus_{name}": difference(stage3, found) for name, found in values.items()
                   if name in ("stage1_accuracy", "stage1_two_runs") or name.startswith("control_")}
    differences |= {f"stage3_tdsm_minus_{name}": difference(values["stage3_tdsm_accuracy"], values[name])
                    for name in ("stage3_accuracy", "stage1_accuracy")}
    first = reports[0]
    classes = list(first["pseudo_label_accuracy_by_class"])
    return {
        **{key: first[key] for key in ("dataset", "labels", "training_images", "test_images", "iterations")},
        "seeds": [report["seed"] for report in reports],
        **{name: mean(values[name]) for name in ("stage1_accuracy", "pseudo_label_accuracy", "stage3_accuracy")},
        **({"stage3_tdsm_accuracy": mean(values["stage3_tdsm_accuracy"])} if known(values["stage3_tdsm_accuracy"])
           else {}),
        "pseudo_label_accuracy_by_class": {
            name: mean([report["pseudo_label_accuracy_by_class"].get(name) for report in reports]) for name in classes},
        "seconds": {name: mean([report["seconds"].get(name) for report in reports])
                    for name in dict.fromkeys(name for report in reports for name in report["seconds"])},
        "summary": {name: {"mean": mean(found), "standard_deviation": deviation(found), "seeds": len(known(found)),
                           "by_seed": found} for name, found in values.items() if known(found)},
        "differences": {name: found for name, found in differences.items() if found},
        "hardware": first["hardware"], "versions": first["versions"]}
