"""The tables of DASO: the runs of each cell and the printed numbers.

    python -m DASO.tables                                  # names of the tables
    python -m DASO.tables cifar10-lt --only DASO --list    # the runs of a table and their state
    python -m DASO.tables digits --jobs 2                  # all learners on the long-tailed digits, rare classes apart
    python -m DASO.tables cifar10-lt --scale tiny          # those of the table on the digits, in minutes

How they are run, aggregated and written: shared/report/tables.py. Printed numbers are from memory of the paper.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from shared.cli import Int, Option, read_yaml
from shared.report.history import percent, read_json
from shared.report.tables import Cell, Job, Printed, Stage, Table, Tables, serve

HERE = Path(__file__).resolve().parent
# The published tables report the median of the last 20 evaluations.
BY = ("median of last 20", "last", "best on validation", "best on test")
LOGIT_ADJUSTMENT, ABC = ("ALGORITHM.LOGIT_ADJUST.APPLY", "True"), ("ALGORITHM.ABC.APPLY", "True")
DARP = ("ALGORITHM.DARP.APPLY", "True")
# Added keys of a row with another class distribution of the unlabelled images.
MISMATCHED = {"FixMatch + DASO": ("ALGORITHM.DASO.DIST_TEMP", "0.3"),
              "FixMatch + DARP": ("ALGORITHM.DARP.EST", str(HERE / "darp_estim"))}
# Row -> configuration file and the keys it adds. LA: logit adjustment.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Supervised": ("supervised", ()),
    "Supervised + LA": ("supervised", LOGIT_ADJUSTMENT),
    "Supervised + LDAM": ("supervised", ("MODEL.LOSS.WITH_LABELED_COST_SENSITIVE", "True")),
    "cRT on Supervised": ("crt", ()),
    "PseudoLabel": ("pseudolabel", ()),
    "MeanTeacher": ("meanteacher", ()),
    "MixMatch": ("mixmatch", ()),
    "ReMixMatch": ("remixmatch", ()),
    "ReMixMatch + DARP": ("remixmatch", DARP),
    "ReMixMatch + CReST+": ("remixmatch_crest", ()),
    "ReMixMatch + DASO": ("remixmatch_daso", ()),
    "USADTM": ("usadtm", ()),
    "FixMatch": ("fixmatch", ()),
    "FixMatch + DARP": ("fixmatch", DARP),
    "FixMatch + CReST": ("fixmatch_crest", ("MODEL.DIST_ALIGN.APPLY", "False")),
    "FixMatch + CReST+": ("fixmatch_crest", ("MODEL.DIST_ALIGN.APPLY", "True")),
    "FixMatch + DASO": ("fixmatch_daso", ()),
    "FixMatch + LA": ("fixmatch", LOGIT_ADJUSTMENT),
    "FixMatch + LA + DASO": ("fixmatch_daso", LOGIT_ADJUSTMENT),
    "FixMatch + ABC": ("fixmatch_abc", ()),
    "FixMatch + ABC + DASO": ("fixmatch_daso", ABC),
    "ACR": ("acr", ()),
    "SimPro": ("simpro", ()),
}
GROUPS = ("many", "medium", "few")  # thirds of the classes by frequency
DIGITS, PAPER = "digits", "paper"  # folders of the runs, which all tables share


def columns(dataset: str, heads: tuple[tuple[int, int], ...], factors: tuple[tuple[int, int], ...],
            reverse: bool = False) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (name, data set, keys) of every pair of (N1, M1) and (gamma_l, gamma_u), factors outside."""
    found, section = [], f"DATASET.{dataset.upper()}"
    for labelled, unlabelled in factors:
        for head, unlabelled_head in heads:
            keys = (f"{section}.NUM_LABELED_HEAD", str(head), f"{section}.IMB_FACTOR_L", str(labelled))
            name = f"{dataset} N1={head} g={labelled}"
            if dataset != "stl10":
                keys += (f"{section}.NUM_UNLABELED_HEAD", str(unlabelled_head), f"{section}.IMB_FACTOR_UL",
                         str(unlabelled))
                name += "" if unlabelled == labelled and not reverse else f" gu={'1/' if reverse else ''}{unlabelled}"
            if reverse:
                keys += ("DATASET.REVERSE_UL_DISTRIBUTION", "True")
            found.append((name, dataset, keys))
    return found


CIFAR10, CIFAR100, STL10 = ((500, 4000), (1500, 3000)), ((50, 400), (150, 300)), ((150, -1), (450, -1))
# Published table -> its columns.
COLUMNS = {
    "matched": (columns("cifar10", CIFAR10, ((100, 100), (150, 150)))
                + columns("cifar100", CIFAR100, ((10, 10), (20, 20)))),
    "mismatched": (columns("cifar10", CIFAR10, ((100, 1),)) + columns("cifar10", CIFAR10, ((100, 100),), True)
                   + columns("stl10", STL10, ((10, -1), (20, -1)))),
}
PRINTED = read_yaml(HERE / "configs" / "printed.yaml", "tables.py")  # rows as "mean, std" of each of these columns

# Table -> title, the published tables that it shows, and of which data sets.
TABLES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "cifar10-lt": ("long-tailed CIFAR-10", ("matched", "mismatched"), ("cifar10",)),
    "cifar100-lt": ("long-tailed CIFAR-100", ("matched",), ("cifar100",)),
    "stl10-lt": ("long-tailed STL-10", ("mismatched",), ("stl10",)),
    "matched": ("equally long-tailed labelled and unlabelled images", ("matched",), ("cifar10", "cifar100")),
    "mismatched": ("unlabelled images of another class distribution", ("mismatched",), ("cifar10", "stl10")),
}


def read_accuracy(folder: Path) -> dict[str, dict[str, float]]:
    """Return {"accuracy": by protocol, "few": of the rarest classes} in % from a run's result.json."""
    result = read_json(next((folder / "run").glob("*/result.json")))
    return {name: percent(values) for name, values in {"accuracy": result["accuracy"], **result["groups"]}.items()}


def training(file: str, keys: Sequence[str], name: str = "train") -> Stage:
    """Return the run of one configuration."""
    return Stage(name, (str(HERE / "main.py"), "--config-file", str(HERE / "configs" / f"{file}.yaml"), *keys, "SEED",
                        "{seed}", "OUTPUT_DIR", f"{{out}}/{'run' if name == 'train' else name}"))


def slug(row: str) -> str:
    return row.lower().replace(" + ", "_").replace("+", "_plus").replace(" ", "_")


def job(row: str, dataset: str, name: str, keys: Sequence[str]) -> Job:
    """Return the run of a row of ROWS on a data set."""
    file, own = ROWS[row]
    return Job(f"{slug(row)}_{name}", (training(f"{dataset}/{file}", (*keys, *own)),), read_accuracy,
               (HERE / "configs" / dataset / f"{file}.yaml",))


def on_digits(row: str, options: SimpleNamespace, reverse: bool = False) -> Job:
    """Return the run of a row on the digits, whose first class has --imbalance times the images of the last one."""
    count = str(options.imbalance)
    keys = ("DATASET.DIGITS.IMB_FACTOR_L", count, "DATASET.DIGITS.IMB_FACTOR_UL", count, "TENSORBOARD", "False",
            *options.args.split(), *("DATASET.REVERSE_UL_DISTRIBUTION", "True") * reverse)
    if row != "cRT on Supervised":
        return job(row, "digits", "digits_reversed" if reverse else "digits", keys)
    target = "{out}/encoder/Supervised_digits_l_40_" + count + "_seed_{seed}"
    return Job(f"{slug(row)}_digits", (training("digits/supervised", keys, "encoder"),
                                       training("digits/crt", (*keys, "ALGORITHM.CRT.TARGET_DIR", target))),
               read_accuracy, tuple(HERE / "configs/digits" / f"{name}.yaml" for name in ("supervised", "crt")))


def digits_table(scale: str, options: SimpleNamespace) -> Table:
    """Return all learners on the long-tailed digits, the rare classes apart."""
    cells = [Cell(row, column, on_digits(row, options), metric) for row in ROWS
             for column, metric in {"all": "accuracy", **{group: group for group in GROUPS}}.items()]
    return Table("digits", "All learners on the long-tailed digits", "nothing", "Accuracy in % on 500 test images",
                 tuple(cells), ("last", "median of last 20"), base="FixMatch", runs=DIGITS,
                 note=f"Imbalance {options.imbalance}{', ' * bool(options.args)}{options.args}; "
                      "many, medium, few: mean over the classes of each third by frequency.")


def cells_of(published: str, datasets: Sequence[str], scale: str, options: SimpleNamespace) -> list[Cell]:
    """Return the cells of a published table on some data sets; of its learners on the long-tailed digits."""
    reverse, cells = published == "mismatched", []
    for row, numbers in PRINTED[published].items():
        if scale == "tiny":
            # DARP needs an estimate of the other distribution, and there is none for the digits.
            if not (reverse and row == "FixMatch + DARP"):
                run, column = on_digits(row, options, reverse), "digits" + ", reversed" * reverse
                cells += [Cell(row, column, run, "accuracy"), Cell(row, f"{column}, rare classes", run, "few")]
            continue
        for place, (column, dataset, counts) in enumerate(COLUMNS[published]):
            if dataset not in datasets:
                continue
            keys = (*counts, *(MISMATCHED.get(row, ()) if reverse else ()), "DATASET.ROOT", f"{{data}}/{dataset}")
            run = job(row, dataset, column.replace(" ", "_").replace("/", "over"), keys)
            cells.append(Cell(row, column, run, "accuracy", Printed(numbers[2 * place], numbers[2 * place + 1])))
    return cells


def table_of(name: str, scale: str, options: SimpleNamespace) -> Table:
    """Return one of TABLES; their runs are shared."""
    title, published, datasets = TABLES[name]
    cells = [cell for which in published for cell in cells_of(which, datasets, scale, options)]
    return Table(name, f"DASO: {title}", "Oh et al., CVPR 2022, tables 1 and 2 (from memory)", "Accuracy in %",
                 tuple(sorted(cells, key=lambda cell: list(ROWS).index(cell.row))), BY,
                 runs=DIGITS if scale == "tiny" else PAPER)


MORE_FLAGS = (
    Option("--imbalance", Int(1), 20, "digits: images of the first class over those of the last"),
    Option("--args", default="", metavar='"KEY VALUE ..."', help="the digits: further keys of every run"),
)
BUILDERS: Tables = {name: (lambda scale, options, name=name: table_of(name, scale, options)) for name in TABLES}
BUILDERS["digits"] = digits_table

if __name__ == "__main__":
    serve("DASO.tables", BUILDERS, MORE_FLAGS)
