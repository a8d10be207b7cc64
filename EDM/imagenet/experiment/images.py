"""The images of the ImageNet commands, the labelled ones among them, and their pseudo-labels.

    {image_path}/train/<class>/    all training images; classes are numbered by the sorted folders
    {image_path}/val/<class>/      test images; also as `test/<class>/`, or as a flat `val`
                                   beside LOC_val_solution.csv, as ImageNet is downloaded
    {image_path}/unlabeled/        further training images without a class (optional)

An image is known by its path below {image_path}: its base name may occur in two folders.
"""
from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from EDM.imagenet.experiment.config import Config
from EDM.imagenet.experiment.layout import Layout
from shared.cli import UserError, nearest
from shared.data.classes import class_folders
from shared.data.photographs import PhotographSet, list_photographs, list_unlabeled
from shared.training.files import atomic, make_dir, write_array

SOLUTION = "LOC_val_solution.csv"  # comes with the flat `val`: ImageId,PredictionString ("n03995372 85 1 499 272 ...")


def training_images(config: Config) -> PhotographSet:
    """Return the training images, those of unknown class last; none is decoded. UserError without any."""
    folder = Path(config.image_path, "train")
    if not folder.is_dir():
        raise UserError(f"image_path: {folder}/<class>/ not found; give --config.image_path=FOLDER, which holds train/ "
                        "and val/")
    images = _below(list_photographs(folder), config)
    unlabeled = folder.with_name("unlabeled")
    return images.concatenate(list_unlabeled(unlabeled, images.classes)) if unlabeled.is_dir() else images


def validation_images(config: Config, classes: Sequence[str]) -> PhotographSet:
    """Return the images that classifiers are tested on, with the training set's classes; UserError without any."""
    folder = next((found for name in ("val", "test") if (found := Path(config.image_path, name)).is_dir()), None)
    if folder is None:
        raise UserError(f"image_path: neither {config.image_path}/val/<class>/ nor test/<class>/ found")
    if class_folders(folder):
        return _below(list_photographs(folder, classes), config)
    images = list_unlabeled(folder, classes)
    solution = next((found for place in (folder.parent, *folder.parents[1:4])
                     if (found := place / SOLUTION).is_file()), None)
    if solution is None:
        raise UserError(f"{folder}: its {len(images)} images lie in no class folders; move them to "
                        f"{folder}/<class>/, or put the official {SOLUTION} into {folder.parent}")
    with open(solution, encoding="utf-8", newline="") as file:
        known = {row[0]: row[1].split(" ")[0] for row in csv.reader(file) if len(row) == 2}
    found = [known.get(Path(name).stem) for name in images.names]
    if (absent := next((number for number, name in enumerate(found) if name not in classes), None)) is not None:
        raise UserError(f"{solution}: {images.names[absent]} is of {found[absent]}, which is no folder of train")
    labels = np.array([classes.index(name) for name in found], np.int64)
    return _below(PhotographSet(images.files, labels, tuple(classes), images.name), config)


def labelled_images(layout: Layout, images: PhotographSet) -> PhotographSet:
    """Return those of the training images that the subset list names, in its order.

    A line is a base name `<class>_<anything>`, as published, or `<class>/<file>`. Raises UserError, which names the
    line, for an image or class that does not exist, a blank line and an image that is named twice.
    """
    if not layout.subset.is_file():
        raise UserError(f"subset_path: there is no file {layout.subset}; the published lists lie in the repositories "
                        "of DPT and MSN, and your own names an image a line: <class>/<file>")
    positions = {name: number for number, name in enumerate(images.names)}
    chosen: dict[str, int] = {}
    for number, line in enumerate(layout.subset.read_text(encoding="utf-8").splitlines(), 1):
        where, name = f"{layout.subset}, line {number}", line.strip()
        folder = name.partition("/" if "/" in name else "_")[0]
        path = f"train/{name}" if "/" in name else f"train/{folder}/{name}"
        if folder not in images.classes:
            raise UserError(f"{where}: {name!r} is of the class {folder!r}, which is no folder of train"
                            f"{nearest(folder, images.classes)}" if name else f"{where}: is blank")
        if path not in positions:
            raise UserError(f"{where}: there is no image {path}")
        if path in chosen:
            raise UserError(f"{where}: {name} was named before")
        chosen[path] = positions[path]
    if not chosen:
        raise UserError(f"{layout.subset}: names no image")
    found = images.subset(np.array(list(chosen.values())))
    _warn_of_empty(found.labels, images.classes, f"{layout.subset}: no labelled image of")
    return found


def generated_images(layout: Layout, classes: Sequence[str]) -> PhotographSet:
    """Return the images that stage 2 has drawn, by class; UserError without any."""
    if not layout.generated.is_dir():
        raise UserError(f"{layout.generated}: no generated images; draw them with sample_ldm_all.py or "
                        "sample_ldm_discrete_all.py")
    images = list_photographs(layout.generated, classes)
    _warn_of_empty(images.labels, classes, f"{layout.generated}: no image of")
    return images


def _below(images: PhotographSet, config: Config) -> PhotographSet:
    """Name images by their path below image_path."""
    return PhotographSet(images.files, images.labels, images.classes, images.name, str(Path(config.image_path)))


def _warn_of_empty(labels: np.ndarray, classes: Sequence[str], what: str) -> None:
    if empty := sorted(set(range(len(classes))) - set(labels.tolist())):
        names = ", ".join(classes[number] for number in empty[:5])
        warnings.warn(f"{what} {len(empty)} of {len(classes)} classes ({names}{', ...' if len(empty) > 5 else ''})",
                      stacklevel=3)


# ------------------------------------------------------------------------------------------------------- pseudo-labels

def write_pseudo_labels(layout: Layout, images: PhotographSet, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """Write the pseudo-labels of all training images, int64 [N], and their probabilities, float32 [N], as published;
    and beside these the paths, as base names may occur twice."""
    make_dir(layout.cluster)
    _warn_of_empty(labels, images.classes, "no pseudo-label of")
    write_array(layout.pseudo_labels, labels)
    for path, value in ((layout.pseudo_labels_tensor, torch.from_numpy(labels)),
                        (layout.pseudo_probabilities, torch.from_numpy(probabilities)),
                        (layout.true_labels, torch.from_numpy(images.labels)),
                        (layout.image_names, [Path(name).name for name in images.names]),
                        (layout.image_paths, images.names)):
        with atomic(path) as file:
            torch.save(value, file)
