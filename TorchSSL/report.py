"""The report of a DPT experiment: accuracies of both classifiers, pseudo-labels, times, and pictures.

    python report.py --out=../runs/digits_10_1 --dataset=digits --stage1=./saved_models/freematch_digits_10_1 \\
        --stage2=../EDM/training-runs/freematch-10-seed1-digits-8x8 \\
        --images=./data-aug/freematch_digits_10_1/nums_100 --stage3=./saved_models/freematch_digits_10_1_aug100

Writes report.json, report.md and PNG files into --out from whatever of the stages is there; what is missing is null.
Controls are found beside stage 1, as <stage1>_other_seed, _twice, _real_all and _real_balanced. With --seed_report,
once per folder that holds a report.json, it writes mean, standard deviation and differences over these instead.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import Parser, UserError, run_main
from TorchSSL.core.report_text import CONTROLS, run_markdown, run_summary, seeds_markdown

if TYPE_CHECKING:
    from torch import Tensor

HARDWARE = ("device", "hardware", "threads", "processes", "precision")
FEATURE_IMAGES = 10_000  # at most so many images of each kind enter the distance of features


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", required=True, help="folder for report.json, report.md and the pictures")
    add("--dataset", default="digits", help="name of the data set, or a path [%(default)s]")
    add("--data_dir", default="./data", help="folder of the data sets [%(default)s]")
    add("--stage1", help="run folder of stage 1")
    add("--stage2", help="run folder of the diffusion model")
    add("--images", help="folder of the generated images")
    add("--stage3", help="run folder of stage 3")
    add("--tdsm_stage2", help="run folder of a diffusion model that knows its labels to be noisy (TDSM)")
    add("--tdsm_images", help="folder of its images")
    add("--tdsm_stage3", help="run folder of stage 3 with these images")
    add("--tdsm_transition", help="the file of estimate_transition.py that it was trained with")
    add("--judged", help="folders <this>-plain and <this>-tdsm hold the result.json of evaluate.py for their images")
    add("--seed_report", action="append", default=[], help="a folder with the report.json of one seed")
    options = parser.parse_args(argv)
    if not options.seed_report and not options.stage1:
        raise UserError("--stage1: name the run folder of stage 1, or give --seed_report folders")
    return options


def main() -> None:
    options = parse()
    from shared.training.files import atomic, make_dir

    out = make_dir(options.out)
    if options.seed_report:
        from TorchSSL.core.seed_statistics import over_seeds

        content = over_seeds([read_json(Path(folder) / "report.json", required=True) for folder in options.seed_report])
        text = seeds_markdown(content)
    else:
        content = collect(options, out)
        text = run_markdown(content)
    with atomic(out / "report.json", "w") as file:
        json.dump(content, file, indent=1)
    with atomic(out / "report.md", "w") as file:
        file.write(text)
    print(text if options.seed_report else run_summary(content))
    print(f"report: {out.resolve() / 'report.md'}")


def collect(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Gather what the stages have written, and draw the pictures into `out`."""
    from TorchSSL.steps import seconds_by_step

    stage1 = Path(options.stage1)
    results = {"stage1": read_json(stage1 / "result.json"),
               "stage3": read_json(Path(options.stage3) / "result.json") if options.stage3 else None}
    if options.tdsm_stage3:
        results["stage3_tdsm"] = read_json(Path(options.tdsm_stage3) / "result.json")
    controls = {name: read_json(stage1.with_name(f"{stage1.name}_{name}") / "result.json") for name in CONTROLS}
    accuracy = {stage: result["accuracy"] if result else None for stage, result in results.items()}
    last = {stage: values["last"] if values else None for stage, values in accuracy.items()}
    pseudo = read_json(stage1 / "pseudo_label.json") or {}
    classes = pseudo.get("classes") or (results["stage1"] or {}).get("classes", [])
    by_class = dict(zip(classes, pseudo.get("agreement_by_class", []), strict=False))
    first = results["stage1"] or {}
    seconds = seconds_by_step(out / "commands.jsonl")
    return {
        "dataset": options.dataset, "labels": first.get("num_labels"), "seed": first.get("seed"),
        "training_images": first.get("unlabeled_images"), "test_images": first.get("test_images"),
        "stage1_accuracy": last["stage1"], "pseudo_label_accuracy": pseudo.get("agreement"),
        "pseudo_label_accuracy_by_class": by_class, "pseudo_label_counts": pseudo.get("pseudo_label_counts"),
        "stage3_accuracy": last["stage3"],
        "difference": minus(last["stage3"], last["stage1"]),
        **(noise_aware(options, last, classes, out) if options.tdsm_stage3 else {}),
        "accuracy": accuracy,
        "iterations": {stage: result["iterations"] if result else None for stage, result in results.items()},
        "controls": {name: result["accuracy"] for name, result in controls.items() if result},
        "generated": generated_images(options, options.images, classes, out / "generated.png"),
        "seconds": group_seconds(seconds), "seconds_by_step": seconds,
        "hardware": {stage: {key: result.get(key) for key in HARDWARE} for stage, result in results.items() if result},
        "versions": versions(), "pictures": draw(options, results, classes, out)}


def noise_aware(options: argparse.Namespace, last: dict[str, float | None], classes: Sequence[str],
                out: Path) -> dict[str, Any]:
    """Return what is known of a second stage with TDSM; `last`: accuracies of the stages at their last iteration."""
    transition = read_json(Path(options.tdsm_transition)) if options.tdsm_transition else None
    judged = {kind: read_json(Path(f"{options.judged}-{kind}") / "result.json") if options.judged else None
              for kind in ("plain", "tdsm")}
    return {
        "stage3_tdsm_accuracy": last["stage3_tdsm"],
        "tdsm": {
            "minus_stage3": minus(last["stage3_tdsm"], last["stage3"]),
            "minus_stage1": minus(last["stage3_tdsm"], last["stage1"]),
            "transition": transition,
            "generated": generated_images(options, options.tdsm_images, classes, out / "generated_tdsm.png"),
            "images_of_the_right_class": {kind: found["class_accuracy"] for kind, found in judged.items() if found},
            "judge_accuracy": next((found["judge_accuracy"] for found in judged.values() if found), None)}}


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def read_json(path: Path, required: bool = False) -> dict[str, Any] | None:
    """Return the content of a JSON file; None, or a UserError if it is `required`, where there is none."""
    if not path.is_file():
        if required:
            raise UserError(f"{path} does not exist; it is written by report.py for one seed")
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it and repeat the step that writes it") from None


def group_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Return seconds of the stages, the controls and in total, from those of the steps (names of TorchSSL/dpt.py)."""
    groups = {"classifier": "stage1", "pseudo-labels": "stage1", "pseudo-data set": "stage1", "zip": "stage1",
              "diffusion model": "stage2", "generated images": "stage2", "classifier again": "stage3",
              "transition": "stage2_tdsm", "noise classifier": "stage2_tdsm", "diffusion model tdsm": "stage2_tdsm",
              "generated images tdsm": "stage2_tdsm", "classifier again tdsm": "stage3_tdsm"}
    total: dict[str, float] = {}
    for step, value in seconds.items():
        group = groups.get(step) or ("controls" if step.startswith("control") else "other")
        total[group] = total.get(group, 0.0) + value
    return {**{name: round(value, 1) for name, value in total.items()}, "total": round(sum(total.values()), 1)}


def versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "torchvision", "numpy")}}


# -------------------------------------------------------------------------------------------------- generated images

def generated_images(options: argparse.Namespace, folder: str | None, classes: Sequence[str],
                     picture: Path) -> dict[str, Any] | None:
    """Count the images of a folder, draw a grid of them, and measure how far their features are from real ones.

    The features are those of stage 1's own classifier: the number tells runs on this data set with the same
    classifier apart, and is no FID. For scale, the same distance between real test and training images is given.
    """
    checkpoint = Path(options.stage1) / "latest_model.pth"
    if not folder or not Path(folder).is_dir() or not checkpoint.exists():
        return None
    import numpy as np

    from EDM.metrics.frechet import frechet_distance_of_features
    from shared.data.datasets import load_dataset
    from shared.data.images import read_images
    from shared.report.plots import image_grid
    from TorchSSL.core.data import load_pools

    train = load_pools(options.dataset, options.data_dir, download=False)[0]
    test = load_dataset(options.dataset, "test", options.data_dir)
    images = read_images(folder, channels=train.channels, num_classes=train.num_classes)
    rows, real = ({name: part.images[np.flatnonzero(part.labels == c)[:count]] for c, name in enumerate(classes[:20])}
                  for part, count in ((images, 12), (test, 3)))
    image_grid({name: row for name, row in rows.items() if len(row)}, picture,
               "Generated images, one class a row; on the right real ones", beside=real)
    features = {name: classifier_features(checkpoint, options, part) for name, part in
                (("generated", images), ("train", train), ("test", test))}
    return {
        "images": len(images), "by_class": np.bincount(images.labels, minlength=train.num_classes).tolist(),
        "feature_distance": frechet_distance_of_features(features["generated"], features["train"]),
        "feature_distance_of_test_images": frechet_distance_of_features(features["test"], features["train"]),
        "feature_distance_is": (
            f"Frechet distance between {features['train'].shape[1]} pooled features of stage 1's classifier, "
            f"{len(features['generated'])} generated against {len(features['train'])} real training images "
            f"(for scale: {len(features['test'])} real test images against the same); not comparable with FID")}


def classifier_features(checkpoint: Path, options: argparse.Namespace, images: Any) -> Tensor:
    """Return float64 [n, D] pooled features of evenly spaced images, by the averaged weights of a checkpoint."""
    import numpy as np
    import torch

    from shared.data.pool import Pool
    from shared.distributed import start
    from TorchSSL.core.evaluation import load_classifier
    from TorchSSL.get_labels import parse as prediction_options

    prediction = prediction_options([f"--dataset={options.dataset}", f"--load_path={checkpoint}"])
    classifier = load_classifier(str(checkpoint), prediction, images)
    device = start().device
    pool, net = Pool(images, classifier.mean, classifier.std, device), classifier.net.to(device)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), FEATURE_IMAGES)).round().astype(np.int64))
    with torch.no_grad():
        parts = [net(pool.normalised(chosen[start:start + 256]), return_feature=True)[1]
                 for start in range(0, len(chosen), 256)]
    return torch.cat(parts).double().cpu()


# ---------------------------------------------------------------------------------------------------------- pictures

def draw(options: argparse.Namespace, results: dict[str, Any], classes: Sequence[str], out: Path) -> list[str]:
    """Draw confusion matrices and training curves; return the names of all pictures in `out`."""
    import numpy as np

    from shared.report.plots import confusion_matrices, curves

    titles = {"stage1": "Stage 1", "stage3": "Stage 3", "stage3_tdsm": "Stage 3, TDSM"}
    matrices = {f"{titles[stage]}: {100 * result['accuracy']['last']:.1f} %": np.array(result["confusion_matrix"])
                for stage, result in results.items() if result}
    if matrices:
        confusion_matrices(matrices, classes, out / "confusion.png")
    folders = {"Stage 1": options.stage1, "Stage 3": options.stage3, "Stage 3, TDSM": options.tdsm_stage3}
    lines = {title: read_lines(Path(folder) / "stats.jsonl") for title, folder in folders.items() if folder}
    diffusion = read_lines(Path(options.stage2) / "stats.jsonl") if options.stage2 else []
    panels = {
        "Accuracy on the test set, %": {title: series(found, "step", "eval/top-1-acc", 100)
                                        for title, found in lines.items()},
        "Loss of the classifier": {title: series(smooth(found), "step", "train/total_loss")
                                   for title, found in lines.items()},
        "Share of unlabelled images used": {title: series(smooth(found), "step", "train/utilisation")
                                            for title, found in lines.items()},
        "Loss of the diffusion model": {"Stage 2": series(
            [{"kimg": line["Progress/kimg"]["mean"], "loss": line["Loss/loss"]["mean"]} for line in diffusion
             if "Progress/kimg" in line and "Loss/loss" in line], "kimg", "loss")}}
    panels = {title: {name: line for name, line in found.items() if line[0]} for title, found in panels.items()}
    panels = {title: found for title, found in panels.items() if found}
    if panels:
        curves(panels, out / "curves.png", {title: "thousand images" if "diffusion" in title else "iteration"
                                            for title in panels})
    names = ("generated.png", "generated_tdsm.png", "curves.png", "confusion.png")
    return [name for name in names if (out / name).exists()]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def smooth(lines: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the lines that hold means over many iterations; those of single iterations where the run is short."""
    means = [line for line in lines if "eval/top-1-acc" not in line]
    return means if len(means) >= 10 else [line for line in lines if "eval/top-1-acc" in line] or means


def series(lines: Sequence[dict[str, Any]], x: str, y: str, scale: float = 1) -> tuple[list[float], list[float]]:
    """Return the points of the lines that have both keys; y is multiplied by `scale`."""
    points = [(line[x], scale * line[y]) for line in lines if x in line and y in line]
    return [point[0] for point in points], [point[1] for point in points]


if __name__ == "__main__":
    run_main(main)
