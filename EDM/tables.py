"""The tables of EDM and TDSM: the runs behind each cell, and what is printed.

    python -m EDM.tables                                  # which there are
    python -m EDM.tables tdsm-cifar10 --list              # the runs of one of them, and how long they take here
    python -m EDM.tables tdsm --only "cifar10 sym 40"     # two rows of a table, at the length of the paper
    python -m EDM.tables tdsm --scale tiny --jobs 2       # from noisy labels to class accuracy on the digits

How they are run, aggregated and written: shared/report/tables.py.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.report.tables import Cell, Job, Printed, Stage, Table, serve

HERE = Path(__file__).resolve().parent
PUBLISHED_IMAGES, FID_IMAGES = 200_000_000, 50_000
LAST = "last snapshot"

# Networks and lengths of the digits: 8x8 pixels, 0.19 million parameters.
DIGITS_IMAGES, DIGITS_BATCH = 160_000, 128
DIGITS_TRAINING = ("--arch=ddpmpp --cbase=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0.1 --augment=0 "
                   "--lr=4e-3 --lr-rampup=3 --lr-decay=0.3 --tick=10").split()
DIGITS_CLASSIFIER = "--augment=0 --lr=2e-3 --lr-rampup=3 --lr-decay=0.5 --averaged=1 --tick=5".split()
DIGITS_CLASSIFIER_IMAGES, DIGITS_PER_CLASS = 30_000, 100

# Class-wise FID and classification accuracy score of Na et al. (ICLR 2024), from memory.
TDSM_PRINTED = {("cifar10", "sym", 40, "EDM"): (30.45, 47.2), ("cifar10", "sym", 40, "TDSM"): (15.92, 62.3)}
TDSM_DATA = ("mnist", "cifar10", "cifar100")
SOURCES = {"mnist": "MNIST/raw/train-images-idx3-ubyte.gz", "cifar10": "cifar-10-python.tar.gz",
           "cifar100": "cifar-100-python.tar.gz", "digits": "digits"}
# Per class, so that 50,000 images are scored.
PER_CLASS = {"mnist": 5000, "cifar10": 5000, "cifar100": 500, "digits": DIGITS_PER_CLASS}
# An evaluation is timed by so many images a class, and as many steps of its classifiers as are due to them.
IMAGES_TIMED = 5
CLASSIFIER_STEPS = {"mnist": 4000, "cifar10": 40_000, "cifar100": 40_000, "digits": 600}
# Column -> keys of evaluate.py's result.json, of which one is there, and the factor that gives the column's unit.
COLUMNS = {
    "FID": (("fid", "fd_judge"), 1), "CW-FID": (("class_wise_fid", "class_wise_fd_judge"), 1),
    "density": (("density",), 100), "coverage": (("coverage",), 100),
    "CW-density": (("class_wise_density",), 100), "CW-coverage": (("class_wise_coverage",), 100),
    "CAS": (("cas",), 100), "class accuracy": (("class_accuracy",), 100),
}


@dataclass(frozen=True)
class Setting:
    """A row of EDM's tables: data set, flags of train.py, FID by --arch as published, length, and flags of
    the sampler."""
    dataset: str
    flags: tuple[str, ...]
    printed: Mapping[str, float | None]
    images: int = PUBLISHED_IMAGES
    batch: int = 512
    sampling: tuple[str, ...] = ()


CIFAR10 = {"class-conditional": Setting("cifar10", ("--cond=1",), {"ddpmpp": 1.79, "ncsnpp": 1.79}),
           "unconditional": Setting("cifar10", ("--cond=0",), {"ddpmpp": 1.97, "ncsnpp": 1.98})}
FACES, FACES_SAMPLING = ("--cond=0", "--cres=1,2,2,2", "--lr=2e-4", "--augment=0.15"), ("--steps=40",)
LARGE = {"FFHQ": Setting("ffhq-64x64", (*FACES, "--dropout=0.05"), {"ddpmpp": 2.39, "ncsnpp": 2.53}, batch=256,
                         sampling=FACES_SAMPLING),
         "AFHQv2": Setting("afhqv2-64x64", (*FACES, "--dropout=0.25"), {"ddpmpp": 1.96, "ncsnpp": 2.16}, batch=256,
                           sampling=FACES_SAMPLING),
         "ImageNet": Setting("imagenet-64x64", ("--cond=1", "--lr=1e-4", "--ema=50", "--dropout=0.10", "--augment=0",
                                                "--fp16=1", "--ls=100", "--tick=200"),
                             {"adm": 1.36}, 2_500_000_000, 4096,
                             ("--steps=256", "--S_churn=40", "--S_min=0.05", "--S_max=50", "--S_noise=1.003"))}
DIGITS = {"class-conditional": Setting(
    "digits", ("--cond=1", *(flag for flag in DIGITS_TRAINING if not flag.startswith("--arch"))),
    {"ddpmpp": None, "ncsnpp": None}, DIGITS_IMAGES, DIGITS_BATCH)}


def short_run(iterations: int | None, batch: int) -> list[str]:
    """Return the flags that end a training after so many iterations; None: at its length."""
    return [f"--duration={iterations * batch / 1e6}", "--tick=1", "--snap=1", "--dump=1"] if iterations else []


def training(script: str, out: Path, data: Path, flags: Sequence[str], images: int, batch: int, seed: int,
             iterations: int | None) -> list[str]:
    return [str(HERE / script), f"--outdir={out}", "--nosubdir", f"--data={data}", *flags, f"--batch={batch}",
            f"--seed={seed}", *(short_run(iterations, batch) or [f"--duration={images / 1e6}"])]


def read_evaluation(folder: Path) -> dict[str, dict[str, float]]:
    """Return the columns from the result.json of evaluate.py."""
    found = json.loads((folder / "evaluation" / "result.json").read_text(encoding="utf-8"))
    return {column: {LAST: factor * found[key]} for column, (keys, factor) in COLUMNS.items() for key in keys
            if key in found}


# ---------------------------------------------------------------- TDSM

def noisy_job(dataset: str, kind: str, percent: int, method: str, data_dir: Path) -> Job:
    """Return the runs of one row: noisy set, classifier (TDSM only), diffusion model, evaluation.

    Both methods train for as many images, with the same network, draws and noisy labels.
    """
    tiny = dataset == "digits"
    name = f"{dataset}_{kind}_{percent}"
    source = "digits" if tiny else str(data_dir / SOURCES[dataset])
    arch = DIGITS_TRAINING if tiny else [f"--arch={'ddpmpp_mnist' if dataset == 'mnist' else 'ddpmpp'}"]
    images, batch = (DIGITS_IMAGES, DIGITS_BATCH) if tiny else (PUBLISHED_IMAGES, 512)
    evaluations = PER_CLASS[dataset] // IMAGES_TIMED
    classifier_images, classifier_batch = (DIGITS_CLASSIFIER_IMAGES, DIGITS_BATCH) if tiny else (PUBLISHED_IMAGES, 1024)
    noise = [f"--noise_type={kind}", f"--noise_rate={percent / 100}"] if percent else []

    def data(out: Path, seed: int, iterations: int | None) -> list[str]:
        return [str(HERE / "dataset_tool.py"), f"--source={source}", f"--dest={out / name}.zip",
                *([*noise, f"--seed={seed}"] if noise else [])]

    def classifier(out: Path, seed: int, iterations: int | None) -> list[str]:
        flags = ["--cond=1", *noise, *(DIGITS_CLASSIFIER if tiny else ["--arch=ddpmpp"])]
        return training("train_classifier.py", out / "classifier", out / f"{name}.zip", flags, classifier_images,
                        classifier_batch, seed, iterations)

    def train(out: Path, seed: int, iterations: int | None) -> list[str]:
        aware = [f"--cls={out / 'classifier' / 'network-snapshot-latest.pkl'}", *noise] if method == "TDSM" else []
        return training("train_noise.py" if aware else "train.py", out / "model", out / f"{name}.zip",
                        ["--cond=1", *arch, *aware], images, batch, seed, iterations)

    def evaluate(out: Path, seed: int, iterations: int | None) -> list[str]:
        count = iterations * IMAGES_TIMED if iterations else PER_CLASS[dataset]
        short = [f"--classifier-steps={iterations * CLASSIFIER_STEPS[dataset] // evaluations}"] if iterations else []
        return [str(HERE / "evaluate.py"), f"--outdir={out / 'evaluation'}", f"--data={dataset}",
                f"--data-dir={data_dir}", f"--network={out / 'model' / 'network-snapshot-latest.pkl'}",
                f"--per-class={count}", f"--seed={seed}", *short]

    stages = [Stage("data", data)]
    stages += [Stage("classifier", classifier, classifier_images // classifier_batch)] * (method == "TDSM")
    stages += [Stage("train", train, images // batch), Stage("evaluate", evaluate, evaluations)]
    return Job(f"{name}_{method.lower()}", tuple(stages), read_evaluation)


def tdsm_table(scale: str, options: argparse.Namespace) -> Table:
    """Return plain EDM and TDSM on noisy labels; on the digits with 40 % symmetric noise where the scale is tiny."""
    kinds = [("clean", 0), ("sym", 20), ("sym", 40), ("asym", 20), ("asym", 40)]
    settings = [(dataset, *kind) for dataset in TDSM_DATA for kind in kinds]
    if scale == "tiny":
        settings = [("digits", "clean", 0), ("digits", "sym", 40)]
    cells = []
    for dataset, kind, percent in settings:
        for method in ("EDM", "TDSM") if percent else ("EDM",):
            job = noisy_job(dataset, kind, percent, method, options.data_dir)
            printed = dict(zip(("CW-FID", "CAS"), TDSM_PRINTED.get((dataset, kind, percent, method), ()), strict=False))
            noise = f"{kind} {percent} %" if percent else "clean labels"
            cells += [Cell(f"{dataset} {noise}, {method}", column, job, column,
                           Printed(printed[column]) if column in printed else None) for column in COLUMNS]
    return Table(
        "tdsm", "TDSM: diffusion models from noisy labels", "Na et al., ICLR 2024 (from memory)",
        "FID (of the digits: Fréchet distance in the features of a judge trained with clean labels), CW- the mean of "
        "the classes; density, coverage, CAS (classification accuracy score), class accuracy in %",
        tuple(cells), (LAST,), seeds=(0, 1, 2) if scale == "tiny" else (0,),
        note="EDM is plain training on the labels as they are, for as many images as TDSM and with the same network. "
             "Class accuracy: generated images that a classifier trained with clean labels takes for the class they "
             "should show.")


def tdsm_view(dataset: str, scale: str, options: argparse.Namespace) -> Table:
    """Return the rows of one data set, which share their runs with the whole table; all of the digits."""
    return tdsm_table(scale, options).view(
        f"tdsm-{dataset}", f"TDSM: diffusion models from noisy labels, {dataset}", scale,
        lambda cell: scale == "tiny" or cell.row.startswith(f"{dataset} "))


# ---------------------------------------------------------------- EDM

def clean_job(setting: Setting, arch: str, data_dir: Path) -> Job:
    """Return the training of a published model and its FID: the lowest of three ranges of seeds, as published."""
    dataset = setting.dataset
    tiny, made = dataset == "digits", dataset in SOURCES
    source = "digits" if tiny else str(data_dir / SOURCES.get(dataset, ""))

    def images(out: Path) -> Path:
        return (out if made else data_dir) / f"{dataset}.zip"

    def data(out: Path, seed: int, iterations: int | None) -> list[str]:
        return [str(HERE / "dataset_tool.py"), f"--source={source}", f"--dest={images(out)}"]

    def train(out: Path, seed: int, iterations: int | None) -> list[str]:
        return training("train.py", out / "model", images(out), [f"--arch={arch}", *setting.flags], setting.images,
                        setting.batch, seed, iterations)

    def score(number: int) -> Callable[[Path, int, int | None], list[str]]:
        def command(out: Path, seed: int, iterations: int | None) -> list[str]:
            network = f"--network={out / 'model' / 'network-snapshot-latest.pkl'}"
            if tiny:
                short = [f"--classifier-steps={iterations}"] if iterations else []
                return [str(HERE / "evaluate.py"), f"--outdir={out / f'range{number}'}", "--data=digits", network,
                        f"--per-class={DIGITS_PER_CLASS}", "--metrics=fid", f"--judge-dir={out / 'judge'}",
                        f"--first-seed={number * DIGITS_PER_CLASS}", *short]
            count = iterations * IMAGES_TIMED if iterations else FID_IMAGES
            return [str(HERE / "fid.py"), "calc", network, f"--seeds={number * count}-{(number + 1) * count - 1}",
                    f"--ref={images(out)}", f"--json={out / f'range{number}' / 'result.json'}", *setting.sampling]
        return command

    def read(folder: Path) -> dict[str, dict[str, float]]:
        found = [json.loads((folder / f"range{number}" / "result.json").read_text(encoding="utf-8"))
                 for number in range(3)]
        values = [content["fd_judge" if tiny else "fid"] for content in found]
        return {"FID": {"lowest of three": min(values), "first": values[0]}}

    kind = "cond" if "--cond=1" in setting.flags else "uncond"
    return Job(f"{dataset}_{kind}_{arch}",
               (*[Stage("data", data)] * made, Stage("train", train, setting.images // setting.batch),
                *(Stage(f"score{number}", score(number), None if tiny else FID_IMAGES // IMAGES_TIMED)
                  for number in range(3))), read)


def clean_table(name: str, title: str, settings: Mapping[str, Setting], note: str, scale: str,
                options: argparse.Namespace) -> Table:
    """Return FID of 50,000 images; on the digits, class-conditional only, where the scale is tiny."""
    cells = tuple(Cell(row, arch, clean_job(setting, arch, options.data_dir), "FID", printed and Printed(printed))
                  for row, setting in (DIGITS if scale == "tiny" else settings).items()
                  for arch, printed in setting.printed.items())
    return Table(name, f"EDM: {title}", "Karras et al., NeurIPS 2022, and README of EDM",
                 "FID (of the digits: Fréchet distance in the features of a judge)", cells,
                 ("lowest of three", "first"), seeds=(0,), runs=f"edm-{scale}",
                 note="As published, FID is computed for three ranges of seeds and the lowest one is reported." + note)


def edm_table(scale: str, options: argparse.Namespace) -> Table:
    return clean_table("edm", "CIFAR-10, 35 network evaluations", CIFAR10, "", scale, options)


def edm_large_table(scale: str, options: argparse.Namespace) -> Table:
    return clean_table("edm-64", "64x64 pixels, 79 network evaluations, ImageNet 511", LARGE,
                       " Data: ffhq-64x64.zip, afhqv2-64x64.zip and imagenet-64x64.zip of dataset_tool.py in the "
                       "folder of the data sets.", scale, options)


TABLES: dict[str, Callable[[str, argparse.Namespace], Table]] = {
    "edm": edm_table, "edm-64": edm_large_table, "tdsm": tdsm_table,
    **{f"tdsm-{name}": (lambda scale, options, name=name: tdsm_view(name, scale, options)) for name in TDSM_DATA}}

if __name__ == "__main__":
    serve("EDM.tables", TABLES)
