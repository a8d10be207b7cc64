"""Write the report of a DPT experiment: accuracies of both classifiers, pseudo-labels, times, and pictures.

    python report.py --out=../runs/digits_10_1 --dataset=digits --stage1=./saved_models/freematch_digits_10_1 \\
        --stage2=../EDM/training-runs/freematch-10-seed1-digits-8x8 \\
        --images=./data-aug/freematch_digits_10_1/nums_100 --stage3=./saved_models/freematch_digits_10_1_aug100

Writes report.json, report.md and PNG files into --out from the existing stages; missing numbers are null. Controls lie
beside stage 1, as <stage1>_other_seed, _twice, _real_all and _real_balanced. With --seed_report, once per folder with a
report.json, it writes mean, standard deviation and differences over these instead.
"""
from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader

from EDM.metrics.metrics import frechet_distance_of_features
from shared.cli import Option, UserError, parse, run_main
from shared.data.datasets import load_dataset
from shared.data.images import ImageSet, read_images
from shared.data.pool import Pool
from shared.distributed import start
from shared.report.history import read_json, read_lines, seconds_by_step
from shared.report.plots import Panel, confusion_matrices, curves, image_grid
from shared.report.table_report import difference, known, mean, std
from shared.training.files import make_dir, write_json, write_text
from TorchSSL.core.classifier import open_classifier
from TorchSSL.core.data import load_pools

FLAGS = (
    Option("--out", required=True, metavar="DIR", help="folder for report.json, report.md and the pictures"),
    Option("--dataset", default="digits", help="name of the data set, or a path"),
    Option("--data_dir", default="./data", help="folder of the data sets"),
    Option("--stage1", metavar="DIR", help="run folder of stage 1"),
    Option("--stage2", metavar="DIR", help="run folder of the diffusion model"),
    Option("--images", metavar="DIR", help="folder of the generated images"),
    Option("--stage3", metavar="DIR", help="run folder of stage 3"),
    Option("--tdsm_stage2", metavar="DIR", help="run folder of a diffusion model that knows its labels to be noisy"),
    Option("--tdsm_images", metavar="DIR", help="folder of its images"),
    Option("--tdsm_stage3", metavar="DIR", help="run folder of stage 3 with these images"),
    Option("--tdsm_transition", metavar="JSON", help="file of estimate_transition.py that it was trained with"),
    Option("--judged", metavar="DIR", help="<this>-plain and <this>-tdsm hold evaluate.py's result.json of the images"),
    Option("--seed_report", many=True, metavar="DIR", help="folder with the report.json of one seed"),
)
HARDWARE = ("device", "hardware", "threads", "processes", "precision")
FEATURE_IMAGES = 10_000  # most images of each kind in the distance of features
# Names of run_all.sh's steps -> what their seconds are summed up as.
STEPS = {"classifier": "stage1", "pseudo-labels": "stage1", "pseudo-data set": "stage1", "zip": "stage1",
         "diffusion model": "stage2", "generated images": "stage2", "classifier again": "stage3",
         "transition": "stage2_tdsm", "noise classifier": "stage2_tdsm", "diffusion model tdsm": "stage2_tdsm",
         "generated images tdsm": "stage2_tdsm", "classifier again tdsm": "stage3_tdsm"}
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


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    if not options.seed_report and not options.stage1:
        raise UserError("--stage1: name the run folder of stage 1, or give --seed_report folders")
    if options.stage1 and not Path(options.stage1).is_dir():
        raise UserError(f"--stage1: there is no folder {options.stage1}; name the run folder of stage 1")
    out = make_dir(options.out)
    if options.seed_report:
        content = over_seeds([read_json(Path(folder) / "report.json", required=True) for folder in options.seed_report])
        text = summary = markdown(content)
    else:
        content = collect(options, out)
        text, summary = markdown(content), run_summary(content)
    write_json(out / "report.json", content)
    write_text(out / "report.md", text)
    print(f"{summary}\nreport: {out.resolve() / 'report.md'}")


def collect(options: SimpleNamespace, out: Path) -> dict[str, Any]:
    """Gather the results of the stages, and draw the pictures into `out`."""
    stage1 = Path(options.stage1)
    folders = {"stage1": stage1, "stage3": options.stage3}
    if options.tdsm_stage3:
        folders["stage3_tdsm"] = options.tdsm_stage3
    results = {stage: read_json(Path(folder) / "result.json") if folder else None for stage, folder in folders.items()}
    controls = {name: read_json(stage1.with_name(f"{stage1.name}_{name}") / "result.json") for name in CONTROLS}
    accuracy = {stage: result["accuracy"] if result else None for stage, result in results.items()}
    last = {stage: values["last"] if values else None for stage, values in accuracy.items()}
    pseudo, first = read_json(stage1 / "pseudo_label.json") or {}, results["stage1"] or {}
    classes = pseudo.get("classes") or first.get("classes", [])
    seconds = seconds_by_step(out / "commands.jsonl")
    return {
        "dataset": options.dataset, "labels": first.get("num_labels"), "seed": first.get("seed"),
        "training_images": first.get("unlabeled_images"), "test_images": first.get("test_images"),
        "stage1_accuracy": last["stage1"], "pseudo_label_accuracy": pseudo.get("agreement"),
        "pseudo_label_accuracy_by_class": dict(zip(classes, pseudo.get("agreement_by_class", []), strict=False)),
        "pseudo_label_counts": pseudo.get("pseudo_label_counts"),
        "stage3_accuracy": last["stage3"], "difference": minus(last["stage3"], last["stage1"]),
        **(noise_aware(options, last, classes, out) if options.tdsm_stage3 else {}),
        "accuracy": accuracy,
        "iterations": {stage: result["iterations"] if result else None for stage, result in results.items()},
        "controls": {name: result["accuracy"] for name, result in controls.items() if result},
        "generated": generated_images(options, options.images, classes, out / "generated.png"),
        "seconds": group_seconds(seconds), "seconds_by_step": seconds,
        "hardware": {stage: {key: result.get(key) for key in HARDWARE} for stage, result in results.items() if result},
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in ("torch", "torchvision", "numpy")}},
        "pictures": draw(options, results, classes, out)}


def noise_aware(options: SimpleNamespace, last: Mapping[str, float | None], classes: Sequence[str],
                out: Path) -> dict[str, Any]:
    """Return the results of a second stage with TDSM; `last`: accuracies of the stages at their last iteration."""
    judged = {kind: read_json(Path(f"{options.judged}-{kind}") / "result.json") if options.judged else None
              for kind in ("plain", "tdsm")}
    return {
        "stage3_tdsm_accuracy": last["stage3_tdsm"],
        "tdsm": {
            "minus_stage3": minus(last["stage3_tdsm"], last["stage3"]),
            "minus_stage1": minus(last["stage3_tdsm"], last["stage1"]),
            "transition": read_json(Path(options.tdsm_transition)) if options.tdsm_transition else None,
            "generated": generated_images(options, options.tdsm_images, classes, out / "generated_tdsm.png"),
            "images_of_the_right_class": {kind: found["class_accuracy"] for kind, found in judged.items() if found},
            "judge_accuracy": next((found["judge_accuracy"] for found in judged.values() if found), None)}}


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def group_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return seconds of the stages, the controls and in total, from those of the steps."""
    total: dict[str, float] = {}
    for step, value in seconds.items():
        group = STEPS.get(step) or ("controls" if step.startswith("control") else "other")
        total[group] = total.get(group, 0.0) + value
    return {**{name: round(value, 1) for name, value in total.items()}, "total": round(sum(total.values()), 1)}


# ---------------------------------------------------------------- generated images


def generated_images(options: SimpleNamespace, folder: str | None, classes: Sequence[str],
                     picture: Path) -> dict[str, Any] | None:
    """Count the images of a folder, draw a grid of them, and measure the distance of their features from real ones.

    The features are those of stage 1's own classifier: the number compares runs on this data set with the same
    classifier, and is no FID. For scale, the same distance between real test and training images is given.
    """
    checkpoint = Path(options.stage1) / "latest_model.pth"
    if not folder or not Path(folder).is_dir() or not checkpoint.exists():
        return None
    train = load_pools(options.dataset, options.data_dir, download=False)[0]
    test = load_dataset(options.dataset, "test", options.data_dir)
    images = read_images(folder, channels=train.channels, num_classes=train.num_classes)
    rows, real = ({name: part.images[np.flatnonzero(part.labels == c)[:count]] for c, name in enumerate(classes[:20])}
                  for part, count in ((images, 12), (test, 3)))
    image_grid({name: row for name, row in rows.items() if len(row)}, picture,
               "Generated images, one class a row; on the right real ones", beside=real)
    generated, training, testing = (features(checkpoint, options, part) for part in (images, train, test))
    return {
        "images": len(images), "by_class": np.bincount(images.labels, minlength=train.num_classes).tolist(),
        "feature_distance": frechet_distance_of_features(generated, training),
        "feature_distance_of_test_images": frechet_distance_of_features(testing, training),
        "feature_distance_is": (
            f"Frechet distance between {training.shape[1]} pooled features of stage 1's classifier, {len(generated)} "
            f"generated against {len(training)} real training images (for scale: {len(testing)} real test images "
            "against the same); not comparable with FID")}


@torch.no_grad()
def features(checkpoint: Path, options: SimpleNamespace, images: ImageSet) -> torch.Tensor:
    """Return float64 [n, D] pooled features of evenly spaced images, by the averaged weights of a checkpoint."""
    device = start().device
    classifier = open_classifier(checkpoint, device, options.dataset)
    pool, net = Pool(images, classifier.mean, classifier.std, device), classifier.network
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), FEATURE_IMAGES)).round().astype(np.int64))
    parts = [net(pool.normalised(chosen[first:first + 256]), return_feature=True)[1]
             for first in range(0, len(chosen), 256)]
    return torch.cat(parts).double().cpu()


# ---------------------------------------------------------------- pictures


def draw(options: SimpleNamespace, results: Mapping[str, Any], classes: Sequence[str], out: Path) -> list[str]:
    """Draw confusion matrices and training curves; return the names of all pictures in `out`."""
    titles = {"stage1": "Stage 1", "stage3": "Stage 3", "stage3_tdsm": "Stage 3, TDSM"}
    matrices = {f"{titles[stage]}: {100 * result['accuracy']['last']:.1f} %": np.array(result["confusion_matrix"])
                for stage, result in results.items() if result}
    if matrices:
        confusion_matrices(matrices, classes, out / "confusion.png")
    folders = {"Stage 1": options.stage1, "Stage 3": options.stage3, "Stage 3, TDSM": options.tdsm_stage3}
    lines = {title: read_lines(Path(folder) / "stats.jsonl") for title, folder in folders.items() if folder}
    smooth = {title: smoothed(found) for title, found in lines.items()}
    diffusion = [{key: value["mean"] for key, value in line.items() if isinstance(value, dict) and "mean" in value}
                 for line in (read_lines(Path(options.stage2) / "stats.jsonl") if options.stage2 else [])]
    panels = {
        "Accuracy on the test set": panel(lines, "eval/top-1-acc", "accuracy, %", percent=True),
        "Loss of the classifier": panel(smooth, "train/total_loss", "loss"),
        "Unlabelled images used": panel(smooth, "train/utilisation", "fraction of the batch, %", percent=True),
        "Loss of the diffusion model": Panel({"Stage 2": series(diffusion, "Progress/kimg", "Loss/loss")},
                                             "thousand images", "loss")}
    panels = {title: found for title, found in panels.items() if any(x for x, _ in found.lines.values())}
    if panels:
        curves(panels, out / "curves.png")
    names = ("generated.png", "generated_tdsm.png", "curves.png", "confusion.png")
    return [name for name in names if (out / name).exists()]


def panel(runs: dict[str, Sequence[dict[str, Any]]], key: str, ylabel: str, percent: bool = False) -> Panel:
    """Return the chart of one quantity over the iterations, a line for every run that logs it."""
    lines = {name: series(found, "step", key) for name, found in runs.items()}
    return Panel({name: line for name, line in lines.items() if line[0]}, "iteration", ylabel, percent)


def smoothed(lines: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the lines with means over many iterations; in a short run, those of single iterations."""
    means = [line for line in lines if "eval/top-1-acc" not in line]
    return means if len(means) >= 10 else [line for line in lines if "eval/top-1-acc" in line] or means


def series(lines: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the points of the lines that have both keys."""
    having = [line for line in lines if x in line and y in line]
    return [line[x] for line in having], [line[y] for line in having]


# ---------------------------------------------------------------- several seeds


def over_seeds(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


# ---------------------------------------------------------------- text


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def markdown(content: Mapping[str, Any]) -> str:
    """Return report.md of the content of report.json, of one seed or of several."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent / "core"), trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"percent": percent, "points": points}
    accuracy, accuracies = content.get("accuracy", {}), {}
    if accuracy:
        accuracies = {ROWS["stage1_accuracy"]: accuracy["stage1"], ROWS["stage3_accuracy"]: accuracy["stage3"],
                      TDSM: accuracy.get("stage3_tdsm"),
                      **{CONTROLS[name]: values for name, values in content["controls"].items()}}
    text = pages.get_template("report.md.jinja").render(
        content, accuracies=accuracies, rows=ROWS, subtrahends=SUBTRAHENDS, tdsm_subtrahends=TDSM_SUBTRAHENDS)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def run_summary(content: Mapping[str, Any]) -> str:
    """Return the few lines for the console."""
    gain = "" if content["difference"] is None else f"  ({points(content['difference'])} points)"
    lines = [f"stage 1, accuracy on the test set   {percent(content['stage1_accuracy'])} %",
             f"pseudo-labels that are right        {percent(content['pseudo_label_accuracy'])} %",
             f"stage 3, accuracy on the test set   {percent(content['stage3_accuracy'])} %{gain}"]
    if "tdsm" in content:
        lines.append(f"stage 3, the same with TDSM         {percent(content['stage3_tdsm_accuracy'])} %  "
                     f"({points(content['tdsm']['minus_stage3'])} over plain DPT)")
    return "\n".join([*lines, f"seconds                             {content['seconds'].get('total', 0):.0f}"])


if __name__ == "__main__":
    run_main(main)
