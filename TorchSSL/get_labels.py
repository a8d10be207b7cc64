"""Pseudo-labels for all training images, from a trained classifier (stage 1b of DPT).

    python get_labels.py --load_path ./saved_models/freematch_cifar10_40_1/model_best.pth \\
        --save_path ./saved_models/freematch_cifar10_40_1/

Writes <save_path>/pseudo_label.npy (int64, one class per training image, in file order) and pseudo_label.json (class
counts and agreement with the true labels, which take no part in the prediction). The last line names the agreement.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from shared.cli import run_main
from TorchSSL.core.options import COMMON, COUNT, Flag, build_parser

PREDICTION_FLAGS = (
    Flag("--load_path", str, "./saved_models/fixmatch/model_best.pth", "checkpoint of the classifier"),
    Flag("--use_train_model", None, False, "the weights as trained, in place of their moving average"),
    Flag("--batch_size", COUNT, 256, "images in a batch"),
    Flag("--data_dir", str, "./data", "folder of the data sets"),
    Flag("--dataset -ds", str, "cifar10", "name or path, as in the training"),
    Flag("--num_classes -nc", COUNT, 10, "classes"),
    Flag("--download", None, False, "fetch a published data set that is not in --data_dir"),
    Flag("--device", str, None, "cpu, cuda, cuda:1 or mps (default: a GPU where there is one)"),
)
OUTPUT_FLAGS = (
    Flag("--save_path", str, "./saved_models/fixmatch", "folder for pseudo_label.npy"),
    Flag("--label_idx", str, None, "give the images named in this .npy file (a run's sampled_label_idx.npy) their true "
         "labels in place of predictions"),
)
NETWORK_FLAGS = COMMON["network"]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; what is not given follows the training, where the checkpoint is one of ours."""
    groups = {"prediction": PREDICTION_FLAGS, "output": OUTPUT_FLAGS, "network": NETWORK_FLAGS}
    return build_parser("get_labels", __doc__, groups).parse_with_yaml(argv)


def main() -> None:
    options = parse()
    import numpy as np

    from shared.data.datasets import has_split, load_dataset
    from shared.training.files import atomic, make_dir
    from TorchSSL.core.classifier import predict_split
    from TorchSSL.core.data import read_index

    predicted, images = predict_split(options, "train")
    labels, known = predicted.argmax(1).numpy().astype(np.int64), images.labels >= 0
    given = np.zeros(len(labels), bool)
    if options.label_idx is not None:
        # Indices count the images that labels are drawn from, which are the last ones of the pool.
        start = 0
        if has_split(options.dataset, "unlabeled"):
            start = len(images) - len(load_dataset(options.dataset, "train", options.data_dir))
        labeled = slice(start, None)
        given[labeled][read_index(options.label_idx, images.labels[labeled], "--label_idx")] = True
        labels[given] = images.labels[given]
    folder = make_dir(options.save_path)

    agreement = float(np.mean(labels[known] == images.labels[known])) if known.any() else None
    counts = np.bincount(labels, minlength=predicted.shape[1])
    true_counts = np.bincount(images.labels[known], minlength=predicted.shape[1])
    by_class = [float(np.mean(labels[images.labels == c] == c)) if (images.labels == c).any() else None
                for c in range(predicted.shape[1])]
    report = {"images": len(labels), "classes": list(images.classes), "pseudo_label_counts": counts.tolist(),
              "true_label_counts": true_counts.tolist(), "true_labels_known": int(known.sum()),
              "true_labels_injected": int(given.sum()), "agreement": agreement, "agreement_by_class": by_class,
              "mean_confidence": float(predicted.softmax(1).amax(1).mean()), "load_path": options.load_path}
    with atomic(folder / "pseudo_label.npy") as file:
        np.save(file, labels)
    with atomic(folder / "pseudo_label.json", "w") as file:
        json.dump(report, file, indent=1)

    print(f"{len(labels)} pseudo-labels: {folder / 'pseudo_label.npy'}")
    print(f"first pseudo-labels {labels[:20].tolist()}\nfirst true labels   {images.labels[:20].tolist()}")
    print(f"pseudo-labels per class {counts.tolist()}\ntrue labels per class   {true_counts.tolist()}")
    print(f"Test Accuracy: {agreement}" if agreement is not None else "no true labels are known to compare with")


if __name__ == "__main__":
    run_main(main)
