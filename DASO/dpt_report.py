"""What generated images changed for every class: stage 3 of long-tailed DPT against stage 1.

    python dpt_report.py --out=../runs/digits_imbalance20_1 --stage1=RUN --stage3=RUN_aug100

Reads result.json of both runs and stage 1's pseudo_label.json; writes report.json, report.md and classes.png. With
--seed_report, once per folder that holds a report.json, it writes means and differences over seeds instead.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.cli import Parser, UserError, run_main
from shared.report.aggregate import deviation, difference, known, mean

GROUPS = ("many", "medium", "few")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the report")
    add("--stage1", type=Path, metavar="DIR", help="run folder of stage 1")
    add("--stage3", type=Path, metavar="DIR", help="run folder of stage 3")
    add("--control", type=Path, action="append", default=[], metavar="DIR", help="a further run to compare with")
    add("--seed_report", type=Path, action="append", default=[], metavar="DIR", help="folder of the report of a seed")
    options = parser.parse_args(argv)
    if not options.seed_report and options.stage1 is None:
        raise UserError("expected --stage1 and --stage3, the runs to compare, or --seed_report")
    return options


def main() -> None:
    options = parse()
    from shared.training.files import atomic, make_dir

    out = make_dir(options.out)
    if options.seed_report:
        content = over_seeds([read(folder / "report.json") for folder in options.seed_report])
        text = seeds_text(content)
    else:
        content = collect(options)
        text = run_text(content)
        draw(content, out / "classes.png")
    with atomic(out / "report.json", "w") as file:
        json.dump(content, file, indent=1)
    with atomic(out / "report.md", "w") as file:
        file.write(text)
    print(f"{text}\nreport: {(out / 'report.md').resolve()}")


def read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run that writes it has not finished")
    return json.loads(path.read_text(encoding="utf-8"))


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Return accuracies (fractions) of both stages, by class too, and how good stage 1's pseudo-labels are."""
    first, again = read(options.stage1 / "result.json"), None
    if options.stage3 is not None and (options.stage3 / "result.json").is_file():
        again = read(options.stage3 / "result.json")
    pseudo = read(options.stage1 / "pseudo_label.json")
    # The run folders of the controls are named after that of stage 1.
    controls = {path.name.removeprefix(f"{options.stage1.name}_"): read(path / "result.json")
                for path in options.control}
    results = {"stage1": first, **({"stage3": again} if again else {}), **controls}
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


def run_text(content: dict[str, Any]) -> str:
    """Return the report of a seed as Markdown."""
    by_class, groups = content["by_class"], content["groups"]
    again = by_class.get("stage3")
    pseudo = content["pseudo_labels"]
    lines = [f"# Long-tailed DPT on {content['dataset']}, seed {content['seed']}", "",
             "Accuracy in % on the test images after the last iteration; pseudo-labels of stage 1.", "",
             "| class | labelled | pseudo-labelled | recall | precision | stage 1 | stage 3 | gain |",
             "|---|---|---|---|---|---|---|---|"]
    for c, name in enumerate(content["classes"]):
        ours = again[c] if again else None
        gain = None if ours is None else ours - by_class["stage1"][c]
        lines.append(f"| {name} | {content['labelled'][c]} | {pseudo['pseudo_label_counts'][c]} | "
                     f"{percent(pseudo['recall'][c])} | {percent(pseudo['precision'][c])} | "
                     f"{percent(by_class['stage1'][c])} | {percent(ours)} | {percent(gain, '+')} |")
    lines += ["", "| | all | " + " | ".join(f"{group}-shot" for group in GROUPS) + " | iterations | seconds |",
              "|---|---|---|---|---|---|---|"]
    for name, values in content["accuracy"].items():
        cells = [percent(values["last"]), *(percent(groups[name].get(group)) for group in GROUPS)]
        lines.append(f"| {name} | {' | '.join(cells)} | {content['iterations'][name]} | "
                     f"{content['seconds'][name]:.0f} |")
    return "\n".join(lines) + "\n"


def over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return means, deviations and paired differences of several seeds, overall, by class and by group."""
    names = list(reports[0]["accuracy"])

    def numbers(name: str) -> dict[str, list[float | None]]:
        """Return what is measured -> one value a seed."""
        found = {"all": [report["accuracy"].get(name, {}).get("last") for report in reports]}
        for group in GROUPS:
            found[group] = [report["groups"].get(name, {}).get(group) for report in reports]
        for c, label in enumerate(reports[0]["classes"]):
            found[f"class {label}"] = [report["by_class"][name][c] if name in report["by_class"] else None
                                       for report in reports]
        return found

    first, content = numbers("stage1"), {"seeds": [report["seed"] for report in reports], "runs": {}}
    for name in names:
        values = numbers(name)
        content["runs"][name] = {
            key: {"mean": mean(part), "deviation": deviation(part), "gain": difference(part, first[key])}
            for key, part in values.items() if known(part)}
    return content


def seeds_text(content: dict[str, Any]) -> str:
    """Return the report of several seeds as Markdown."""
    keys = list(content["runs"]["stage1"])
    lines = ["# Long-tailed DPT over seeds " + ", ".join(map(str, content["seeds"])), "",
             "Accuracy in % after the last iteration, mean ± standard deviation; in brackets the mean gain over stage "
             "1 and its standard error.", "", f"| | {' | '.join(content['runs'])} |",
             "|---|" + "---|" * len(content["runs"])]
    for key in keys:
        cells = []
        for name, values in content["runs"].items():
            found = values.get(key)
            if found is None:
                cells.append("-")
                continue
            gain, text = found["gain"], f"{percent(found['mean'])} ± {percent(found['deviation'] or 0.0)}"
            if name != "stage1" and gain is not None:
                text += f" ({percent(gain['mean'], '+')} ± {percent(gain['standard_error'] or 0.0)})"
            cells.append(text)
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw the accuracy of every class, in the order of the classes, as PNG."""
    from shared.report.plots import dots

    names = list(content["by_class"])[:3]
    rows = {f"{label} ({content['labelled'][c]})": [(100 * content["by_class"][name][c], None) for name in names]
            for c, label in enumerate(content["classes"])}
    title = f"{content['dataset']}, seed {content['seed']}"
    dots({"class (labelled images)": rows}, names, path, "accuracy in %", title)


if __name__ == "__main__":
    run_main(main)
