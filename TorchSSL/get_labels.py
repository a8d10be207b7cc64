"""Pseudo-labels for all training images, from a trained classifier (stage 1b of DPT).

    python get_labels.py --load_path ./saved_models/freematch_cifar10_40_1/model_best.pth \\
        --save_path ./saved_models/freematch_cifar10_40_1/

Writes <save_path>/pseudo_label.npy (int64, one class per training image, in file order), pseudo_label.csv (file, class
name, probability) and pseudo_label.json (class counts, agreement with the true labels). The prediction does not use the
true labels. The last line is the agreement.
"""
from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch

from shared.cli import Flag, Option, Text, less_memory, run_main
from shared.cli import parse as parse_flags
from shared.data.datasets import NAMES, has_split
from shared.data.images import ImageSet
from shared.data.photographs import PhotographSet
from shared.training.files import make_dir, write_array, write_csv, write_json
from shared.training.fingerprint import fingerprint_arrays
from shared.training.record import Record
from TorchSSL.core.data import content
from TorchSSL.core.evaluation import open_split, predict_in_blocks
from TorchSSL.core.labels import PSEUDO_LABEL_FILE, labeled_part, read_index
from TorchSSL.core.options import NETWORK, PREDICTED_BY, PREDICTION
from TorchSSL.encoders.images import own_images

NAMED_FILE = "pseudo_label.csv"
OUTPUT = (
    Option("--save_path", Text, "./saved_models/fixmatch", "folder for pseudo_label.npy"),
    Option("--label_idx", Text, None, "give the images named in this .npy file (a run's sampled_label_idx.npy) their "
           "true labels in place of predictions"),
    Option("--overwrite", Flag, False, "replace pseudo-labels of other settings or another classifier"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options; absent ones follow the training, if the checkpoint is one of ours."""
    return parse_flags(__doc__, {"prediction": PREDICTION, "output": OUTPUT, "network": NETWORK}, argv, config="--c")


@less_memory("--batch_size")
def main() -> None:
    options = parse()
    net, pool, images = open_split(options, "train")
    folder = make_dir(options.save_path)
    record = Record(folder / PSEUDO_LABEL_FILE, {name: getattr(options, name) for name in PREDICTED_BY},
                    {"--load_path": options.load_path, "--label_idx": options.label_idx,
                     "--dataset": fingerprint_arrays(*content(images), images.classes)})
    if record.is_complete(options.overwrite):
        return
    predicted = predict_in_blocks(net, pool, options.batch_size)
    labels, known = predicted.argmax(1).numpy().astype(np.int64), images.labels >= 0
    given = np.zeros(len(labels), bool)
    if options.label_idx is not None:
        labeled = labeled_part(options.dataset, options.data_dir, len(images))
        given[labeled][read_index(options.label_idx, images.labels[labeled], "--label_idx")] = True
        labels[given] = images.labels[given]

    agreement = float(np.mean(labels[known] == images.labels[known])) if known.any() else None
    counts = np.bincount(labels, minlength=predicted.shape[1])
    true_counts = np.bincount(images.labels[known], minlength=predicted.shape[1])
    by_class = [float(np.mean(labels[images.labels == c] == c)) if (images.labels == c).any() else None
                for c in range(predicted.shape[1])]
    report = {"images": len(labels), "classes": list(images.classes), "pseudo_label_counts": counts.tolist(),
              "true_label_counts": true_counts.tolist(), "true_labels_known": int(known.sum()),
              "true_labels_injected": int(given.sum()), "agreement": agreement, "agreement_by_class": by_class,
              "mean_confidence": float(predicted.softmax(1).amax(1).mean()), "load_path": options.load_path}
    write_json(folder / "pseudo_label.json", report)
    chances = predicted.softmax(1)[torch.arange(len(labels)), torch.from_numpy(labels)].tolist()
    write_csv(folder / NAMED_FILE, ("file", "label", "probability"), (
        (name, images.classes[label] if label < len(images.classes) else label, f"{chance:.6f}")
        for name, label, chance in zip(pool_names(images, options), labels.tolist(), chances, strict=True)))
    write_array(folder / PSEUDO_LABEL_FILE, labels)
    record.write()

    print(f"{len(labels)} pseudo-labels: {folder / PSEUDO_LABEL_FILE}")
    print(f"first pseudo-labels {labels[:20].tolist()}\nfirst true labels   {images.labels[:20].tolist()}")
    print(f"pseudo-labels per class {counts.tolist()}\ntrue labels per class   {true_counts.tolist()}")
    print(f"Test Accuracy: {agreement}" if agreement is not None else "no true labels are known to compare with")


def pool_names(images: ImageSet | PhotographSet, options: SimpleNamespace) -> list[str]:
    """Return the names of the unlabelled images: their files, or positions if there are no files."""
    if isinstance(images, PhotographSet):
        return images.names
    names = list(map(str, range(len(images))))
    if options.dataset in NAMES:
        return names
    splits = ("unlabeled", "train") if has_split(options.dataset, "unlabeled") else ("train",)
    listed = [name for split in splits for name in own_images(options.dataset, split).names]
    return listed if len(listed) == len(images) else names


if __name__ == "__main__":
    run_main(main)
