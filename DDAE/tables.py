"""The tables of DDAE: the runs behind each cell, and what is printed.

    python -m DDAE.tables                                 # which there are
    python -m DDAE.tables cifar10 --only EDM_ddpmpp       # one row at the length of the paper
    python -m DDAE.tables cifar10 --scale tiny --jobs 2   # the whole chain on the digits, 3 seeds
    python -m DDAE.tables dit                             # linear probe of DiT-XL/2

Each row is one chain of commands: pre-train, sample, probe and so on. How they are run, aggregated and written:
shared/report/tables.py.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shared.report.tables import Cell, Job, Printed, Stage, Table, Values, serve

HERE = Path(__file__).resolve().parent
LAST, BEST = "last", "best on test"
# config -> (epoch, FID, linear probe in %) of the best probe and of the best FID (README of DDAE).
PRINTED = {
    "DDPM_ddpm": ((800, 4.09, 90.05), (1999, 3.62, 88.23)),
    "EDM_ddpm": ((1200, 3.97, 90.44), (1999, 3.56, 89.71)),
    "DDPM_ddpmpp": ((1200, 3.08, 93.97), (1999, 2.98, 93.03)),
    "EDM_ddpmpp": ((1200, 2.23, 94.50),),
    "EDM_ddpmpp_aug": ((2000, 2.34, 95.49), (3200, 2.12, 95.19)),
}
IMAGES = 50_000  # of CIFAR-10's training set, and for FID
# 4 processes with the config's batch size and rate each, 8 for the last: 512 or 256 images a step.
PROCESSES = {"EDM_ddpmpp_aug": 8}
STEPS = {"DDPM_ddpm": 98 * 2000, "EDM_ddpm": 98 * 2000, "DDPM_ddpmpp": 196 * 2000, "EDM_ddpmpp": 196 * 2000,
         "EDM_ddpmpp_aug": 98 * 4000}
REFERENCE = "fid-refs/cifar10.npz"      # below the data folder, made once by EDM/fid.py ref

DIGITS, DIGITS_LEVELS = "DDPM_digits", "1,11,31,71,121"
DIGITS_WRN = ("--dataset=digits --epoch=40 --batch_size=32 --blocks_per_group=1 --channel_multiplier=2 --no_flip "
              "--pad=1").split()
DIGITS_TUNING = "--epochs=30 --lr=1e-3 --eval_every=10 --warm_epoch=2 --batch_size=128".split()
# row -> folder of its result.json in the folder of the run.
DIGITS_CHAIN = {"linear probe": "probe", "fine-tuned": "finetune", "noisy images, head on features": "head",
                "noisy images, WideResNet": "wrn"}
DIGITS_CONTROLS = {"linear probe, untrained network": "untrained", "linear probe, pixels": "pixels",
                   "fine-tuned from scratch": "scratch"}


def call(script: str, *flags: str) -> list[str]:
    return [str(HERE / script), *flags]


def common(config: str, out: Path, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the flags that every stage of a chain has."""
    return [f"--config={HERE / 'config' / f'{config}.yaml'}", f"--set=save_dir={out / 'run'}", f"--seed={seed}",
            f"--data_dir={options.data_dir}"]


def accuracies(path: Path) -> dict[str, float]:
    """Return the accuracies of a result.json in percent by protocol."""
    found = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
    names = {LAST: "last", BEST: "best_on_test"}
    return {protocol: 100 * found[key] for protocol, key in names.items() if key in found}


# ------------------------------------------------------------------------------------------------------------ CIFAR-10

def published_chain(config: str, options: argparse.Namespace) -> Job:
    """Return one row of the README: pre-training, then FID and linear probe of one or two of its checkpoints."""
    epochs = [epoch for epoch, *_ in PRINTED[config]]
    processes = PROCESSES.get(config, 4)
    gpus, probe_steps = f"--gpus={processes}", 15 * -(-IMAGES // (128 * processes))

    def train(out: Path, seed: int, iterations: int | None) -> list[str]:
        short = [f"--steps={iterations}"] if iterations else []
        return call("train.py", *common(config, out, seed, options), "--use_amp", gpus, *short)

    def fid(epoch: int) -> Callable[[Path, int, int | None], Sequence[str]]:
        def command(out: Path, seed: int, iterations: int | None) -> Sequence[str]:
            own = (*common(config, out, seed, options), "--use_amp")
            if iterations:  # what counts are the images: of the network that the trial of the training leaves
                return call("sample.py", *own, "--epoch=0", "--overwrite", f"--images={iterations}")
            return call("fid.py", *own, f"--epoch={epoch}", f"--ref={options.data_dir / REFERENCE}",
                        f"--json={out / f'fid_{epoch}.json'}")
        return command

    def probe(epoch: int) -> Callable[[Path, int, int | None], Sequence[str]]:
        def command(out: Path, seed: int, iterations: int | None) -> Sequence[str]:
            short = [f"--steps={iterations}"] if iterations else []
            return call("linear.py", *common(config, out, seed, options), "--use_amp", gpus,
                        f"--epoch={0 if iterations else epoch}", f"--outdir={out / f'probe_{epoch}'}", *short)
        return command

    def read(folder: Path) -> Values:
        values: dict[str, dict[str, float]] = {}
        for epoch in epochs:
            fid_value = json.loads((folder / f"fid_{epoch}.json").read_text(encoding="utf-8"))["fid"]
            values[f"FID {epoch}"] = {LAST: fid_value}
            values[f"acc {epoch}"] = accuracies(folder / f"probe_{epoch}" / "result.json")
        return values

    stages = [Stage("train", train, STEPS[config])]
    for epoch in epochs:
        stages += [Stage(f"fid{epoch}", fid(epoch), IMAGES), Stage(f"probe{epoch}", probe(epoch), probe_steps)]
    return Job(config, tuple(stages), read, (HERE / "config" / f"{config}.yaml",))


def cifar10_table(scale: str, options: argparse.Namespace) -> Table:
    """Return the five rows of the README; at the tiny scale the chain on the digits."""
    if scale == "tiny":
        return digits_table(options)
    cells = []
    for config, rows in PRINTED.items():
        job = published_chain(config, options)
        for which, (epoch, fid, accuracy) in zip(("best probe", "best FID"), rows, strict=False):
            cells += [Cell(config, f"{which}: FID", job, f"FID {epoch}", Printed(fid)),
                      Cell(config, f"{which}: acc", job, f"acc {epoch}", Printed(accuracy))]
    return Table("cifar10", "DDAE: FID and linear probe on CIFAR-10", "README of DDAE, one run", "FID; accuracy in %",
                 tuple(cells), (LAST, BEST), seeds=(1337,))


# -------------------------------------------------------------------------------------------------------------- digits

def digits_stage(options: argparse.Namespace, name: str, script: str, *flags: str, trained: bool = True,
                 config: bool = True) -> Stage:
    """Return a command on the digits; trained: it needs the checkpoint of the run, which a trial has not."""
    def command(out: Path, seed: int, iterations: int | None) -> Sequence[str]:
        if iterations and trained:
            return ()
        own = common(DIGITS, out, seed, options) if config else [f"--seed={seed}"]
        return call(script, *own, *(flag.replace("{out}", str(out)) for flag in flags))
    return Stage(name, command)


def digits_chain(options: argparse.Namespace) -> Job:
    """Return everything that there is to do with a DDAE, on the digits."""
    def train(out: Path, seed: int, iterations: int | None) -> Sequence[str]:
        return call("train.py", *common(DIGITS, out, seed, options), *([f"--steps={iterations}"] if iterations else []))

    stages = (
        Stage("train", train, 11 * 180),
        digits_stage(options, "sample", "sample.py", "--images=100"),
        digits_stage(options, "probe", "linear.py", "--grid", f"--times={DIGITS_LEVELS}", "--copies=4",
                     "--outdir={out}/probe"),
        digits_stage(options, "contrastive", "contrastive.py", "--epoch_interval=100", "--outdir={out}/contrastive"),
        digits_stage(options, "wrn", "noisy_classifier_WRN.py", "--mode=DDPM", *DIGITS_WRN, "--save_dir={out}/wrn",
                     trained=False, config=False),
        digits_stage(options, "head", "noisy_classifier_DDAE.py", "--outdir={out}/head", "--compare",
                     "{out}/wrn/result.json"),
        digits_stage(options, "finetune", "finetune.py", *DIGITS_TUNING, "--outdir={out}/finetune"),
    )
    return Job("chain", stages, lambda folder: read_rows(folder, DIGITS_CHAIN), (HERE / "config" / f"{DIGITS}.yaml",))


def digits_controls(options: argparse.Namespace) -> Job:
    """Return what the chain is compared with: the same on an untrained network and on pixels."""
    stages = (
        digits_stage(options, "untrained", "linear.py", "--grid", f"--times={DIGITS_LEVELS}", "--copies=4",
                     "--encoder=untrained", "--outdir={out}/untrained", trained=False),
        digits_stage(options, "pixels", "linear.py", "--encoder=pixels", "--copies=4", "--outdir={out}/pixels",
                     trained=False),
        digits_stage(options, "scratch", "finetune.py", *DIGITS_TUNING, "--encoder=untrained", "--outdir={out}/scratch",
                     trained=False),
    )
    return Job("controls", stages, lambda folder: read_rows(folder, DIGITS_CONTROLS),
               (HERE / "config" / f"{DIGITS}.yaml",))


def read_rows(folder: Path, rows: Mapping[str, str]) -> Values:
    return {row: accuracies(folder / name / "result.json") for row, name in rows.items()}


def digits_table(options: argparse.Namespace) -> Table:
    """Return accuracies on the digits: probe, its two comparisons, fine-tuning, both noise-conditional classifiers."""
    cells = [Cell(row, "accuracy", job, row) for job, rows in ((digits_chain(options), DIGITS_CHAIN),
                                                               (digits_controls(options), DIGITS_CONTROLS))
             for row in rows]
    return Table("cifar10", "DDAE on the handwritten digits", "nothing", "Accuracy in %, 500 test images", tuple(cells),
                 (LAST, BEST), seeds=(0, 1, 2),
                 note="Accuracy on noisy images is the mean over 20 noise levels. By the protocol \"best on test\" a "
                      "probe is the best of its grid. Each run also leaves samples, the grid as a heat map, alignment "
                      "and uniformity, and the curves over noise levels as PNG files in its folder.")


# ----------------------------------------------------------------------------------------------------------------- DiT

def dit_job(dataset: str, options: argparse.Namespace, tiny: bool) -> Job:
    """Return latents and probe of one data set; the weights lie in pretrained_models/ of the data folder, small ones
    are made."""
    def common(out: Path, seed: int) -> list[str]:
        return [f"--dataset={dataset}", f"--codes={out / 'codes'}", "--use_amp", f"--seed={seed}"]

    def pretrained(out: Path) -> Path:
        return out / "small" if tiny else options.data_dir / "pretrained_models"

    def small(out: Path, seed: int, iterations: int | None) -> Sequence[str]:
        return call("DiT/small.py", f"--outdir={pretrained(out)}", f"--seed={seed}")

    def latents(out: Path, seed: int, iterations: int | None) -> Sequence[str]:
        vae, short = ("vae", ["--resolution=32", "--num_copies=2"]) if tiny else ("sd-vae-ft-mse", [])
        return () if iterations else call("DiT/vae_preprocessing.py", *common(out, seed), *short,
                                          f"--vae={pretrained(out) / vae}", f"--data_dir={options.data_dir}")

    def probe(out: Path, seed: int, iterations: int | None) -> Sequence[str]:
        ckpt = "DiT-S-2.pt" if tiny else "DiT-XL-2-256x256.pt"
        short = ["--model=DiT-S/2", "--name=layer-2", "--lr=3e-2", "--epoch=10"] * tiny
        return () if iterations else call("DiT/linear.py", *common(out, seed), *short,
                                          f"--ckpt={pretrained(out) / ckpt}", f"--outdir={out / 'probe'}")

    def read(folder: Path) -> Values:
        return {"acc": accuracies(folder / "probe" / dataset / "result.json")}

    made = (Stage("small", small),) if tiny else ()
    return Job(f"dit_{dataset}", (*made, Stage("latents", latents), Stage("probe", probe)), read)


def dit_table(scale: str, options: argparse.Namespace) -> Table:
    """Return the linear probe of DiT-XL/2; of a small DiT without training, on the digits, where the scale is tiny."""
    tiny = scale == "tiny"
    cells = [Cell("DiT-S/2, random weights" if tiny else "DiT-XL/2", dataset, dit_job(dataset, options, tiny), "acc",
                  printed) for dataset, printed in
             ({"digits": None} if tiny else {"cifar": Printed(85.73), "tiny": Printed(66.57)}).items()]
    return Table("dit", "Linear probe of DiT-XL/2", "README of DDAE's DiT folder", "Accuracy in %", tuple(cells),
                 (LAST,), seeds=(0, 1, 2) if tiny else (0,))


TABLES: dict[str, Callable[[str, argparse.Namespace], Table]] = {"cifar10": cifar10_table, "dit": dit_table}

if __name__ == "__main__":
    serve("DDAE.tables", TABLES)
