"""Stages 1 and 3 of DPT on ImageNet: the few-label classifier of frozen features, and its pseudo-labels.

    accelerate launch --num_processes 4 train_classifier.py --config=configs/NAME.py --func=train_classifier_stage1

You et al., "Diffusion Models and Semi-Supervised Learners Benefit Mutually with Few Labels", NeurIPS 2023 (arXiv
2302.10586). The functions, in the order of the README:

    train_classifier_stage1   features of the labelled and the test images; the classifier of the former
    get_all_features          features of all training images
    get_cluster               their pseudo-labels
    get_aug_features          features of the generated images
    train_classifier_stage3   the classifier of generated and labelled images

The same command again does nothing, or continues. torchrun and plain python start it as well.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from EDM.imagenet.experiment.config import Config, parse
from EDM.imagenet.experiment.images import (
    generated_images,
    labelled_images,
    training_images,
    validation_images,
    write_pseudo_labels,
)
from EDM.imagenet.experiment.layout import Layout
from shared import distributed
from shared.cli import Choice, Flag, Int, Option, Text, UserError, less_memory, run_main
from shared.data.photographs import PhotographSet
from shared.data.safe import load_array
from shared.distributed import World
from shared.training.files import make_dir, write_json
from shared.training.record import Record
from TorchSSL.encoders.classifier import Classifier, fit, prepared, read_classifier
from TorchSSL.encoders.encoder import Encoder, open_encoder
from TorchSSL.encoders.features import Features, features_of, read_features

FUNCTIONS = ("train_classifier_stage1", "get_all_features", "get_cluster", "get_aug_features",
             "train_classifier_stage3")
FLAGS = (
    Option("--func", Choice(*FUNCTIONS), None, "step of the experiment, see above", required=True),
    # Beyond the published command line.
    Option("--rows", Choice("generated", "real"), "generated", "stage 3: real is a control, the training images with "
           "their pseudo-labels in place of generated ones"),
    Option("--batch-size", Int(1), 64, "images at a time on each process"),
    Option("--decoder", Choice("auto", "dali", "torchvision"), "auto", "decoder of photographs; auto: DALI on a GPU"),
    Option("--workers", Int(1), None, "threads that decode", default_help="one a core"),
    Option("--precision", Choice("fp32", "bf16"), "fp32", "arithmetic of the encoder; bf16 is not as published"),
    Option("--device", Text, None, "cpu, cuda, cuda:N", default_help="a GPU if available"),
    Option("--overwrite", Flag, False, "replace files made from other inputs"),
)


def main(argv: Sequence[str] | None = None) -> None:
    options, config = parse(__doc__, FLAGS, argv)
    if config.penalty != "l2":
        raise UserError(f"penalty: expected 'l2', which the published classifier has, got {config.penalty!r}")
    if config.lambd <= 0:
        raise UserError(f"lambd: expected a number above 0, got {config.lambd}")
    world = distributed.start(options.device)
    job = Job(options, config, world)
    {"train_classifier_stage1": train_classifier_stage1, "get_all_features": get_all_features,
     "get_cluster": get_cluster, "get_aug_features": get_aug_features,
     "train_classifier_stage3": train_classifier_stage3}[options.func](job)
    distributed.stop()


class Job:
    """The options, files and processes of a command, and its log."""

    def __init__(self, options: SimpleNamespace, config: Config, world: World) -> None:
        self.options, self.config, self.world, self.layout = options, config, world, Layout(config)
        self.overwrite = options.overwrite or not config.preload
        if config.output_path and world.main:
            make_dir(Path(config.output_path).parent)

    @cached_property
    def encoder(self) -> Encoder:
        """The published encoder, whose name says its size; or any other, config.encoder."""
        config = self.config
        published = config.model_name if config.model_name.startswith("deit_") else None
        return open_encoder(config.get("encoder") or self.layout.encoder, published, config.blocks, config.mask)

    @less_memory("--batch-size")
    def features(self, images: PhotographSet, file: Path) -> Features:
        """Return the features of images, from their file or computed now by all processes."""
        options = self.options
        return features_of(images, self.encoder, file, self.world, options.batch_size, options.workers,
                           options.decoder, options.precision, self.overwrite)

    def log(self, text: str) -> None:
        """Print a line, and write it to config.output_path."""
        print(text, flush=True)
        if self.config.output_path:
            with open(self.config.output_path, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def train_classifier_stage1(job: Job) -> None:
    images = training_images(job.config)
    labelled = labelled_images(job.layout, images)
    test = validation_images(job.config, images.classes)
    train_features = job.features(labelled, job.layout.train_features)
    test_features = job.features(test, job.layout.val_features)
    if job.world.main:
        train_classifier(job, {"labelled": job.layout.train_features}, [train_features], test_features,
                         job.layout.classifier)


def get_all_features(job: Job) -> None:
    job.features(training_images(job.config), job.layout.all_features)


def get_cluster(job: Job) -> None:
    if not job.world.main:
        return
    features = read_features(job.layout.all_features)
    classifier = read_classifier(job.layout.classifier, features.encoder)
    if features.classes and features.classes != classifier.classes:
        raise UserError(f"{job.layout.all_features} has other classes than {job.layout.classifier}; repeat "
                        "--func=get_all_features or train_classifier_stage1")
    labels, probabilities = classifier.predict(features.values, job.world.device)
    images = PhotographSet(np.array(features.names), features.labels, classifier.classes, "training images")
    write_pseudo_labels(job.layout, images, labels, probabilities)
    known = features.labels >= 0
    right = labels == features.labels
    facts = {"images": len(labels), "with_true_label": int(known.sum()), "classes": classifier.classes,
             "accuracy": float(right[known].mean()) if known.any() else None,
             "accuracy_by_class": [float(right[features.labels == number].mean()) if (features.labels == number).any()
                                   else None for number in range(len(classifier.classes))],
             "counts": np.bincount(labels, minlength=len(classifier.classes)).tolist()}
    write_facts(job.layout.pseudo_labels, facts)
    job.log(f"pseudo-labels of {len(labels)} images: {job.layout.cluster}")
    if known.any():  # true labels serve for this alone
        job.log(f"pseudo-label accuracy: {facts['accuracy']:.6g}")


def get_aug_features(job: Job) -> None:
    classes = read_classifier(job.layout.classifier).classes
    job.features(generated_images(job.layout, classes), job.layout.generated_features)


def train_classifier_stage3(job: Job) -> None:
    if not job.world.main:
        return
    layout, path = job.layout, job.layout.classifier_stage3
    if job.options.rows == "real":
        path = path.with_name(f"{path.stem}-real.pkl")
        files = {"real": layout.all_features, "pseudo-labels": layout.pseudo_labels}
        parts = [with_pseudo_labels(layout)]
    else:
        files, parts = {"generated": layout.generated_features}, [read_features(layout.generated_features)]
    if job.config.using_true_label and layout.train_features.is_file():
        files["labelled"] = layout.train_features
        parts.append(read_features(layout.train_features))
    train_classifier(job, files, parts, read_features(layout.val_features), path)


def with_pseudo_labels(layout: Layout) -> Features:
    """Return the features of all training images with their pseudo-labels."""
    features, labels = read_features(layout.all_features), load_array(layout.pseudo_labels)
    if labels.shape != features.labels.shape:
        raise UserError(f"{layout.pseudo_labels} does not belong to {layout.all_features}; repeat --func=get_cluster")
    return replace(features, labels=labels)


def train_classifier(job: Job, files: dict[str, Path], parts: Sequence[Features], test: Features, path: Path) -> None:
    """Fit the classifier of all rows of `parts`, write it to `path` and log its scores. files: what these come from."""
    encoders = {part.encoder for part in (*parts, test) if part.encoder}
    if len(encoders) > 1:
        raise UserError(f"{', '.join(map(str, files.values()))} and the test images' features are not of one encoder; "
                        "make them anew")
    classes = parts[-1].classes or tuple(map(str, range(1 + max(int(part.labels.max()) for part in parts))))
    device, normalize = job.world.device, job.config.normalize
    record = Record(path, {"lambd": job.config.lambd, "normalize": normalize},
                    {**files, "test images": job.layout.val_features})
    if record.is_complete(job.overwrite):
        classifier = read_classifier(path)
    else:
        rows = torch.cat([prepared(torch.from_numpy(part.values).to(device), normalize) for part in parts])
        labels = torch.from_numpy(np.concatenate([part.labels for part in parts])).to(device)
        weights = fit(rows, labels, len(classes), job.config.lambd, shown=True)
        classifier = Classifier(weights, classes, next(iter(encoders), ""), normalize)
        classifier.save(path)
        record.write()
    right = sum(classifier.accuracy(part.values, part.labels, device)["top1"] * len(part) for part in parts)
    train_score = right / sum(map(len, parts))
    scores = classifier.accuracy(test.values, test.labels, device)
    kinds = [name for name in files if name != "pseudo-labels"]
    write_facts(path, {"rows": {name: len(part) for name, part in zip(kinds, parts, strict=True)},
                       "test_images": len(test), "classes": classes, "train_top1": train_score, **scores})
    job.log(f"classifier: {path}")
    job.log(f"train score: {train_score:.6g}")
    job.log(f"test score: {scores['top1']:.6g}, top-5: {scores['top5']:.6g}")


def facts_file(path: Path) -> Path:
    """Return the path of the scores of `path`."""
    return path.with_name(f"{path.name}.json")


def write_facts(path: Path, facts: dict) -> None:
    write_json(facts_file(path), facts)


if __name__ == "__main__":
    run_main(main)
