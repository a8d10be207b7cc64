"""How long a training script takes until its first step, on a data set that it has not seen and on one that it has.

    python -m tests.bench.second_start [--cifar FOLDER]

Times whole processes: Python, imports, data, network, optimiser and run folder, up to the step; and beside them a
process that imports PyTorch and nothing else, which no program that trains with it can undercut. FOLDER holds
cifar-10-batches-py; without it, random images in its place. Exit status 1 where a second start takes 2 s or more.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from shared.data.datasets import load_dataset
from shared.data.images import ImageSet
from shared.data.writers import write_zip
from tests.shared.cifar_files import write_cifar
from tests.shared.programs import ROOT

BAR, REPEATS = 2.0, 5
# As in recipes/digits.sh.
DIGITS_DIFFUSION = ("--batch=128 --cbase=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0.1 --augment=0 "
                    "--duration=0.08 --lr=4e-3 --lr-rampup=3 --lr-decay=0.3 --tick=5 --checkpoint-seconds=20")
# The script as it is, but for its first step.
UP_TO_THE_FIRST_STEP = """
import os, runpy, sys
from shared.training.run import Run
def steps(run, total):
    sys.stdout.flush()
    os._exit(64)
Run.steps = steps
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def seconds(script: Path, arguments: list[str], environment: dict[str, str]) -> float:
    """Return the seconds of one process, from its start to its first step."""
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", UP_TO_THE_FIRST_STEP, script.name, *arguments], cwd=script.parent,
                            env=environment, capture_output=True, text=True)
    if result.returncode != 64:
        sys.exit(f"{script.name} did not reach its first step:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return time.perf_counter() - started


def seconds_of_import(environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import os, torch; os._exit(0)"], env=environment, check=True)
    return time.perf_counter() - started


def random_cifar() -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(rng.integers(256, size=(50_000, 3, 32, 32), dtype=np.uint8), np.arange(50_000) % 10,
                    tuple("abcdefghij"), "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar", type=Path, help="folder with cifar-10-batches-py")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FEWLABEL_CACHE"] = str(folder / "cache")
        cifar = given.cifar and given.cifar.resolve()
        if cifar is None:
            cifar = folder / "cifar"
            images = random_cifar()
            write_cifar(images, cifar / "cifar-10-batches-py", images.subset(slice(10_000)))
        for name, images in (("digits", load_dataset("digits", "train", "")),
                             ("cifar10", load_dataset("cifar10", "train", str(cifar)))):
            write_zip(images, folder / f"{name}.zip")

        freematch, train = ROOT / "TorchSSL/freematch.py", ROOT / "EDM/train.py"
        edm = ["--cond=1", "--arch=ddpmpp", "--nosubdir"]
        cases = {
            "freematch.py, digits": (freematch, ["--c", "config/freematch_digits_10_1.yaml"], "--save_dir="),
            "freematch.py, CIFAR-10, published": (
                freematch, ["--c", "config/freematch_cifar10_40_1.yaml", f"--data_dir={cifar}"], "--save_dir="),
            "train.py, digits": (train, [f"--data={folder}/digits.zip", *edm, *DIGITS_DIFFUSION.split()], "--outdir="),
            "train.py, CIFAR-10, published network": (train, [f"--data={folder}/cifar10.zip", *edm], "--outdir="),
        }
        # A second start finds the byte code of the first, also where the calling shell forbids to write any.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        slow = False
        for number, (title, (script, arguments, flag)) in enumerate(cases.items()):
            environment["FEWLABEL_CACHE"] = str(folder / f"cache{number}")
            times, imports = [], []
            for repeat in range(1 + REPEATS):
                outdir = f"{flag}{folder}/runs/{number}_{repeat}"
                times.append(seconds(script, [*arguments, outdir], environment))
                imports.append(seconds_of_import(environment))
            second = median(times[1:])
            slow |= second >= BAR
            print(f"{title}: {times[0]:.2f} s until the first step, second start {second:.2f} s (median of {REPEATS}, "
                  f"bar {BAR:.0f}); PyTorch's import alone {median(imports):.2f} s", flush=True)
    sys.exit(slow)


if __name__ == "__main__":
    main()
