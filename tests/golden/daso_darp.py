"""DARP: the tables, the solver, the expected class counts and their estimate."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
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
from tests.golden.cases import arrays
from tests.golden.daso_cases import of_file, serves

CASES = {case["name"]: case for case in of_file("darp.npz")}
SERVES = serves([CASES[name] for name in ("darp", "estim", "estim_files", "target")])


def counts(head: int, gamma: float, classes: int) -> list[int]:
    return [int(head * (1 / gamma) ** (rank / (classes - 1))) for rank in range(classes)]


def close(found: torch.Tensor, wanted: np.ndarray, key: str) -> None:
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5, err_msg=key)


def test_refinement() -> None:
    case = CASES["darp"]
    given, stored, classes = case["ctor"], arrays("daso", case["file"]), case["ctor"]["K"]
    recipe = re.search(r"seed (\d+).*\[:(\d+)\]; p=softmax\(([\d.]+)\*normal\(\(\d+,K\)\) \+ ([\d.]+)\*onehot",
                       case["recipe"])
    seed, size, noise, signal = int(recipe[1]), int(recipe[2]), float(recipe[3]), float(recipe[4])
    target = torch.tensor(counts(given["M1"], given["gamma"], classes), dtype=torch.float32)
    np.testing.assert_array_equal(target, stored["darp/target"])

    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, given["n_unlabelled"])
    setting = Setting(classes, (1,) * classes, given["n_unlabelled"])
    refinery = DARP(target, setting, int(given["MAX_ITER"] * given["WARMUP_RATIO"]),
                    given["PER_ITERS"], given["ALPHA"], given["NUM_DARP_ITERS"])
    for call in range(1, sum("/out" in key for key in case["keys"]) + 1):
        chosen = rng.permutation(given["n_unlabelled"])[:size]
        logits = noise * rng.standard_normal((size, classes)).astype(np.float32)
        logits = logits + signal * np.eye(classes, dtype=np.float32)[truth[chosen]]
        found = refinery(torch.from_numpy(logits.astype(np.float32)).softmax(1), torch.from_numpy(chosen))
        close(found, stored[f"darp/out{call}"], f"call {call}")
    close(refinery.original, stored["darp/stored_orig"], "originals")
    close(refinery.refined, stored["darp/stored_refined"], "refined")


def test_selection_and_solver() -> None:
    given, stored = CASES["darp"]["ctor"], arrays("daso", CASES["darp"]["file"])
    target, table = (torch.from_numpy(stored[f"darp/{name}"]) for name in ("target", "stored_orig"))
    mask, scale = most_probable(table, target, [int(given["ALPHA"] * count) for count in target.tolist()])
    np.testing.assert_array_equal(mask, stored["darp/topk_mask"])
    close(scale, stored["darp/topk_weights"], "weights")
    close(solve(table, target, given["NUM_DARP_ITERS"]), stored["darp/solver_on_stored"], "solver")


def test_estimate() -> None:
    stored = {key.removeprefix("estim/"): arrays("daso", "darp.npz")[key] for key in CASES["estim"]["keys"]}
    validation, unlabelled = (torch.from_numpy(stored[f"{name}_logits"]).softmax(1) for name in ("val", "ul"))
    confusion = soft_confusion(validation, torch.from_numpy(stored["val_y"]).long())
    found, condition = estimate_counts(confusion, unlabelled.sum(0))
    np.testing.assert_allclose(found, stored["q"], rtol=1e-3)
    np.testing.assert_allclose(condition, stored["cond"], rtol=1e-3)


def write_estimates(folder: Path) -> dict[str, np.ndarray]:
    """Write the released files; return their content by name."""
    stored = arrays("daso", CASES["estim_files"]["file"])
    files = {key.partition("/")[2]: stored[key] for key in CASES["estim_files"]["keys"]}
    for name, content in files.items():
        with open(folder / name, "wb") as file:
            np.save(file, content)
    return files


def test_estimate_files(tmp_path: Path) -> None:
    for name, content in write_estimates(tmp_path).items():
        total = round(float(content.sum()))
        found = read_estimate(tmp_path, name, total, len(content))
        np.testing.assert_allclose(found, content * (total / content.sum()), rtol=1e-6, err_msg=name)


def test_target(tmp_path: Path) -> None:
    """Known counts where both sets are alike, else the file's, scaled to the number of images."""
    write_estimates(tmp_path)
    stored = arrays("daso", CASES["target"]["file"])
    for key in (key for key in CASES["target"]["keys"] if not key.endswith("_prob")):
        dataset, *numbers, reverse = key.removeprefix("target/").split("_")
        head, gamma, unlabelled_head, unlabelled_gamma = map(int, numbers)
        classes = len(stored[key])
        known = counts(unlabelled_head, unlabelled_gamma, classes) if unlabelled_gamma > 0 else [0] * classes
        images = sum(known) or round(float(stored[key].sum()))
        section = f"DATASET.{dataset.upper()}"
        cfg = Config({"DATASET.NAME": dataset, f"{section}.NUM_LABELED_HEAD": head, f"{section}.IMB_FACTOR_L": gamma,
                      f"{section}.NUM_UNLABELED_HEAD": unlabelled_head, f"{section}.IMB_FACTOR_UL": unlabelled_gamma,
                      "DATASET.REVERSE_UL_DISTRIBUTION": reverse, "ALGORITHM.DARP.EST": str(tmp_path)})
        found = expected_counts(cfg, Setting(classes, (1,) * classes, images))
        np.testing.assert_allclose(found, stored[key], rtol=1e-5, err_msg=key)
        np.testing.assert_allclose(found / found.sum(), stored[f"{key}_prob"], rtol=1e-5, err_msg=key)
