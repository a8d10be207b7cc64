"""Evaluate class-conditional generation: class accuracy, class-wise FID, density, coverage, classification accuracy.

    python evaluate.py --outdir=eval --data=datasets/cifar10-32x32.zip --test=datasets/cifar10-test-32x32.zip \\
        --network=noise-runs/.../network-snapshot-latest.pkl --per-class=5000
    python evaluate.py --outdir=eval --data=digits --images=generated.zip

The references are real images with clean labels. A judge, trained on them, classifies each generated image. Fréchet
distance, density and coverage are computed in its features, Inception's or DINOv2's, of all images and class by class.
The classification accuracy score is that of a classifier trained on generated images and tested on real ones. The same
command again continues, and reuses existing results.
"""
from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from EDM import generate
from EDM.metrics.detectors import Detector, load_detector
from EDM.metrics.features import MetricNames, extract, from_extraction, full_precision, score
from EDM.metrics.judge import (
    RECIPES,
    as_detector,
    confusion,
    default_network,
    predict,
    train_classifier,
)
from EDM.metrics.sources import SetImages
from EDM.tdsm.noise import with_clean_labels
from EDM.training.published import local_file
from shared.cli import Bool, Choice, Flag, Int, Option, UserError, less_memory, parse, run_main
from shared.data.datasets import NAMES, load_dataset
from shared.data.images import ImageSet, read_images, shape_text, with_classes, with_names
from shared.distributed import World, start
from shared.report.plots import confusion_matrices, image_grid
from shared.report.table_report import markdown_table
from shared.training.files import make_dir, write_json, write_text
from shared.training.precision import computed_on
from shared.training.record import Record

METRICS = MetricNames({
    "accuracy": "fraction of the images of the right class, by the judge",
    "fid": "Fréchet distance, of all images and class-wise",
    "prdc": "precision, recall, density, coverage, of all images and class-wise",
    "cas": "classification accuracy score: train on generated images, test on real ones",
})
CLASSIFIERS = ("small", "cnn", "resnet50", "resnet50_pretrained")
COUNT = Int(1)
INCEPTION_SIDE = 32  # smaller images give a network for photographs little information

FLAGS = {
    "images": (
        Option("--outdir", required=True, metavar="DIR", help="folder of result.json, evaluation.md and pictures"),
        Option("--data", required=True, metavar="PATH|NAME", help="real training images with labels, or a data set's "
               "name; of a set with label noise the clean labels are taken"),
        Option("--test", metavar="PATH|NAME", help="real test images", default_help="the test split of a named --data"),
        Option("--data-dir", default="./data", metavar="DIR", help="folder of named data sets"),
        Option("--images", metavar="PATH|ZIP|NPZ", help="generated images with their classes"),
        Option("--network", metavar="PATH|URL", help="snapshot to generate them with, instead of --images"),
        Option("--per-class", Int(2, 1_000_000), 1000, "images of --network a class"),
        Option("--first-seed", Int(0), 0, "first of the seeds of --network"),
        Option("--steps", COUNT, 18, "sampling steps of --network"),
    ),
    "metrics": (
        Option("--metrics", METRICS, list(METRICS.known), METRICS.help),
        Option("--detector", metavar="judge|inception|dinov2|FILE", help="network of the features",
               default_help="inception; judge for gray images and below 32x32"),
        Option("--download", Flag, False, "fetch Inception's weights if they are missing"),
        Option("--k", COUNT, 5, "neighbours of density and coverage"),
        Option("--pr-k", COUNT, 3, "neighbours of precision and recall"),
    ),
    "classifiers": (
        Option("--classifier", Choice(*CLASSIFIERS), None, "network of the judge and of the classification accuracy "
               "score", default_help="resnet50; cnn for gray images, small below 32x32"),
        Option("--classifier-steps", COUNT, None, "training steps of these classifiers", default_help="by the network"),
        Option("--weights", metavar="FILE", help="torchvision weights of resnet50_pretrained"),
        Option("--flip", Bool, None, "mirror half of their training images", default_help="if images have colour"),
        Option("--judge-dir", metavar="DIR", help="folder of the judge, to share it", default_help="OUTDIR/judge"),
    ),
    "running": (
        Option("--overwrite", Flag, False, "replace the images and classifiers of another evaluation in --outdir"),
        Option("--seed", Int(0), 0, "seed of the classifiers"),
        Option("--batch", COUNT, 64, "images at once"),
        generate.DEVICE,
    ),
}


@less_memory("--batch")
def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("evaluate.py runs in one process; generate the images beforehand with several (generate.py)")
    if (flags.images is None) == (flags.network is None):
        raise UserError("give either --images or --network")
    if (flags.classifier == "resnet50_pretrained") != (flags.weights is not None):
        raise UserError("--classifier=resnet50_pretrained and --weights=FILE belong together")
    evaluate(flags)


def evaluate(flags: SimpleNamespace) -> dict[str, Any]:
    """Compute the metrics, write them into --outdir, and return the content of result.json."""
    started = time.monotonic()
    train, test = real_images(flags)
    outdir = Path(flags.outdir)
    world = start(flags.device)
    set_defaults(flags, train)
    record = record_of(flags, train, test)
    if record.is_complete(flags.overwrite or record.has_same_inputs()):  # other metrics may replace the result
        return json.loads(record.output.read_text(encoding="utf-8"))
    generated = generated_images(flags, train, make_dir(outdir))
    check_counts(flags, generated, train)

    values: dict[str, Any] = {}
    judge_folder = Path(flags.judge_dir or outdir / "judge")
    judge = trained(flags, judge_folder, train, world, "judge") if needs_judge(flags) else None
    if judge is not None:
        values |= accuracies("judge_accuracy", judge, test, world)[0]
    if "accuracy" in flags.metrics:
        found, values["confusion_matrix"] = accuracies("class_accuracy", judge, generated, world)
        values |= found
    if {"fid", "prdc"} & set(flags.metrics):
        values |= feature_metrics(flags, detector_of(flags, judge, judge_folder, train, world), generated, train, world)
    if "cas" in flags.metrics:
        net = trained(flags, outdir / "cas", generated, world, "classification accuracy score")
        values |= accuracies("cas", net, test, world)[0]

    content = {**values, "classes": list(train.classes), "images": len(generated), "real_images": len(train),
               "test_images": len(test), "source": flags.images or flags.network, "data": flags.data,
               "test": flags.test or flags.data, "detector": flags.detector, "classifier": flags.classifier,
               "classifier_steps": flags.classifier_steps, "k": flags.k, "pr_k": flags.pr_k, "seed": flags.seed,
               "seconds": round(time.monotonic() - started, 1), "arithmetic": "fp32", **computed_on(world.device)}
    pictures = draw(content, generated, train, outdir)
    text = markdown(content, pictures)
    write_text(outdir / "evaluation.md", text)
    write_json(outdir / "result.json", content)
    record.write()
    print("\n".join(f"{name} {value:.4f}" for name, value in numbers(content).items()))
    print(f"evaluation: {outdir / 'evaluation.md'}", flush=True)
    return content


def record_of(flags: SimpleNamespace, train: ImageSet, test: ImageSet) -> Record:
    """Return the record of result.json."""
    names = ("metrics", "per_class", "first_seed", "steps", "detector", "k", "pr_k", "classifier", "classifier_steps",
             "flip", "seed")
    files = {"--images": flags.images, "--network": flags.network, "--weights": flags.weights,
             "--detector": flags.detector if os.path.isfile(flags.detector) else None}
    given = {name: path if os.path.exists(path) else local_file(path)  # a URL is fetched
             for name, path in files.items() if path is not None}
    return Record(Path(flags.outdir) / "result.json", {name: getattr(flags, name) for name in names},
                  {"--data": train, "--test": test, **given})


# ---------------------------------------------------------------- images

def real_images(flags: SimpleNamespace) -> tuple[ImageSet, ImageSet]:
    """Return the real training and test images, all labelled; UserError if they are missing or do not fit."""
    if flags.test is None and flags.data not in NAMES:
        raise UserError(f"--test: name real test images with labels; --data={flags.data} is no named data set with a "
                        f"test split ({', '.join(NAMES)})")
    sets = []
    for name, split in ((flags.data, "train"), (flags.test or flags.data, "test")):
        images = load_dataset(name, split, flags.data_dir) if name in NAMES else with_clean_labels(read_images(name),
                                                                                                   name)
        if not len(images.labels) or images.labels.min() < 0:
            raise UserError(f"{name}: every real image needs a label (dataset.json or class folders)")
        sets.append(images)
    train, test = sets
    if test.images.shape[1:] != train.images.shape[1:]:
        raise UserError(f"--test has images of {shape_text(test)}, --data of {shape_text(train)}")
    test = with_names(test, train.classes, flags.test or flags.data)
    return train, with_classes(test, train.num_classes, flags.test or flags.data)


def generated_images(flags: SimpleNamespace, train: ImageSet, outdir: Path) -> ImageSet:
    """Return the generated images with their classes, made first if --network says so."""
    path = flags.images
    if flags.network is not None:
        path = str(outdir / "generated.zip")
        more = [f"--device={flags.device}"] * (flags.device is not None) + ["--overwrite"] * flags.overwrite
        generate.main([f"--network={flags.network}", f"--outdir={path}",
                       f"--seeds={flags.first_seed}-{flags.first_seed + flags.per_class - 1}", "--classes=all",
                       f"--steps={flags.steps}", f"--batch={flags.batch}", *more])
    images = read_images(path, channels=train.channels, num_classes=train.num_classes, classes=train.classes)
    if images.images.shape[1:] != train.images.shape[1:]:
        raise UserError(f"{path} has images of {shape_text(images)}, --data of {shape_text(train)}")
    if images.labels.min() < 0:
        raise UserError(f"{path}: not every image says which class it should show; expected class folders or "
                        "dataset.json, as generate.py --classes=all writes them")
    return images


def set_defaults(flags: SimpleNamespace, train: ImageSet) -> None:
    """Set the defaults that depend on the images."""
    flags.classifier = flags.classifier or default_network(train)
    flags.classifier_steps = flags.classifier_steps or RECIPES[flags.classifier].steps
    photographs = train.channels == 3 and train.size[0] >= INCEPTION_SIDE
    flags.detector = flags.detector or ("inception" if photographs else "judge")
    if flags.flip is None:
        flags.flip = train.channels == 3


def check_counts(flags: SimpleNamespace, generated: ImageSet, train: ImageSet) -> None:
    """Raise UserError before the training of a judge if a class has too few images for the metrics."""
    needs = {"cas": 1, "fid": 2, "prdc": max(flags.k, flags.pr_k) + 1}
    least = max(needs.get(name, 0) for name in flags.metrics)
    for images, what in ((generated, "generated images"), (train, "real images")):
        counts = np.bincount(images.labels, minlength=train.num_classes)
        if counts.min() < least:
            raise UserError(f"{flags.images or flags.network if images is generated else flags.data}: {counts.min()} "
                            f"{what} of class {train.classes[counts.argmin()]}, but these metrics need {least} of "
                            "every class (see --per-class, --k, --pr-k)")


# ---------------------------------------------------------------- measuring

def needs_judge(flags: SimpleNamespace) -> bool:
    return "accuracy" in flags.metrics or flags.detector == "judge" and bool({"fid", "prdc"} & set(flags.metrics))


def trained(flags: SimpleNamespace, folder: Path, images: ImageSet, world: World, desc: str) -> Any:
    return train_classifier(folder, flags.classifier, images, world, seed=flags.seed, steps=flags.classifier_steps,
                            flip=flags.flip, weights=flags.weights, overwrite=flags.overwrite, desc=desc)


def accuracies(name: str, net: Any, images: ImageSet, world: World) -> tuple[dict[str, Any], list[list[int]]]:
    """Return {name: accuracy, name_by_class: ...} of the network on labelled images, and the confusion matrix."""
    counts = confusion(images.labels, predict(net, images, world.device), images.num_classes)
    each = [int(row[label]) / int(row.sum()) if row.any() else None for label, row in enumerate(counts)]
    return {name: float(counts.trace() / counts.sum()), f"{name}_by_class": each}, counts.tolist()


def detector_of(flags: SimpleNamespace, judge: Any, folder: Path, train: ImageSet, world: World) -> Detector:
    if flags.detector == "judge":
        return as_detector(judge, flags.classifier, train, folder, world.device)
    return load_detector(flags.detector, world.device, flags.download, world)


def feature_metrics(flags: SimpleNamespace, detector: Detector, generated: ImageSet, train: ImageSet,
                    world: World) -> dict[str, Any]:
    """Return the Fréchet distance and the manifold metrics of all images, their means over classes and each class."""
    full_precision()
    ours, real = (extract(SetImages(images, detector.channels), detector, flags.batch, world, keep_features=True)
                  for images in (generated, train))
    names = [name for metric in ("fid", "prdc") if metric in flags.metrics for name in (metric, f"cw{metric}")]
    return score(names, ours, from_extraction(real, flags.data), detector,
                 SimpleNamespace(pr_k=flags.pr_k, dc_k=flags.k))


# ---------------------------------------------------------------- report

TITLES = {
    "judge_accuracy": "Accuracy of the judge on real test images", "class_accuracy": "Class accuracy of the samples",
    "cas": "Classification accuracy score", "precision": "Precision", "recall": "Recall", "density": "Density",
    "coverage": "Coverage",
}


def numbers(content: dict[str, Any]) -> dict[str, float]:
    """Return the single numbers among the metrics."""
    settings = {"seconds", "k", "pr_k", "seed", "images", "real_images", "test_images", "classifier_steps", "threads"}
    return {name: value for name, value in content.items() if isinstance(value, (int, float)) and name not in settings}


def title(name: str) -> str:
    if name.startswith("class_wise_"):
        return f"{title(name.removeprefix('class_wise_'))}, mean of the classes"
    distance = {"fid": "FID", "fd_dinov2": "FD-DINOv2"}
    return TITLES.get(name) or distance.get(name) or f"Fréchet distance in features of the {name.removeprefix('fd_')}"


def markdown(content: dict[str, Any], pictures: list[str]) -> str:
    """Return evaluation.md."""
    rows = [[title(name), f"{value:.4f}"] for name, value in numbers(content).items()]
    by_class = {name.removesuffix("_by_class"): value for name, value in content.items() if name.endswith("_by_class")}
    classes = [[name, *("–" if values[label] is None else f"{values[label]:.3f}" for values in by_class.values())]
               for label, name in enumerate(content["classes"])]
    about = (f"{content['images']} generated images ({content['source']}) against {content['real_images']} real ones "
             f"({content['data']}); {content['test_images']} real test images. Features: {content['detector']}. "
             f"Classifiers: {content['classifier']}, {content['classifier_steps']} steps, seed {content['seed']}. "
             f"{content['hardware']}, {content['threads']} thread(s), torch {content['torch']}, fp32, "
             f"{content['seconds']:.0f} s.")
    return "\n\n".join(["# Evaluation of generated images", about, markdown_table(["", ""], rows),
                        markdown_table(["class", *by_class], classes),
                        *(f"![{name}]({name})" for name in pictures)]) + "\n"


def draw(content: dict[str, Any], generated: ImageSet, train: ImageSet, outdir: Path) -> list[str]:
    """Write confusion.png and samples.png; return the names of the written ones."""
    rows: dict[str, np.ndarray] = {name: generated.images[np.flatnonzero(generated.labels == label)[:12]]
                                   for label, name in enumerate(train.classes[:20])}
    there = {name: row for name, row in rows.items() if len(row)}
    image_grid(there, outdir / "samples.png", "Generated images, one class a row")
    names = ["samples.png"]
    if "confusion_matrix" in content:
        heading = f"Generated images that show their class: {100 * content['class_accuracy']:.1f} %"
        confusion_matrices({heading: np.array(content["confusion_matrix"])}, train.classes, outdir / "confusion.png",
                           ("class asked for", "class that the judge sees"))
        names.append("confusion.png")
    return names


if __name__ == "__main__":
    run_main(main)
