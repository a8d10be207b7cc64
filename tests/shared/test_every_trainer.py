"""One trainer of each folder, as a user starts it, on the digits and the like: ranks that die or drift apart, weights
that are no numbers, memory over 10,000 steps."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shared.training.checkpoint import read_checkpoint
from tests.daso import small as daso
from tests.ddae import tiny as ddae
from tests.edm import latent_runs as latent
from tests.edm import training_runs as edm
from tests.metasemi import tiny as metasemi
from tests.shared.programs import ROOT, assert_same, growth, one_line_error, run
from tests.torchssl import tiny as torchssl

pytestmark = pytest.mark.slow
MISHAP = "tests/shared/mishap.py"
# What a run measures of the machine and not of the method; sums for the log are those of one of the ranks.
NOT_BITWISE = {"seconds", "stats_bytes", "log_sums", "meta", "config", "meters", "options", "inputs"}


@dataclass(frozen=True)
class Trainer:
    """script: in the project. flags: (working folder, number of steps) -> arguments, with a save every 4 steps at least
    in a short run. checkpoint: pattern of its name in the working folder."""

    script: str
    flags: Callable[[Path, int], list[str]]
    checkpoint: str

    def call(self, folder: Path, steps: int, what: str, at: int, **how: Any) -> Any:
        """Run it in `folder` with a mishap; see `run` for the rest."""
        folder.mkdir(exist_ok=True)
        return run(ROOT / MISHAP, what, str(at), ROOT / self.script, *self.flags(folder, steps), cwd=folder,
                   FEWLABEL_CACHE=str(folder.parent / "cache"), **how)

    def saved(self, folder: Path) -> dict[str, Any]:
        (path,) = folder.glob(self.checkpoint)
        return {key: value for key, value in read_checkpoint(path).items() if key not in NOT_BITWISE}


def every(steps: int) -> int:
    return max(4, steps // 10)


def seconds(steps: int) -> float:
    """Between two saves by the clock: after every step of a short run."""
    return 1e-6 if steps < 100 else 5


def edm_flags(folder: Path, steps: int) -> list[str]:
    edm.write_set(folder / "tiny.zip")
    return ["--outdir=run", "--nosubdir", "--data=tiny.zip", *edm.TINY, f"--duration={16 * steps / 1e6}",
            f"--tick={max(1, steps // 500)}", f"--dump={1 << 20}", f"--checkpoint-seconds={seconds(steps)}"]


def ddae_flags(folder: Path, steps: int) -> list[str]:
    ddae.write_config(folder, n_epoch=-(-steps // 3), n_sample=2)
    return ["--config=tiny.yaml", "--device=cpu", f"--checkpoint_seconds={seconds(steps)}"]


def daso_flags(folder: Path, steps: int) -> list[str]:
    return daso.command("fixmatch_daso", folder / "out", {
        "SOLVER.MAX_ITER": steps, "PERIODS.EVAL": steps, "PERIODS.LOG": steps, "PERIODS.CHECKPOINT": every(steps)})


def latent_flags(folder: Path, steps: int) -> list[str]:
    latent.write_latents(folder / "latents")
    return [latent.LARGE, *latent.TINY, "--dataset_path=latents", "--workdir=run", f"--config.train.n_steps={steps}",
            f"--config.train.log_interval={every(steps)}", f"--config.train.save_interval={steps}",
            f"--config.train.eval_interval={steps + 1}", f"--checkpoint_minutes={seconds(steps) / 60}"]


TRAINERS = {
    "TorchSSL": Trainer("TorchSSL/freematch.py", lambda folder, steps: [
        *torchssl.TINY, f"--num_train_iter={steps}", f"--num_eval_iter={every(steps)}",
        f"--num_save_iter={every(steps)}"], "saved_models/tiny/latest_model.pth"),
    "EDM": Trainer("EDM/train.py", edm_flags, "run/checkpoint.pt"),
    "latent diffusion": Trainer("EDM/imagenet/train_ldm.py", latent_flags, "run/checkpoint.pt"),
    "DDAE": Trainer("DDAE/train.py", ddae_flags, "out/checkpoint.pt"),
    "MetaSemi": Trainer("MetaSemi/train_meta.py", lambda folder, steps: [
        *metasemi.TINY, "--save-path=run", "--mix-up", f"--total-steps={steps}", f"--test-freq={every(steps)}",
        f"--print-freq={every(steps)}"], "run/checkpoint.pth"),
    "DASO": Trainer("DASO/main.py", daso_flags, "out/*/checkpoint.pth.tar"),
}


@pytest.fixture(params=TRAINERS)
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return TRAINERS[request.param]


def test_a_rank_that_dies_is_started_again_by_torchrun(trainer: Trainer, tmp_path: Path) -> None:
    trainer.call(tmp_path / "died", 12, "kill", 6, ranks=2, restarts=1)
    assert list((tmp_path / "died").rglob("died"))
    trainer.call(tmp_path / "whole", 12, "nothing", 0, ranks=2)
    assert_same(trainer.saved(tmp_path / "died"), trainer.saved(tmp_path / "whole"))


def test_ranks_that_drift_apart_are_found_at_the_next_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    failed = trainer.call(tmp_path / "run", 12, "drift", 6, ranks=2, status=1)
    assert "differs between ranks 0 and 1 after step" in failed.stderr
    assert trainer.saved(tmp_path / "run")["step"] <= 6


@pytest.mark.parametrize("at", [6, 11])
def test_a_weight_that_is_no_number_is_named(trainer: Trainer, tmp_path: Path, at: int) -> None:
    """In the middle, and in the last step, whose loss was still finite: nothing of it is kept as a result."""
    line = one_line_error(trainer.call(tmp_path / "run", 12, "nan", at, status=1))
    assert f"is not finite at step {at} on rank 0; the first non-finite tensor is " in line
    assert trainer.saved(tmp_path / "run")["step"] <= at
    assert not trainer.saved(tmp_path / "run")["finished"]
    assert not list((tmp_path / "run").rglob("result*.json")) and not list((tmp_path / "run").rglob("model_final*"))


def test_memory_of_ten_thousand_steps(trainer: Trainer, tmp_path: Path) -> None:
    trainer.call(tmp_path / "run", 10_000, "memory", 100, timeout=3600)
    assert growth(tmp_path / "run" / "memory") < 1, json.dumps(growth(tmp_path / "run" / "memory"))
