"""The table of all learners on the handwritten digits with 40 labels: several seeds, mean and standard deviation.

    python digits_table.py                    # all of them, seeds 0 to 2, two runs at a time
    python digits_table.py --only fixmatch,vat --seeds 5

Each run is the learner's own command with its config/<name>/<name>_digits_40_0.yaml. The baseline has the same labels,
batches and iterations, and no unlabelled images. What is finished is not run again. Prints a Markdown table, and writes
it with all numbers into --out.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shared.cli import Parser, UserError, nearest, run_main
from shared.files import atomic, make_dir
from TorchSSL.make_configs import LEARNERS

HERE = Path(__file__).resolve().parent
BASELINE, ALL_LABELS = "supervised, 40 labels", "fullysupervised"
COLUMNS = {"last": "last", "median_of_last_20": "median of last 20", "best_on_test": "best on test"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 [3]")
    parser.add_argument("--only", default=None, metavar="NAMES", help="these learners, separated by commas [all]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time, one thread each [2]")
    parser.add_argument("--out", default="./saved_models/digits_table", metavar="DIR", help="folder of the runs and of "
                        "table.json and table.md [./saved_models/digits_table]")
    parser.add_argument("--args", default="", metavar='"..."', help="further flags of every run")
    options = parser.parse_args(argv)
    options.names = list(LEARNERS) if options.only is None else options.only.split(",")
    for name in options.names:
        if name not in LEARNERS:
            raise UserError(f"--only {name}: no such learner{nearest(name, LEARNERS)}; known: {', '.join(LEARNERS)}")
    if options.seeds < 1 or options.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    return options


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Do one run, or find it done; return its result.json. A run that fails ends the program, in its own words."""
    script = ALL_LABELS if name == BASELINE else name
    run = f"{'baseline' if name == BASELINE else name}_{seed}"
    command = [sys.executable, str(HERE / f"{script}.py"), "--c",
               str(HERE / "config" / script / f"{script}_digits_40_0.yaml"), f"--seed={seed}", f"--save_name={run}",
               f"--save_dir={options.out}", *options.args.split()]
    command += ["--all_labels=False"] * (name == BASELINE)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          check=False)
    if done.returncode:
        raise UserError(f"{name}, seed {seed}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    result = json.loads((Path(options.out) / run / "result.json").read_text(encoding="utf-8"))
    print(f"{name}, seed {seed}: {result['accuracy']['last']:.4f} after {result['seconds']:.0f} s", flush=True)
    return result


def mean_and_deviation(values: list[float]) -> str:
    """Return "mean ± standard deviation" in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the Markdown table, best last accuracy first; differences to the baseline are of the same seeds."""
    lines = [f"| learner | {' | '.join(COLUMNS.values())} | last, over the baseline | seconds |", "|---|" + "---|" * 5]
    baseline = [result["accuracy"]["last"] for result in results[BASELINE]]

    def last(name: str) -> list[float]:
        return [result["accuracy"]["last"] for result in results[name]]

    for name in sorted(results, key=lambda name: -statistics.mean(last(name))):
        cells = [mean_and_deviation([result["accuracy"][key] for result in results[name]]) for key in COLUMNS]
        gain = [ours - theirs for ours, theirs in zip(last(name), baseline, strict=True)]
        cells.append("" if name == BASELINE else f"{100 * statistics.mean(gain):+.1f}")
        cells.append(f"{statistics.mean(result['seconds'] for result in results[name]):.0f}")
        lines.append(f"| {name}{', all labels' * (name == ALL_LABELS)} | {' | '.join(cells)} |")
    any_run = results[BASELINE][0]
    lines += ["", f"Accuracy in % on {any_run['test_images']} test images, mean ± standard deviation over "
              f"{len(baseline)} seeds (each with labels, weights and draws of its own); {any_run['iterations']} "
              f"iterations; {any_run['hardware']}, {any_run['device']}, one thread a run, {any_run['precision']}, "
              f"torch {any_run['torch']}."]
    return "\n".join(lines)


def main() -> None:
    options = parse()
    out = make_dir(options.out)
    jobs = [(name, seed) for name in (BASELINE, *options.names) for seed in range(options.seeds)]
    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(lambda job: train(*job, options), jobs))
    results: dict[str, list[dict[str, Any]]] = {}
    for (name, _), result in zip(jobs, done, strict=True):
        results.setdefault(name, []).append(result)
    with atomic(out / "table.json", "w") as file:
        json.dump(results, file, indent=1)
    text = table(results)
    with atomic(out / "table.md", "w") as file:
        file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
