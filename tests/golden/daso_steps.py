"""Whole training steps of every learner: losses, accuracies, masks, final weights and their norms."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from DASO.lib.algorithm.interface import Batch, Draws
from DASO.lib.config.config import Config
from DASO.lib.data.augment import Look
from DASO.lib.data.sets import TrainingData
from DASO.lib.trainer import Trainer
from shared.data.images import ImageSet
from shared.distributed import World
from tests.golden.cases import Stored, each, facts, fill, number, numbers, serves
from tests.golden.daso_cases import PAPER, Case, Recipe, cases_of, of_step, stored
from tests.golden.recipes import computed

TRAININGS = cases_of("training")
SERVES = serves(TRAININGS)


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


def trainer_of(case: Case) -> Trainer:
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


def images_of(case: Case, recipe: Recipe) -> Batch:
    """Draw the next batch as the case describes it: assignments, in their midst "then 2 view(s), each EXPRESSION"."""
    described = re.search(r"then (\d+) views?(?:\(s\))?, each ([^;]+);", recipe.every)
    if described is None:
        drawn = recipe.step()
        return Batch(torch.from_numpy(drawn["l_images"]), torch.from_numpy(drawn["labels"]))
    drawn = recipe.step(recipe.every[:described.start()])
    seen = tuple(torch.from_numpy(computed(described[2], **drawn)) for _ in range(int(described[1])))
    drawn = recipe.step(recipe.every[described.end():], **drawn)
    images, labels, truth, index = (torch.from_numpy(drawn[name]) for name in ("l_images", "labels", "ul_labels",
                                                                              "ul_indices"))
    return Batch(images, labels, seen, index, truth)


@each(TRAININGS)
def test_steps(case: Case) -> None:
    wanted, trainer = stored(case), trainer_of(case)
    iterations = numbers(re.search(r"iterations \[([\d, ]+)\]", case["what"])[1])
    recipe = Recipe(case["recipe"], n_unlabelled_dataset=case["n_unlabelled_dataset"])
    said = case["tolerance"]
    off = dict(rtol=number(said, "losses rtol #"), atol=number(said, "uc_loss atol #", 1e-6))
    for step, it in enumerate(iterations):
        batch = images_of(case, recipe)
        draws = StoredDraws(wanted, step)
        found, values = trainer.step(batch, it, draws)
        assert not any(draws.values.values()), "a stored draw was not asked for"
        seen = {name.removeprefix("train/"): value for name, value in values.items()}
        if found.mask is not None:
            seen["mask"] = found.mask
        expected = of_step(wanted, step)
        losses = {name for name in expected if "loss" in name}
        assert losses <= set(found.losses), (losses, set(found.losses))
        for name in set(found.losses) - losses:
            assert float(found.losses[name]) == 0, name
        for name, value in expected.items():
            np.testing.assert_allclose(np.asarray(seen[name]), value, **off, err_msg=f"{name}, iteration {it}")
    compare_state(case, wanted, trainer)


def compare_state(case: Case, wanted: Stored, trainer: Trainer) -> None:
    """Check the final weights, statistics, norms and learning rate."""
    share = number(case["tolerance"], r"atol # \*")
    nets = {"student": trainer.model} | ({"ema": trainer.ema.module} if trainer.ema else {})
    np.testing.assert_allclose(trainer.scheduler.lr, wanted["final/lr"], rtol=1e-6)
    for kind, net in nets.items():
        state = net.state_dict()
        names = list(state)
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
    learner = trainer.algorithm
    for name, found in (("pl_dist", lambda: learner.semantics.blender.histogram),
                        ("prototypes", lambda: learner.semantics.queue.prototypes)):
        if f"final/{name}" in wanted:
            value = wanted[f"final/{name}"]
            np.testing.assert_allclose(found(), value, rtol=0, atol=share * np.abs(value).max(), err_msg=name)
    listed = list(facts(PAPER, "steps_state.json")[case["name"]])
    assert all(list(net.state_dict()) == listed for net in nets.values())
