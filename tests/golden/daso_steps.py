"""Whole training steps of every learner: losses, accuracies, masks, final weights and their norms."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from DASO.lib.algorithm.interface import Batch, Draws
from DASO.lib.config.config import Config
from DASO.lib.data.augment import Look
from DASO.lib.data.sets import TrainingData
from DASO.lib.trainer import Trainer
from shared.data.images import ImageSet
from shared.distributed import World
from tests.golden.cases import facts, fill
from tests.golden.daso_cases import each, normal, numbers, of_file, serves, stored

CASES = of_file("steps.npz")
SERVES = serves(CASES)


class StoredDraws(Draws):
    """Gives the random numbers of a step as they were drawn, each kind in its order."""

    def __init__(self, values: dict[str, np.ndarray], step: int) -> None:
        super().__init__(0, 0)
        self.values: dict[str, list[np.ndarray]] = {}
        for name in sorted(name for name in values if name.startswith(f"st{step}/draw")):
            self.values.setdefault(name.rpartition("_")[2], []).append(values[name])

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.values["bernoulli"].pop(0)).to(probability.dtype)

    def beta(self, alpha: float) -> float:
        return float(self.values["beta"].pop(0))

    def permutation(self, count: int) -> np.ndarray:
        return self.values["randperm"].pop(0).astype(np.int64)

    def quarter_turns(self, count: int) -> np.ndarray:
        return self.values["randint"].pop(0).astype(np.int64)


def blank(labels: np.ndarray, classes: int, name: str) -> ImageSet:
    return ImageSet(np.zeros((len(labels), 3, 32, 32), np.uint8), labels, tuple(map(str, range(classes))), name)


def trainer_of(case: dict[str, Any]) -> Trainer:
    """Return a trainer with weights from fill() and a copy of them as average, on images that are never looked at."""
    cfg = Config({**case["overrides"], "STRICT": True, "SEED": 0})
    classes = cfg.MODEL.NUM_CLASSES
    labelled = blank(np.repeat(np.arange(classes), case["labelled_counts"]), classes, "labelled")
    count = case["n_unlabelled_dataset"]
    unlabelled = blank(np.zeros(count, np.int64), classes, "unlabelled") if count else None
    look = Look((0.5,) * 3, (0.25,) * 3, 32)
    trainer = Trainer(cfg, TrainingData(labelled, unlabelled, None, None, look, classes), World(), Path("."))
    fill(trainer.model)
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(trainer.model.state_dict())
    return trainer


def images_of(case: dict[str, Any], rng: np.random.Generator) -> Batch:
    """Draw the next batch as the case describes it."""
    text = case["recipe"]
    labelled = numbers(re.search(r"l_images=normal\(\(([\d,]+)\)\)", text)[1])
    classes = int(re.search(r"labels=rng.integers\(0,(\d+),", text)[1])
    images = torch.from_numpy(normal(rng, *labelled))
    labels = torch.from_numpy(rng.integers(0, classes, labelled[0]))
    described = re.search(r"base=normal\(\(([\d,]+)\)\); then (\d+) view\(s\), each base\+([\d.]+)\*normal", text)
    if described is None:
        return Batch(images, labels)
    shape, views, noise = numbers(described[1]), int(described[2]), np.float32(described[3])
    base = normal(rng, *shape)
    seen = tuple(torch.from_numpy(base + noise * normal(rng, *shape)) for _ in range(views))
    truth = torch.from_numpy(rng.integers(0, classes, shape[0]))
    index = torch.from_numpy(rng.permutation(case["n_unlabelled_dataset"])[:shape[0]])
    return Batch(images, labels, seen, index, truth)


@each(CASES)
def test_steps(case: dict[str, Any]) -> None:
    wanted, trainer = stored(case), trainer_of(case)
    iterations = numbers(re.search(r"iterations \[([\d, ]+)\]", case["what"])[1])
    rng = np.random.default_rng(int(re.search(r"seed (\d+)", case["recipe"])[1]))
    off = dict(rtol=float(re.search(r"losses rtol ([\d.e-]+)", case["tolerance"])[1]), atol=1e-6)
    for step, it in enumerate(iterations):
        batch = images_of(case, rng)
        draws = StoredDraws(wanted, step)
        found, values = trainer.step(batch, it, draws)
        assert not any(draws.values.values()), "a stored draw was not asked for"
        seen = {name.removeprefix("train/"): value for name, value in values.items()}
        if found.mask is not None:
            seen["mask"] = found.mask
        expected = {key.partition("/")[2]: value for key, value in wanted.items()
                    if key.startswith(f"st{step}/") and "/draw" not in key}
        losses = {name for name in expected if "loss" in name}
        assert losses <= set(found.losses), (losses, set(found.losses))
        for name in set(found.losses) - losses:
            assert float(found.losses[name]) == 0, name
        for name, value in expected.items():
            np.testing.assert_allclose(np.asarray(seen[name]), value, **off, err_msg=f"{name}, iteration {it}")
    compare_state(case, wanted, trainer)


def compare_state(case: dict[str, Any], wanted: dict[str, np.ndarray], trainer: Trainer) -> None:
    """Check the final weights, statistics, norms and learning rate."""
    share = float(re.search(r"atol ([\d.e-]+) \* max", case["tolerance"])[1])
    names = list(facts("daso", "steps_state.json")[case["name"]])
    nets = {"student": trainer.model} | ({"ema": trainer.ema.module} if trainer.ema else {})
    np.testing.assert_allclose(trainer.scheduler.lr, wanted["final/lr"], rtol=1e-6)
    for kind, net in nets.items():
        state = net.state_dict()
        assert list(state) == names
        for key, value in wanted.items():
            if not key.startswith(f"final/{kind}/"):
                continue
            name = key.removeprefix(f"final/{kind}/")
            if name != "l2norms":
                np.testing.assert_allclose(state[name], value, rtol=0, atol=share * np.abs(value).max(), err_msg=key)
                continue
            # The counters of the average are integers here.
            counted = [not entry.endswith("num_batches_tracked") or kind == "student" for entry in names]
            norms = np.array([state[entry].double().norm().item() for entry in names])
            np.testing.assert_allclose(norms[counted], value[counted], rtol=share, atol=share, err_msg=key)
