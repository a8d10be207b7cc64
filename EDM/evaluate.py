"""Evaluate class-conditional generation: class accuracy, class-wise FID, density, coverage, classification accuracy.

    python evaluate.py --outdir=eval --data=datasets/cifar10-32x32.zip --test=datasets/cifar10-test-32x32.zip \\
        --network=noise-runs/.../network-snapshot-latest.pkl --per-class=5000
    python evaluate.py --outdir=eval --data=digits --images=generated.zip

Everything is measured against real images with clean labels. A judge is trained on them, and says which class each
generated image shows; in its features, Inception's or DINOv2's the Fréchet distance, density and coverage are
measured, of all images and class by class; and a classifier is trained on the generated images and tested on real ones.
The same command again continues, and reuses what is there.
"""
from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from shared.cli import UserError, nearest, run_main

if TYPE_CHECKING:
    import numpy as np

    from EDM.metrics.detectors import Detector
    from shared.data.images import ImageSet
    from shared.distributed import World

METRICS = {
    "accuracy": "share of the images that show the class they should, by the judge",
    "fid": "Fréchet distance, of all images and class-wise",
    "prdc": "precision, recall, density, coverage, of all images and class-wise",
    "cas": "classification accuracy score: train on generated images, test on real ones",
}
CLASSIFIERS = ("small", "cnn", "resnet50", "resnet50_pretrained")
AT_LEAST_ONE = click.IntRange(min=1)
INCEPTION_SIDE = 32  # images of fewer pixels say little to a network for photographs


def option(*names: str, **settings: Any) -> Any:
    return click.option(*names, **{"show_default": settings.get("default") is not None, **settings})


@click.command(help="\n\n".join(part for part in __doc__.strip().split("\n\n") if not part.startswith("    ")))
@option("--outdir", metavar="DIR", type=str, required=True, help="Where to write result.json, evaluation.md, pictures")
@option("--data", metavar="PATH|NAME", type=str, required=True, help="Real training images with labels, or a data "
        "set's name; of a set with label noise the clean labels are taken")
@option("--test", metavar="PATH|NAME", type=str, help="Real test images  [default: the test split of a named --data]")
@option("--data-dir", metavar="DIR", type=str, default="./data", help="Folder of named data sets")
@option("--images", metavar="PATH|ZIP|NPZ", type=str, help="Generated images with their classes")
@option("--network", metavar="PATH|URL", type=str, help="Snapshot to generate them with, instead of --images")
@option("--per-class", metavar="INT", type=click.IntRange(min=2), default=1000, help="Images of --network a class")
@option("--first-seed", metavar="INT", type=click.IntRange(min=0), default=0, help="First of the seeds of --network")
@option("--steps", metavar="INT", type=AT_LEAST_ONE, default=18, help="Sampling steps of --network")
@option("--metrics", metavar="LIST", type=str, default=",".join(METRICS),
        help="Comma-separated: " + "; ".join(f"{name}, {text}" for name, text in METRICS.items()))
@option("--detector", metavar="judge|inception|dinov2|FILE", type=str,
        help="Network of the features  [default: inception; judge for gray images and below 32x32]")
@option("--download", is_flag=True, help="Fetch Inception's weights if they are not there")
@option("--k", metavar="INT", type=AT_LEAST_ONE, default=5, help="Neighbours of density and coverage")
@option("--pr-k", metavar="INT", type=AT_LEAST_ONE, default=3, help="Neighbours of precision and recall")
@option("--classifier", type=click.Choice(CLASSIFIERS), help="Network of the judge and of the classification accuracy "
        "score  [default: resnet50; cnn for gray images, small below 32x32]")
@option("--classifier-steps", metavar="INT", type=AT_LEAST_ONE, help="Their training steps  [default: by the network]")
@option("--weights", metavar="FILE", type=str, help="torchvision weights of resnet50_pretrained")
@option("--flip", metavar="BOOL", type=bool, help="Mirror half of their images  [default: where images have colour]")
@option("--judge-dir", metavar="DIR", type=str, help="Folder of the judge, to share it  [default: OUTDIR/judge]")
@option("--overwrite", is_flag=True, help="Replace the images and classifiers of another evaluation in --outdir")
@option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, help="Seed of the classifiers")
@option("--batch", metavar="INT", type=AT_LEAST_ONE, default=64, help="Images at once")
@option("--device", metavar="NAME", type=str, help="cpu, cuda, cuda:N or mps  [default: a GPU if there is one]")
def main(**given: Any) -> None:
    flags = SimpleNamespace(**given)
    flags.metrics = read_metrics(flags.metrics)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("evaluate.py runs in one process; generate the images beforehand with several (generate.py)")
    if (flags.images is None) == (flags.network is None):
        raise UserError("give either --images or --network")
    if (flags.classifier == "resnet50_pretrained") != (flags.weights is not None):
        raise UserError("--classifier=resnet50_pretrained and --weights=FILE belong together")
    evaluate(flags)


def read_metrics(text: str) -> list[str]:
    """Return the names in a comma-separated list; UserError for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.lower().split(",")))
    for name in names:
        if name not in METRICS:
            raise UserError(f'--metrics: unknown metric "{name}"{nearest(name, METRICS)}; known: {", ".join(METRICS)}')
    return names


def evaluate(flags: SimpleNamespace) -> dict[str, Any]:
    """Compute what checked flags ask for, write it into --outdir, and return the content of result.json."""
    started = time.monotonic()
    train, test = real_images(flags)
    outdir = Path(flags.outdir)

    from shared.distributed import start
    from shared.training.files import atomic, make_dir
    from shared.training.hardware import computed_on

    world = start(flags.device)
    settle(flags, train)
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
    with atomic(outdir / "result.json", "w") as file:
        json.dump(content, file, indent=1)
    pictures = draw(content, generated, train, outdir)
    text = markdown(content, pictures)
    with atomic(outdir / "evaluation.md", "w") as file:
        file.write(text)
    print("\n".join(f"{name} {value:.4f}" for name, value in numbers(content).items()))
    print(f"evaluation: {outdir / 'evaluation.md'}", flush=True)
    return content


# ---------------------------------------------------------------- images

def real_images(flags: SimpleNamespace) -> tuple[ImageSet, ImageSet]:
    """Return the real training and test images, all labelled; UserError where there are none or they do not fit."""
    from EDM.tdsm.noise import with_clean_labels
    from shared.data.datasets import NAMES, load_dataset
    from shared.data.images import read_images, shape_text, with_classes

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
    return train, with_classes(test, train.num_classes, flags.test or flags.data)


def generated_images(flags: SimpleNamespace, train: ImageSet, outdir: Path) -> ImageSet:
    """Return the generated images with their classes, made first if --network says so."""
    from shared.data.images import read_images, shape_text

    path = flags.images
    if flags.network is not None:
        from EDM import generate

        path = str(outdir / "generated.zip")
        more = [f"--device={flags.device}"] * (flags.device is not None) + ["--overwrite"] * flags.overwrite
        generate.main.main([f"--network={flags.network}", f"--outdir={path}",
                            f"--seeds={flags.first_seed}-{flags.first_seed + flags.per_class - 1}", "--classes=all",
                            f"--steps={flags.steps}", f"--batch={flags.batch}", *more], standalone_mode=False)
    images = read_images(path, channels=train.channels, num_classes=train.num_classes)
    if images.images.shape[1:] != train.images.shape[1:]:
        raise UserError(f"{path} has images of {shape_text(images)}, --data of {shape_text(train)}")
    if images.labels.min() < 0:
        raise UserError(f"{path}: not every image says which class it should show; expected class folders or "
                        "dataset.json, as generate.py --classes=all writes them")
    return images


def settle(flags: SimpleNamespace, train: ImageSet) -> None:
    """Set the defaults that depend on the images."""
    from EDM.metrics.judge import RECIPES, default_network

    flags.classifier = flags.classifier or default_network(train)
    flags.classifier_steps = flags.classifier_steps or RECIPES[flags.classifier].steps
    photographs = train.channels == 3 and train.size[0] >= INCEPTION_SIDE
    flags.detector = flags.detector or ("inception" if photographs else "judge")
    if flags.flip is None:
        flags.flip = train.channels == 3


def check_counts(flags: SimpleNamespace, generated: ImageSet, train: ImageSet) -> None:
    """Raise UserError now, not after the training of a judge, where a class has too few images for the metrics."""
    import numpy as np

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
    from EDM.metrics.judge import train_classifier

    return train_classifier(folder, flags.classifier, images, world, seed=flags.seed, steps=flags.classifier_steps,
                            flip=flags.flip, weights=flags.weights, restart=flags.overwrite, desc=desc)


def accuracies(name: str, net: Any, images: ImageSet, world: World) -> tuple[dict[str, Any], list[list[int]]]:
    """Return {name: accuracy, name_by_class: ...} of the network on labelled images, and the confusion matrix."""
    from EDM.metrics.judge import confusion, predict

    counts = confusion(images.labels, predict(net, images, world.device), images.num_classes)
    each = [int(row[label]) / max(1, int(row.sum())) for label, row in enumerate(counts)]
    return {name: float(counts.trace() / counts.sum()), f"{name}_by_class": each}, counts.tolist()


def detector_of(flags: SimpleNamespace, judge: Any, folder: Path, train: ImageSet, world: World) -> Detector:
    from EDM.metrics.detectors import load_detector
    from EDM.metrics.judge import as_detector

    if flags.detector == "judge":
        return as_detector(judge, flags.classifier, train, folder, world.device)
    return load_detector(flags.detector, world.device, flags.download, world)


def feature_metrics(flags: SimpleNamespace, detector: Detector, generated: ImageSet, train: ImageSet,
                    world: World) -> dict[str, Any]:
    """Return the Fréchet distance and the manifold metrics of all images, their means over classes and each class."""
    from EDM.fid import distance_name, full_precision
    from EDM.metrics.extraction import extract
    from EDM.metrics.frechet import frechet_distance
    from EDM.metrics.judge import SetImages
    from EDM.metrics.metrics import classwise_frechet_distance, manifold_metrics

    full_precision()
    ours, real = (extract(SetImages(images, detector.channels), detector, flags.batch, world, keep_features=True)
                  for images in (generated, train))
    distance, values = distance_name(detector), {}
    if "fid" in flags.metrics:
        values[distance] = frechet_distance(*ours.moments.mean_and_covariance(), *real.moments.mean_and_covariance())
        each = classwise_frechet_distance(ours.features, ours.labels, real.features, real.labels)
        values[f"class_wise_{distance}"] = each.mean().item()
        values[f"class_wise_{distance}_by_class"] = each.tolist()
    if "prdc" in flags.metrics:
        values |= vars(manifold_metrics(ours.features, real.features, flags.pr_k, flags.k))
        each = [vars(manifold_metrics(ours.features[ours.labels == label], real.features[real.labels == label],
                                      flags.pr_k, flags.k)) for label in range(train.num_classes)]
        for name in each[0]:
            values[f"class_wise_{name}"] = sum(found[name] for found in each) / len(each)
            values[f"class_wise_{name}_by_class"] = [found[name] for found in each]
    return values


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
    rows = [f"| {title(name)} | {value:.4f} |" for name, value in numbers(content).items()]
    by_class = {name.removesuffix("_by_class"): value for name, value in content.items() if name.endswith("_by_class")}
    table = ["| class | " + " | ".join(by_class) + " |", "|---|" + "---|" * len(by_class)]
    for label, name in enumerate(content["classes"]):
        table.append(f"| {name} | " + " | ".join(f"{values[label]:.3f}" for values in by_class.values()) + " |")
    about = (f"{content['images']} generated images ({content['source']}) against {content['real_images']} real ones "
             f"({content['data']}); {content['test_images']} real test images. Features: {content['detector']}. "
             f"Classifiers: {content['classifier']}, {content['classifier_steps']} steps, seed {content['seed']}. "
             f"{content['hardware']}, {content['threads']} thread(s), torch {content['torch']}, fp32, "
             f"{content['seconds']:.0f} s.")
    return "\n\n".join(["# Evaluation of generated images", about, "\n".join(["| | |", "|---|---|", *rows]),
                        "\n".join(table), *(f"![{name}]({name})" for name in pictures)]) + "\n"


def draw(content: dict[str, Any], generated: ImageSet, train: ImageSet, outdir: Path) -> list[str]:
    """Write confusion.png and samples.png; return the names of those that there are."""
    import numpy as np

    from shared.report.plots import confusion_matrices, image_grid

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
