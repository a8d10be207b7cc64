"""The effect of generated images on every class: stage 3 of long-tailed DPT against stage 1.

    python dpt_report.py --out=../runs/digits_imbalance20_1 --stage1=RUN --stage3=RUN_aug100

Reads result.json of both runs and stage 1's pseudo_label.json; writes report.json, report.md and classes.png. With
--seed_report, once per folder that holds a report.json, it writes means and differences over seeds instead.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared.cli import Option, UserError, parse, run_main
from shared.report.history import read_json
from shared.report.plots import dots
from shared.report.table_report import difference, known, markdown_table, mean, std
from shared.training.files import make_dir, write_json, write_text

FLAGS = (
    Option("--out", required=True, metavar="DIR", help="folder of the report"),
    Option("--stage1", metavar="DIR", help="run folder of stage 1"),
    Option("--stage3", metavar="DIR", help="run folder of stage 3"),
    Option("--control", many=True, metavar="DIR", help="a further run to compare with"),
    Option("--seed_report", many=True, metavar="DIR", help="folder of the report of a seed"),
)
GROUPS = ("many", "medium", "few")
Content = Mapping[str, Any]  # of report.json


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    if not options.seed_report and options.stage1 is None:
        raise UserError("expected --stage1 and --stage3, the runs to compare, or --seed_report")
    out = make_dir(options.out)
    if options.seed_report:
        content = over_seeds([read_json(Path(folder) / "report.json", required=True) for folder in options.seed_report])
        text = seeds_text(content)
    else:
        content = collect(options)
        text = run_text(content)
        draw(content, out / "classes.png")
    write_json(out / "report.json", content)
    write_text(out / "report.md", text)
    print(f"{text}\nreport: {(out / 'report.md').resolve()}")


def collect(options: SimpleNamespace) -> dict[str, Any]:
    """Return accuracies (fractions) of both stages, by class too, and the quality of stage 1's pseudo-labels."""
    stage1 = Path(options.stage1)
    results = {"stage1": read_json(stage1 / "result.json", required=True)}
    if options.stage3 is not None and (stage3 := read_json(Path(options.stage3) / "result.json")):
        results["stage3"] = stage3
    for control in map(Path, options.control):  # named after stage 1
        results[control.name.removeprefix(f"{stage1.name}_")] = read_json(control / "result.json", required=True)
    first, pseudo = results["stage1"], read_json(stage1 / "pseudo_label.json", required=True)
    return {"dataset": first["dataset"], "seed": first["seed"], "classes": pseudo["classes"],
            "labelled": pseudo["labelled_counts"], "pseudo_labels": pseudo,
            "accuracy": {name: result["accuracy"] for name, result in results.items()},
            "by_class": {name: result["accuracy_by_class"] for name, result in results.items()},
            "groups": {name: {group: values["last"] for group, values in result["groups"].items()}
                       for name, result in results.items()},
            "iterations": {name: result["iterations"] for name, result in results.items()},
            "seconds": {name: result["seconds"] for name, result in results.items()}}


def percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def run_text(content: Content) -> str:
    """Return the report of a seed as Markdown."""
    pseudo, before, after = content["pseudo_labels"], content["by_class"]["stage1"], content["by_class"].get("stage3")
    classes = []
    for c, name in enumerate(content["classes"]):
        ours = after[c] if after else None
        gain = None if ours is None else ours - before[c]
        classes.append([name, str(content["labelled"][c]), str(pseudo["pseudo_label_counts"][c]),
                        percent(pseudo["recall"][c]), percent(pseudo["precision"][c]), percent(before[c]),
                        percent(ours), percent(gain, "+")])
    runs = [[name, percent(values["last"]), *(percent(content["groups"][name].get(group)) for group in GROUPS),
             str(content["iterations"][name]), f"{content['seconds'][name]:.0f}"]
            for name, values in content["accuracy"].items()]
    head = ["class", "labelled", "pseudo-labelled", "recall", "precision", "stage 1", "stage 3", "gain"]
    return "\n\n".join([
        f"# Long-tailed DPT on {content['dataset']}, seed {content['seed']}",
        "Accuracy in % on the test images after the last iteration; pseudo-labels of stage 1.",
        markdown_table(head, classes),
        markdown_table(["", "all", *(f"{group}-shot" for group in GROUPS), "iterations", "seconds"], runs)]) + "\n"


def over_seeds(reports: Sequence[Content]) -> dict[str, Any]:
    """Return means, deviations and paired differences of several seeds, overall, by class and by group."""
    def numbers(name: str) -> dict[str, list[float | None]]:
        """Return quantity -> one value a seed."""
        found = {"all": [report["accuracy"].get(name, {}).get("last") for report in reports]}
        for group in GROUPS:
            found[group] = [report["groups"].get(name, {}).get(group) for report in reports]
        for c, label in enumerate(reports[0]["classes"]):
            found[f"class {label}"] = [report["by_class"][name][c] if name in report["by_class"] else None
                                       for report in reports]
        return found

    first = numbers("stage1")
    return {"seeds": [report["seed"] for report in reports],
            "runs": {name: {key: {"mean": mean(part), "deviation": std(part), "gain": difference(part, first[key])}
                            for key, part in numbers(name).items() if known(part)}
                     for name in reports[0]["accuracy"]}}


def seeds_text(content: Content) -> str:
    """Return the report of several seeds as Markdown."""
    def cell(name: str, found: Content | None) -> str:
        if found is None:
            return "-"
        gain, text = found["gain"], f"{percent(found['mean'])} ± {percent(found['deviation'] or 0.0)}"
        if name == "stage1" or gain is None:
            return text
        return f"{text} ({percent(gain['mean'], '+')} ± {percent(gain['standard_error'] or 0.0)})"

    runs = content["runs"]
    rows = [[key, *(cell(name, values.get(key)) for name, values in runs.items())] for key in runs["stage1"]]
    return "\n\n".join([
        "# Long-tailed DPT over seeds " + ", ".join(map(str, content["seeds"])),
        "Accuracy in % after the last iteration, mean ± standard deviation; in brackets the mean gain over stage 1 and "
        "its standard error.", markdown_table(["", *runs], rows)]) + "\n"


def draw(content: Content, path: Path) -> None:
    """Draw the accuracy of every class, in the order of the classes, as PNG."""
    names = list(content["by_class"])[:3]
    rows = {f"{label} ({content['labelled'][c]})": [(100 * content["by_class"][name][c], None) for name in names]
            for c, label in enumerate(content["classes"])}
    title = f"{content['dataset']}, seed {content['seed']}"
    dots({"class (labelled images)": rows}, names, path, "accuracy in %", title)


if __name__ == "__main__":
    run_main(main)
