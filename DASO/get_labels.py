"""Labels for all training images of a finished run: true ones where given, pseudo-labels for the others.

    python get_labels.py --run outputs/digits/fixmatch/DASO_digits_l_40_10_ul_70_10_seed_0

Writes into the run's folder, or --dest: pseudo_label.npz (images, labels, classes), which EDM/dataset_tool.py reads,
and pseudo_label.json (class counts, recall and precision, where the truth is known). With --per_class N also
real_balanced/, N images of every class under these labels: a control for generated ones.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.cli import Parser, UserError, run_main

FINAL = "model_final.pth.tar"


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a finished run of main.py")
    parser.add_argument("--dest", type=Path, metavar="DIR", help="where to write [the run's folder]")
    parser.add_argument("--per_class", type=int, default=0, metavar="N", help="also write N real images of every class")
    return parser.parse_args(argv)


def main() -> None:
    options = parse_options()
    from DASO.lib.config.config import parse

    config = options.run / "config.yaml"
    if not config.is_file() or not (options.run / FINAL).is_file():
        raise UserError(f"--run {options.run}: expected the folder of a finished run, with config.yaml and {FINAL}")
    cfg, _ = parse(["--config-file", str(config)])
    import numpy as np

    from DASO.lib.checkpoints import load_weights
    from DASO.lib.data.sets import load_data
    from DASO.lib.trainer import Trainer
    from DASO.main import device_of
    from shared.data.classes import class_balanced_draw
    from shared.data.images import ImageSet
    from shared.data.writers import write_folder, write_npz
    from shared.distributed import start
    from shared.training.files import atomic, make_dir

    data = load_data(cfg)
    if data.unlabelled is None:
        raise UserError(f"--run {options.run}: {cfg.ALGORITHM.NAME} has no unlabelled images to label")
    trainer = Trainer(cfg, data, start(device_of(cfg)), options.run)
    load_weights(trainer, options.run / FINAL)
    pseudo = trainer.predict(trainer.batches.unlabelled).argmax(1).cpu().numpy()
    real = data.labelled.subset(np.arange(len(data.labelled) - data.generated))
    everything = real.concatenate(data.unlabelled)
    labelled = ImageSet(everything.images, np.concatenate([real.labels, pseudo]), everything.classes, everything.name)

    dest = make_dir(options.dest or options.run)
    write_npz(labelled, dest / "pseudo_label.npz")
    report = describe(pseudo, data.unlabelled.labels, data.num_classes)
    report |= {"images": len(labelled), "classes": list(labelled.classes), "labelled_counts": data.real_counts.tolist()}
    with atomic(dest / "pseudo_label.json", "w") as file:
        json.dump(report, file, indent=1)
    if options.per_class:
        chosen = class_balanced_draw(labelled.labels, options.per_class, cfg.SEED)
        write_folder(labelled.subset(chosen), dest / "real_balanced")
    agreement = "not known" if report["agreement"] is None else f"{report['agreement']:.4f}"
    print(f"{len(pseudo)} pseudo-labels, a class {report['pseudo_label_counts']}; truth {report['true_label_counts']}; "
          f"agreement {agreement}\nwrote {dest / 'pseudo_label.npz'}")


def describe(pseudo: Any, truth: Any, num_classes: int) -> dict[str, Any]:
    """Return counts, and agreement, recall and precision of pseudo-labels int64 [N] where the truth is known (not -1).
    """
    import numpy as np

    known = truth >= 0
    right = np.bincount(truth[known & (pseudo == truth)], minlength=num_classes)
    true, predicted = (np.bincount(part[known], minlength=num_classes) for part in (truth, pseudo))

    def share(of: np.ndarray) -> list[float | None]:
        return [float(part / whole) if whole else None for part, whole in zip(right, of, strict=True)]

    return {"pseudo_label_counts": np.bincount(pseudo, minlength=num_classes).tolist(),
            "true_label_counts": true.tolist(), "agreement": float(right.sum() / known.sum()) if known.any() else None,
            "recall": share(true), "precision": share(predicted)}


if __name__ == "__main__":
    run_main(main)
