"""The tables of DDAE: the runs of each cell and the printed numbers.

    python -m DDAE.tables                                 # names of the tables
    python -m DDAE.tables cifar10 --only EDM_ddpmpp       # one row at the length of the paper
    python -m DDAE.tables cifar10 --scale tiny --jobs 2   # the whole chain on the digits, 3 seeds
    python -m DDAE.tables dit                             # linear probe of DiT-XL/2

Each row is one chain of commands: pre-train, sample, probe and so on. How they are run, aggregated and written:
shared/report/tables.py.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from shared.report.history import percent, read_json
from shared.report.tables import Cell, Job, Printed, Stage, Table, Tables, Values, serve

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
# 4 processes with the config's batch size and rate each, 8 for the last: 512 or 256 images a step.
PROCESSES = {"EDM_ddpmpp_aug": 8}
REFERENCE = "{data}/fid-refs/cifar10.npz"  # made once by EDM/fid.py ref

DIGITS, DIGITS_LEVELS = "DDPM_digits", "1,11,31,71,121"
DIGITS_WRN = ("--dataset=digits --epoch=40 --batch_size=32 --blocks_per_group=1 --channel_multiplier=2 --no_flip "
              "--pad=1").split()
DIGITS_TUNING = "--epochs=30 --lr=1e-3 --eval_every=10 --warm_epoch=2 --batch_size=128".split()
# row -> folder of its result.json in the folder of the run.
DIGITS_CHAIN = {"linear probe": "probe", "fine-tuned": "finetune", "noisy images, head on features": "head",
                "noisy images, WideResNet": "wrn"}
DIGITS_CONTROLS = {"linear probe, untrained network": "untrained", "linear probe, pixels": "pixels",
                   "fine-tuned from scratch": "scratch"}


def stage(name: str, script: str, *flags: str) -> Stage:
    return Stage(name, (str(HERE / script), *flags))


def on_config(config: str) -> tuple[str, ...]:
    """Return the flags that every stage of a chain has."""
    return (f"--config={HERE / 'config' / f'{config}.yaml'}", "--set=save_dir={out}/run", "--seed={seed}",
            "--data_dir={data}")


def accuracies(path: Path) -> dict[str, float]:
    return percent(read_json(path, required=True)["accuracy"])


# ---------------------------------------------------------------- CIFAR-10


def published_chain(config: str) -> Job:
    """Return one row of the README: pre-training, then FID and linear probe of one or two of its checkpoints."""
    epochs = [epoch for epoch, *_ in PRINTED[config]]
    own, gpus = (*on_config(config), "--use_amp"), f"--gpus={PROCESSES.get(config, 4)}"
    stages = [stage("train", "train.py", *own, gpus)]
    for epoch in epochs:
        stages += [stage(f"fid{epoch}", "fid.py", *own, f"--epoch={epoch}", f"--ref={REFERENCE}",
                         f"--json={{out}}/fid_{epoch}.json"),
                   stage(f"probe{epoch}", "linear.py", *own, gpus, f"--epoch={epoch}",
                         f"--outdir={{out}}/probe_{epoch}")]

    def read(folder: Path) -> Values:
        values: dict[str, dict[str, float]] = {}
        for epoch in epochs:
            fid = read_json(folder / f"fid_{epoch}.json", required=True)["fid"]
            values[f"FID {epoch}"] = {LAST: fid}
            values[f"acc {epoch}"] = accuracies(folder / f"probe_{epoch}" / "result.json")
        return values

    return Job(config, tuple(stages), read, (HERE / "config" / f"{config}.yaml",))


def cifar10_table(scale: str, options: SimpleNamespace) -> Table:
    """Return the five rows of the README; at the tiny scale the chain on the digits."""
    if scale == "tiny":
        return digits_table()
    cells = []
    for config, rows in PRINTED.items():
        job = published_chain(config)
        for which, (epoch, fid, accuracy) in zip(("best probe", "best FID"), rows, strict=False):
            cells += [Cell(config, f"{which}: FID", job, f"FID {epoch}", Printed(fid)),
                      Cell(config, f"{which}: acc", job, f"acc {epoch}", Printed(accuracy))]
    return Table("cifar10", "DDAE: FID and linear probe on CIFAR-10", "README of DDAE, one run", "FID; accuracy in %",
                 tuple(cells), (LAST, BEST), seeds=(1337,))


# ---------------------------------------------------------------- digits


def digits_chain() -> Job:
    """Return all stages of a DDAE on the digits."""
    own = on_config(DIGITS)
    return digits_job("chain", DIGITS_CHAIN, (
        stage("train", "train.py", *own),
        stage("sample", "sample.py", *own, "--images=100"),
        stage("probe", "linear.py", *own, "--grid", f"--times={DIGITS_LEVELS}", "--copies=4", "--outdir={out}/probe"),
        stage("contrastive", "contrastive.py", *own, "--epoch_interval=100", "--outdir={out}/contrastive"),
        stage("wrn", "noisy_classifier_WRN.py", "--seed={seed}", "--mode=DDPM", *DIGITS_WRN, "--save_dir={out}/wrn"),
        stage("head", "noisy_classifier_DDAE.py", *own, "--outdir={out}/head", "--compare", "{out}/wrn/result.json"),
        stage("finetune", "finetune.py", *own, *DIGITS_TUNING, "--outdir={out}/finetune")))


def digits_controls() -> Job:
    """Return the controls of the chain: an untrained network, and pixels."""
    own = on_config(DIGITS)
    return digits_job("controls", DIGITS_CONTROLS, (
        stage("untrained", "linear.py", *own, "--grid", f"--times={DIGITS_LEVELS}", "--copies=4",
              "--encoder=untrained", "--outdir={out}/untrained"),
        stage("pixels", "linear.py", *own, "--encoder=pixels", "--copies=4", "--outdir={out}/pixels"),
        stage("scratch", "finetune.py", *own, *DIGITS_TUNING, "--encoder=untrained", "--outdir={out}/scratch")))


def digits_job(name: str, rows: Mapping[str, str], stages: tuple[Stage, ...]) -> Job:
    def read(folder: Path) -> Values:
        return {row: accuracies(folder / place / "result.json") for row, place in rows.items()}

    return Job(name, stages, read, (HERE / "config" / f"{DIGITS}.yaml",))


def digits_table() -> Table:
    """Return accuracies on the digits: probe, its two comparisons, fine-tuning, both noise-conditional classifiers."""
    cells = [Cell(row, "accuracy", job, row) for job, rows in ((digits_chain(), DIGITS_CHAIN),
                                                               (digits_controls(), DIGITS_CONTROLS)) for row in rows]
    return Table("cifar10", "DDAE on the handwritten digits", "nothing", "Accuracy in %, 500 test images", tuple(cells),
                 (LAST, BEST), seeds=(0, 1, 2),
                 note="Accuracy on noisy images is the mean over 20 noise levels. By the protocol \"best on test\" a "
                      "probe is the best of its grid. Each run also leaves samples, the grid as a heat map, alignment "
                      "and uniformity, and the curves over noise levels as PNG files in its folder.")


# ---------------------------------------------------------------- DiT


def dit_job(dataset: str, tiny: bool) -> Job:
    """Return latents and probe of one data set; the weights lie in pretrained_models/ of the data folder, small ones
    are made."""
    own = (f"--dataset={dataset}", "--codes={out}/codes", "--use_amp", "--seed={seed}")
    pretrained, vae, ckpt = "{data}/pretrained_models", "sd-vae-ft-mse", "DiT-XL-2-256x256.pt"
    stages, small_vae, small_dit = [], [], []
    if tiny:
        pretrained, vae, ckpt = "{out}/small", "vae", "DiT-S-2.pt"
        stages = [stage("small", "DiT/small.py", f"--outdir={pretrained}", "--seed={seed}")]
        small_vae = ["--resolution=32", "--num_copies=2"]
        small_dit = ["--model=DiT-S/2", "--name=layer-2", "--lr=3e-2", "--epoch=10"]
    stages += [stage("latents", "DiT/vae_preprocessing.py", *own, *small_vae, f"--vae={pretrained}/{vae}",
                     "--data_dir={data}"),
               stage("probe", "DiT/linear.py", *own, *small_dit, f"--ckpt={pretrained}/{ckpt}", "--outdir={out}/probe")]

    def read(folder: Path) -> Values:
        return {"acc": accuracies(folder / "probe" / dataset / "result.json")}

    return Job(f"dit_{dataset}", tuple(stages), read)


def dit_table(scale: str, options: SimpleNamespace) -> Table:
    """Return the linear probe of DiT-XL/2; of a small DiT without training, on the digits, where the scale is tiny."""
    tiny = scale == "tiny"
    cells = [Cell("DiT-S/2, random weights" if tiny else "DiT-XL/2", dataset, dit_job(dataset, tiny), "acc", printed)
             for dataset, printed in
             ({"digits": None} if tiny else {"cifar": Printed(85.73), "tiny": Printed(66.57)}).items()]
    return Table("dit", "Linear probe of DiT-XL/2", "README of DDAE's DiT folder", "Accuracy in %", tuple(cells),
                 (LAST,), seeds=(0, 1, 2) if tiny else (0,))


TABLES: Tables = {"cifar10": cifar10_table, "dit": dit_table}

if __name__ == "__main__":
    serve("DDAE.tables", TABLES)
