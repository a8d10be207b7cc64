"""Encode the training images to the moments of their latents, with pseudo-labels as classes.

    python extract_imagenet_features_semi.py --config=configs/accelerate_b4_subset1_2img_k_128_large.py

It needs the pseudo-labels of train_classifier.py --func=get_cluster, and the VAE --config.autoencoder.pretrained_path:
a published file in either layout, a diffusers folder or hub name, or space-to-depth, which needs none. The same command
again makes what is missing.
"""
from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import torch

from EDM.imagenet.experiment.config import parse
from EDM.imagenet.experiment.images import training_images
from EDM.imagenet.experiment.layout import Layout
from EDM.latent.extraction import extract, pseudo_labels_of
from EDM.latent.latents import ABOUT, LABELS, MOMENTS
from EDM.latent.vae import load_coder
from shared import distributed
from shared.cli import Choice, Flag, Option, Text, UserError, run_main
from shared.data.safe import load_array
from shared.training.files import make_dir
from shared.training.record import Record

FLAGS = (
    Option("--dtype", Choice("float32", "float16"), "float32", "number format of the array on disk; float16 halves it"),
    Option("--device", Text, None, "cpu, cuda, cuda:N", default_help="a GPU if available", metavar="NAME"),
    Option("--overwrite", Flag, False, "replace latents of other images, labels or another VAE"),
)


def main(argv: Sequence[str] | None = None) -> None:
    options, config = parse(__doc__, FLAGS, argv)
    world = distributed.start(options.device)
    layout = Layout(config)
    folder = layout.latents

    photographs = distributed.on_main(lambda: training_images(config), world)
    labels = distributed.on_main(lambda: pseudo_labels_of(photographs, read_pseudo_labels(layout)), world)
    coder = load_coder(config.autoencoder.pretrained_path, config.z_shape, config.resolution,
                       "--config.autoencoder.pretrained_path")

    mirror = config.dataset.get("mirror", True)
    record = Record(folder, {"resolution": config.resolution, "dtype": options.dtype, "mirror images": mirror}, {
        "the training images": photographs.fingerprint, "the pseudo-labels": labels,
        "--config.autoencoder.pretrained_path": coder.fingerprint})
    if distributed.on_main(lambda: begin(record, options.overwrite), world):
        extract(photographs, labels, coder, folder, config.resolution, world, getattr(np, options.dtype), mirror)
        if world.main:
            record.write()
            print(f"Saved the moments of {len(photographs)} images{' and their mirror images' * mirror} to "
                  f"\"{folder}\"")
    distributed.stop()


def read_pseudo_labels(layout: Layout) -> dict[str, int]:
    """Return path below image_path, or in published folders base name -> pseudo-label, as train_classifier.py wrote
    them."""
    file = layout.image_paths if layout.image_paths.is_file() else layout.image_names
    try:
        labels, names = load_array(layout.pseudo_labels), torch.load(file, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; run train_classifier.py --func=get_cluster") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: cut short or no list of names ({type(error).__name__})") from None
    if not isinstance(names, list) or labels.shape != (len(names),):
        raise UserError(f"{layout.pseudo_labels}: {list(labels.shape)} labels do not belong to the names in "
                        f"{file}; run train_classifier.py --func=get_cluster anew")
    found = dict(zip(map(str, names), labels.astype(int).tolist(), strict=True))
    if len(found) < len(names):
        raise UserError(f"{file}: {len(names) - len(found)} names occur twice; run train_classifier.py "
                        "--func=get_cluster anew, which writes their folders too")
    return found


def begin(record: Record, overwrite: bool) -> bool:
    """Make the folder the place of these latents; False if all are there already."""
    if record.is_complete(overwrite):
        return False
    if not record.path.exists():  # any files there belong to something else
        for name in (MOMENTS, MOMENTS.replace(".npy", ".part.npy"), LABELS, ABOUT):
            (record.output / name).unlink(missing_ok=True)
    make_dir(record.output)
    record.begin()
    return True


if __name__ == "__main__":
    run_main(main)
