"""The tables of MetaSemi: the runs of each cell and the printed numbers.

    python -m MetaSemi.tables                              # names of the tables
    python -m MetaSemi.tables cifar10 --list               # the runs of a table and their state
    python -m MetaSemi.tables ablation --scale tiny        # on the digits with 20 and 40 labels, minutes

How they are run, aggregated and written: shared/report/tables.py.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from shared.cli import Choice, Flag, Option
from shared.report.history import percent, read_json
from shared.report.tables import Cell, Job, Printed, Stage, Table, Tables, Values, serve

HERE = Path(__file__).resolve().parent
# The published tables report the best accuracy on the test set.
BY = ("best on test", "median of last 20", "last")

# Data set -> its labels and flags in the README of the original; the seed there is that of our seed 0.
SETTINGS = {"svhn": (1000, ("--alpha=0.1", "--weight-decay=5e-5"), 7788),
            "cifar10": (4000, ("--alpha=1.0", "--weight-decay=1e-4"), 8469),
            "cifar100": (10000, ("--alpha=1.0", "--weight-decay=1e-4"), 7788)}
# Row -> script, switch, error rates on these three.
ABLATION = {"labels only": ("train_baseline", (), (9.76, 15.43, 38.74)),
            "meta only": ("train_meta", (), (3.68, 11.63, 35.40)),
            "mix-up only": ("train_baseline", ("--mix-up",), (5.60, 11.10, 32.67)),
            "MetaSemi (both)": ("train_meta", ("--mix-up",), (3.15, 7.78, 30.74))}
ALL_LABELS = (2.67, 4.88, 22.10)
# Not in the paper, on the digits alone: the same with uncorrected pseudo-labels.

CONTROLS = {"meta only, uncorrected": ("train_meta", ("--meta-lr=0",), ()),
            "both, uncorrected": ("train_meta", ("--mix-up", "--meta-lr=0"), ())}
# The digits: 8x8 images, a small network, a short training with the published shape of the schedule.
DIGITS = ("--dataset=digits", "-a=small", "--batch-size=32", "--warmup=60", "--milestones=[400,500]",
          "--test-freq=100", "--print-freq=100")
DIGITS_LENGTH = "--total-steps=600"
# Row -> script, top-1 and top-5 error.
GLOBAL_BATCH, EPOCHS = 512, 600
IMAGENET = {"labels only": ("train_imagenet", (53.65, 31.01)), "MetaSemi": ("train_meta_imagenet", (44.87, 18.88))}
MORE_FLAGS = (
    Option("--gpu", Flag, False, "train on a GPU (--gpus implies it)"),
    Option("--processes", Choice("1", "2", "4", "8", "16", "32"), "1",
           "ImageNet: GPUs of one run, which share its batches of 512"),
)


def read_error(folder: Path) -> Values:
    """Return the error in % by protocol from a run's result.json, and its top-5 error, if any."""
    accuracy = read_json(folder / "run" / "result.json", required=True)["accuracy"]
    values = {"error": {protocol: 100 - value for protocol, value in percent(accuracy).items()}}
    if "last_top5" in accuracy:
        values["top-5 error"] = {"last": 100 - 100 * accuracy["last_top5"]}
    return values


def training(name: str, script: str, flags: Sequence[str], first_seed: int = 0, launcher: Sequence[str] = ()) -> Job:
    """Return a run of one script. first_seed: the --seed of seed 0."""
    words = (*launcher, str(HERE / f"{script}.py"), *flags, "--seed={seed}", "--save-path={out}/run")
    return Job(name, (Stage("train", words),), read_error, first_seed=first_seed)


def ablation_table(scale: str, options: SimpleNamespace) -> Table:
    """Return the errors of MetaSemi and of its parts; on the digits with 20 and 40 labels where the scale is tiny."""
    cells = []
    for row, (script, switch, printed) in (ABLATION | (CONTROLS if scale == "tiny" else {})).items():
        word = row.split(" (")[0].replace(", ", "-").replace(" ", "-").lower()
        if scale == "tiny":
            for labels in (20, 40):
                flags = (*DIGITS, f"--num-label={labels}", DIGITS_LENGTH, *switch)
                cells.append(Cell(row, f"digits, {labels} labels",
                                  training(f"{word}_digits_{labels}", script, flags), "error"))
            continue
        for (dataset, (labels, method, seed)), error in zip(SETTINGS.items(), printed, strict=True):
            flags = (f"--dataset={dataset}", f"--num-label={labels}", *method, *switch, *where(options))
            cells.append(Cell(row, f"{dataset}, {labels} labels",
                              training(f"{word}_{dataset}", script, flags, seed), "error", Printed(error)))
    if scale == "paper":
        for (dataset, (labels, method, seed)), error in zip(SETTINGS.items(), ALL_LABELS, strict=True):
            # More than there are of any class: all of them.
            flags = (f"--dataset={dataset}", "--num-label=200000", *method, *where(options))
            cells.append(Cell("all labels", f"{dataset}, {labels} labels",
                              training(f"all-labels_{dataset}", "train_baseline", flags, seed), "error",
                              Printed(error)))
    return Table("ablation", "MetaSemi and its parts", "Zhang et al., AISTATS 2021, ConvLarge", "Error in %",
                 tuple(cells), BY)


def view(dataset: str, scale: str, options: SimpleNamespace) -> Table:
    """Return the column of one data set, which shares its runs with the whole ablation; all columns of the digits."""
    return ablation_table(scale, options).view(
        dataset, f"MetaSemi and its parts, {dataset}", scale,
        lambda cell: scale == "tiny" or cell.column.startswith(f"{dataset},"))


def where(options: SimpleNamespace) -> list[str]:
    return ["--data-path={data}", *["--gpu"] * bool(options.gpus or options.gpu)]


def imagenet_table(scale: str, options: SimpleNamespace) -> Table:
    """Return top-1 and top-5 error of ResNet-18 with a tenth of the labels (tiny: the digits with 20 labels)."""
    note = "records: <data-dir>/imagenet-records, the nine files that imagenet/im2rec.py writes"
    title, source, unit = "MetaSemi: ImageNet, 128,000 labels, ResNet-18", "Zhang et al., AISTATS 2021", "Error in %"
    if scale == "tiny":
        tiny = [cell for cell in ablation_table(scale, options).cells if cell.column == "digits, 20 labels"
                and cell.row in ("labels only", "MetaSemi (both)")]
        return Table("imagenet", title, source, unit, tuple(tiny), BY, seeds=(0,), runs="ablation-tiny")
    count, cells = int(options.processes), []
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}") if count > 1 else ()
    for row, (script, (top1, top5)) in IMAGENET.items():
        flags = ("--data={data}/imagenet-records", f"--batch-size={GLOBAL_BATCH // count}", f"--epochs={EPOCHS}")
        job = training(f"{row.lower().replace(' ', '-')}_imagenet", script, flags, 12, launcher)
        cells += [Cell(row, "top-1", job, "error", Printed(top1)),
                  Cell(row, "top-5", job, "top-5 error", Printed(top5))]
    return Table("imagenet", title, source, unit, tuple(cells), ("last", "best on test", "median of last 20"),
                 seeds=(0,), note=note)


TABLES: Tables = {
    "ablation": ablation_table,
    **{name: (lambda scale, options, name=name: view(name, scale, options)) for name in SETTINGS},
    "imagenet": imagenet_table}

if __name__ == "__main__":
    serve("MetaSemi.tables", TABLES, MORE_FLAGS)
