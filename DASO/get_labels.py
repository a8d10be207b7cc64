"""Labels for all training images of a finished run: true ones where given, pseudo-labels for the others.

    python get_labels.py --run outputs/digits/fixmatch/DASO_digits_l_40_10_ul_70_10_seed_0

Writes into the run's folder, or --dest: pseudo_label.npz (images, labels, classes), which EDM/dataset_tool.py reads,
and pseudo_label.json (class counts, recall and precision, where the truth is known). With --per_class N also
real_balanced/, N images of every class under these labels: a control for generated ones.
"""
from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from DASO.lib.config.config import Config
from DASO.lib.config.config import parse as read_config
from DASO.lib.data.sets import load_data
from DASO.lib.report import rates
from DASO.lib.trainer import FINAL, Trainer, device_of
from shared.cli import Flag, Int, Option, UserError, parse, run_main
from shared.data.classes import class_balanced_draw
from shared.data.images import ImageSet, read_images
from shared.data.writers import write_folder, write_npz
from shared.distributed import start
from shared.training.files import make_dir, write_json
from shared.training.record import Record

FLAGS = (
    Option("--run", required=True, help="folder of a finished run of main.py", metavar="DIR"),
    Option("--dest", help="folder of the labels", default_help="the run's folder", metavar="DIR"),
    Option("--per_class", Int(0), 0, "also write this number of real images of every class", unit="images"),
    Option("--overwrite", Flag, False, "replace labels of another classifier"),
)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    run = Path(options.run)
    if not (run / "config.yaml").is_file() or not (run / FINAL).is_file():
        raise UserError(f"--run {run}: expected the folder of a finished run, with config.yaml and {FINAL}")
    cfg, _ = read_config(["--config-file", str(run / "config.yaml")])
    data = load_data(cfg)
    if data.unlabelled is None:
        raise UserError(f"--run {run}: {cfg.ALGORITHM.NAME} has no unlabelled images to label")
    trainer = Trainer(cfg, data, start(device_of(cfg)), run)
    dest = make_dir(options.dest or run)
    record = Record(dest / "pseudo_label.npz", {},
                    {"--run": run / FINAL, "DATASET.ROOT": trainer.inputs()["DATASET.ROOT"]})
    if not record.is_complete(options.overwrite):
        write_labels(trainer, dest)
        record.write()
    if options.per_class:
        write_balanced(dest, options, cfg)


def write_labels(trainer: Trainer, dest: Path) -> None:
    """Label the images of a run; write pseudo_label.npz and pseudo_label.json."""
    data = trainer.data
    trainer.load_weights(trainer.folder / FINAL)
    pseudo = trainer.predict(trainer.batches.unlabelled).argmax(1).cpu().numpy()
    everything = data.real_labelled.concatenate(data.unlabelled)
    labels = np.concatenate([data.real_labelled.labels, pseudo])
    report = describe(pseudo, data.unlabelled.labels, data.num_classes)
    report |= {"images": len(labels), "classes": list(everything.classes), "labelled_counts": data.real_counts.tolist()}
    write_json(dest / "pseudo_label.json", report)
    write_npz(ImageSet(everything.images, labels, everything.classes, everything.name), dest / "pseudo_label.npz")
    agreement = "not known" if report["agreement"] is None else f"{report['agreement']:.4f}"
    print(f"{len(pseudo)} pseudo-labels, a class {report['pseudo_label_counts']}; truth {report['true_label_counts']}; "
          f"agreement {agreement}\nwrote {dest / 'pseudo_label.npz'}")


def write_balanced(dest: Path, options: SimpleNamespace, cfg: Config) -> None:
    """Write real_balanced/, a sub-folder a class."""
    folder, source = dest / "real_balanced", dest / "pseudo_label.npz"
    record = Record(folder, {"--per_class": options.per_class, "SEED": cfg.SEED}, {"pseudo_label.npz": source})
    if record.is_complete(options.overwrite):
        return
    shutil.rmtree(folder, ignore_errors=True)  # written in part, or by a version that kept no record
    images = read_images(source)
    write_folder(images.subset(class_balanced_draw(images.labels, options.per_class, cfg.SEED)), folder)
    record.write()


def describe(pseudo: np.ndarray, truth: np.ndarray, num_classes: int) -> dict[str, Any]:
    """Return counts, and agreement, recall and precision of pseudo-labels int64 [N] where the truth is known (not -1).
    """
    confusion = np.zeros((num_classes + 1, num_classes), np.int64)  # the last row: truth unknown
    np.add.at(confusion, (truth, pseudo), 1)
    known, found = confusion[:num_classes], rates(confusion)
    return {"pseudo_label_counts": confusion.sum(0).tolist(), "true_label_counts": known.sum(1).tolist(),
            "agreement": float(known.trace() / known.sum()) if known.any() else None,
            "recall": as_json(found["recall"]), "precision": as_json(found["precision"])}


def as_json(rates_by_class: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(rate) or rate < 0 else float(rate) for rate in rates_by_class]


if __name__ == "__main__":
    run_main(main)
