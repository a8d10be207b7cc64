"""The command line of the converter, which TorchSSL/dataset_tool.py and EDM/dataset_tool.py both start."""
from __future__ import annotations

import re

import click


def _resolution(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)[x,](\d+)", text)
    if match is None or not 1 <= int(match[1]) <= 16_384 or not 1 <= int(match[2]) <= 16_384:
        raise click.BadParameter(f"{text!r} is not WxH or W,H, such as 32x32")
    return int(match[1]), int(match[2])


@click.command(context_settings={"max_content_width": 120})
@click.option("--source", required=True, metavar="PATH",
              help="Folder, folder ending in _lmdb, .zip, .npz, cifar-10-python.tar.gz, cifar-100-python.tar.gz or "
                   "train-images-idx3-ubyte.gz (t10k-images-idx3-ubyte.gz); or digits, scikit-learn's.")
@click.option("--dest", required=True, metavar="PATH", help="The .zip file to write, or an empty folder.")
@click.option("--max-images", type=click.IntRange(min=1), help="Take the first images only.  [default: all]")
@click.option("--transform", type=click.Choice(["center-crop", "center-crop-wide"]),
              help="Crop before scaling; needs --resolution.")
@click.option("--resolution", callback=_resolution, metavar="WxH", help="Size of the written images, such as 64x64.")
@click.option("--eval", "test_split", type=bool, metavar="BOOL", default=False, show_default=True,
              help="Take the test images of a CIFAR archive or of digits.")
def main(source: str, dest: str, max_images: int | None, transform: str | None, resolution: tuple[int, int] | None,
         test_split: bool) -> None:
    """Convert images to the ZIP or folder that EDM trains on.

    \b
    Labels come from a dataset.json in the source, {"labels": [["folder/image.png", 6], ...]}, or else from the
    top-level folders, if there are at least two: in order of name, or by value where all are numbers.

    \b
    python dataset_tool.py --source=downloads/cifar-10-python.tar.gz --dest=datasets/cifar10-32x32.zip
    python dataset_tool.py --source=downloads/images --dest=datasets/images-64x64.zip \\
        --resolution=64x64 --transform=center-crop
    """
    from EDM.convert_dataset import convert

    convert(source, dest, max_images, transform, resolution, test_split=test_split)
