"""Encode CIFAR-10 or Tiny-ImageNet, enlarged to 256x256, to the latents that DiT was trained on.

    python vae_preprocessing.py --dataset cifar --use_amp
    torchrun --standalone --nproc_per_node=4 vae_preprocessing.py --dataset tiny --use_amp
    python vae_preprocessing.py --vae ~/models/sd-vae-ft-mse     # without a network

A code is 0.18215 times a sample of the VAE's posterior. The training set is encoded --num_copies times, each time
flipped and cropped anew; the test set once, as it is. The same command again makes what is missing.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from DDAE.ddae.options import choose_precision
from DDAE.DiT.options import code_folder, dit_parser
from shared.cli import UserError, run_main
from shared.lazy import lazy
from shared.training.precision import autocast

if TYPE_CHECKING:
    from shared.data.images import ImageSet
    from shared.distributed import World

np, torch = lazy("numpy"), lazy("torch")

SCALE = 0.18215         # of Stable Diffusion's latents, whose deviation it brings to about 1
PUBLISHED_VAE = "stabilityai/sd-vae-ft-mse"
DEBUG_IMAGES = 16       # of each copy's first images are shown beside their reconstruction


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = dit_parser(__doc__)
    parser.add_argument("--num_copies", type=int, default=10, help="augmented copies of the training set [10]")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time on each process [32]")
    parser.add_argument("--vae", default=PUBLISHED_VAE, metavar="DIR|NAME", help="folder of a diffusers AutoencoderKL, "
                        f"or its name on the Hugging Face hub [{PUBLISHED_VAE}]")
    parser.add_argument("--resolution", type=int, default=256, help="images are enlarged to this side [256]")
    parser.add_argument("--data_dir", default="../data", metavar="DIR", help="folder of the data sets [../data]")
    options = parser.parse_args(argv)
    for name in ("num_copies", "batch_size", "resolution"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    return options


def main() -> None:
    options = parse()
    from DDAE.ddae.data import load_images
    from shared import distributed

    world = distributed.start(options.device)
    vae = load_vae(options.vae).to(world.device)
    if vae.config.latent_channels != 4:
        raise UserError(f"--vae {options.vae}: latents of {vae.config.latent_channels} channels; DiT takes 4")
    folder = code_folder(options)
    for split, copies in (("train", options.num_copies), ("test", 1)):
        images = load_images(options.dataset, split, options.data_dir)
        if world.main:
            save_labels(folder, split, images)
        for copy in range(copies):
            encode_copy(vae, images, folder, split, copy, options, world)
    distributed.stop()


def load_vae(name: str) -> torch.nn.Module:
    """Return diffusers' AutoencoderKL in eval mode, from a folder or by its name; UserError where it cannot be had."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("the VAE needs the package diffusers: pip install 'fewlabel[dit]'") from None
    try:
        vae = AutoencoderKL.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False,
                                            local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--vae {name}: cannot be loaded ({reason}); without a network, give a folder with config.json "
                        "and diffusion_pytorch_model.safetensors") from None
    return vae.eval().requires_grad_(False)


def save_labels(folder: Path, split: str, images: ImageSet) -> None:
    from shared.training.files import atomic, make_dir

    with atomic(make_dir(folder) / f"{split}_label.npy") as file:
        np.save(file, images.labels.astype(np.int64))


def encode_copy(vae: torch.nn.Module, images: ImageSet, folder: Path, split: str, copy: int,
                options: argparse.Namespace, world: World) -> None:
    """Write <split>_code_<copy>.npy, each process its part of the images; what is there already stays."""
    from DDAE.ddae.batches import share_out
    from DDAE.ddae.partial import PartialArray
    from DDAE.DiT.latents import code_path
    from shared import distributed
    from shared.training.progress import Progress

    codes_file = PartialArray(code_path(folder, split, copy))
    if codes_file.path.exists():
        if world.main:
            print(f"complete: {codes_file.path}", flush=True)
        return
    side = options.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    if world.main:
        codes_file.create((len(images), 4, side, side))
    distributed.barrier(world)
    codes, items = codes_file.open(), codes_file.missing(share_out(len(images), world))
    bar = Progress(f"{split} copy {copy}", len(items), "images", shown=world.main)
    for start in range(0, len(items), options.batch_size):
        chosen = items[start:start + options.batch_size]
        enlarged = prepared(images, chosen, split, copy, options, world.device)
        codes[chosen] = encode(vae, enlarged, chosen, f"{split} {copy}", options)
        if start == 0 and world.main:
            show(vae, enlarged, codes[chosen], folder, split, copy)
        bar.advance(len(chosen))
    bar.close()
    codes.flush()
    distributed.barrier(world)
    if world.main:
        codes_file.finish()
    distributed.barrier(world)


def prepared(images: ImageSet, items: np.ndarray, split: str, copy: int, options: argparse.Namespace,
             device: torch.device) -> torch.Tensor:
    """Return float32 [n, 3, S, S] in [0, 1]: flipped and cropped (training set), then enlarged bilinearly."""
    from shared.augment.views import WeakPolicy, draw_weak, shift_whole
    from shared.training.randomness import numpy_rng

    chosen = torch.from_numpy(images.images[items])
    if split == "train":
        # Drawn for the whole copy, so that an image's view depends on nothing but the copy.
        draws = draw_weak(len(images), numpy_rng(options.seed, copy, "augment latents"), images.size,
                          WeakPolicy(pad_mode="zero"))
        chosen = shift_whole(chosen, draws[items])
    # On bytes, on the CPU: the arithmetic of Pillow's bilinear filter.
    enlarged = torch.nn.functional.interpolate(chosen, size=(options.resolution, options.resolution), mode="bilinear",
                                               antialias=True)
    return enlarged.to(device).float().div_(255).expand(-1, 3, -1, -1)  # gray images get three equal channels


def encode(vae: torch.nn.Module, images: torch.Tensor, items: np.ndarray, purpose: str,
           options: argparse.Namespace) -> np.ndarray:
    """Return the codes float32 [n, 4, s, s]; the posterior's noise is a function of (seed, item, purpose)."""
    from DDAE.ddae.batches import item_noise

    device = images.device
    with torch.no_grad(), autocast(device, choose_precision(options, device)):
        posterior = vae.encode(2 * images - 1).latent_dist
    mean, deviation = posterior.mean.float(), posterior.std.float()
    noise = item_noise(options.seed, items, mean.shape[1:], f"posterior {purpose}").to(device)
    return (SCALE * (mean + deviation * noise)).cpu().numpy()


def show(vae: torch.nn.Module, images: torch.Tensor, codes: np.ndarray, folder: Path, split: str, copy: int) -> None:
    """Write the first images and what the VAE makes of their codes, to look at."""
    from shared.report.plots import image_grid

    images = images[:DEBUG_IMAGES]
    with torch.no_grad():
        decoded = vae.decode(torch.from_numpy(codes[:DEBUG_IMAGES]).to(images.device) / SCALE).sample / 2 + 0.5
    for kind, shown in (("original", images), ("reconstruct", decoded)):
        pixels = (255 * shown.float() + 0.5).clamp(0, 255).to(torch.uint8).cpu().numpy()
        image_grid({f"{split} {row // 8}": pixels[row:row + 8] for row in range(0, len(pixels), 8)},
                   folder / f"{split}_debug_{kind}_{copy}.png", scale=1)


if __name__ == "__main__":
    run_main(main)
