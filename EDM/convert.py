"""Copy a network snapshot, ours or a published one, into a file that holds nothing but numbers and text.

    python -m EDM.convert network-snapshot-200000.pkl network.safetensors
    python -m EDM.convert https://.../edm-cifar10-32x32-cond-vp.pkl network-snapshot-cifar10.pkl

Nothing in the source file is run.
"""
from __future__ import annotations

from pathlib import Path

import click

from shared.cli import UserError, run_main


@click.command(help=__doc__.split("\n\n    python")[0].strip() + " DEST ends in .safetensors or .pkl.")
@click.argument("src", metavar="SRC")
@click.argument("dest", metavar="DEST")
@click.option("--overwrite", is_flag=True, help="Replace DEST if it exists.")
def main(src: str, dest: str, overwrite: bool) -> None:
    if Path(dest).suffix not in (".safetensors", ".pkl"):
        raise UserError(f"DEST: expected a name ending in .safetensors or .pkl, got {dest}")
    if Path(dest).exists() and not overwrite:
        raise UserError(f"{dest} exists already; choose another name or add --overwrite")
    from EDM.training.snapshots import read_snapshot, write_snapshot
    from shared.training.files import make_dir

    snapshot = read_snapshot(src)
    net = snapshot.build()  # proves that the copy will load
    make_dir(Path(dest).absolute().parent)
    write_snapshot(dest, snapshot)
    count = sum(parameter.numel() for parameter in net.parameters())
    classes = f"{net.label_dim} classes" if net.label_dim else "unconditional"
    print(f"{dest}: {snapshot.class_name}, {count:,} parameters, {net.img_channels} x {net.img_resolution} x "
          f"{net.img_resolution}, {classes}")


if __name__ == "__main__":
    run_main(main)
