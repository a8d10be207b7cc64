"""Encode CIFAR-10 or Tiny-ImageNet, enlarged to 256x256, to the latents that DiT was trained on.

    python vae_preprocessing.py --dataset cifar --use_amp
    torchrun --standalone --nproc_per_node=4 vae_preprocessing.py --dataset tiny --use_amp
    python vae_preprocessing.py --vae ~/models/sd-vae-ft-mse     # without a network

A code is 0.18215 times a sample of the VAE's posterior. The training set is encoded --num_copies times, each time
flipped and cropped anew; the test set once, as it is. The same command again makes what is missing.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from DDAE.ddae.config import choose_precision
from DDAE.ddae.data import item_noise, load_images
from DDAE.ddae.sampling import to_uint8
from DDAE.DiT.latents import DIT, code_folder, code_path
from EDM.latent.vae import SCALE, load_vae, sample
from shared import cli, distributed
from shared.augment.views import WeakPolicy, draw_weak, shift_whole
from shared.cli import Flag, Int, Option, Text, UserError, less_memory, run_main
from shared.data.cache import fill_arrays
from shared.data.images import ImageSet
from shared.distributed import World
from shared.report.plots import image_grid
from shared.training.files import make_dir, taken, write_array
from shared.training.fingerprint import fingerprint_arrays
from shared.training.precision import autocast, to_device
from shared.training.randomness import numpy_rng
from shared.training.record import Record

PUBLISHED_VAE = "stabilityai/sd-vae-ft-mse"
DEBUG_IMAGES = 16       # of each copy's first images are shown beside their reconstruction
FLAGS = (
    *DIT,
    Option("--num_copies", Int(1), 10, "augmented copies of the training set"),
    Option("--batch_size", Int(1), 32, "batch of the VAE", unit="images per process"),
    Option("--vae", Text, PUBLISHED_VAE, "file of weights, folder of a diffusers AutoencoderKL, or its name on the "
           "Hugging Face hub", metavar="FILE|DIR|NAME"),
    Option("--resolution", Int(1), 256, "side of the enlarged images", unit="pixels"),
    Option("--data_dir", Text, "../data", "folder of the data sets", metavar="DIR"),
    Option("--overwrite", Flag, False, "replace latents of other images, another VAE or other settings"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("--batch_size")
def main() -> None:
    options = parse()
    world = distributed.start(options.device)
    options.precision = choose_precision(options, world.device)
    vae = load_vae(options.vae).to(world.device)
    if vae.config.latent_channels != 4:
        raise UserError(f"--vae {options.vae}: latents of {vae.config.latent_channels} channels; DiT takes 4")
    folder = code_folder(options)
    sets = {split: load_images(options.dataset, split, options.data_dir) for split in ("train", "test")}
    record = Record(folder, {name: getattr(options, name) for name in ("resolution", "seed", "precision")}, {
        "--dataset (train)": sets["train"], "--dataset (test)": sets["test"],
        "--vae": fingerprint_arrays(*(tensor.cpu().numpy() for tensor in vae.state_dict().values()))})
    wanted = [("train", copy) for copy in range(options.num_copies)] + [("test", 0)]
    with ExitStack() as held:
        if distributed.on_main(lambda: begin(record, sets, wanted, options.overwrite, held), world):
            for split, copy in wanted:
                encode_copy(vae, sets[split], folder, split, copy, options, world)
            if world.main:
                record.write()
    distributed.stop()


def begin(record: Record, sets: dict[str, ImageSet], wanted: list[tuple[str, int]], overwrite: bool,
          held: ExitStack) -> bool:
    """Make the folder the place of these latents, and write the labels; False if all is there already.

    Raises UserError if it is the place of others, unless `overwrite`; then these are deleted.
    """
    folder, had_record = record.output, record.path.exists()
    if record.is_complete(overwrite) and all(code_path(folder, split, copy).exists() for split, copy in wanted):
        return False
    held.enter_context(taken(folder))
    if had_record and not record.path.exists():
        for path in folder.glob("*_code_*.npy"):
            path.unlink()
    make_dir(folder)
    record.begin()
    for split, images in sets.items():
        write_array(folder / f"{split}_label.npy", images.labels.astype(np.int64))
    return True


def encode_copy(vae: nn.Module, images: ImageSet, folder: Path, split: str, copy: int, options: SimpleNamespace,
                world: World) -> None:
    """Write <split>_code_<copy>.npy, each process its part of the images; existing rows stay."""
    path = code_path(folder, split, copy)
    if path.exists():
        if world.main:
            print(f"complete: {path}", flush=True)
        return
    side = options.resolution // 2 ** (len(vae.config.block_out_channels) - 1)

    def make(items: np.ndarray) -> dict[str, np.ndarray]:
        enlarged = prepared(images, items, split, copy, options, world.device)
        codes = encode(vae, enlarged, items, f"{split} {copy}", options)
        if items[0] == 0:
            show(vae, enlarged, codes, folder, split, copy)
        return {"codes": codes}

    fill_arrays({"codes": path}, {"codes": (len(images), 4, side, side)}, partial(map, make), options.batch_size,
                world, f"{split} copy {copy}")


def prepared(images: ImageSet, items: np.ndarray, split: str, copy: int, options: SimpleNamespace,
             device: torch.device) -> Tensor:
    """Return float32 [n, 3, S, S] in [0, 1]: flipped and cropped (training set), then enlarged bilinearly."""
    chosen = torch.from_numpy(images.images[items])
    if split == "train":
        # Drawn for the whole copy: an image's view depends on the copy alone.
        draws = draw_weak(len(images), numpy_rng(options.seed, copy, "augment latents"), images.size,
                          WeakPolicy(pad_mode="zero"))
        chosen = shift_whole(chosen, draws[items])
    # On bytes, on the CPU: the arithmetic of Pillow's bilinear filter.
    enlarged = nn.functional.interpolate(chosen, size=(options.resolution, options.resolution), mode="bilinear",
                                         antialias=True)
    return enlarged.to(device).float().div_(255).expand(-1, 3, -1, -1)  # gray images get three equal channels


def encode(vae: nn.Module, images: Tensor, items: np.ndarray, purpose: str, options: SimpleNamespace) -> np.ndarray:
    """Return the codes float32 [n, 4, s, s]; the posterior's noise is a function of (seed, item, purpose)."""
    device = images.device
    with torch.no_grad(), autocast(device, options.precision):
        moments = vae.encode(2 * images - 1).latent_dist.parameters.float()
    noise = item_noise(options.seed, items, (moments.shape[1] // 2, *moments.shape[2:]), f"posterior {purpose}")
    return sample(moments, noise.to(device)).cpu().numpy()


def show(vae: nn.Module, images: Tensor, codes: np.ndarray, folder: Path, split: str, copy: int) -> None:
    """Write the first images beside the VAE's reconstructions, to look at."""
    images = images[:DEBUG_IMAGES]
    with torch.no_grad():
        decoded = vae.decode(to_device(codes[:DEBUG_IMAGES], images.device) / SCALE).sample / 2 + 0.5
    for kind, shown in (("original", images), ("reconstruct", decoded)):
        pixels = to_uint8(shown.float()).cpu().numpy()
        image_grid({f"{split} {row // 8}": pixels[row:row + 8] for row in range(0, len(pixels), 8)},
                   folder / f"{split}_debug_{kind}_{copy}.png", scale=1)


if __name__ == "__main__":
    run_main(main)
