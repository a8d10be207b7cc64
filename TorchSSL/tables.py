"""The tables of TorchSSL and DPT: the runs of each cell and the printed numbers.


    python -m TorchSSL.tables                             # names of the tables
    python -m TorchSSL.tables cifar10 --list              # its runs and their state
    python -m TorchSSL.tables digits                      # all learners on the handwritten digits, in minutes
    python -m TorchSSL.tables dpt --scale tiny            # all stages on the digits

How they are run, aggregated and written: shared/report/tables.py.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from shared.report.tables import Cell, Job, Printed, Stage, Table, Tables, serve
from TorchSSL.make_configs import CONFIG, LEARNERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Accuracies of result.json by protocol; the published tables report the best one on the test set.
PROTOCOLS = {"best on test": "best_on_test", "median of last 20": "median_of_last_20", "last": "last",
             "best on validation": "best_on_validation"}

# Rows as "mean std"; "-" where nothing is printed.
ACCURACY = {
    "cifar10": ((40, 250, 4000), """
        fullysupervised 95.38 .05 95.39 .04 95.38 .05
        pimodel 25.66 1.76 53.76 1.29 86.87 .59
        pseudolabel 25.39 .26 53.51 2.2 84.92 .19
        pseudolabel_flex 26.26 1.96 53.86 1.81 85.25 .19
        meanteacher 29.91 1.6 62.54 3.3 91.9 .21
        vat 25.34 2.12 58.97 1.79 89.49 .12
        mixmatch 63.81 6.48 86.37 .59 93.34 .26
        remixmatch 90.12 1.03 93.7 .05 95.16 .01
        uda 89.38 3.75 94.84 .06 95.71 .07
        uda_flex 94.56 .52 94.98 .07 95.76 .06
        fixmatch 92.53 .28 95.14 .05 95.79 .08
        flexmatch 95.03 .06 95.02 .09 95.81 .01"""),
    "cifar100": ((400, 2500, 10000), """
        fullysupervised 80.7 .09 80.7 .09 80.73 .05
        pimodel 13.04 .8 41.2 .66 63.35 0
        pseudolabel 12.55 .85 42.26 .28 63.45 .24
        pseudolabel_flex 14.28 .46 43.88 .51 64.4 .15
        meanteacher 18.89 1.44 54.83 1.06 68.25 .23
        vat 14.8 1.4 53.16 .79 67.86 .19
        mixmatch 32.41 .66 60.24 .48 72.22 .29
        remixmatch 57.25 1.05 73.97 .35 79.98 .27
        uda 53.61 1.59 72.27 .21 77.51 .23
        uda_flex 54.83 1.88 72.92 .15 78.09 .1
        fixmatch 53.58 .82 71.97 .16 77.8 .12
        flexmatch 60.06 1.62 73.51 .2 78.1 .15"""),
    "stl10": ((40, 250, 1000), """
        pimodel 25.69 .85 44.87 1.5 67.22 .4
        pseudolabel 25.32 .99 44.55 2.43 67.36 .71
        pseudolabel_flex 26.58 2.19 47.94 2.5 67.95 .37
        meanteacher 28.28 1.45 43.51 2.75 66.1 1.37
        vat 25.26 .38 43.58 1.97 62.05 1.12
        mixmatch 45.07 .96 65.48 .32 78.3 .68
        remixmatch 67.88 6.24 87.51 1.28 93.26 .14
        uda 62.58 8.44 90.28 1.15 93.36 .17
        uda_flex 70.47 2.1 90.97 .45 93.9 .25
        fixmatch 64.03 4.14 90.19 1.04 93.75 .33
        flexmatch 70.85 4.16 91.77 .39 94.23 .18"""),
    "svhn": ((40, 250, 1000), """
        fullysupervised 97.87 .02 97.87 .01 97.86 .01
        pimodel 32.52 .95 86.7 1.12 92.84 .11
        pseudolabel 35.39 5.6 84.41 .95 90.6 .32
        pseudolabel_flex 36.79 3.64 79.58 2.11 87.95 .54
        meanteacher 63.91 3.98 96.55 .03 96.73 .05
        vat 25.25 3.38 95.67 .12 95.89 .2
        mixmatch 69.4 8.39 95.44 .32 96.31 .37
        remixmatch 75.96 9.13 93.64 .22 94.84 .31
        uda 94.88 4.27 98.08 .05 98.11 .01
        uda_flex 96.58 1.51 97.34 .83 97.98 .05
        fixmatch 96.19 1.18 97.98 .02 98.04 .03
        flexmatch 91.81 3.2 93.41 2.29 93.28 .3"""),
}
SUPERVISED, ALL_LABELS = "supervised, 40 labels", "fullysupervised"  # one script, without and with the other labels
DIGITS = "digits"  # the folder of the runs on the digits, which several tables show
IMAGENET = {"fixmatch": (56.34, 78.20), "flexmatch": (58.15, 80.52)}  # top-1 and top-5 with 100,000 labels
DPT_ERROR = Printed(4.68, 0.17)  # CIFAR-10, 40 labels; the deviation is from memory


def percent(accuracy: Mapping[str, float | None]) -> dict[str, float]:
    return {protocol: 100 * accuracy[key] for protocol, key in PROTOCOLS.items() if accuracy.get(key) is not None}


def read_accuracy(folder: Path) -> dict[str, dict[str, float]]:
    """Return {"accuracy": by protocol, "top-5": the last} in % from a run's result.json."""
    result = json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))
    return {"accuracy": percent(result["accuracy"]), "top-5": {"last": 100 * result["last"]["eval/top-5-acc"]}}


def learner(name: str, config: Path, *flags: str, job: str = "") -> Job:
    """Return the run of one learner with one configuration file. job: its name, where that of the file is another's."""
    words = (str(HERE / f"{name}.py"), "--c", str(config), "--seed={seed}", "--save_dir={out}", "--save_name=run",
             "--data_dir={data}", *flags)
    return Job(job or config.stem.removesuffix("_0"), (Stage("train", words),), read_accuracy, (config,))


def on_digits(name: str) -> Job:
    """Return the run of one learner, or of SUPERVISED, on the digits with 40 labels."""
    if name == SUPERVISED:
        config = CONFIG / ALL_LABELS / f"{ALL_LABELS}_digits_40_0.yaml"
        return learner(ALL_LABELS, config, "--all_labels=False", job="supervised_digits_40")
    return learner(name, CONFIG / name / f"{name}_digits_40_0.yaml")


def digits_table(scale: str, options: SimpleNamespace) -> Table:
    """Return all learners on the digits, beside the same training on the labelled images alone."""
    cells = [Cell(f"{name}, all labels" if name == ALL_LABELS else name, "accuracy", on_digits(name), "accuracy")
             for name in (SUPERVISED, *LEARNERS)]
    protocols = ("last", "median of last 20", "best on test")
    return Table("digits", "All learners on the handwritten digits, 40 labels", "nothing",
                 "Accuracy in % on 500 test images", tuple(cells), protocols, base=SUPERVISED, runs=DIGITS)


def accuracy_table(dataset: str, scale: str, options: SimpleNamespace) -> Table:
    """Return the accuracies of all learners on one data set; on the digits with 40 labels where the scale is tiny."""
    labels, text = ACCURACY[dataset]
    cells = []
    for line in text.split("\n")[1:]:
        name, *numbers = line.split()
        if scale == "tiny":
            cells.append(Cell(name, "digits, 40 labels", on_digits(name), "accuracy"))
            continue
        for i, count in enumerate(labels):
            config = CONFIG / name / f"{name}_{dataset}_{count}_0.yaml"
            cells.append(Cell(name, f"{count} labels", learner(name, config), "accuracy",
                              Printed(float(numbers[2 * i]), float(numbers[2 * i + 1]) or None)))
    return Table(dataset, f"TorchSSL: accuracy on {dataset}", "README of TorchSSL, seeds 0, 1 and 2",
                 "Accuracy in %", tuple(cells), tuple(PROTOCOLS), runs=DIGITS if scale == "tiny" else "")


def imagenet_table(scale: str, options: SimpleNamespace) -> Table:
    """Return top-1 and top-5 accuracy on ImageNet with 100,000 labels."""
    cells = []
    for name, (top1, top5) in IMAGENET.items():
        config = CONFIG / name / f"{name}_imagenet_100000_0.yaml"
        job = on_digits(name) if scale == "tiny" else learner(name, config)
        cells += [Cell(name, "top-1", job, "accuracy", Printed(top1)), Cell(name, "top-5", job, "top-5", Printed(top5))]
    return Table("imagenet", "TorchSSL: ImageNet, 100,000 labels", "README of TorchSSL", "Accuracy in %", tuple(cells),
                 ("last", *[name for name in PROTOCOLS if name != "last"]), seeds=(0,),
                 runs=DIGITS if scale == "tiny" else "")


def read_dpt(folder: Path) -> dict[str, dict[str, float]]:
    """Return the error rates in % of both classifiers and of the pseudo-labels, and the FID of stage 2."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    distance = json.loads((folder / "fid" / "result.json").read_text(encoding="utf-8"))
    # One set of labels and one diffusion model for all protocols.
    once = {"pseudo-label error": 100 - 100 * report["pseudo_label_accuracy"],
            "FID": distance["fid" if "fid" in distance else "fd_judge"]}
    values = {name: dict.fromkeys(percent(report["accuracy"]["stage1"]), value) for name, value in once.items()}
    for stage in ("stage1", "stage3"):
        accuracy = percent(report["accuracy"][stage])
        values[f"{stage} error"] = {protocol: 100 - value for protocol, value in accuracy.items()}
    return values


def dpt_table(scale: str, options: SimpleNamespace) -> Table:
    """Return DPT on CIFAR-10 with 40 labels: stage 1, its pseudo-labels, stage 2, stage 3."""
    tiny = scale == "tiny"
    dataset, labels, size = ("digits", 10, 8) if tiny else ("cifar10", 40, 32)
    name = f"freematch-{labels}-seed{{seed}}-{dataset}-{size}x{size}"  # of the folder of stage 2, as run_all.sh has it
    network = f"--network={{out}}/training-runs/{name}/network-snapshot-latest.pkl"
    stages = [Stage(f"stage{number}", (str(ROOT / "run_all.sh"), f"--dataset={dataset}", "--seed={seed}", "--out={out}",
                                       "--data-dir={data}", f"--stages={number}")) for number in (1, 2, 3)]
    if tiny:
        fid = ("EDM/evaluate.py", "--outdir={out}/fid", f"--data={dataset}", network, "--per-class=100",
               "--metrics=fid", "--seed={seed}")
    else:  # the images of the training set are also those with pseudo-labels
        reference = f"{{out}}/saved_models/freematch_{dataset}_{labels}_{{seed}}/{name}.zip"
        fid = ("EDM/fid.py", "calc", network, f"--ref={reference}", "--seeds=0-49999", "--json={out}/fid/result.json")
    stages.append(Stage("fid", (str(ROOT / fid[0]), *fid[1:])))
    job = Job(f"dpt_{dataset}", tuple(stages), read_dpt)
    cells = tuple(Cell("DPT", column, job, column, printed) for column, printed in
                  {"stage1 error": None, "pseudo-label error": None, "FID": None, "stage3 error": DPT_ERROR}.items())
    return Table("dpt", "DPT: CIFAR-10 with 40 labels", "You et al., NeurIPS 2023 (deviation from memory)",
                 "Error in %; FID (of the digits: Fréchet distance in the features of a judge)", cells,
                 tuple(PROTOCOLS), seeds=(1, 2, 3),
                 note="FID: images of stage 2, which is trained with the pseudo-labels, against the training images; "
                      "the paper's number is not at hand.")



TABLES: Tables = {
    **{name: (lambda scale, options, name=name: accuracy_table(name, scale, options)) for name in ACCURACY},
    "imagenet": imagenet_table,
    "digits": digits_table,
    "dpt": dpt_table,
}

if __name__ == "__main__":
    serve("TorchSSL.tables", TABLES)
