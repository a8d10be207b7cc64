"""Every learner on the long-tailed digits, small enough for a test, in this process."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from DASO import main as program
from DASO.lib.trainer import Trainer
from shared.training.checkpoint import read_checkpoint
from tests.shared.programs import ROOT

STEPS = 6
SMALL = {
    "SOLVER.MAX_ITER": STEPS, "SOLVER.IMS_PER_BATCH": 8, "SOLVER.BASE_LR": 0.01, "SOLVER.WARMUP_ITERS": 0,
    "PERIODS.EVAL": STEPS, "PERIODS.LOG": STEPS, "PERIODS.CHECKPOINT": 3, "DATASET.NUM_VALID": 20,
    "EVAL_ON_TEST_SET": False, "TENSORBOARD": False, "SEED": 0, "MODEL.QUEUE.MAX_SIZE": 3,
    "ALGORITHM.CONFIDENCE_THRESHOLD": 0.2, "ALGORITHM.CREST.GEN_PERIOD_STEPS": 2,
    "ALGORITHM.DASO.PRETRAIN_STEPS": 1, "ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": 2, "ALGORITHM.USADTM.PRETRAIN_STEPS": 1,
    "ALGORITHM.DARP.WARMUP_RATIO": 0.2, "ALGORITHM.DARP.PER_ITERS": 2,
    "ALGORITHM.DARP_ESTIM.PER_CLASS_VALID_SAMPLES": 2, "ALGORITHM.DARP_ESTIM.THRESH_COND": 10**9,
    "ALGORITHM.ACR.ESTIMATE_AFTER": 1, "ALGORITHM.ACR.EPOCH": 2}
# Name of the case -> file of configs/digits and further keys.
LEARNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "MeanTeacher": ("meanteacher", {}),
    "MeanTeacher with DASO": ("meanteacher", {"ALGORITHM.MEANTEACHER.APPLY_DASO": True}),
    "MixMatch": ("mixmatch", {}),
    "MixMatch with DASO": ("mixmatch", {"ALGORITHM.MIXMATCH.APPLY_DASO": True}),
    "ReMixMatch": ("remixmatch", {"MODEL.DIST_ALIGN.APPLY": True}),
    "ReMixMatch with DARP": ("remixmatch", {"MODEL.DIST_ALIGN.APPLY": True, "ALGORITHM.DARP.APPLY": True}),
    "ReMixMatch with CReST+": ("remixmatch_crest", {}),
    "ReMixMatch with DASO": ("remixmatch_daso", {"MODEL.DIST_ALIGN.APPLY": True}),
    "FixMatch with DARP": ("fixmatch", {"ALGORITHM.DARP.APPLY": True}),
    "FixMatch with CReST": ("fixmatch_crest", {"MODEL.DIST_ALIGN.APPLY": False, "ALGORITHM.LOGIT_ADJUST.APPLY": True}),
    "FixMatch with CReST+": ("fixmatch_crest", {}),
    "FixMatch with ABC": ("fixmatch_abc", {}),
    "USADTM": ("usadtm", {}),
    "USADTM with averaged prototypes": ("usadtm", {"ALGORITHM.USADTM.WITH_EMA_PROTOTYPE": True}),
    "DARP_ESTIM": ("darp_estim", {}),
    "ACR": ("acr", {}),
    "SimPro": ("simpro", {}),
}
NOT_BITWISE = {"seconds", "stats_bytes", "log_sums", "config"}  # of the machine and the clock


def command(config: str, folder: Path, keys: dict[str, Any]) -> list[str]:
    """Return the arguments of main.py for a small run below `folder`."""
    pairs = {**SMALL, **keys, "OUTPUT_DIR": str(folder)}
    return ["--config-file", str(ROOT / "DASO" / "configs" / "digits" / f"{config}.yaml"),
            *(str(part) for pair in pairs.items() for part in pair)]


def call(config: str, folder: Path, keys: dict[str, Any] | None = None, *, stop_before: int | None = None) -> Path:
    """Run main.py in this process and return the run's folder. stop_before: break off at this iteration."""
    before, step = sys.argv, Trainer.step

    def broken(trainer: Trainer, batch: Any, it: int, draws: Any) -> Any:
        if it == stop_before:
            raise InterruptedError
        return step(trainer, batch, it, draws)

    sys.argv, Trainer.step = ["main.py", *command(config, folder, keys or {})], broken
    try:
        program.main()
    except InterruptedError:
        if stop_before is None:
            raise
    finally:
        sys.argv, Trainer.step = before, step
    return next(path for path in folder.iterdir() if path.is_dir())


def saved(folder: Path) -> dict[str, Any]:
    """Return a run's checkpoint without what depends on the clock."""
    content = read_checkpoint(folder / "checkpoint.pth.tar")
    kept = {key: value for key, value in content.items() if key not in NOT_BITWISE}
    kept["meta"] = {key: value for key, value in content["meta"].items() if "time" not in key}
    return kept
