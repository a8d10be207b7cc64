"""Write a small VAE and a DiT-S/2 with random weights, to try vae_preprocessing.py and linear.py without the published.

    python small.py --outdir small
    python vae_preprocessing.py --dataset digits --vae small/vae --resolution 32
    python linear.py --dataset digits --ckpt small/DiT-S-2.pt --model DiT-S/2

Nothing is trained; the latents of the data set are brought to mean 0 and standard deviation 1, as the published have.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from DDAE.ddae.data import load_images
from DDAE.DiT.network import make_dit
from EDM.latent.vae import SCALE, autoencoder
from shared import cli
from shared.cli import Int, Option, Text, UserError, run_main
from shared.data.images import ImageSet
from shared.training.files import atomic, make_dir

MODEL, CHECKPOINT, VAE = "DiT-S/2", "DiT-S-2.pt", "vae"
STAGES = 4      # of the VAE: a latent's side is an eighth of the image's
MEASURED = 256  # images whose latents are measured
LOG_VARIANCE = -20.0  # of the VAE's posterior: its samples are its means
FLAGS = (
    Option("--outdir", Text, "small", "folder of vae/ and DiT-S-2.pt", metavar="DIR"),
    Option("--dataset", Text, "digits", "data set whose latents are measured: a name or a path"),
    Option("--data_dir", Text, "../data", "folder of the data sets", metavar="DIR"),
    Option("--resolution", Int(16), 32, "side of the enlarged images, a multiple of 16", unit="pixels"),
    Option("--seed", Int(), 0, "seed of the weights"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    options = cli.parse(__doc__, FLAGS, argv)
    if options.resolution % 16:
        raise UserError(f"--resolution {options.resolution}: expected a multiple of 16")
    return options


def main() -> None:
    options = parse()
    images = load_images(options.dataset, "train", options.data_dir)
    write_small(Path(options.outdir), images, options.resolution, options.seed)


def write_small(folder: Path, images: ImageSet, resolution: int, seed: int) -> None:
    """Write folder/vae, as diffusers does, and folder/DiT-S-2.pt, for images enlarged to this side."""
    torch.manual_seed(seed)
    make_dir(folder)
    vae = autoencoder()(block_out_channels=(8,) * STAGES, down_block_types=("DownEncoderBlock2D",) * STAGES,
                        up_block_types=("UpDecoderBlock2D",) * STAGES, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4)
    pixels = F.interpolate(torch.from_numpy(images.images[:MEASURED]).float() / 127.5 - 1,
                           size=(resolution, resolution), mode="bilinear").expand(-1, 3, -1, -1)
    net = make_dit(MODEL, resolution // 2 ** (STAGES - 1))
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        last, std, centre = vae.quant_conv, SCALE * latents.std((0, 2, 3)), latents.mean((0, 2, 3))
        last.weight[:4] /= std[:, None, None, None]
        last.bias[:4] = (last.bias[:4] - centre) / std
        last.weight[4:], last.bias[4:] = 0.0, LOG_VARIANCE
        for block in net.blocks:  # as initialised, every block is the identity
            block.adaLN_modulation[1].weight.normal_(std=0.2)
    vae.save_pretrained(folder / VAE)
    with atomic(folder / CHECKPOINT) as file:
        torch.save({"ema": net.state_dict()}, file)


if __name__ == "__main__":
    run_main(main)
