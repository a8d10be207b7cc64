"""The label noise of a training set, by flags, its dataset.json, its name, or a classifier."""
from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from EDM.tdsm import transition
from EDM.tdsm.classifiers import volmin_transition
from EDM.training.dataset import TrainingSet, open_data, open_training_set
from EDM.training.snapshots import Snapshot
from shared.cli import UserError
from shared.data.classes import LABEL_FILE, find_images, match_labels
from shared.data.images import ImageSet
from shared.data.safe import Member, read_members, zip_members

# Names as in cifar10_sym_40-32x32.zip: type and percentage.
NAMED = re.compile(r"(?:^|[_-])(sym|asym)[_-](\d{1,2})(?=$|[^0-9])")
SAME = 1e-5  # largest difference of two matrices that count as one


@dataclass(frozen=True)
class Noise:
    """Label noise of a training set.

    noise_type: one of transition.NOISE_TYPES or "file". noise_rate: 0 if it has none. dataset: a key of
    transition.CLASSES or None. matrix: float64 [K, K]; None if it is learned. origin: source of this knowledge.
    """

    noise_type: str
    noise_rate: float
    dataset: str | None
    num_classes: int
    matrix: np.ndarray | None
    origin: str

    def settings(self) -> dict[str, Any]:
        """Return its entries in the published option dictionary."""
        return dict(num_classes=self.num_classes, noise_type=self.noise_type, noise_rate=self.noise_rate,
                    dataset=self.dataset)

    def record(self) -> dict[str, Any]:
        """Return its record in a snapshot: the settings and the matrix."""
        return {**self.settings(), **({} if self.matrix is None else {"transition_matrix": self.matrix.tolist()})}

    def __str__(self) -> str:
        kind = f"{self.noise_type} {self.noise_rate:g}" if self.noise_type in ("sym", "asym") else self.noise_type
        matrix = "" if self.matrix is None else f": {transition.describe(self.matrix)}"
        return f"{kind} ({self.origin}){matrix}"


# ------------------------------------------------------------------------------------------------- the training set

def open_noisy_set(flags: SimpleNamespace) -> TrainingSet:
    """Open --data with as many classes as the data set is known to have. Raises UserError without class labels."""
    if not flags.cond:
        raise UserError("this script learns from labels: add --cond=1")
    dataset = open_data(flags.data, True, flags.xflip)
    if not dataset.has_onehot_labels:
        raise UserError(f"--data: {flags.data} labels its images by lists of numbers; classes are needed")
    return dataclasses.replace(dataset, label_dim=number_of_classes(flags, dataset.label_dim))


def open_eval_set(flags: SimpleNamespace, dataset: TrainingSet) -> TrainingSet | None:
    """Open --eval-data, if given. Raises UserError unless its images and classes are those of `dataset`."""
    if flags.eval_data is None:
        return None
    try:
        test = open_training_set(flags.eval_data, use_labels=True)
    except UserError as error:
        raise UserError(f"--eval-data: {error}") from None
    if test.has_onehot_labels:
        labels = match_labels(test.raw_labels, test.classes, dataset.classes, f"--eval-data: {flags.eval_data}")
        test = dataclasses.replace(test, raw_labels=labels, label_dim=int(labels.max()) + 1)
    shapes = [(found.num_channels, found.resolution) for found in (test, dataset)]
    if not test.has_onehot_labels or test.label_dim > dataset.label_dim or shapes[0] != shapes[1]:
        raise UserError(f"--eval-data: {flags.eval_data} needs class labels below {dataset.label_dim} and images of "
                        f"{dataset.num_channels} x {dataset.resolution} x {dataset.resolution}")
    return test


def number_of_classes(flags: SimpleNamespace, label_dim: int) -> int:
    """Return the number of classes of the set: of --dataset, its name or its record; else of its labels."""
    kind = kind_of(flags)
    known = transition.CLASSES.get(kind)
    if known is None:
        known = len(read_record(flags.data).get("transition_matrix") or ()) or label_dim
    if known < label_dim:
        if flags.dataset is not None:
            raise UserError(f"--dataset={flags.dataset} has {known} classes, but {flags.data} has a label "
                            f"{label_dim - 1}")
        return label_dim
    return known


def kind_of(flags: SimpleNamespace) -> str | None:
    """Return which data set --data is, a key of transition.CLASSES: by --dataset, its record or its base name."""
    recorded = (read_record(flags.data).get("label_noise") or {}).get("dataset")
    named = recorded if recorded in transition.CLASSES else transition.dataset_kind(flags.data)
    return flags.dataset or named


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """Return the entries of a dataset.json besides the labels; {} without one. Raises UserError."""
    path = Path(path)
    return _read_record(path, path.stat().st_mtime_ns) if path.exists() else {}


@lru_cache(maxsize=4)
def _read_record(path: Path, changed: int) -> dict[str, Any]:
    if path.is_dir():
        members = [Member(LABEL_FILE)] if (path / LABEL_FILE).is_file() else []
    elif path.suffix.lower() == ".zip":
        members = [member for member in zip_members(path) if member.name == LABEL_FILE]
    else:
        members = []
    if not members:
        return {}
    try:
        content = json.loads(next(read_members(path, members)))
    except ValueError:
        raise UserError(f"{path}: {LABEL_FILE} is not JSON") from None
    return {key: value for key, value in content.items() if key != "labels"} if isinstance(content, dict) else {}


def clean_labels(path: str | os.PathLike) -> np.ndarray | None:
    """Return the clean labels int64 [N] that dataset.json keeps, in the order of the images; None where it has none."""
    listed = read_record(path).get("clean_labels")
    if not listed:
        return None
    try:
        by_name = {name: int(label) for name, label in listed}
        return np.array([by_name[name] for name in find_images(Path(path)).names], np.int64)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: the entry clean_labels of {LABEL_FILE} does not list every image ({error})") from None


def with_clean_labels(images: ImageSet, path: str) -> ImageSet:
    """Return the set read from `path` with the clean labels that its dataset.json keeps; itself where it keeps none."""
    labels = clean_labels(path)
    if labels is None:
        return images
    classes = images.classes + tuple(map(str, range(images.num_classes, int(labels.max()) + 1)))
    return ImageSet(images.images, labels, classes, images.name)


# --------------------------------------------------------------------------------------------------- its label noise

def noise_of_flags(flags: SimpleNamespace, num_classes: int) -> Noise | None:
    """Return the noise of the flags; None without. Raises UserError for contradictions."""
    kind, noise_type = kind_of(flags), flags.noise_type
    if flags.transition is not None:
        if noise_type not in (None, "file") or flags.noise_rate is not None:
            raise UserError("--transition says all about the noise; leave out --noise_type and --noise_rate")
        matrix = transition.load_transition(flags.transition, num_classes)
        return Noise("file", 0.0, kind, num_classes, matrix, flags.transition)
    if noise_type is None:
        if flags.noise_rate is not None:
            raise UserError("--noise_rate needs --noise_type=sym or --noise_type=asym")
        return None
    if noise_type == "file":
        raise UserError("--noise_type=file needs the file: --transition=T.npy or T.json")
    if noise_type in ("sym", "asym"):
        if flags.noise_rate is None:
            raise UserError(f"--noise_type={noise_type} needs --noise_rate, the fraction of wrong labels, such as 0.4")
        rate = transition.check_rate(flags.noise_rate)
        matrix = transition.transition_matrix(noise_type, rate, num_classes, kind)
        return Noise(noise_type, rate, kind, num_classes, matrix, "as the flags say")
    if flags.noise_rate:
        raise UserError(f"--noise_rate does not go with --noise_type={noise_type}; leave it out")
    matrix = np.eye(num_classes) if noise_type == "clean" else None
    return Noise(noise_type, 0.0, kind, num_classes, matrix, "as the flags say")


def noise_of_data(flags: SimpleNamespace, num_classes: int) -> Noise:
    """Return the noise that the set's dataset.json records, else that its name tells, else none."""
    kind, record = kind_of(flags), read_record(flags.data)
    if "transition_matrix" in record:
        matrix = transition.check_transition(record["transition_matrix"], num_classes, flags.data)
        said = record.get("label_noise") or {}
        noise_type = said.get("noise_type") if said.get("noise_type") in ("sym", "asym") else "file"
        return Noise(noise_type, float(said.get("noise_rate") or 0.0), kind, num_classes, matrix,
                     f"as {LABEL_FILE} of --data says")
    name = os.path.splitext(os.path.basename(os.path.abspath(flags.data)))[0]
    if match := NAMED.search(name):
        noise_type, rate = match[1], int(match[2]) / 100
        matrix = transition.transition_matrix(noise_type, rate, num_classes, kind)
        return Noise(noise_type, rate, kind, num_classes, matrix, "by the name of --data")
    return Noise("clean", 0.0, kind, num_classes, np.eye(num_classes), "--data records no noise")


def noise_of_classifier(snapshot: Snapshot, num_classes: int) -> Noise | None:
    """Return the noise that a classifier was trained for; None if its snapshot does not say."""
    said, origin = snapshot.loss_kwargs, "as the classifier says"
    if "transition_matrix" in snapshot.state_dict:
        matrix = volmin_transition(snapshot.state_dict["transition_matrix"].double()).numpy()
        matrix = transition.check_transition(matrix, num_classes, snapshot.source)
        return Noise("learn", 0.0, said.get("dataset"), num_classes, matrix, "as the classifier learned it")
    noise_type, rate, kind = (said.get(name) for name in ("noise_type", "noise_rate", "dataset"))
    if "transition_matrix" in said:
        matrix = transition.check_transition(said["transition_matrix"], num_classes, snapshot.source)
        return Noise(str(noise_type), float(rate or 0.0), kind, num_classes, matrix, origin)
    if noise_type in ("clean", "sym", "asym"):  # a published one
        matrix = transition.transition_matrix(noise_type, float(rate or 0.0), num_classes, kind)
        return Noise(noise_type, float(rate or 0.0), kind, num_classes, matrix, origin)
    return None


def agreed_noise(flags: SimpleNamespace, num_classes: int, classifier: Snapshot | None) -> Noise:
    """Return the noise that a denoiser is trained for: the classifier's, with which the flags must agree.

    Raises UserError if they do not, and for noise without a classifier.
    """
    asked = noise_of_flags(flags, num_classes)
    if classifier is None:
        if asked is not None and asked.noise_type == "clean":
            return asked
        raise UserError("--cls: the snapshot of a classifier is needed (train_classifier.py makes one), or "
                        "--noise_type=clean for labels without noise")
    learned = noise_of_classifier(classifier, num_classes)
    if learned is None:
        return asked or noise_of_data(flags, num_classes)
    if asked is None:
        return learned
    if asked.noise_type == "learn":
        if learned.noise_type != "learn":
            raise UserError(f"--noise_type=learn: {classifier.source} has learned no transition matrix; train one with "
                            "--precond=edm_vm, or leave --noise_type out")
        return learned
    difference = np.abs(asked.matrix - learned.matrix).max()
    if difference > SAME:
        raise UserError(f"--cls: {classifier.source} was trained for {learned}, which differs from {asked} by "
                        f"up to {difference:.3g}; give the classifier's noise, or leave the flags out")
    return learned


def transition_error(matrix: np.ndarray, path: str | os.PathLike) -> float | None:
    """Return the mean over rows of Σ |T - realised T| / 2, in [0, 1]; None where the set does not keep the latter."""
    realised = read_record(path).get("realised_transition_matrix")
    if realised is None or np.shape(realised) != matrix.shape:
        return None
    return float(np.abs(matrix - np.asarray(realised)).sum(1).mean() / 2)
