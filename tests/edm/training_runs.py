"""Small training runs of EDM for the tests: a tiny labelled set, a tiny network, and what a run leaves behind."""
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# A network of 20,000 parameters with every kind of layer; 63 steps of 16 images.
TINY = ("--cond=1", "--cbase=8", "--cres=1,1", "--num-blocks=1", "--attn-resolutions=4", "--batch=16",
        "--duration=0.001", "--tick=1", "--dump=1", "--seed=3", "--lr=5e-3", "--lr-rampup=0.2", "--device=cpu")
STEPS = 63


def write_set(path: Path, count: int = 24, size: int = 8, channels: int = 3, labels: bool = True,
              seed: int = 0) -> Path:
    """Write a ZIP of random images with three classes."""
    random = np.random.default_rng(seed)
    names = []
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            pixels = random.integers(0, 256, (size, size, channels), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels if channels == 3 else pixels[:, :, 0]).save(buffer, "png")
            names.append(f"00000/img{number:08d}.png")
            archive.writestr(names[-1], buffer.getvalue())
        archive.writestr("dataset.json", json.dumps(
            {"labels": [[name, number % 3] for number, name in enumerate(names)] if labels else None}))
    return path


def checkpoint(folder: Path) -> dict:
    """Return what a checkpoint holds of the training itself."""
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {name: saved[name] for name in ("step", "finished", "net", "ema", "optimizer", "order", "losses")}


def outcome(folder: Path) -> dict:
    """Return all that a run has computed: checkpoint, snapshots, training states, losses."""
    files = sorted([*folder.glob("network-snapshot-*.pkl"), *folder.glob("training-state-*.pt")])
    return {"checkpoint": checkpoint(folder), "losses": losses(folder),
            **{file.name: torch.load(file, weights_only=True) for file in files}}


def stats(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[dict]:
    return [line["Loss/loss"] for line in stats(folder)]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two state dicts, but for the attention biases: the part of them that
    belongs to the keys has no gradient, and Adam makes steps of full size out of its rounding noise."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a if not name.endswith("qkv.bias"))
