"""Images to be scored and small networks to score them with, for the tests of the metrics."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from EDM.training.networks import EDMPrecond
from EDM.training.snapshots import save_snapshot
from TorchSSL.core.networks import build_network

CLASSES = 3


def write_classifier(path: Path, channels: int = 3, seed: int = 0) -> Path:
    """Write the checkpoint of a small classifier of 5 classes, as a TorchSSL run would, with random weights."""
    torch.manual_seed(seed)
    options = {"net": "WideResNet", "depth": 10, "widen_factor": 1, "leaky_slope": 0.1, "dataset": "digits",
               "num_classes": 5}
    net = build_network("WideResNet", 5, depth=10, widen_factor=1, in_channels=channels)
    torch.save({"ema_model": net.state_dict(), "options": options, "mean": (0.5,) * channels, "std": (0.3,) * channels},
               path)
    return path


def pixels(count: int, seed: int, channels: int = 3, size: int = 8) -> np.ndarray:
    """Return uint8 [count, size, size, channels]: a bright stripe whose place tells the class, and noise."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 120, (count, size, size, channels))
    for index in range(count):
        images[index, index % CLASSES * 2] += 100
    return images.astype(np.uint8)


def write_images(folder: Path, count: int, seed: int, channels: int = 3, layout: str = "seeds", size: int = 8) -> Path:
    """Write PNGs as {seed:06d}.png ("seeds"), in class folders ("classes"), or with a dataset.json ("listed")."""
    labels = []
    for index, image in enumerate(pixels(count, seed, channels, size)):
        name = f"{index:06d}.png" if layout == "seeds" else f"img{index:05d}.png"
        place = folder / (str(index % CLASSES) if layout == "classes" else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[:, :, 0] if channels == 1 else image).save(place / name)
        labels.append([name, index % CLASSES])
    if layout == "listed":
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def write_network(path: Path, channels: int = 3, label_dim: int = CLASSES) -> Path:
    """Write the snapshot of a small diffusion model with random weights."""
    torch.manual_seed(0)
    net = EDMPrecond(8, channels, label_dim, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1,
                     attn_resolutions=[])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_snapshot(path, net)
    return path
