"""Test accuracy of a trained classifier.

    python eval.py --load_path ./saved_models/freematch_cifar10_40_1/model_best.pth

Prints the published metrics as fractions; the last line is `Test Accuracy: <fraction>`.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from shared.cli import Option, Text, UserError, less_memory, run_main
from shared.cli import parse as parse_flags
from shared.training.files import check_writable, make_dir, write_json
from TorchSSL.core.evaluation import confusion_matrix, confusion_text, metrics, predict_split
from TorchSSL.core.options import NETWORK, PREDICTION

OUTPUT = (Option("--json", Text, None, "also write metrics and confusion matrix to this file"),)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """Return the options; absent ones follow the training, if the checkpoint is one of ours."""
    return parse_flags(__doc__, {"prediction": PREDICTION, "output": OUTPUT, "network": NETWORK}, argv, config="--c")


@less_memory("--batch_size")
def main() -> None:
    options = parse()
    if options.json is not None:
        check_writable(options.json, "--json")
    logits, images = predict_split(options, "test")
    if images.labels.min() < 0 or images.labels.max() >= logits.shape[1]:
        raise UserError(f"{options.dataset}: every test image needs a label in 0..{logits.shape[1] - 1}")
    found = metrics(logits, torch.from_numpy(images.labels), auc=True)
    counts = confusion_matrix(images.labels, logits.argmax(1).numpy(), logits.shape[1])
    if options.json is not None:
        make_dir(Path(options.json).absolute().parent)
        write_json(options.json, {**found, "confusion_matrix": counts.tolist(), "classes": list(images.classes),
                                  "images": len(images), "load_path": options.load_path})
    print(confusion_text(counts))
    for name, value in found.items():
        print(f"{name} {value:.6g}")
    print(f"Test Accuracy: {found['eval/top-1-acc']}")


if __name__ == "__main__":
    run_main(main)
