"""Convert images to the ZIP or folder that EDM trains on, if wanted with wrong labels.

    python dataset_tool.py --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
    python dataset_tool.py --source=downloads/images --dest=datasets/images-64x64.zip \\
        --resolution=64x64 --transform=center-crop

Labels come from a dataset.json in the source, {"labels": [["folder/image.png", 6], ...]}, or else from the top-level
folders, if there are at least two: in order of name, or by value where all are numbers.

Label noise is for experiments with wrong labels. dataset.json then also holds the clean labels, the flips, the
transition matrix and the realised one.

    python dataset_tool.py --source=downloads/cifar-10-python.tar.gz \\
        --dest=datasets/cifar10_sym_40-32x32.zip --noise_type=sym --noise_rate=0.4
"""
from __future__ import annotations

import re
from collections.abc import Sequence

from EDM.convert_dataset import TRANSFORMS, convert
from EDM.tdsm.transition import plan_noise
from shared.cli import Bool, Choice, Float, Int, Option, parse, run_main


class Size:
    """Width and height in pixels: 32x32 or 32,32."""

    metavar, range = "WxH", ""

    def convert(self, text: str) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})[x,](\d{1,5})", text)
        if match is None or not 1 <= int(match[1]) <= 16_384 or not 1 <= int(match[2]) <= 16_384:
            raise ValueError(f"{text!r} is not WxH or W,H, such as 32x32")
        return int(match[1]), int(match[2])


FLAGS = {
    "images": (
        Option("--source", required=True, metavar="PATH", help="folder, folder ending in _lmdb, .zip, .npz, "
               "cifar-10-python.tar.gz, cifar-100-python.tar.gz or train-images-idx3-ubyte.gz "
               "(t10k-images-idx3-ubyte.gz); or digits, scikit-learn's"),
        Option("--dest", required=True, metavar="PATH", help="the .zip file to write, or an empty folder"),
        Option("--max-images", Int(1), None, "take the first images only", default_help="all"),
        Option("--transform", Choice(*TRANSFORMS), None, "crop before scaling; needs --resolution"),
        Option("--resolution", Size, None, "size of the written images, such as 64x64"),
        Option("--eval", Bool, False, "take the test images of a CIFAR archive or of digits"),
    ),
    "label noise": (
        Option("--noise_type", Choice("sym", "asym"), None, "flip labels: to any other class, or to one similar class"),
        Option("--noise_rate", Float(0, 1, open="high"), None, "probability of a flip"),
        Option("--transition", metavar="FILE", help="flip labels by this matrix instead: .json or .npy, row = clean "
               "class"),
        Option("--dataset", metavar="NAME", help="mnist, cifar10, cifar100 or digits, for --noise_type",
               default_help="by the name of the source or --dest"),
        Option("--seed", Int(0, 2**32 - 1), None, "seed of the flips", default_help="0"),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    noise = plan_noise(flags.noise_type, flags.noise_rate, flags.transition, flags.dataset, flags.seed, flags.source,
                       flags.dest)
    convert(flags.source, flags.dest, flags.max_images, flags.transform, flags.resolution, test_split=flags.eval,
            relabel=noise)


if __name__ == "__main__":
    run_main(main)
