"""Copy a network snapshot, ours or a published one, into a file of numbers and text only.

    python -m EDM.convert network-snapshot-200000.pkl network.safetensors
    python -m EDM.convert https://.../edm-cifar10-32x32-cond-vp.pkl network-snapshot-cifar10.pkl

No code in the source file is run. DEST ends in .safetensors or .pkl.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from EDM.tdsm.classifiers import CLASSIFIERS, CAS_class
from EDM.training.networks import PRECONDITIONERS
from EDM.training.snapshots import read_snapshot, write_snapshot
from shared.cli import Flag, Option, UserError, parse, run_main
from shared.training.files import make_dir

FLAGS = (
    Option("src", required=True, help="snapshot to read, a file or a URL"),
    Option("dest", required=True, help="file to write"),
    Option("--overwrite", Flag, False, "replace DEST if it exists"),
)


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    src, dest = flags.src, flags.dest
    if Path(dest).suffix not in (".safetensors", ".pkl"):
        raise UserError(f"DEST: expected a name ending in .safetensors or .pkl, got {dest}")
    if Path(dest).exists() and not flags.overwrite:
        raise UserError(f"{dest} exists already; choose another name or add --overwrite")
    snapshot = read_snapshot(src)
    networks = {**PRECONDITIONERS, **CLASSIFIERS, "CAS_class": CAS_class}
    net = snapshot.build(networks, "a network of EDM or TDSM")  # proves that the copy will load
    make_dir(Path(dest).absolute().parent)
    write_snapshot(dest, snapshot)
    count = sum(parameter.numel() for parameter in net.parameters())
    classes = f"{net.label_dim} classes" if net.label_dim else "unconditional"
    print(f"{dest}: {snapshot.class_name}, {count:,} parameters, {net.img_channels} x {net.img_resolution} x "
          f"{net.img_resolution}, {classes}")


if __name__ == "__main__":
    run_main(main)
