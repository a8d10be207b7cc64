"""Train a learner on long-tailed, partly labelled data.

    python main.py --config-file configs/cifar10/fixmatch_daso.yaml \\
        DATASET.CIFAR10.NUM_LABELED_HEAD 500 DATASET.CIFAR10.NUM_UNLABELED_HEAD 4000 SEED 1
    python main.py --config-file configs/digits/fixmatch_daso.yaml SEED 0      (a first try, no download)
    torchrun --nproc_per_node 2 main.py --config-file ...                       (two processes, the same numbers)

The same command again continues the run; with --eval-only it measures its newest checkpoint or that of RESUME.
"""
from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from DASO.lib.config.config import Config, experiment_name, parse
from DASO.lib.trainer import device_of, evaluate_only, train
from shared import distributed
from shared.cli import UserError, run_main


def main() -> None:
    cfg, flags = parse(doc=__doc__)
    world = distributed.start(device_of(cfg))
    if cfg.SOLVER.IMS_PER_BATCH % world.size:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be shared evenly by {world.size} "
                        "processes; choose a multiple of their number")
    seed = distributed.broadcast_value(seed_of(cfg), world)
    folder = Path(cfg.OUTPUT_DIR) / experiment_name(cfg, seed)
    cfg = cfg.replaced({"SEED": seed, "OUTPUT_DIR": str(folder)})
    if not flags.eval_only:
        train(cfg, folder, world, flags.overwrite)
        return
    values = evaluate_only(cfg, folder, world)
    if world.main:
        print(json.dumps(values, indent=4, sort_keys=True))


def seed_of(cfg: Config) -> int:
    """Return SEED, that of the run whose encoder classifier re-training takes, or a drawn one where SEED < 0."""
    if cfg.ALGORITHM.NAME == "cRT" and (found := re.search(r"_seed_(\d+)", cfg.ALGORITHM.CRT.TARGET_DIR)):
        return int(found[1])
    return cfg.SEED if cfg.SEED >= 0 else secrets.randbelow(2 ** 31)


if __name__ == "__main__":
    run_main(main)
