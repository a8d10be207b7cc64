"""Fréchet inception distance of a DDAE's samples, straight from the network: no PNG files.

    python ../EDM/fid.py ref --data=data/cifar10-32x32.zip --dest=fid-refs/cifar10.npz
    python fid.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400 --ref fid-refs/cifar10.npz

The images are those that sample.py writes with the same flags.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from DDAE.ddae.config import read_config
from DDAE.ddae.sampling import ImageSampler, to_uint8
from DDAE.sample import SAMPLER, make_sampler
from EDM.metrics.detectors import load_detector
from EDM.metrics.features import extract, full_precision, read_reference, score
from shared import cli, distributed
from shared.cli import Flag, Int, Option, Text, less_memory, run_main
from shared.training.files import check_writable, make_dir, write_json

FLAGS = (
    *SAMPLER,
    Option("--ref", Text, required=True, help="statistics made by EDM/fid.py ref", metavar="NPZ"),
    Option("--images", Int(2), 50000, "number of images"),
    Option("--detector", Text, "inception", "network of the features: Inception's weights from assets/, or a file",
           metavar="inception|FILE"),
    Option("--download", Flag, False, "fetch Inception's weights if they are missing"),
    Option("--json", Text, None, "also write the value with settings and inputs", metavar="FILE"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("--batch")
def main() -> None:
    options = parse()
    if options.json:
        check_writable(options.json, "--json")
    config = read_config(options.config, options.set)
    world = distributed.start(options.device)
    sampler, epoch, settings = make_sampler(config, options, world)
    full_precision()
    detector = load_detector(options.detector, world.device, options.download, world)
    reference = []
    distributed.on_main(lambda: reference.append(read_reference(options.ref, detector)), world)
    source = SampledImages(sampler, options.images, options.batch, detector.channels)
    extraction = extract(source, detector, options.batch, world)
    distributed.stop()
    if not world.main:
        return
    value, = score(("fid",), extraction, reference[0], detector, options).values()
    if options.json:
        facts = {"fid": value, "images": options.images, "reference": options.ref, "detector": detector.name,
                 "sha256": detector.sha256, "sampling": settings}
        make_dir(Path(options.json).absolute().parent)
        write_json(options.json, facts, indent=2)
    print(f"epoch {epoch}, {options.images} images, detector {detector.name}: FID {value:g}")


class SampledImages:
    """Images 0..count-1 of a sampler, made when they are asked for: a source for EDM's metrics."""

    def __init__(self, sampler: ImageSampler, count: int, batch: int, channels: int) -> None:
        self.sampler, self.count, self.channels = sampler, count, channels
        self.rows = sampler.rows(min(batch, count), count)

    def __len__(self) -> int:
        return self.count

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (uint8 [n, channels, H, W], int64 labels [n], all -1) of lists of numbers."""
        for part in parts:
            if not part:
                yield torch.zeros(0, self.channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
                continue
            images = to_uint8(self.sampler.images(part, self.rows))
            yield images.repeat(1, self.channels // images.shape[1], 1, 1), torch.full((len(part),), -1)


if __name__ == "__main__":
    run_main(main)
