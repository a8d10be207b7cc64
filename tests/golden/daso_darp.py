"""DARP: the tables, the solver, the expected class counts and their estimate."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from DASO.lib.algorithm.darp import (
    DARP,
    estimate_counts,
    expected_counts,
    most_probable,
    read_estimate,
    soft_confusion,
    solve,
)
from DASO.lib.algorithm.interface import Setting
from DASO.lib.config.config import Config
from tests.golden.cases import each, keys_of, serves
from tests.golden.daso_cases import Case, Recipe, cases_of, close, stored

REFINEMENTS, ESTIMATES = cases_of("darp"), cases_of("estimate")
FILES, TARGETS = cases_of("estimate files"), cases_of("targets")
SERVES = serves(REFINEMENTS, ESTIMATES, FILES, TARGETS)


def counts(head: int, gamma: float, classes: int) -> list[int]:
    return [int(head * (1 / gamma) ** (rank / (classes - 1))) for rank in range(classes)]


@each(REFINEMENTS)
def test_refinement(case: Case) -> None:
    given, wanted, classes = case["ctor"], stored(case), case["ctor"]["K"]
    target = torch.tensor(counts(given["M1"], given["gamma"], classes), dtype=torch.float32)
    np.testing.assert_array_equal(target, wanted["target"])
    recipe = Recipe(case["recipe"], K=classes, n=given["n_unlabelled"],
                    onehot=lambda labels: np.eye(classes, dtype=np.float32)[labels],
                    softmax=lambda logits: torch.from_numpy(np.float32(logits)).softmax(1))
    setting = Setting(classes, (1,) * classes, given["n_unlabelled"])
    refinery = DARP(target, setting, int(given["MAX_ITER"] * given["WARMUP_RATIO"]),
                    given["PER_ITERS"], given["ALPHA"], given["NUM_DARP_ITERS"])
    for call in range(1, 1 + sum(key.startswith("out") for key in wanted)):
        drawn = recipe.step()
        found = refinery(drawn["p"], torch.from_numpy(drawn["idx"]))
        close(found, wanted[f"out{call}"], case, f"call {call}")
    for key, found in (("stored_orig", refinery.original), ("stored_refined", refinery.refined)):
        if key in wanted:
            close(found, wanted[key], case, key)


@each(REFINEMENTS)
def test_selection_and_solver(case: Case) -> None:
    given, wanted = case["ctor"], stored(case)
    target, table = (torch.from_numpy(wanted[name]) for name in ("target", "stored_orig"))
    mask, scale = most_probable(table, target, [int(given["ALPHA"] * count) for count in target.tolist()])
    np.testing.assert_array_equal(mask, wanted["topk_mask"])
    close(scale, wanted["topk_weights"], case, "weights")
    close(solve(table, target, given["NUM_DARP_ITERS"]), wanted["solver_on_stored"], case, "solver")


@each(ESTIMATES)
def test_estimate(case: Case) -> None:
    wanted = stored(case)
    validation, unlabelled = (torch.from_numpy(wanted[f"{name}_logits"]).softmax(1) for name in ("val", "ul"))
    confusion = soft_confusion(validation, torch.from_numpy(wanted["val_y"]).long())
    found, condition = estimate_counts(confusion, unlabelled.sum(0))
    close(found, wanted["q"], case, "counts")
    close(condition, wanted["cond"], case, "condition number")


def write_estimates(folder: Path) -> dict[str, np.ndarray]:
    """Write the released files; return their content by name."""
    files = {name: content for case in FILES for name, content in stored(case).items()}
    for name, content in files.items():
        with open(folder / name, "wb") as file:
            np.save(file, content)
    return files


@each(FILES)
def test_estimate_files(case: Case, tmp_path: Path) -> None:
    write_estimates(tmp_path)
    for name, content in stored(case).items():
        total = round(float(content.sum()))
        found = read_estimate(tmp_path, name, total, len(content))
        np.testing.assert_allclose(found, content * (total / content.sum()), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(("case", "key"), [
    pytest.param(case, key, id=key) for case in TARGETS for key in keys_of(case) if not key.endswith("_prob")])
def test_target(case: Case, key: str, tmp_path: Path) -> None:
    """Known counts where both sets are alike, else the file's, scaled to the number of images."""
    wanted = stored(case)
    dataset, *words, reverse = key.split("_")
    head, gamma, unlabelled_head, unlabelled_gamma = (float(word) if "." in word else int(word) for word in words)
    if gamma != unlabelled_gamma or reverse == "True":
        name = "_".join([dataset, "l", *words[:2], "ul", *words[2:], *["rev"] * (reverse == "True"), "estim.npyz"])
        if name not in write_estimates(tmp_path):
            pytest.skip(f"there is no {name}")
    classes = len(wanted[key])
    known = counts(unlabelled_head, unlabelled_gamma, classes) if unlabelled_gamma > 0 else [0] * classes
    images = sum(known) or round(float(wanted[key].sum()))
    section = f"DATASET.{dataset.upper()}"
    cfg = Config({"DATASET.NAME": dataset, f"{section}.NUM_LABELED_HEAD": head, f"{section}.IMB_FACTOR_L": gamma,
                  f"{section}.NUM_UNLABELED_HEAD": unlabelled_head, f"{section}.IMB_FACTOR_UL": unlabelled_gamma,
                  "DATASET.REVERSE_UL_DISTRIBUTION": reverse, "ALGORITHM.DARP.EST": str(tmp_path)})
    found = expected_counts(cfg, Setting(classes, (1,) * classes, images))
    close(found, wanted[key], case, key)
    close(found / found.sum(), wanted[f"{key}_prob"], case, key)
