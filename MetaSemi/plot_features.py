"""The t-SNE figure of a network's features: labelled, unlabelled and test images (figure 3 of the paper).

    python plot_features.py --dataset svhn --checkpoint-path results/svhn/model_best.pth \\
        --index-path results/svhn/label_indices.txt --save-path results/svhn/visualization --num-point 5000

Writes visualization.pdf and .png, and aligned.npy: the embedding, float32 [N, 2], labelled images first, then the
unlabelled and the test images, with the classes in classes.npy. A GPU is used if available.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from MetaSemi.core.data import statistics
from MetaSemi.core.model import ConvLarge, SmallNet, shakeshake26
from MetaSemi.core.options import COUNT, DATASETS
from shared import distributed
from shared.cli import Flag, Int, Option, UserError, parse, run_main
from shared.data.datasets import load_dataset
from shared.data.images import ImageSet, with_names
from shared.data.pool import Pool
from shared.option_types import NameOrPath
from shared.training.checkpoint import read_checkpoint, weights_in
from shared.training.files import atomic, make_dir, write_array
from shared.training.progress import progress

# Colours of the classes, in the published order; further classes begin anew.
COLOURS = ("lightcoral", "darkgreen", "cadetblue", "darkorange", "peru", "cornflowerblue", "khaki", "magenta", "gray",
           "slategrey")
BATCH = 100
FLAGS = {
    "published flags": (
        Option("--dataset", NameOrPath(*DATASETS), "svhn", "data set of the run, or its folder of own images"),
        Option("--data-path", default="./data", metavar="DIR", help="folder of the data sets"),
        Option("--checkpoint-path", required=True, metavar="FILE", help="checkpoint.pth or model_best.pth"),
        Option("--index-path", required=True, metavar="FILE", help="label_indices.txt of the run"),
        Option("--save-path", required=True, metavar="DIR", help="folder of the figure"),
        Option("--num-point", COUNT, None, "most unlabelled images and most test images in the figure",
               default_help="all"),
    ),
    "beyond the published flags": (
        Option("--embed-all", Flag, False, "embed all images and choose afterwards, as published; otherwise the chosen "
               "ones alone, which is much faster"),
        Option("--seed", Int(0, 2**32 - 1), 0, "seed of the choice and the embedding"),
        Option("--download", Flag, False, "fetch missing files of the data set"),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    train, test = (load_dataset(options.dataset, part, options.data_path, options.download)
                   for part in ("train", "test"))
    labeled = read_indices(options.index_path, len(train))
    unlabeled = np.setdiff1d(np.arange(len(train)), labeled)
    print(f"# data: {len(train)}, labeled: {len(labeled)}, unlabeled: {len(unlabeled)}", flush=True)
    net = load_network(options.checkpoint_path, train.channels).to(distributed.start().device)
    names = read_checkpoint(options.checkpoint_path).get("classes", train.classes)
    train, test = (with_names(part, names, f"--dataset {options.dataset}") for part in (train, test))

    rng = np.random.default_rng(options.seed)
    points = [labeled, unlabeled, np.arange(len(test))]
    chosen = [np.sort(rng.permutation(len(places))[:options.num_point if which else None])
              for which, places in enumerate(points)]
    if not options.embed_all:
        points, chosen = [places[kept] for places, kept in zip(points, chosen, strict=True)], [slice(None)] * 3
    sets = [train.subset(points[0]), train.subset(points[1]), test.subset(points[2])]
    mean, std = statistics(options.dataset, train)
    vectors = np.concatenate([features(net, part, mean, std) for part in sets])
    classes = np.concatenate([part.labels for part in sets])

    folder = make_dir(options.save_path)
    aligned = embed(vectors, options.seed)
    for name, content in (("aligned.npy", aligned), ("classes.npy", classes)):
        write_array(folder / name, content)
    ends = np.cumsum([len(part) for part in sets])[:-1]
    panels = [(places[kept], found[kept]) for places, found, kept in
              zip(np.split(aligned, ends), np.split(classes, ends), chosen, strict=True)]
    draw(panels, folder)


def read_indices(path: str, count: int) -> np.ndarray:
    """Return the positions in a label_indices.txt, int64, one a line; UserError for anything else."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--index-path: cannot read {path} ({getattr(error, 'strerror', None) or 'not text'})"
                        ) from None
    wrong = next((line for line in lines if not (line.isascii() and line.isdigit() and int(line) < count)), None)
    if wrong is not None or not lines:
        raise UserError(f"--index-path: {path} must list positions from 0 to {count - 1}, one a line; found "
                        f"{wrong!r}" if lines else f"--index-path: {path} is empty")
    indices = np.array([int(line) for line in lines], np.int64)
    if len(np.unique(indices)) < len(indices):
        raise UserError(f"--index-path: {path} lists an image twice")
    return indices


def load_network(path: str, channels: int) -> torch.nn.Module:
    """Return the network of a checkpoint in eval mode, recognised by the names and shapes of its tensors."""
    content = read_checkpoint(path)
    if "model" not in content:
        raise UserError(f"--checkpoint-path: {path} holds no model; expected a checkpoint.pth or model_best.pth")
    state = weights_in(content, "model", f"--checkpoint-path: {path}")
    head = "fc.weight" if "fc.weight" in state else "classifier.0.weight"
    classes = len(state[head]) if head in state and state[head].ndim else 10
    if head == "fc.weight":
        net: torch.nn.Module = shakeshake26(classes)
    elif "block9.0.weight" in state:
        net = ConvLarge(channels, classes, top_bn="classifier.1.weight" in state)
    else:
        net = SmallNet(channels, classes)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--checkpoint-path: {path} does not fit {type(net).__name__}: {reason}") from None
    return net.eval()


def features(net: torch.nn.Module, images: ImageSet, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return the classifier's input for each image, float32 [N, D], in order."""
    pool = Pool(images, mean, std, next(net.parameters()).device)
    with torch.inference_mode():
        found = [net.features(pool.normalised(np.arange(start, min(start + BATCH, len(pool))))).cpu()
                 for start in progress(range(0, len(pool), BATCH), "features", unit="batches")]
    return torch.cat(found).numpy()


def embed(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Return the t-SNE embedding float32 [N, 2] of float32 [N, D] (van der Maaten and Hinton 2008)."""
    if len(vectors) < 3:
        raise UserError(f"an embedding needs at least 3 images, there are {len(vectors)}")
    print(f"embedding {len(vectors)} images", flush=True)
    return TSNE(n_components=2, random_state=seed, perplexity=min(30.0, (len(vectors) - 1) / 3)).fit_transform(vectors)


def draw(panels: Sequence[tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    """Write visualization.pdf and .png: labelled, unlabelled and test images by class, then all three on each other.

    panels: (embedding [n, 2], classes [n]) of the three.
    """
    figure = Figure(figsize=(24, 6), dpi=100)
    FigureCanvasAgg(figure)
    for position, (title, (places, classes)) in enumerate(zip(("labelled", "unlabelled", "test"), panels, strict=True)):
        axes = figure.add_subplot(1, 4, position + 1)
        colours = np.array(COLOURS)[classes % len(COLOURS)]
        axes.scatter(places[:, 0], places[:, 1], s=10, c=colours, linewidths=0)
        axes.set_title(title)
    if max(classes.max() for _, classes in panels) < len(COLOURS):
        for number in np.unique(panels[0][1]):
            figure.axes[0].scatter([], [], s=30, c=COLOURS[number], label=number)
        figure.axes[0].legend(title="class", loc="best", ncols=2)

    axes = figure.add_subplot(1, 4, 4)
    for which, name, colour in ((1, "unlabelled", "blue"), (2, "test", "grey"), (0, "labelled", "red")):
        axes.scatter(*panels[which][0].T, s=10, c=colour, linewidths=0, label=name)
    axes.legend(loc="best")
    axes.set_title("all")
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.tight_layout()
    # Without the time in it, the same data give the same file.
    for ending, metadata in (("pdf", {"CreationDate": None, "Producer": None}), ("png", {"Software": None})):
        with atomic(folder / f"visualization.{ending}") as file:
            figure.savefig(file, format=ending, metadata=metadata)
    print(f"{folder / 'visualization.pdf'} and .png", flush=True)


if __name__ == "__main__":
    run_main(main)
