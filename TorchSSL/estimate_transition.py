"""Estimate p(pseudo-label | class), the errors of pseudo-labels, for a noise-aware second stage (TDSM).

    python estimate_transition.py --load_path=./saved_models/freematch_digits_10_1/latest_model.pth \\
        --save_path=./saved_models/freematch_digits_10_1/ --dest=transition.json --method=predictions

Two estimates, row = class, column = pseudo-label:

predictions   needs no label. Every image votes for the classes that the classifier sees in weakly augmented views of
              it; the votes are summed by pseudo-label (a joint estimate as in confident learning, Northcutt et al.
              2021), and each class's row is divided by its sum. It finds uncertain confusions of the classifier,
              but no confident ones.
held_out      counts --held_out N labelled images that the classifier has not seen, the same number of every class, and
              the row of the other estimate as one image more. So a few labels a class suffice.

Writes transition_matrix and its settings. With known true labels it adds the distance from the true matrix; the
estimate does not use them.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from shared.augment.views import WeakPolicy, draw_weak, weak
from shared.cli import Choice, Flag, Int, Option, Text, UserError, less_memory, run_main
from shared.cli import parse as parse_flags
from shared.data.pool import Pool
from shared.training.checkpoint import read_checkpoint
from shared.training.files import check_writable, write_json
from shared.training.fingerprint import fingerprint_arrays
from shared.training.progress import Progress
from shared.training.randomness import numpy_rng
from shared.training.record import Record
from TorchSSL.core.algorithm import classify
from TorchSSL.core.data import content
from TorchSSL.core.evaluation import confusion_matrix, open_split
from TorchSSL.core.labels import (
    INDEX_FILE,
    PSEUDO_LABEL_FILE,
    SMOOTHING,
    compared_with_truth,
    labeled_part,
    read_index,
    read_pseudo_labels,
    rows_of,
)
from TorchSSL.core.networks import trained_options
from TorchSSL.core.options import NETWORK, PREDICTED_BY, PREDICTION

PRIOR = 1.0       # weight of the first estimate's row, in held-out images
ESTIMATE = (
    Option("--save_path", Text, "./saved_models/fixmatch", "folder of pseudo_label.npy and sampled_label_idx.npy"),
    Option("--dest", Text, "transition.json", "file to write, in --save_path unless it is a path"),
    Option("--method", Choice("predictions", "held_out"), "predictions", "estimate, see above"),
    Option("--held_out", Int(1), None, "labelled images to hold out in all, a multiple of the classes (held_out)"),
    Option("--held_out_idx", Text, None, "hold out the images named in this .npy file instead of drawn ones"),
    Option("--views", Int(1), 10, "views of every image"),
    Option("--seed", Int(0), 0, "seed of the views and of the held-out images"),
    Option("--overwrite", Flag, False, "replace an estimate of other settings or another classifier"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options; UserError unless --method=held_out and a choice of images come together."""
    options = parse_flags(__doc__, {"prediction": PREDICTION, "estimate": ESTIMATE, "network": NETWORK}, argv,
                          config="--c")
    named = (options.held_out is not None) + (options.held_out_idx is not None)
    if named != (options.method == "held_out"):
        raise UserError("--method=held_out needs one of --held_out N and --held_out_idx FILE, and they need it")
    return options


@less_memory("--batch_size")
def main() -> None:
    options = parse()
    net, pool, images = open_split(options, "train")
    folder, classes = Path(options.save_path), images.num_classes
    pseudo = read_pseudo_labels(folder / PSEUDO_LABEL_FILE, "--save_path")
    if len(pseudo) != len(images) or pseudo.max() >= classes:
        raise UserError(f"{folder / PSEUDO_LABEL_FILE}: expected {len(images)} labels from 0 to {classes - 1}, those "
                        "of the training images; make it with get_labels.py for this data set")
    dest, used = Path(options.dest), folder / INDEX_FILE
    if dest.name == options.dest:
        dest = folder / dest
    check_writable(dest, "--dest")
    record = Record(dest, {name: getattr(options, name) for name in ("method", "held_out", "views", "seed",
                                                                     *PREDICTED_BY)},
                    {"--load_path": options.load_path, "--held_out_idx": options.held_out_idx,
                     "--dataset": fingerprint_arrays(*content(images), images.classes),
                     PSEUDO_LABEL_FILE: folder / PSEUDO_LABEL_FILE,
                     INDEX_FILE: used if options.method == "held_out" and used.exists() else None})
    if record.is_complete(options.overwrite):
        return
    estimate = rows_of(joint_of_votes(vote(net, pool, options, images.size, classes), pseudo), SMOOTHING)
    facts = {"method": options.method, "views": options.views, "seed": options.seed}
    if options.method == "held_out":
        index = held_out_index(options, images.labels, classes)
        counts = confusion_matrix(images.labels[index], pseudo[index], classes)
        estimate = rows_of(counts + PRIOR * estimate, SMOOTHING)
        facts |= {"held_out": len(index), "held_out_right": float(np.mean(images.labels[index] == pseudo[index]))}
    known = images.labels >= 0
    if known.any():
        facts |= compared_with_truth(estimate, images.labels, pseudo)
    write_json(dest, {"transition_matrix": estimate.tolist(), "classes": list(images.classes), **facts}, indent=None)
    record.write()
    print(f"{dest}: pseudo-labels of a class that are right, by this estimate: "
          f"{' '.join(f'{100 * value:.0f}' for value in np.diag(estimate))} %")
    if known.any():
        print(f"distance of a row from the true one (total variation): {facts['error']:.3f}; of a matrix without "
              f"noise: {facts['error_of_no_noise']:.3f}")


@torch.no_grad()
def vote(net: nn.Module, pool: Pool, options: SimpleNamespace, size: tuple[int, int], classes: int) -> np.ndarray:
    """Return the fraction of --views weak views in which the classifier sees each class, float64 [N, C].

    The views are those of the classifier's training.
    """
    trained = trained_options(read_checkpoint(options.load_path))
    names = {"flip": "weak_flip", "pad": "weak_pad", "pad_mode": "weak_pad_mode", "subpixel": "weak_subpixel"}
    policy = WeakPolicy(**{name: trained[flag] for name, flag in names.items() if flag in trained})
    votes = np.zeros((len(pool), classes))
    progress = Progress("votes", options.views * len(pool), "views")
    for view in range(options.views):
        draws = draw_weak(len(pool), numpy_rng(options.seed, view, "views for the transition"), size, policy)
        for start in range(0, len(pool), options.batch_size):
            index = np.arange(start, min(start + options.batch_size, len(pool)))
            batch = weak(pool.take(index), draws[index], pool.mean, pool.std)
            votes[index, classify(net, batch).argmax(1).cpu().numpy()] += 1
            progress.advance(len(index))
    progress.close()
    return votes / options.views


def joint_of_votes(votes: np.ndarray, pseudo: np.ndarray) -> np.ndarray:
    """Return float64 [C, C]: votes [N, C] for each class (row), summed over the images of each pseudo-label."""
    joint = np.zeros((votes.shape[1], votes.shape[1]))
    np.add.at(joint.T, pseudo, votes)
    return joint


def held_out_index(options: SimpleNamespace, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return positions in the pool, int64, of the labelled images to count; the classifier has seen none of them.

    labels: of the pool, -1 where unknown. Raises UserError for a class with too few other images, and for a file that
    names a training image.
    """
    part, used = labeled_part(options.dataset, options.data_dir, len(labels)), Path(options.save_path) / INDEX_FILE
    seen = read_index(str(used), labels[part], "--save_path") if used.exists() else np.zeros(0, np.int64)
    if options.held_out_idx is not None:
        index = read_index(options.held_out_idx, labels[part], "--held_out_idx")
        if both := sorted(set(index.tolist()) & set(seen.tolist())):
            raise UserError(f"--held_out_idx: the classifier was trained on image {both[0]} of {options.held_out_idx}")
        return part.start + index
    if options.held_out % classes:
        raise UserError(f"--held_out {options.held_out} is not a multiple of the {classes} classes")
    rng, each, chosen = numpy_rng(options.seed, 0, "held-out labels"), options.held_out // classes, []
    for label in range(classes):
        free = np.setdiff1d(np.flatnonzero(labels[part] == label), seen)
        if len(free) < each:
            raise UserError(f"--held_out {options.held_out}: class {label} has {len(free)} labelled images besides "
                            f"those of the training, fewer than {each}")
        chosen.append(rng.choice(free, each, replace=False))
    return part.start + np.sort(np.concatenate(chosen))


if __name__ == "__main__":
    run_main(main)
