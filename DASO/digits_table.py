"""The table of all learners on the long-tailed digits: several seeds, mean and standard deviation, rare classes apart.

    python -m DASO.digits_table                       # all of them, seeds 0 to 2, two runs at a time
    python -m DASO.digits_table --only FixMatch,DASO --seeds 5

Each run is `main.py --config-file configs/digits/<file>.yaml` with what the table below adds; --imbalance sets how much
rarer the last class is, labelled and unlabelled. What is finished is not run again. Prints Markdown, and writes it with
all numbers into --out.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shared.aggregate import deviation, difference, mean
from shared.cli import Parser, UserError, nearest, run_main
from shared.files import atomic, make_dir

HERE = Path(__file__).resolve().parent
LOGIT_ADJUSTMENT, DARP = "ALGORITHM.LOGIT_ADJUST.APPLY True", "ALGORITHM.DARP.APPLY True"
ABC = "ALGORITHM.ABC.APPLY True"
# Row -> configs/digits/<file>.yaml and the keys it adds.
ROWS = {
    "Supervised": ("supervised", ""),
    "Supervised + logit adjustment": ("supervised", LOGIT_ADJUSTMENT),
    "Supervised + LDAM": ("supervised", "MODEL.LOSS.WITH_LABELED_COST_SENSITIVE True"),
    "cRT on Supervised": ("crt", ""),
    "PseudoLabel": ("pseudolabel", ""),
    "MeanTeacher": ("meanteacher", ""),
    "MixMatch": ("mixmatch", ""),
    "ReMixMatch": ("remixmatch", ""),
    "ReMixMatch + DARP": ("remixmatch", DARP),
    "ReMixMatch + CReST+": ("remixmatch_crest", ""),
    "ReMixMatch + DASO": ("remixmatch_daso", ""),
    "FixMatch": ("fixmatch", ""),
    "USADTM": ("usadtm", ""),
    "FixMatch + DARP": ("fixmatch", DARP),
    "FixMatch + CReST": ("fixmatch_crest", "MODEL.DIST_ALIGN.APPLY False"),
    "FixMatch + CReST+": ("fixmatch_crest", ""),
    "FixMatch + DASO": ("fixmatch_daso", ""),
    "FixMatch + LA": ("fixmatch", LOGIT_ADJUSTMENT),
    "FixMatch + LA + DASO": ("fixmatch_daso", LOGIT_ADJUSTMENT),
    "FixMatch + ABC": ("fixmatch_abc", ""),
    "FixMatch + ABC + DASO": ("fixmatch_daso", ABC),
    "ACR": ("acr", ""),
    "SimPro": ("simpro", ""),
}
BASE = "FixMatch"
GROUPS = ("many", "medium", "few")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m DASO.digits_table", description=__doc__.strip().split("\n\n")[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 [3]")
    add("--only", metavar="NAMES", help="these rows, separated by commas, and the base [all]")
    add("--imbalance", type=int, default=20, metavar="G", help="the first class has G times the images of the last "
        "[20]")
    add("--jobs", type=int, default=2, metavar="N", help="runs at a time, one thread each [2]")
    add("--out", type=Path, default=HERE / "outputs" / "digits_table", metavar="DIR", help="folder of the runs and of "
        "table.json and table.md [DASO/outputs/digits_table]")
    add("--args", default="", metavar='"..."', help="further keys and values of every run")
    options = parser.parse_args(argv)
    names = [BASE, *options.only.split(",")] if options.only else list(ROWS)
    for name in names:
        if name not in ROWS:
            raise UserError(f"--only {name}: no such row{nearest(name, ROWS)}; known: {', '.join(ROWS)}")
    if options.seeds < 1 or options.jobs < 1 or options.imbalance < 1:
        raise UserError("--seeds, --jobs and --imbalance must be at least 1")
    options.names = [name for name in ROWS if name in names]
    if "cRT on Supervised" in options.names and "Supervised" not in options.names:
        options.names.insert(0, "Supervised")
    return options


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Do one run, or find it done; return its result.json. A run that fails ends the program, in its own words."""
    config, keys = ROWS[name]
    folder = options.out.resolve() / name.lower().replace(" + ", "_").replace(" ", "_")
    command = [sys.executable, str(HERE / "main.py"), "--config-file", str(HERE / "configs/digits" / f"{config}.yaml"),
               "DATASET.DIGITS.IMB_FACTOR_L", str(options.imbalance), "DATASET.DIGITS.IMB_FACTOR_UL",
               str(options.imbalance), "SEED", str(seed), "OUTPUT_DIR", str(folder), "TENSORBOARD", "False",
               "GPU_ID", "-1", *keys.split(), *options.args.split()]
    if config == "crt":
        command += ["ALGORITHM.CRT.TARGET_DIR", str(result_of(folder.with_name("supervised"), seed).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{name}, seed {seed}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    result = json.loads(result_of(folder, seed).read_text(encoding="utf-8"))
    print(f"{name}, seed {seed}: {100 * result['accuracy']['last']:.1f} %, rare classes "
          f"{100 * result['groups']['few']['last']:.1f} %, {result['seconds']:.0f} s", flush=True)
    return result


def result_of(folder: Path, seed: int) -> Path:
    """Return the result.json of the run of a seed below `folder`; UserError."""
    found = sorted(folder.glob(f"*_seed_{seed}/result.json"))
    if len(found) != 1:
        raise UserError(f"{folder}: expected one finished run of seed {seed}, found {len(found)}; clear the folder")
    return found[0]


def plus_minus(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.1f} ± {100 * (deviation(values) or 0.0):.1f}"


def table(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Return the Markdown table; differences to the base are of the same seeds."""
    lines = [f"| learner | all, last | all, median of last 20 | {' | '.join(GROUPS)} | few, over {BASE} | seconds |",
             "|---|" + "---|" * (4 + len(GROUPS))]

    def few(name: str) -> list[float]:
        return [result["groups"]["few"]["last"] for result in results[name]]

    for name, found in results.items():
        cells = [plus_minus([result["accuracy"][key] for result in found]) for key in ("last", "median_of_last_20")]
        cells += [plus_minus([result["groups"][group]["last"] for result in found]) for group in GROUPS]
        gain = difference(few(name), few(BASE))
        cells.append("" if name == BASE else f"{100 * gain['mean']:+.1f} ({gain['positive']} of {gain['seeds']})")
        cells.append(f"{mean([result['seconds'] for result in found]):.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    run = results[BASE][0]
    lines += ["", f"Accuracy in % on the 500 test images, mean ± standard deviation over {options.seeds} seeds (each "
              f"with images, weights and draws of its own), imbalance {options.imbalance}"
              f"{', ' * bool(options.args)}{options.args}; labelled images a class {run['labelled_counts']}; many, "
              "medium, few: mean over the classes of each third by frequency; in brackets the seeds above the base. "
              f"{run['iterations']} iterations, {run['precision']}, one thread a run, "
              f"{run.get('hardware', run.get('device'))}."]
    return "\n".join(lines)


def main() -> None:
    options = parse()
    out = make_dir(options.out)
    jobs = [(name, seed) for name in options.names for seed in range(options.seeds)]
    first = [job for job in jobs if ROWS[job[0]][0] != "crt"]  # the others continue a run of these
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in options.names}
    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(first, pool.map(lambda job: train(*job, options), first), strict=True))
        later = [job for job in jobs if job not in found]
        found |= zip(later, pool.map(lambda job: train(*job, options), later), strict=True)
    for name, seed in jobs:
        results[name].append(found[name, seed])
    with atomic(out / "table.json", "w") as file:
        json.dump(results, file, indent=1)
    text = table(results, options)
    with atomic(out / "table.md", "w") as file:
        file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
