"""Draw an 8x8 grid of images from each of the published EDM networks, with the published settings.

    python example.py --network=edm-cifar10-32x32-cond-vp.pkl --network=edm-imagenet-64x64-cond-adm.pkl
    python example.py --network=training-runs/.../network-snapshot-latest.pkl --preset=cifar10
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from EDM.sampling.conditions import read_conditions
from EDM.sampling.samplers import denoiser, edm_sampler
from EDM.training.published import local_file
from EDM.training.snapshots import load_network
from shared.cli import Choice, Int, Option, UserError, parse, run_main
from shared.data.writers import write_png
from shared.distributed import start
from shared.training.files import make_dir
from shared.training.progress import Progress

SIDE = 8  # images in a row and in a column

# The published sampler settings of each data set.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": dict(num_steps=18),
    "ffhq": dict(num_steps=40),
    "afhqv2": dict(num_steps=40),
    "imagenet": dict(num_steps=256, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003),
}


FLAGS = (
    Option("--network", required=True, many=True, metavar="PATH|URL",
           help="network snapshot, ours or a published one; may be given several times"),
    Option("--preset", Choice(*PRESETS), None, "settings", default_help="by the name of the file"),
    Option("--outdir", default=".", metavar="DIR", help="where to save the PNGs"),
    Option("--seed", Int(0), 0, "random seed"),
    Option("--steps", Int(1), None, "sampling steps", default_help="by the preset"),
    Option("--device", metavar="NAME", help="cpu, cuda or cuda:N", default_help="a GPU if available"),
)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    plans = {network: flags.preset or preset_of(network) for network in flags.network}
    if len(set(plans.values())) < len(plans):
        raise UserError("--network: two networks of one preset would be drawn into the same file; give one at a time, "
                        "each with an --outdir of its own")
    for network in plans:
        local_file(network)  # a missing file is reported before hours of sampling
    folder, world = make_dir(flags.outdir), start(flags.device)
    for network, name in plans.items():
        settings = PRESETS[name] | ({} if flags.steps is None else {"num_steps": flags.steps})
        draw_grid(network, name, folder, flags.seed, world.device, settings)


def preset_of(network: str) -> str:
    """Return the preset of the data set in the file's name; UserError if there is none."""
    file = network.rstrip("/").rpartition("/")[2]
    for name in PRESETS:
        if name in file.lower():
            return name
    raise UserError(f"--network: {file} has none of the names {', '.join(PRESETS)} in it; choose the settings with "
                    "--preset")


def draw_grid(network: str, name: str, folder: Path, seed: int, device: torch.device,
              settings: Mapping[str, Any]) -> None:
    """Write `folder`/{name}-{R}x{R}.png: SIDE x SIDE images of random classes, from one generator."""
    print(f"Loading network from \"{network}\"...")
    net = load_network(network, device)
    if net.img_channels not in (1, 3):
        raise UserError(f"--network: {network} makes images of {net.img_channels} channels; a PNG holds 1 or 3")
    target = folder / f"{name}-{net.img_resolution}x{net.img_resolution}.png"
    print(f"Generating {SIDE * SIDE} images to \"{target}\" ({settings['num_steps']} steps on {device.type})...")

    # Latents, then classes, then the noise of stochastic steps: the published order of draws.
    random = torch.Generator(device).manual_seed(seed)
    shape = [SIDE * SIDE, net.img_channels, net.img_resolution, net.img_resolution]
    latents = torch.randn(shape, generator=random, device=device)
    labels = None
    if net.label_dim:
        trained = read_conditions(net.dataset_kwargs, net.label_dim)  # classes as often as in the training set
        drawn = torch.randint(trained.draws_from, shape[:1], generator=random, device=device)
        labels = trained.inputs(trained.chosen(drawn), device)

    model, dtype = denoiser(net, labels), torch.float64
    bar = Progress(f"sampling {name}", 2 * settings["num_steps"] - 1, "calls")

    def counted(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        bar.advance()
        return model(x, sigma)

    images = edm_sampler(counted, latents, limits=(net.sigma_min, net.sigma_max), dtype=dtype,
                         round_sigma=lambda sigmas: net.round_sigma(sigmas.to(device, dtype)).cpu().double(),
                         noise=lambda step: torch.randn(shape, generator=random, device=device, dtype=dtype),
                         **settings)
    bar.close()
    if not images.isfinite().all():
        raise UserError(f"--network: {network} makes images that are not finite; try another snapshot")
    pixels = (images * 127.5 + 128).clip(0, 255).to(torch.uint8)  # truncated, as published
    rows = pixels.reshape(SIDE, SIDE, *shape[1:]).permute(2, 0, 3, 1, 4)
    write_png(target, rows.reshape(shape[1], SIDE * shape[2], SIDE * shape[3]).cpu().numpy())


if __name__ == "__main__":
    run_main(main)
