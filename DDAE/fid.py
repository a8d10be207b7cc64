"""Fréchet inception distance of a DDAE's samples, straight from the network: no PNG files.

    python ../EDM/fid.py ref --data=data/cifar10-32x32.zip --dest=fid-refs/cifar10.npz
    python fid.py --config config/DDPM_ddpm.yaml --use_amp --epoch 400 --ref fid-refs/cifar10.npz

The images are those that sample.py writes with the same flags.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from DDAE.ddae.options import ddae_parser
from DDAE.sample import add_sampler_flags, check, make_sampler
from shared.cli import UserError, run_main

if TYPE_CHECKING:
    import torch

    from DDAE.ddae.sampling import ImageSampler


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ddae_parser(__doc__)
    add_sampler_flags(parser)
    parser.add_argument("--ref", metavar="NPZ", required=True, help="statistics made by EDM/fid.py ref")
    parser.add_argument("--images", type=int, default=50000, help="number of images [50000]")
    parser.add_argument("--detector", default="inception", metavar="inception|FILE",
                        help="network of the features: Inception's weights from assets/, or a file [inception]")
    parser.add_argument("--download", action="store_true", help="fetch Inception's weights if they are not there")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="also write the value and all it depends on")
    args = parser.parse_args(argv)
    check(args)
    if args.images < 2:
        raise UserError(f"--images: expected at least 2, got {args.images}")
    return args


class SampledImages:
    """Images 0..count-1 of a sampler, made when they are asked for."""

    def __init__(self, sampler: ImageSampler, count: int, batch: int, channels: int) -> None:
        self.sampler, self.count, self.channels = sampler, count, channels
        self.rows = sampler.rows(min(batch, count), count)

    def __len__(self) -> int:
        return self.count

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (uint8 [n, channels, H, W], int64 labels [n], all -1) of lists of numbers."""
        import torch

        from DDAE.ddae.pictures import to_uint8

        for part in parts:
            if not part:
                yield torch.zeros(0, self.channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
                continue
            images = to_uint8(self.sampler.images(part, self.rows))
            yield images.repeat(1, self.channels // images.shape[1], 1, 1), torch.full((len(part),), -1)


def main() -> None:
    args = parse()
    from DDAE.ddae.config import read_config

    config = read_config(args.config, args.set)

    from EDM.metrics.detectors import load_detector
    from EDM.metrics.extraction import extract
    from EDM.metrics.frechet import frechet_distance
    from EDM.metrics.reference import read_reference
    from shared import distributed

    world = distributed.start(args.device)
    sampler, epoch, settings = make_sampler(config, args, world)
    detector = load_detector(args.detector, world.device, args.download, world)
    reference = []
    distributed.on_main(lambda: reference.append(read_reference(args.ref, detector)), world)
    source = SampledImages(sampler, args.images, args.batch, detector.channels)
    extraction = extract(source, detector, args.batch, world)
    distributed.stop()
    if not world.main:
        return
    mu, sigma = extraction.moments.mean_and_covariance()
    real = [part.to(mu.device) for part in (reference[0].mu, reference[0].sigma)]
    value = frechet_distance(mu, sigma, *real)
    facts = {"fid": value, "images": args.images, "reference": args.ref, "detector": detector.name,
             "sha256": detector.sha256, "sampling": settings}
    if args.json_file:
        import json
        from pathlib import Path

        from shared.training.files import atomic, make_dir

        make_dir(Path(args.json_file).absolute().parent)
        with atomic(args.json_file, "w") as file:
            file.write(json.dumps(facts, indent=2) + "\n")
    print(f"epoch {epoch}, {args.images} images, detector {detector.name}: FID {value:g}")


if __name__ == "__main__":
    run_main(main)
