"""Findings of an audit: wrong labels, transition matrix, overlapping classes, duplicates and outliers."""
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cleanlab.count import compute_confident_joint, estimate_latent
from cleanlab.dataset import find_overlapping_classes
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.neighbors import NearestNeighbors

from shared.cli import UserError
from shared.data.safe import load_array
from TorchSSL.core.labels import SMOOTHING, rows_of

NEIGHBOURS = 10
NEAR = 0.13   # of the median distance to the nearest image, as in cleanlab's search for near-duplicates
FENCE = 3.0   # quartile distances beyond the upper quartile: Tukey's outer fence
SUM_TOLERANCE = 1e-2  # of given probabilities, written with few digits


@dataclass(frozen=True)
class LabelIssues:
    """positions: int64 [M] of the images whose label looks wrong, worst first. quality: float [N], 0 (wrong) to 1 (as
    labelled). suggested: int64 [N], the most probable class."""

    positions: np.ndarray
    quality: np.ndarray
    suggested: np.ndarray


def label_issues(labels: np.ndarray, probabilities: np.ndarray, rank: str) -> LabelIssues:
    """Return the label issues of confident learning (Northcutt et al. 2021), as cleanlab computes and ranks them.

    labels: int64 [N], -1 unknown (never an issue). probabilities: float [N, K], out of sample.
    """
    known = np.flatnonzero(labels >= 0)
    quality, suggested = np.ones(len(labels)), probabilities.argmax(1)
    found = find_label_issues(labels[known], probabilities[known], filter_by="prune_by_noise_rate", n_jobs=1)
    quality[known] = get_label_quality_scores(labels[known], probabilities[known], method=rank)
    positions = known[found]
    positions = positions[suggested[positions] != labels[positions]]
    return LabelIssues(positions[np.argsort(quality[positions], kind="stable")], quality, suggested)


def transition_matrix(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the estimate of p(given label | class), float64 [K, K], a row a class, from cleanlab's confident joint.

    Every label stays possible: a thousandth of each row is spread over all columns, as TDSM's training needs.
    """
    known = labels >= 0
    joint = compute_confident_joint(labels[known], probabilities[known])
    rows = estimate_latent(joint, labels[known])[1].T  # cleanlab's has a column a class
    return rows_of(rows, SMOOTHING)


def overlapping(labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], most: int = 10) -> list[dict]:
    """Return the pairs of classes that share the most images: names, number of images and share of the set."""
    known = labels >= 0
    table = find_overlapping_classes(labels[known], probabilities[known], class_names=list(classes)).head(most)
    names = {"Class Name A": "one", "Class Name B": "other", "Num Overlapping Examples": "images",
             "Joint Probability": "share"}
    return [row for row in table[list(names)].rename(columns=names).to_dict("records") if row["images"] > 0]


# -------------------------------------------------------------------------------------------- duplicates and outliers

@dataclass(frozen=True)
class Neighbours:
    """duplicates: (position, other, distance), each pair once. outliers: (position, mean distance), farthest first."""

    duplicates: list[tuple[int, int, float]]
    outliers: list[tuple[int, float]]
    radius: float


def neighbours(features: np.ndarray) -> Neighbours:
    """Return near-duplicates and outliers among rows of features float32 [N, D], by Euclidean distance.

    A pair is near if its distance is below 0.13 of the median distance to a nearest neighbour; an outlier's mean
    distance to its 10 nearest lies beyond Tukey's outer fence.
    """
    count = min(NEIGHBOURS + 1, len(features))
    distances, others = NearestNeighbors(n_neighbors=count).fit(features).kneighbors(features)
    own = others == np.arange(len(features))[:, None]  # a row is its own neighbour, though not always the first
    own[~own.any(1), -1] = True
    distances, others = (values[~own].reshape(len(features), -1) for values in (distances, others))
    if distances.shape[1] == 0:
        return Neighbours([], [], 0.0)
    radius = NEAR * float(np.median(distances[:, 0]))
    pairs = {}
    for i, place in np.argwhere(distances <= radius).tolist():
        pairs[tuple(sorted((i, int(others[i, place]))))] = float(distances[i, place])
    means = distances.mean(1)
    low, high = np.quantile(means, (0.25, 0.75))
    far = np.flatnonzero(means > high + FENCE * (high - low))
    return Neighbours(sorted(((*pair, d) for pair, d in pairs.items()), key=lambda found: (found[2], found[:2])),
                      sorted(((int(i), float(means[i])) for i in far), key=lambda found: -found[1]), radius)


def across(features: np.ndarray, others: np.ndarray, radius: float) -> list[tuple[int, int, float]]:
    """Return (position, nearest of `others`, distance) of the rows within the radius of one of them."""
    distances, nearest = (values[:, 0] for values in NearestNeighbors(n_neighbors=1).fit(others).kneighbors(features))
    return sorted(((int(i), int(nearest[i]), float(distances[i])) for i in np.flatnonzero(distances <= radius)),
                  key=lambda found: found[2])


# ---------------------------------------------------------------------------------------------- given probabilities

def given_probabilities(file: str, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the probabilities [N, K] of --pred_probs: a .npy, a .npz, or a CSV of `file` and a column a class.

    Rows of an array are in the order of the images. Raises UserError unless each row is a distribution over the
    classes.
    """
    if not Path(file).is_file():
        raise UserError(f"--pred_probs: there is no file {file}")
    if Path(file).suffix.lower() == ".csv":
        found = _probabilities_in_csv(file, names, classes)
    else:
        found = load_array(file, f"--pred_probs {file}", ("probabilities", "pred_probs"))
    if found.shape != (len(names), len(classes)) or found.dtype.kind != "f":
        raise UserError(f"--pred_probs: {file} holds {found.dtype} {list(found.shape)}, expected floats "
                        f"[{len(names)}, {len(classes)}]: a row an image, a column a class")
    found = found.astype(np.float64)
    sums = found.sum(1)
    if not np.isfinite(found).all() or found.min() < 0 or np.abs(sums - 1).max() > SUM_TOLERANCE:
        row = int(np.argmax(~np.isfinite(sums) | (found < 0).any(1) | (np.abs(sums - 1) > SUM_TOLERANCE)))
        raise UserError(f"--pred_probs: row {row} of {file} is no distribution (its sum is {sums[row]:.4g}); give "
                        "probabilities, not logits")
    return found / sums[:, None]


def _probabilities_in_csv(file: str, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        by_name = {row["file"]: [float(row[name]) for name in classes] for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"--pred_probs: {file} needs the columns file, {', '.join(map(str, classes[:5]))}, ... with a "
                        f"number in each ({type(error).__name__}: {error})") from None
    if absent := [name for name in names if name not in by_name]:
        raise UserError(f"--pred_probs: {file} has no row for {absent[0]}")
    return np.array([by_name[name] for name in names])
