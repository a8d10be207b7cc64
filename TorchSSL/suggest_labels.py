"""Suggest which images to label next.

    python suggest_labels.py --dataset digits --budget 10 --save_path ./saved_models/digits_typical
    python freematch.py --c config/freematch_digits_10_1.yaml \\
        --label_idx ./saved_models/digits_typical/sampled_label_idx.npy

Writes label_these.csv (file, cluster, rank, score and an empty column `label` to fill in), contact_sheet.png and
label_these.html. With its labels filled in, beside or inside the folder of the images, the CSV makes a data set of
them. If all labels are known, as in a benchmark, sampled_label_idx.npy lists the images for --label_idx.

Before any training, over pixels of small images, --features, --encoder or the features of --load_path:

    typical   the densest image of each k-means cluster (Hacohen, Dekel and Weinshall, ICML 2022)
    coverage  balls that cover as many images as possible (Yehuda, Dekel, Hacohen and Weinshall, NeurIPS 2022)
    random    uniform draws

With a classifier (--load_path): margin, entropy, and badge (Ash et al., ICLR 2020).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors

from shared import distributed
from shared.cli import Choice, Flag, Float, Int, Option, Text, UserError, run_main
from shared.cli import parse as parse_flags
from shared.data.datasets import NAMES
from shared.data.listing import read_label_csv
from shared.data.safe import load_array
from shared.training.checkpoint import read_checkpoint
from shared.training.files import make_dir, write_array, write_csv
from shared.training.progress import progress
from shared.training.randomness import numpy_rng
from shared.training.record import Record
from TorchSSL.audit.gallery import Section, picture, write_contact_sheet, write_page
from TorchSSL.core.algorithm import BLOCK
from TorchSSL.core.classifier import open_classifier
from TorchSSL.core.labels import INDEX_FILE
from TorchSSL.core.networks import trained_options
from TorchSSL.encoders.encoder import open_encoder
from TorchSSL.encoders.features import features_of
from TorchSSL.encoders.images import Images, features_in, training_images, unit_length

BY_FEATURES, BY_CLASSIFIER = ("typical", "coverage", "random"), ("margin", "entropy", "badge")
FLAGS = {
    "images": (
        Option("--dataset -ds", Text, None, "digits, cifar10, cifar100, svhn, stl10, mnist, or the path of your own "
               "images", default_help="that of --load_path"),
        Option("--data_dir", Text, "./data", "folder of the data sets"),
        Option("--download", Flag, False, "fetch a published data set missing in --data_dir"),
        Option("--labeled", Text, None, "labelled images: a CSV with the columns file and label, or a .npy file "
               "of positions", default_help="those with a label, unless all have one", metavar="FILE"),
    ),
    "choice": (
        Option("--budget", Int(1), 10, "images to label", unit="images"),
        Option("--strategy", Choice(*BY_FEATURES, *BY_CLASSIFIER), "typical", "how the images are chosen"),
        Option("--features", Text, None, "file of features: .npy or .npz [N, D], or one that an encoder wrote",
               metavar="FILE"),
        Option("--encoder", Text, None, "frozen encoder that makes them: a file, or timm:NAME", metavar="NAME"),
        Option("--load_path", Text, None, "checkpoint of a classifier", metavar="FILE"),
        Option("--neighbours", Int(1), 20, "typical: neighbours in the typicality of an image", unit="images"),
        Option("--delta", Float(0, open="low"), None, "coverage: radius of the balls", default_help="such that 95 % of "
               "them stay within one of --budget clusters"),
        Option("--seed", Int(0, 2 ** 32 - 1), 1, "seed of the clusters and draws"),
    ),
    "output": (
        Option("--save_path", Text, required=True, help="folder for label_these.csv", metavar="DIR"),
        Option("--overwrite", Flag, False, "replace suggestions of other settings or images"),
        Option("--device", Text, None, "cpu, cuda or cuda:1", default_help="a GPU if available"),
    ),
}
CSV_FILE, SHEET, PAGE = "label_these.csv", "contact_sheet.png", "label_these.html"
MOST_PIXELS = 3 * 64 * 64  # values of an image whose pixels are features
MOST_CLUSTERS, SMALLEST_CLUSTER, FEW_CLUSTERS = 500, 5, 50  # as published: MiniBatchKMeans from FEW_CLUSTERS on
PURITY = 0.95  # of the balls, as published


@dataclass(frozen=True)
class Choices:
    """The choice of a strategy, best first. positions: int64 [B]. clusters: of each, or "". scores: float [B]."""

    positions: np.ndarray
    clusters: Sequence[object]
    scores: np.ndarray


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    options = parse_flags(__doc__, FLAGS, argv)
    given = [name for name in ("features", "encoder", "load_path") if getattr(options, name) is not None]
    if options.strategy in BY_CLASSIFIER and options.load_path is None:
        raise UserError(f"--strategy {options.strategy} needs the classifier --load_path")
    if options.strategy in BY_FEATURES and len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]}: give one of them")
    if options.dataset is None and options.load_path is not None:
        options.dataset = trained_options(read_checkpoint(options.load_path)).get("dataset")
    if options.dataset is None:
        raise UserError("--dataset: expected the images to choose from, a path or one of " + ", ".join(NAMES))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    images = training_images(options.dataset, options.data_dir, options.download)
    labeled = labeled_positions(images, options.labeled)
    if options.budget > len(images) - len(labeled):
        raise UserError(f"--budget {options.budget}: only {len(images) - len(labeled)} images have no label yet")
    folder = make_dir(options.save_path)
    settings = ("budget", "strategy", "neighbours", "delta", "seed")
    encoder = options.encoder if options.encoder is None or not Path(options.encoder).exists() else None
    record = Record(folder / PAGE, {**{name: getattr(options, name) for name in settings}, "encoder": encoder},
                    {"--dataset": images.fingerprint, "--labeled": labeled, "--features": options.features,
                     "--encoder": None if encoder else options.encoder, "--load_path": options.load_path})
    if is_complete(record, folder, options.overwrite):
        return
    choices = choose(images, labeled, options)
    write(images, labeled, choices, folder, options)
    record.write()


def is_complete(record: Record, folder: Path, overwrite: bool) -> bool:
    """Return whether the suggestions exist; UserError rather than replace labels filled in by hand."""
    file = folder / CSV_FILE
    filled = file.exists() and any(label is not None for label in read_label_csv(file).labels)
    try:
        complete = record.is_complete() and file.exists()
    except UserError:
        if not filled:
            return record.is_complete(overwrite)
        complete = False
    if filled and not complete:
        raise UserError(f"{file} holds labels; give another --save_path for other suggestions, and --labeled {file} "
                        "to count these")
    return complete


def labeled_positions(images: Images, file: str | None) -> np.ndarray:
    """Return the positions of the labelled images, int64; UserError for a list that does not fit."""
    if file is None:
        known = np.flatnonzero(images.labels >= 0)
        return known if len(known) < len(images) else known[:0]
    if file.endswith(".npy"):
        index = load_array(file, f"--labeled {file}")
        if index.ndim != 1 or index.dtype.kind not in "iu" or len(index) and not 0 <= index.min() <= index.max() < len(
                images):
            raise UserError(f"--labeled: {file} must hold positions in 0..{len(images) - 1}")
        return np.unique(index).astype(np.int64)
    table = read_label_csv(file)
    places = {name: position for position, name in enumerate(images.names)}
    wanted = [name for name, label in zip(table.files, table.labels, strict=True) if label is not None]
    if unknown := [name for name in wanted if name not in places]:
        raise UserError(f"--labeled: {file} names {unknown[0]}, which is not among the images of {images.path}")
    return np.array(sorted(places[name] for name in wanted), np.int64)


# ---------------------------------------------------------------- features

def features(images: Images, options: SimpleNamespace) -> np.ndarray:
    """Return the features for distances, float32 [N, D]; UserError."""
    if options.features is not None:
        found = features_in(options.features, images)
    elif options.encoder is not None:
        world = distributed.start(options.device)
        found = unit_length(np.array(features_of(images.as_set(), open_encoder(options.encoder), world=world).values))
    elif options.load_path is not None:
        found = unit_length(classified(images, options)[1])
    elif images.array is None or images.array[0].size > MOST_PIXELS:
        raise UserError(f"{options.dataset}: photographs are not compared by their pixels; give --encoder (timm:NAME, "
                        "or the file of one) or --features")
    else:
        found = images.array.reshape(len(images), -1).astype(np.float32) / 255
    if not np.isfinite(found).all():
        source = next(name for name in ("features", "encoder", "load_path") if getattr(options, name) is not None)
        raise UserError(f"--{source}: the features of {getattr(options, source)} are not finite")
    return found


def classified(images: Images, options: SimpleNamespace) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return (probabilities [N, K], features [N, D], class names) of the classifier --load_path."""
    device = distributed.start(options.device).device
    classifier = open_classifier(options.load_path, device, options.dataset if options.dataset in NAMES else None)
    if classifier.head is None:
        raise UserError(f"--load_path: {options.load_path} has no linear layer at its end")
    logits, seen = [], []
    for start in progress(range(0, len(images), BLOCK), "features", unit="batches"):
        positions = range(start, min(start + BLOCK, len(images)))
        pixels = [classifier.prepare(images.decode(content, position), images.names[position])
                  for position, content in zip(positions, images.read(positions), strict=True)]
        found = classifier.features(np.stack(pixels))
        logits.append(found[0]), seen.append(found[1])
    return torch.cat(logits).softmax(1).numpy(), torch.cat(seen).numpy(), classifier.classes


# ---------------------------------------------------------------- strategies

def choose(images: Images, labeled: np.ndarray, options: SimpleNamespace) -> Choices:
    """Return the images to label next by the strategy of the options."""
    rng, budget = numpy_rng(options.seed, 0, options.strategy), options.budget
    free = np.setdiff1d(np.arange(len(images)), labeled)
    if options.strategy == "random":
        return Choices(rng.permutation(free)[:budget], [""] * budget, np.zeros(budget))
    if options.strategy in BY_FEATURES:
        found = features(images, options)
        clusters = cluster(found, min(len(labeled) + budget, MOST_CLUSTERS), options.seed)
        if options.strategy == "typical":
            return typical(found, clusters, labeled, budget, options.neighbours)
        delta = options.delta or pure_radius(found, clusters)
        print(f"radius of the balls: {delta:.4g}")
        return coverage(found, labeled, budget, delta)
    probabilities, found, classes = classified(images, options)
    predicted = [classes[label] for label in probabilities.argmax(1)]
    if options.strategy == "badge":
        positions, scores = badge(probabilities, found, free, budget, rng)
    else:
        scores = margin(probabilities) if options.strategy == "margin" else -entropy(probabilities)
        positions = free[np.argsort(scores[free], kind="stable")[:budget]]
        scores = np.abs(scores)
    return Choices(positions, [predicted[position] for position in positions], scores[positions])


def cluster(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the k-means cluster of each row, int [N]."""
    count = min(count, len(rows))
    method = KMeans(count, n_init=10, random_state=seed) if count <= FEW_CLUSTERS else \
        MiniBatchKMeans(count, n_init=3, batch_size=5000, random_state=seed)
    return method.fit_predict(rows)


def typical(rows: np.ndarray, clusters: np.ndarray, labeled: np.ndarray, budget: int, neighbours: int) -> Choices:
    """Take the most typical image of the cluster with the fewest labels; of equal ones, the larger cluster.

    Typicality is 1 / mean distance to the nearest neighbours in the cluster (Hacohen et al., eq. 1).
    """
    scores = np.zeros(len(rows))
    sizes = np.bincount(clusters)
    for number in np.unique(clusters):
        inside = np.flatnonzero(clusters == number)
        count = min(neighbours + 1, len(inside))  # an image is its own neighbour
        distances = NearestNeighbors(n_neighbors=count).fit(rows[inside]).kneighbors(rows[inside])[0]
        scores[inside] = 1 / (distances[:, 1:].mean(1) + 1e-5) if count > 1 else 0
    taken = np.zeros(len(rows), bool)
    taken[labeled] = True
    labels = np.bincount(clusters[labeled], minlength=len(sizes))
    chosen: list[int] = []
    for _ in range(budget):
        left = np.bincount(clusters[~taken], minlength=len(sizes))
        # Tiny clusters are outliers: they come last.
        order = np.lexsort((-sizes, labels, sizes < SMALLEST_CLUSTER, left == 0))
        inside = np.flatnonzero((clusters == order[0]) & ~taken)
        chosen.append(int(inside[scores[inside].argmax()]))
        taken[chosen[-1]] = True
        labels[order[0]] += 1
    positions = np.array(chosen, np.int64)
    return Choices(positions, clusters[positions].tolist(), scores[positions])


def pure_radius(rows: np.ndarray, clusters: np.ndarray) -> float:
    """Return the largest radius at which a ball around an image holds images of one cluster alone, for 95 % of them.

    Clusters stand for the unknown classes (Yehuda et al., section 3.3).
    """
    nearest = np.zeros(len(rows))
    for number in np.unique(clusters):
        inside = clusters == number
        if inside.all():
            return float(np.linalg.norm(rows - rows.mean(0), axis=1).max())
        search = NearestNeighbors(n_neighbors=1).fit(rows[~inside])
        nearest[inside] = search.kneighbors(rows[inside])[0][:, 0]
    return float(np.quantile(nearest, 1 - PURITY))


def coverage(rows: np.ndarray, labeled: np.ndarray, budget: int, delta: float) -> Choices:
    """Repeatedly take the image whose ball of radius delta holds the most uncovered images.

    Yehuda et al., algorithm 1; score: their number. Once all are covered, all count as uncovered again.
    """
    balls = NearestNeighbors(radius=delta).fit(rows).radius_neighbors_graph(rows, mode="connectivity").tocsr()
    starts, inside = balls.indptr, balls.indices

    def ball(position: int) -> np.ndarray:
        return inside[starts[position]:starts[position + 1]]

    taken = np.zeros(len(rows), bool)
    taken[labeled] = True
    covered = np.zeros(len(rows), bool)
    for position in labeled.tolist():
        covered[ball(position)] = True
    gains = np.asarray(balls @ (~covered).astype(np.float64)).astype(np.int64)
    chosen, scores = [], []
    for _ in range(budget):
        if gains[~taken].max() <= 0:
            covered[:] = False
            gains = np.diff(starts).astype(np.int64)
        position = int(np.where(taken, -1, gains).argmax())
        chosen.append(position)
        scores.append(int(gains[position]))
        taken[position] = True
        for other in (new := [other for other in ball(position).tolist() if not covered[other]]):
            gains[ball(other)] -= 1
        covered[new] = True
    return Choices(np.array(chosen, np.int64), list(range(len(chosen))), np.array(scores, float))


def margin(probabilities: np.ndarray) -> np.ndarray:
    """Return the lead of the most likely class over the second, float [N]."""
    two = np.sort(probabilities, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Return the entropy in nats, float [N]."""
    return -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(1)


def badge(probabilities: np.ndarray, rows: np.ndarray, free: np.ndarray, budget: int,
          rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (positions [B], norms [N]): k-means++ seeds among the gradients of the last layer (Ash et al. 2020).

    The gradient of image i, for its most likely class as its label, is the outer product of (p - onehot) and its
    feature; distances need its factors alone.
    """
    errors = probabilities.copy()
    errors[np.arange(len(errors)), probabilities.argmax(1)] -= 1
    norms = (errors ** 2).sum(1) * (rows ** 2).sum(1)
    chosen = [int(free[norms[free].argmax()])]
    squared = np.full(len(free), math.inf)
    for _ in range(budget - 1):
        last = chosen[-1]
        inner = (errors[free] @ errors[last]) * (rows[free] @ rows[last])
        squared = np.minimum(squared, np.maximum(norms[free] + norms[last] - 2 * inner, 0))
        squared[np.isin(free, chosen)] = 0
        total = squared.sum()
        weights = squared / total if total > 0 else ~np.isin(free, chosen) / (len(free) - len(chosen))
        chosen.append(int(rng.choice(free, p=weights)))
    return np.array(chosen, np.int64), np.sqrt(norms)


# ---------------------------------------------------------------- output

def write(images: Images, labeled: np.ndarray, choices: Choices, folder: Path, options: SimpleNamespace) -> None:
    """Write the CSV, the contact sheet, the page and, if all labels are known, the positions for --label_idx."""
    positions = choices.positions.tolist()
    write_csv(folder / CSV_FILE, ("file", "cluster", "rank", "score", "label"), (
        (images.names[position], group, rank, f"{score:.6g}", "") for rank, (position, group, score)
        in enumerate(zip(positions, choices.clusters, choices.scores, strict=True), 1)))
    shown = [images.decode(content, position)
             for position, content in zip(positions, images.read(positions), strict=True)]
    captions = [f"{rank} {images.names[position].rpartition('/')[2]}" for rank, position in enumerate(positions, 1)]
    write_contact_sheet(folder / SHEET, zip(shown, captions, strict=True))
    word = "class" if options.strategy in BY_CLASSIFIER else "cluster"
    pictures = [picture(image, f"{rank}. {images.names[position]}", *([f"{word} {group}"] if group != "" else []),
                        f"score {score:.4g}")
                for rank, (position, group, score, image) in enumerate(
                    zip(positions, choices.clusters, choices.scores, shown, strict=True), 1)]
    introduction = [f"{len(positions)} of {len(images)} images of {images.path.name}, chosen by: {options.strategy}.",
                    f"{len(labeled)} images have a label already.",
                    f"Write the class of each into the column label of {CSV_FILE}."]
    if (images.labels[positions] >= 0).all():
        chosen = np.concatenate([labeled, choices.positions]).astype(np.int64)
        write_array(folder / INDEX_FILE, chosen)
        classes = np.unique(images.labels[chosen])
        print(f"classes among the labelled images: {len(classes)} of {len(images.classes)}")
    write_page(folder / PAGE, "Images to label", introduction, [Section("In this order", [("", pictures)])])
    print(f"{len(positions)} images to label: {folder / CSV_FILE}")


if __name__ == "__main__":
    run_main(main)
