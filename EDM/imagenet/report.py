"""The report of the three stages: report.md, report.json and pictures, for one run or over several seeds.

    python report.py --config=config.py --out=report
    python report.py --out=report --seed_report seed_1/report seed_2/report

Stage 1 is the classifier of the few labels, stage 3 that of generated and labelled images; the control has the training
images with their pseudo-labels in place of generated ones. Top-1 and top-5 are shares of the test images.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from EDM.imagenet.experiment.config import CONFIG, read_config
from EDM.imagenet.experiment.images import generated_images, training_images
from EDM.imagenet.experiment.layout import Layout
from EDM.imagenet.train_classifier import facts_file
from shared import cli
from shared.cli import Option, UserError, run_main
from shared.data.images import open_image, to_chw
from shared.data.photographs import PhotographSet
from shared.report.history import read_json, seconds_by_step
from shared.report.plots import image_grid
from shared.report.table_report import difference, known, markdown_table, mean, std
from shared.training.files import make_dir, write_json, write_text

FLAGS = (
    Option(CONFIG.names, CONFIG.type, None, "configuration of the run", metavar="FILE"),
    Option("--out", required=True, metavar="DIR", help="folder of the report"),
    Option("--seed_report", many=True, metavar="DIR", help="report folders of runs with other seeds"),
    Option("--history", metavar="FILE", help="commands.jsonl of run_imagenet.sh, for the seconds of each step"),
)
TITLES = {"stage1": "stage 1: few labels", "stage3": "stage 3: with generated images",
          "control_real": "control: pseudo-labelled training images in place of generated ones"}
SHOWN, ROWS = 10, 20  # images of a class and classes in the picture


def main(argv: Sequence[str] | None = None) -> None:
    options = cli.parse(__doc__, FLAGS, argv)
    if bool(options.seed_report) == bool(options.config):
        raise UserError("give either --config of one run, or --seed_report of several")
    out = make_dir(options.out)
    if options.seed_report:
        runs = [read_json(Path(folder) / "report.json", required=True) for folder in options.seed_report]
        content = {"seeds": runs}
        text = over_seeds(runs)
    else:
        content = collect(Path(options.config), out, options.history)
        text = of_one(content)
    write_json(out / "report.json", content)
    write_text(out / "report.md", text)
    print(f"{text.split(chr(10) * 2 + '![')[0]}\nreport: {out.resolve() / 'report.md'}")


def collect(config_file: Path, out: Path, history: str | None) -> dict[str, Any]:
    """Gather the results of the stages, and draw the generated images into `out`."""
    config = read_config(config_file)
    layout = Layout(config)
    control = layout.classifier_stage3.with_name(f"{layout.classifier_stage3.stem}-real.pkl")
    files = {"stage1": layout.classifier, "stage3": layout.classifier_stage3, "control_real": control}
    found = {name: facts for name, path in files.items() if (facts := read_json(facts_file(path)))}
    if "stage1" not in found:
        raise UserError(f"{facts_file(layout.classifier)}: no such file; run train_classifier.py "
                        "--func=train_classifier_stage1 first")
    pseudo = read_json(facts_file(layout.pseudo_labels)) or {}
    pictures = []
    if layout.generated.is_dir():
        draw(generated_images(layout, found["stage1"]["classes"]), training_images(config), out / "generated.png")
        pictures.append("generated.png")
    scores = {name: {key: facts[key] for key in ("top1", "top5", "train_top1", "rows")}
              for name, facts in found.items()}
    return {"seed": config.seed, "classes": found["stage1"]["classes"], "test_images": found["stage1"]["test_images"],
            "labelled_images": found["stage1"]["rows"]["labelled"], "scores": scores,
            "encoder": str(config.get("encoder") or layout.encoder), "steps_of_stage2": config.train.n_steps,
            "pseudo_labels": {key: pseudo.get(key) for key in ("images", "accuracy", "accuracy_by_class", "counts")},
            "seconds": seconds_by_step(Path(history)) if history else {}, "pictures": pictures}


def draw(generated: PhotographSet, training: PhotographSet, path: Path) -> None:
    """Draw generated images of each class, and on the right real ones."""
    side = Path(generated.files[0])
    size = open_image(side.read_bytes(), str(side)).size

    def row(images: PhotographSet, label: int, count: int) -> np.ndarray:
        files = images.files[np.flatnonzero(images.labels == label)[:count]].tolist()
        shown = [open_image(Path(file).read_bytes(), file).convert("RGB") for file in files]
        return np.stack([to_chw(image if image.size == size else image.resize(size), 3) for image in shown])

    labels = [label for label in range(generated.num_classes) if (generated.labels == label).any()][:ROWS]
    image_grid({generated.classes[label]: row(generated, label, SHOWN) for label in labels}, path,
               "Generated images, one class a row; on the right real ones",
               beside={training.classes[label]: row(training, label, 2) for label in labels})


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def of_one(content: Mapping[str, Any]) -> str:
    """Return the report of one run as Markdown."""
    scores, pseudo = content["scores"], content["pseudo_labels"]
    rows = [[TITLES[name], percent(found["top1"]), percent(found["top5"]),
             ", ".join(f"{count} {kind}" for kind, count in found["rows"].items())] for name, found in scores.items()]
    parts = [f"# DPT with a frozen encoder: {len(content['classes'])} classes, {content['labelled_images']} labelled "
             f"images, seed {content['seed']}",
             markdown_table(["classifier", "top-1, %", "top-5, %", "fitted to images"], rows)]
    if "stage3" in scores:
        gain = scores["stage3"]["top1"] - scores["stage1"]["top1"]
        parts.append(f"Stage 3 minus stage 1: {100 * gain:+.2f} points of top-1 on {content['test_images']} test "
                     "images, one seed. `--seeds 10 --controls` shows the spread and other explanations.")
    if pseudo["images"]:
        parts.append(f"Pseudo-labels: {pseudo['images']} images" + (
            f", {percent(pseudo['accuracy'])} % of those whose class is known are right." if pseudo["accuracy"] is not
            None else "; no true labels to compare with."))
    parts.append(f"Encoder: {content['encoder']}. Stage 2: {content['steps_of_stage2']} steps. Seconds: "
                 f"{', '.join(f'{name} {value:.0f}' for name, value in content['seconds'].items()) or 'not recorded'}.")
    return "\n\n".join([*parts, *(f"![{name}]({name})" for name in content["pictures"])]) + "\n"


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return means, standard deviations and paired differences over seeds as Markdown."""
    def values(name: str, key: str) -> list[float | None]:
        return [run["scores"].get(name, {}).get(key) for run in runs]

    names = [name for name in TITLES if known(values(name, "top1"))]
    rows = [[TITLES[name], *(percent(number) for key in ("top1", "top5")
                             for number in (mean(values(name, key)), std(values(name, key))))] for name in names]
    accuracies = [run["pseudo_labels"]["accuracy"] for run in runs]
    rows.append(["pseudo-labels of the training images", percent(mean(accuracies)), percent(std(accuracies)), "-", "-"])
    parts = [f"# DPT with a frozen encoder: {runs[0]['labelled_images']} labelled images, {len(runs)} seeds",
             markdown_table(["", "top-1, %", "standard deviation", "top-5, %", "standard deviation"], rows)]
    for name in names:
        if name != "stage3" and (found := difference(values("stage3", "top1"), values(name, "top1"))):
            error = "unknown" if found["standard_error"] is None else f"{100 * found['standard_error']:.2f}"
            parts.append(f"Stage 3 minus {TITLES[name]}: {100 * found['mean']:+.2f} points of top-1, standard error "
                         f"{error}, above 0 with {found['positive']} of {found['seeds']} seeds.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    run_main(main)
