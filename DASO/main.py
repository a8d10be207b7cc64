"""Train a learner on long-tailed, partly labelled data.

    python main.py --config-file configs/cifar10/fixmatch_daso.yaml \
        DATASET.CIFAR10.NUM_LABELED_HEAD 500 DATASET.CIFAR10.NUM_UNLABELED_HEAD 4000 SEED 1
    python main.py --config-file configs/digits/fixmatch_daso.yaml SEED 0      (a first try, no download)
    torchrun --nproc_per_node 2 main.py --config-file ...                       (two processes, the same numbers)

The same command again continues the run; with --eval-only it measures its newest checkpoint or that of RESUME.
"""
from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

from DASO.lib.config.config import Config, experiment_name, parse
from shared.cli import run_main


def main() -> None:
    cfg, eval_only = parse()
    from DASO.lib.algorithms import algorithm_of  # loads torch: only once the command line is known to be right
    from DASO.lib.loop import check_batches, evaluate_only, train
    from shared import distributed

    algorithm_of(cfg.ALGORITHM.NAME)
    world = distributed.start(device_of(cfg))
    check_batches(cfg, world)
    seed = distributed.broadcast_value(seed_of(cfg), world)
    folder = Path(cfg.OUTPUT_DIR) / experiment_name(cfg, seed)
    cfg = cfg.replaced({"SEED": seed, "OUTPUT_DIR": str(folder)})
    if eval_only:
        values = evaluate_only(cfg, folder, world)
        if world.main:
            print(json.dumps(values, indent=4, sort_keys=True))
    else:
        train(cfg, folder, world)


def device_of(cfg: Config) -> str | None:
    """Return the device that GPU_ID means: for 0 the CPU where there is no GPU, this process's own under torchrun."""
    import torch

    if cfg.GPU_ID < 0 or cfg.GPU_ID == 0 and not torch.cuda.is_available():
        return "cpu"
    return None if int(os.environ.get("WORLD_SIZE", 1)) > 1 else f"cuda:{cfg.GPU_ID}"


def seed_of(cfg: Config) -> int:
    """Return SEED, that of the run whose encoder classifier re-training takes, or a drawn one where SEED < 0."""
    if cfg.ALGORITHM.NAME == "cRT" and (found := re.search(r"_seed_(\d+)", cfg.ALGORITHM.CRT.TARGET_DIR)):
        return int(found[1])
    return cfg.SEED if cfg.SEED >= 0 else secrets.randbelow(2 ** 31)


if __name__ == "__main__":
    run_main(main)
