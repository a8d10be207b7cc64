"""The tables of EDM and TDSM: the runs of each cell and the printed numbers.

    python -m EDM.tables                                  # names of the tables
    python -m EDM.tables tdsm-cifar10 --list              # the runs of one of them
    python -m EDM.tables tdsm --only "cifar10 sym 40"     # two rows of a table, at the length of the paper
    python -m EDM.tables tdsm --scale tiny --jobs 2       # from noisy labels to class accuracy on the digits

How they are run, aggregated and written: shared/report/tables.py.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from shared.report.history import read_json
from shared.report.tables import Cell, Job, Printed, Stage, Table, Tables, serve

HERE = Path(__file__).resolve().parent
PUBLISHED_LENGTH, FID_IMAGES = "--duration=200.0", 50_000
LAST = "last snapshot"
SNAPSHOT = "{out}/model/network-snapshot-latest.pkl"

# Networks and lengths of the digits: 8x8 pixels, 0.19 million parameters.
DIGITS_NETWORK = "--cbase=16 --cres=1,2 --num-blocks=1 --attn-resolutions=4 --dropout=0.1 --augment=0"
DIGITS_TRAINING = (*DIGITS_NETWORK.split(), *"--lr=4e-3 --lr-rampup=3 --lr-decay=0.3 --tick=10".split())
DIGITS_CLASSIFIER = tuple("--augment=0 --lr=2e-3 --lr-rampup=3 --lr-decay=0.5 --averaged=1 --tick=5".split())
DIGITS_BATCH, DIGITS_LENGTH, DIGITS_CLASSIFIER_LENGTH = "--batch=128", "--duration=0.16", "--duration=0.03"

# Class-wise FID and classification accuracy score of Na et al. (ICLR 2024), from memory.
TDSM_PRINTED = {("cifar10", "sym", 40, "EDM"): (30.45, 47.2), ("cifar10", "sym", 40, "TDSM"): (15.92, 62.3)}
SOURCES = {"mnist": "{data}/MNIST/raw/train-images-idx3-ubyte.gz", "cifar10": "{data}/cifar-10-python.tar.gz",
           "cifar100": "{data}/cifar-100-python.tar.gz", "digits": "digits"}
TDSM_DATA = ("mnist", "cifar10", "cifar100")
# Per class, so that 50,000 images are scored.
PER_CLASS = {"mnist": 5000, "cifar10": 5000, "cifar100": 500, "digits": 100}
# Column -> alternative keys of evaluate.py's result.json, and the factor that gives the column's unit.
COLUMNS = {
    "FID": (("fid", "fd_judge"), 1), "CW-FID": (("class_wise_fid", "class_wise_fd_judge"), 1),
    "density": (("density",), 100), "coverage": (("coverage",), 100),
    "CW-density": (("class_wise_density",), 100), "CW-coverage": (("class_wise_coverage",), 100),
    "CAS": (("cas",), 100), "class accuracy": (("class_accuracy",), 100),
}


def script(stage: str, name: str, *flags: str) -> Stage:
    return Stage(stage, (str(HERE / name), *flags))


# ---------------------------------------------------------------- TDSM


def noisy_job(dataset: str, kind: str, percent: int, method: str) -> Job:
    """Return the runs of one row: noisy set, classifier (TDSM only), diffusion model, evaluation.

    Both methods train for as many images, with the same network, draws and noisy labels.
    """
    tiny, name, seed = dataset == "digits", f"{dataset}_{kind}_{percent}", "--seed={seed}"
    data = f"--data={{out}}/{name}.zip"
    noise = (f"--noise_type={kind}", f"--noise_rate={percent / 100}") if percent else ()
    network = ("--arch=ddpmpp", *DIGITS_TRAINING) if tiny else (
        f"--arch={'ddpmpp_mnist' if dataset == 'mnist' else 'ddpmpp'}",)
    length = (DIGITS_BATCH, seed, DIGITS_LENGTH) if tiny else ("--batch=512", seed, PUBLISHED_LENGTH)
    classifier = (*DIGITS_CLASSIFIER, DIGITS_BATCH, seed, DIGITS_CLASSIFIER_LENGTH) if tiny else (
        "--arch=ddpmpp", "--batch=1024", seed, PUBLISHED_LENGTH)

    stages = [script("data", "dataset_tool.py", f"--source={SOURCES[dataset]}", f"--dest={{out}}/{name}.zip", *noise,
                     *[seed] * bool(noise))]
    aware: tuple[str, ...] = ()
    if method == "TDSM":
        aware = ("--cls={out}/classifier/network-snapshot-latest.pkl", *noise)
        stages.append(script("classifier", "train_classifier.py", "--outdir={out}/classifier", "--nosubdir", data,
                             "--cond=1", *noise, *classifier))
    stages += [
        script("train", "train_noise.py" if aware else "train.py", "--outdir={out}/model", "--nosubdir", data,
               "--cond=1", *network, *aware, *length),
        script("evaluate", "evaluate.py", "--outdir={out}/evaluation", f"--data={dataset}", "--data-dir={data}",
               f"--network={SNAPSHOT}", f"--per-class={PER_CLASS[dataset]}", seed)]
    return Job(f"{name}_{method.lower()}", tuple(stages), read_evaluation)


def read_evaluation(folder: Path) -> dict[str, dict[str, float]]:
    """Return the columns from the result.json of evaluate.py."""
    found = read_json(folder / "evaluation" / "result.json", required=True)
    return {column: {LAST: factor * found[key]} for column, (keys, factor) in COLUMNS.items() for key in keys
            if key in found}


def tdsm_table(scale: str, options: SimpleNamespace) -> Table:
    """Return plain EDM and TDSM on noisy labels; on the digits with 40 % symmetric noise where the scale is tiny."""
    kinds = [("clean", 0), ("sym", 20), ("sym", 40), ("asym", 20), ("asym", 40)]
    settings = [(dataset, *kind) for dataset in TDSM_DATA for kind in kinds]
    if scale == "tiny":
        settings = [("digits", "clean", 0), ("digits", "sym", 40)]
    cells = []
    for dataset, kind, percent in settings:
        for method in ("EDM", "TDSM") if percent else ("EDM",):
            job = noisy_job(dataset, kind, percent, method)
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


def tdsm_view(dataset: str, scale: str, options: SimpleNamespace) -> Table:
    """Return the rows of one data set, which share their runs with the whole table; all of the digits."""
    return tdsm_table(scale, options).view(
        f"tdsm-{dataset}", f"TDSM: diffusion models from noisy labels, {dataset}", scale,
        lambda cell: scale == "tiny" or cell.row.startswith(f"{dataset} "))


# ---------------------------------------------------------------- EDM


@dataclass(frozen=True)
class Setting:
    """A row of EDM's tables: data set, flags of train.py, FID by --arch as published, and flags of the sampler."""
    dataset: str
    flags: tuple[str, ...]
    printed: Mapping[str, float | None]
    batch: str = "--batch=512"
    length: str = PUBLISHED_LENGTH
    sampling: tuple[str, ...] = ()


CIFAR10 = {"class-conditional": Setting("cifar10", ("--cond=1",), {"ddpmpp": 1.79, "ncsnpp": 1.79}),
           "unconditional": Setting("cifar10", ("--cond=0",), {"ddpmpp": 1.97, "ncsnpp": 1.98})}
FACES, FACES_SAMPLING = ("--cond=0", "--cres=1,2,2,2", "--lr=2e-4", "--augment=0.15"), ("--steps=40",)
LARGE = {"FFHQ": Setting("ffhq-64x64", (*FACES, "--dropout=0.05"), {"ddpmpp": 2.39, "ncsnpp": 2.53}, "--batch=256",
                         sampling=FACES_SAMPLING),
         "AFHQv2": Setting("afhqv2-64x64", (*FACES, "--dropout=0.25"), {"ddpmpp": 1.96, "ncsnpp": 2.16}, "--batch=256",
                           sampling=FACES_SAMPLING),
         "ImageNet": Setting("imagenet-64x64", ("--cond=1", "--lr=1e-4", "--ema=50", "--dropout=0.10", "--augment=0",
                                                "--fp16=1", "--ls=100", "--tick=200"),
                             {"adm": 1.36}, "--batch=4096", "--duration=2500.0",
                             ("--steps=256", "--S_churn=40", "--S_min=0.05", "--S_max=50", "--S_noise=1.003"))}
DIGITS = {"class-conditional": Setting("digits", ("--cond=1", *DIGITS_TRAINING), {"ddpmpp": None, "ncsnpp": None},
                                       DIGITS_BATCH, DIGITS_LENGTH)}


def clean_job(setting: Setting, arch: str) -> Job:
    """Return the training of a published model and its FID: the lowest of three ranges of seeds, as published."""
    dataset, tiny = setting.dataset, setting.dataset == "digits"
    images = f"{{out}}/{dataset}.zip" if dataset in SOURCES else f"{{data}}/{dataset}.zip"

    def score(number: int) -> Stage:
        if tiny:
            return script(f"score{number}", "evaluate.py", f"--outdir={{out}}/range{number}", "--data=digits",
                          f"--network={SNAPSHOT}", f"--per-class={PER_CLASS[dataset]}", "--metrics=fid",
                          "--judge-dir={out}/judge", f"--first-seed={number * PER_CLASS[dataset]}")
        return script(f"score{number}", "fid.py", "calc", f"--network={SNAPSHOT}",
                      f"--seeds={number * FID_IMAGES}-{(number + 1) * FID_IMAGES - 1}", f"--ref={images}",
                      f"--json={{out}}/range{number}/result.json", *setting.sampling)

    def read(folder: Path) -> dict[str, dict[str, float]]:
        found = [read_json(folder / f"range{number}" / "result.json", required=True) for number in range(3)]
        values = [content["fd_judge" if tiny else "fid"] for content in found]
        return {"FID": {"lowest of three": min(values), "first": values[0]}}

    stages = [script("train", "train.py", "--outdir={out}/model", "--nosubdir", f"--data={images}", f"--arch={arch}",
                     *setting.flags, setting.batch, "--seed={seed}", setting.length), *map(score, range(3))]
    if dataset in SOURCES:
        stages.insert(0, script("data", "dataset_tool.py", f"--source={SOURCES[dataset]}", f"--dest={images}"))
    kind = "cond" if "--cond=1" in setting.flags else "uncond"
    return Job(f"{dataset}_{kind}_{arch}", tuple(stages), read)


def clean_table(name: str, title: str, settings: Mapping[str, Setting], note: str, scale: str) -> Table:
    """Return FID of 50,000 images; on the digits, class-conditional only, where the scale is tiny."""
    cells = tuple(Cell(row, arch, clean_job(setting, arch), "FID", printed and Printed(printed))
                  for row, setting in (DIGITS if scale == "tiny" else settings).items()
                  for arch, printed in setting.printed.items())
    return Table(name, f"EDM: {title}", "Karras et al., NeurIPS 2022, and README of EDM",
                 "FID (of the digits: Fréchet distance in the features of a judge)", cells,
                 ("lowest of three", "first"), seeds=(0,), runs=f"edm-{scale}",
                 note="As published, FID is computed for three ranges of seeds and the lowest one is reported." + note)


def edm_table(scale: str, options: SimpleNamespace) -> Table:
    return clean_table("edm", "CIFAR-10, 35 network evaluations", CIFAR10, "", scale)


def edm_large_table(scale: str, options: SimpleNamespace) -> Table:
    return clean_table("edm-64", "64x64 pixels, 79 network evaluations, ImageNet 511", LARGE,
                       " Data: ffhq-64x64.zip, afhqv2-64x64.zip and imagenet-64x64.zip of dataset_tool.py in the "
                       "folder of the data sets.", scale)


TABLES: Tables = {
    "edm": edm_table, "edm-64": edm_large_table, "tdsm": tdsm_table,
    **{f"tdsm-{name}": (lambda scale, options, name=name: tdsm_view(name, scale, options)) for name in TDSM_DATA}}

if __name__ == "__main__":
    serve("EDM.tables", TABLES)
