"""Photographs in the layout of ImageNet, latents, and the smallest settings of the ImageNet commands."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from EDM.latent.vae import SpaceToDepth

CLASSES = ("n01440764", "n01443537", "n02007558")
CONFIGS = Path(__file__).resolve().parents[2] / "EDM" / "imagenet" / "configs"
LARGE = f"--config={CONFIGS / 'accelerate_b4_subset1_2img_k_128_large.py'}"
HUGE = f"--config={CONFIGS / 'accelerate_b4_subset1_2img_k_128_huge.py'}"
CLUSTER = "deit_base_p4-imagenet_subsets1-2imgs_class"
LATENTS = Path("pretrained/datasets", CLUSTER, "imagenet32_features")
WORKDIR = Path("assets/DPM", CLUSTER, "32")
# Pixels of 32 x 32 images rearranged to [12, 16, 16], a network of two blocks.
TINY = ("--config.image_path=data", "--config.resolution=32", "--config.autoencoder.pretrained_path=space-to-depth",
        "--config.z_shape=12,16,16", "--config.nnet.img_size=16", "--config.nnet.in_chans=12",
        "--config.nnet.embed_dim=16", "--config.nnet.depth=2", "--config.nnet.num_heads=2",
        "--config.nnet.num_classes=4", "--config.nnet.patch_size=4", "--config.train.n_steps=6",
        "--config.train.batch_size=4", "--config.train.log_interval=2", "--config.train.eval_interval=6",
        "--config.train.save_interval=3", "--config.lr_scheduler.warmup_steps=2", "--config.sample.sample_steps=3",
        "--config.sample.n_samples=8", "--config.sample.mini_batch_size=4", "--config.augmentation_K=3")


def write_photographs(folder: Path, per_class: int = 4) -> None:
    """Write data/train/<class>/<class>_<i>.png, and pseudo-labels as train_classifier.py does."""
    rng, names, labels = np.random.default_rng(0), [], []
    for label, name in enumerate(CLASSES):
        place = folder / "data" / "train" / name
        place.mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 256, (36 + label, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{name}_{number}.png")
            names.append(f"{name}_{number}.png")
            labels.append((label + number) % len(CLASSES))
    cluster = folder / "pretrained" / "cluster" / CLUSTER
    cluster.mkdir(parents=True)
    np.save(cluster / "imagenet_features_preds.npy", np.array(labels))
    torch.save(names, cluster / "imagenet_features_fnames.pth")


def write_latents(folder: Path, shape: tuple[int, ...] = (12, 16, 16), count: int = 12, classes: int = 3) -> None:
    """Write random latents as extract_imagenet_features_semi.py does."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    np.save(folder / "moments.npy", rng.standard_normal((count, 2 * shape[0], *shape[1:]), np.float32))
    np.save(folder / "labels.npy", np.arange(count) % classes)
    about = {"classes": [f"class{number}" for number in range(classes)], "scale": 1.0, "resolution": 32,
             "coder": SpaceToDepth(32 // shape[1]).fingerprint}
    (folder / "latents.json").write_text(json.dumps(about))
