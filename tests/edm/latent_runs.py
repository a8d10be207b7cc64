"""Photographs in the layout of ImageNet, latents, and the smallest settings of the ImageNet commands."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from EDM.latent.vae import SpaceToDepth, autoencoder

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


def write_vae(file: Path) -> None:
    """Write a small VAE of 32 x 32 images, latents [4, 16, 16], as Stable Diffusion's is published."""
    torch.manual_seed(0)
    vae = autoencoder()(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=8)
    torch.save({compvis_name(name, 2): value for name, value in vae.state_dict().items()}, file)


def compvis_name(name: str, levels: int) -> str:
    """Return the published name of a tensor of diffusers' VAE."""
    words = name.split(".")
    side, rest = words[0], words[1:]
    if rest[0] in ("down_blocks", "up_blocks"):
        kind, level = rest[0].removesuffix("_blocks"), int(rest[1])
        inner = ["block", *rest[3:]] if rest[2] == "resnets" else [f"{kind}sample", *rest[4:]]
        rest = [kind, str(level if kind == "down" else levels - 1 - level), *inner]
    elif rest[0] == "mid_block" and rest[1] == "resnets":
        rest = ["mid", f"block_{int(rest[2]) + 1}", *rest[3:]]
    elif rest[0] == "mid_block":
        part = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[rest[3]]
        rest = ["mid", "attn_1", part, rest[-1]]
    elif rest[0] == "conv_norm_out":
        rest[0] = "norm_out"
    return ".".join([side, *rest]).replace(".conv_shortcut.", ".nin_shortcut.")
