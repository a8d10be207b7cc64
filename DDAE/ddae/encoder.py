"""A frozen network whose blocks are features, and how a command line names one."""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from DDAE.ddae.options import choose_precision, ddae_parser
from shared.cli import UserError, nearest
from shared.lazy import lazy
from shared.training.precision import autocast, set_arithmetic

if TYPE_CHECKING:
    from DDAE.ddae.config import Config, LinearConfig
    from shared.data.images import ImageSet

torch = lazy("torch")

ENCODERS = ("trained", "untrained", "pixels")
PIXELS = "pixels"


def encoder_parser(description: str, epoch: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags that choose a network, its data and the machine."""
    parser = ddae_parser(description)
    parser.add_argument("--gpus", type=int, default=None, help="processes that the config's batch_size and lrate are "
                        "meant for, however many there are [as many as there are]")
    if epoch:
        parser.add_argument("--epoch", type=int, default=-1, help="checkpoint model_{epoch}.pth [the last]")
        parser.add_argument("--network", default=None, metavar="SNAPSHOT", help="probe a network-snapshot-*.pkl of "
                            "EDM/train.py in place of a checkpoint of the config; --config then says how")
    return parser


@dataclass(frozen=True)
class Encoder:
    """A network in eval mode without gradients, its diffusion model, and what it is probed on.

    name: in folders of results, such as ep400. widths: block name -> number of features. weights: the file that the
    network comes from, None for fresh weights. precision: fp32, bf16 or fp16.
    """

    net: Any
    diffusion: Any
    config: Config
    name: str
    widths: dict[str, int]
    weights: Path | None
    precision: str

    @property
    def probe(self) -> LinearConfig:
        return self.config.probe()

    @property
    def pixels(self) -> bool:
        """Whether the "features" are the pixels themselves, to compare with."""
        return self.net is None

    def facts(self) -> list:
        """Return what changes when the weights do: file, size, time of change."""
        if self.weights is None or not self.weights.is_file():
            return [str(self.weights)]
        state = self.weights.stat()
        return [str(self.weights), state.st_size, state.st_mtime_ns]

    def check_names(self, names: Sequence[str]) -> None:
        """Raise UserError for a block that does not exist, naming those that do."""
        for name in names:
            if name not in self.widths:
                raise UserError(f"no block {name!r}{nearest(str(name), self.widths)}; this network has "
                                f"{', '.join(self.widths)}")

    def check_levels(self, levels: Sequence[int]) -> None:
        """Raise UserError for a noise level at which there are no features."""
        known = self.diffusion.levels()
        for level in levels:
            if level not in known:
                raise UserError(f"noise level {level}: {self.config.model_type} features are taken at {known[0]} to "
                                f"{known[-1]}")

    def features(self, x01: torch.Tensor, level: int | torch.Tensor, noise: torch.Tensor, names: Sequence[str],
                 norm: bool = False) -> dict[str, torch.Tensor]:
        """Return float32 [N, width] for each named block; images in [0, 1]. Blocks behind the last one do not run."""
        if self.pixels:
            return {PIXELS: (2 * x01 - 1).flatten(1)}  # without noise, which could only make them worse
        with torch.no_grad(), autocast(x01.device, self.precision):
            return self.diffusion.features(self.net, x01, level, noise, names, norm)


def load_encoder(options: argparse.Namespace, device: torch.device, epoch: int | None = None) -> Encoder:
    """Return the encoder that --config, --epoch, --network and, where a script has it, --encoder name. UserError."""
    from DDAE.ddae.checkpoints import find_checkpoint, load_model
    from DDAE.ddae.config import make_diffusion, make_network, read_config
    from DDAE.ddae.model import use_channels_last
    from shared.cpu.allocator import keep_freed_memory

    config = read_config(options.config, options.set)
    config.probe()
    precision = choose_precision(options, device)
    set_arithmetic(strict=False, tf32=precision != "fp32")
    if device.type == "cpu":
        keep_freed_memory()
    epoch = options.epoch if epoch is None else epoch
    kind, snapshot = getattr(options, "encoder", "trained"), getattr(options, "network", None)
    if snapshot is not None and kind != "trained":
        raise UserError(f"--network and --encoder {kind} contradict each other; give one of them")
    if snapshot is not None:
        from DDAE.ddae.snapshots import load_snapshot

        net, diffusion = load_snapshot(snapshot, device)
        return Encoder(net, diffusion, config, Path(snapshot).stem, net.widths, Path(snapshot), precision)
    if kind == "pixels":
        widths = {PIXELS: math.prod(config.network["image_shape"])}
        return Encoder(None, make_diffusion(config), config, kind, widths, None, "fp32")
    if kind == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            net, diffusion = make_network(config).to(device), make_diffusion(config)
        name, weights = f"untrained{options.seed}", None
    else:
        weights, epoch = find_checkpoint(config, epoch)
        net, diffusion = load_model(config, epoch, device)
        name = f"ep{epoch}"
    use_channels_last(net)
    return Encoder(net.eval().requires_grad_(False), diffusion, config, name, net.widths, weights, precision)


def load_split(encoder: Encoder, split: str, options: argparse.Namespace) -> ImageSet:
    """Return the images of the config's data set; UserError where they do not fit the network."""
    from DDAE.ddae.data import check_fits, load_images

    images = load_images(encoder.config.dataset, split, options.data_dir)
    shape = encoder.config.network["image_shape"] if encoder.pixels else encoder.net.image_shape
    check_fits(images, shape, encoder.config.classes)
    return images
