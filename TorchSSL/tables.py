"""The tables of TorchSSL and DPT: the runs of each cell and the printed numbers.


    python -m TorchSSL.tables                             # names of the tables
    python -m TorchSSL.tables cifar10 --list              # its runs and their state
    python -m TorchSSL.tables digits                      # all learners on the handwritten digits, in minutes
    python -m TorchSSL.tables dpt --scale tiny            # all stages on the digits

How they are run, aggregated and written: shared/report/tables.py.
"""
from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from shared.cli import read_yaml
from shared.report.history import percent, read_json
from shared.report.tables import Cell, Job, Printed, Stage, Table, Tables, serve
from TorchSSL.make_configs import CONFIG, LEARNERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# The published tables report the best accuracy on the test set.
BY = ("best on test", "median of last 20", "last", "best on validation")

ACCURACY = read_yaml(CONFIG / "printed.yaml", "tables.py")  # as printed
SUPERVISED, ALL_LABELS = "supervised, 40 labels", "fullysupervised"  # one script, without and with the other labels
DIGITS = "digits"  # the folder of the runs on the digits, which several tables show
IMAGENET = {"fixmatch": (56.34, 78.20), "flexmatch": (58.15, 80.52)}  # top-1 and top-5 with 100,000 labels
DPT_ERROR = Printed(4.68, 0.17)  # CIFAR-10, 40 labels; the deviation is from memory


def read_accuracy(folder: Path) -> dict[str, dict[str, float]]:
    """Return {"accuracy": by protocol, "top-5": the last} in % from a run's result.json."""
    result = read_json(folder / "run" / "result.json", required=True)
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
    labels, cells = ACCURACY[dataset]["labels"], []
    for name, numbers in ACCURACY[dataset].items():
        if name == "labels":
            continue
        if scale == "tiny":
            cells.append(Cell(name, "digits, 40 labels", on_digits(name), "accuracy"))
            continue
        for i, count in enumerate(labels):
            config = CONFIG / name / f"{name}_{dataset}_{count}_0.yaml"
            cells.append(Cell(name, f"{count} labels", learner(name, config), "accuracy",
                              Printed(numbers[2 * i], numbers[2 * i + 1] or None)))
    return Table(dataset, f"TorchSSL: accuracy on {dataset}", "README of TorchSSL, seeds 0, 1 and 2",
                 "Accuracy in %", tuple(cells), BY, runs=DIGITS if scale == "tiny" else "")


def imagenet_table(scale: str, options: SimpleNamespace) -> Table:
    """Return top-1 and top-5 accuracy on ImageNet with 100,000 labels."""
    cells = []
    for name, (top1, top5) in IMAGENET.items():
        config = CONFIG / name / f"{name}_imagenet_100000_0.yaml"
        job = on_digits(name) if scale == "tiny" else learner(name, config)
        cells += [Cell(name, "top-1", job, "accuracy", Printed(top1)), Cell(name, "top-5", job, "top-5", Printed(top5))]
    return Table("imagenet", "TorchSSL: ImageNet, 100,000 labels", "README of TorchSSL", "Accuracy in %", tuple(cells),
                 ("last", *[name for name in BY if name != "last"]), seeds=(0,),
                 runs=DIGITS if scale == "tiny" else "")


def read_dpt(folder: Path) -> dict[str, dict[str, float]]:
    """Return the error rates in % of both classifiers and of the pseudo-labels, and the FID of stage 2."""
    report = read_json(folder / "report.json", required=True)
    distance = read_json(folder / "fid" / "result.json", required=True)
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
                 BY, seeds=(1, 2, 3),
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
