"""Write a small VAE and a DiT-S/2 with random weights, to try vae_preprocessing.py and linear.py without the published.

    python small.py --outdir small
    python vae_preprocessing.py --dataset digits --vae small/vae --resolution 32
    python linear.py --dataset digits --ckpt small/DiT-S-2.pt --model DiT-S/2
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shared.cli import Parser, UserError, run_main

MODEL, CHECKPOINT, VAE = "DiT-S/2", "DiT-S-2.pt", "vae"
STAGES = 4      # of the VAE: a latent's side is an eighth of the image's


def write_small(folder: Path, resolution: int, seed: int) -> None:
    """Write folder/vae, as diffusers does, and folder/DiT-S-2.pt for latents of images of this side."""
    import torch

    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("the VAE needs the package diffusers: pip install 'fewlabel[dit]'") from None
    from DDAE.DiT.network import make_dit
    from shared.files import atomic, make_dir

    torch.manual_seed(seed)
    make_dir(folder)
    AutoencoderKL(block_out_channels=(8,) * STAGES, down_block_types=("DownEncoderBlock2D",) * STAGES,
                  up_block_types=("UpDecoderBlock2D",) * STAGES, layers_per_block=1, norm_num_groups=4,
                  latent_channels=4).save_pretrained(folder / VAE)
    net = make_dit(MODEL, resolution // 2 ** (STAGES - 1))
    with torch.no_grad():  # as initialised, every block is the identity
        for block in net.blocks:
            block.adaLN_modulation[1].weight.normal_(std=0.02)
    with atomic(folder / CHECKPOINT) as file:
        torch.save({"ema": net.state_dict()}, file)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--outdir", default="small", metavar="DIR", help="where they are written [small]")
    parser.add_argument("--resolution", type=int, default=32, help="side of the enlarged images [32]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.resolution < 16 or options.resolution % 16:
        raise UserError(f"--resolution {options.resolution}: expected a multiple of 16")
    return options


def main() -> None:
    options = parse()
    write_small(Path(options.outdir), options.resolution, options.seed)


if __name__ == "__main__":
    run_main(main)
