"""Make a folder in which the commands of this experiment are typed, for a small data set or one's own photographs.

    python prepare.py --config=configs/own.py --dataset=photos/ --dest=run
    cd run; python .../train_classifier.py --config=config.py --func=train_classifier_stage1

Writes DEST/config.py, a copy of --config with the paths and number of classes of the images, and DEST/labels.txt, the
labelled images; a list of your own there is kept. Photographs stay in place: PATH/train/<class>/, PATH/test/<class>/
and, optionally, PATH/unlabeled/. A data set by name is written to DEST/images, enlarged to
--config.resolution.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from pprint import pformat
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from EDM.imagenet.experiment.config import Config, parse
from EDM.imagenet.experiment.images import training_images, validation_images
from EDM.latent.uvit import make_uvit
from EDM.latent.vae import load_coder
from shared.cli import Flag, Int, Option, Text, UserError, run_main
from shared.data.datasets import NAMES, load_dataset
from shared.data.images import ImageSet
from shared.data.photographs import PhotographSet
from shared.data.writers import write_folder
from shared.training.files import make_dir, write_text
from shared.training.randomness import numpy_rng
from shared.training.record import Record
from TorchSSL.encoders.encoder import open_encoder

FLAGS = (
    Option("--dataset", Text, "digits", "a data set by name, or the path of your own images"),
    Option("--data_dir", Text, "../../TorchSSL/data", "folder of the published data sets"),
    Option("--dest", required=True, metavar="DIR", help="folder to work in"),
    Option("--labels", Int(0), 0, "labelled images of every class, drawn at random; 0: all that lie in train/<class>/"),
    Option("--encoder", Text, None, "frozen encoder: a file or folder of MSN, or timm:NAME[@FILE|@pretrained]",
           default_help="DEST/msn/encoder.pth.tar, see train_msn.py"),
    Option("--seed", Int(0), 1, "seed of the labelled images and the diffusion model"),
    Option("--stages", Text, "1,2,3", "planned stages; their encoder, VAE and network are tried first"),
    Option("--overwrite", Flag, False, "replace files made from other images or with another seed"),
)
DROPPED = ("config_name", "hparams")  # the reader adds them again


def main(argv: Sequence[str] | None = None) -> None:
    options, config = parse(__doc__, FLAGS, argv)
    check_networks(options, config)
    dest = make_dir(options.dest)
    config["image_path"] = os.path.abspath(options.dataset)
    if options.dataset in NAMES:
        config["image_path"] = str(dest / "images")
        write_images(options, config)
    images = training_images(config)
    validation_images(config, images.classes)
    rows = len(images) * (2 if config.dataset.get("mirror", True) else 1)
    if "2" in options.stages and config.train.batch_size > rows:
        raise UserError(f"--config.train.batch_size={config.train.batch_size}: {options.dataset} has only {rows} "
                        "latents; give a smaller batch")
    write_labels(options, images, dest / "labels.txt")

    if options.dataset in NAMES:
        config["image_path"] = "images"
    config.nnet["num_classes"], config["seed"] = images.num_classes + 1, options.seed
    if options.encoder is not None:
        path = Path(options.encoder)
        config["encoder"] = os.path.abspath(path) if path.exists() else options.encoder
        config["model_name"] = config["fname"] = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.name)
    kept = {key: value for key, value in config.items() if key not in DROPPED}
    text = pformat(kept, width=100, sort_dicts=False).replace("\n", "\n    ")
    write_text(dest / "config.py", f'"""Written by prepare.py from {options.config}, for {options.dataset}."""\n\n\n'
                                   f"def get_config() -> dict:\n    return {text}\n")
    print(f"{len(images)} training images of {images.num_classes} classes; configuration: {dest / 'config.py'}")


def check_networks(options: SimpleNamespace, config: Config) -> None:
    """Raise UserError for an encoder, VAE or U-ViT that a later step could not open."""
    if options.encoder is not None:
        open_encoder(options.encoder)
    if "2" in options.stages:
        load_coder(config.autoencoder.pretrained_path, config.z_shape, config.resolution,
                   "--config.autoencoder.pretrained_path")
        with torch.device("meta"):
            make_uvit(config.nnet, config.z_shape)


def write_images(options: SimpleNamespace, config: Config) -> None:
    """Write the training and test images of a data set as RGB images of the configuration's size."""
    for split, name in (("train", "train"), ("test", "val")):
        source, folder = load_dataset(options.dataset, split, options.data_dir), Path(config.image_path, name)
        record = Record(folder, {"resolution": config.resolution}, {"--dataset": source})
        if record.is_complete(options.overwrite):
            continue
        size = (config.resolution, config.resolution)
        pixels = [F.interpolate(torch.from_numpy(np.array(part)), size, mode="bilinear", antialias=True)
                  for part in np.array_split(source.images, 1 + len(source) // 1000)]
        rgb = torch.cat(pixels).expand(-1, 3, -1, -1).numpy()
        if folder.exists():
            shutil.rmtree(folder)
        write_folder(ImageSet(rgb, source.labels, source.classes, source.name), folder)
        record.write()


def write_labels(options: SimpleNamespace, images: PhotographSet, file: Path) -> None:
    """Write the list of labelled images, `<class>/<file>` a line."""
    chosen = []
    for label in range(images.num_classes):
        positions = np.flatnonzero(images.labels == label)
        if options.labels > len(positions):
            raise UserError(f"--labels: {images.classes[label]} has only {len(positions)} images in train")
        order = numpy_rng(options.seed, label, "labelled images").permutation(positions)
        chosen += order[:options.labels].tolist() if options.labels else positions.tolist()
    record = Record(file, {"labels": options.labels, "seed": options.seed}, {"--dataset": images.fingerprint})
    if record.is_complete(options.overwrite):
        return
    if file.exists() and not options.overwrite:
        print(f"kept as it is, for it was written by hand: {file}")
        return
    write_text(file, "".join(f"{images.names[position].removeprefix('train/')}\n" for position in chosen))
    record.write()


if __name__ == "__main__":
    run_main(main)
