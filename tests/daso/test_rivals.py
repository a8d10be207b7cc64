"""Every rival of DASO runs on the long-tailed digits, and goes on bitwise where it was broken off."""
from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from DASO.lib.algorithm.darp import DARPEstimate, estimate_name, expected_counts, read_estimate, solve
from DASO.lib.algorithm.interface import Batch, Draws, Setting
from DASO.lib.algorithm.rivals import ACR, SimPro
from DASO.lib.config.config import Config
from DASO.lib.data.sets import long_tail_counts
from shared.cli import UserError
from tests.daso.small import LEARNERS, STEPS, call, saved
from tests.shared.programs import ROOT, assert_same

STATELESS = {"MeanTeacher", "MixMatch"}  # their only state is that of every learner; kept short here


@pytest.mark.parametrize("name", LEARNERS)
def test_runs_and_resumes(name: str, tmp_path: Path) -> None:
    config, keys = LEARNERS[name]
    whole = call(config, tmp_path / "whole", keys)
    line = json.loads((whole / "metrics.json").read_text().splitlines()[-1])
    assert line["iteration"] == STEPS and 0 <= line["valid/top1"] <= 100
    losses = {key: value for key, value in line.items() if key.startswith("train/") and "loss" in key}
    assert losses and all(math.isfinite(value) for value in losses.values())
    if name in STATELESS:
        return
    broken = call(config, tmp_path / "broken", keys, stop_before=4)
    assert json.loads((broken / "metrics.json").read_text() or "{}") == {}
    call(config, tmp_path / "broken", keys)
    assert_same(saved(broken), saved(whole))


def test_crest_adds_pseudo_labelled_images_and_begins_anew(tmp_path: Path) -> None:
    """Each generation has its own added images; weights and average start again from untrained ones."""
    keys = {"ALGORITHM.CREST.GEN_PERIOD_STEPS": 3, "PERIODS.CHECKPOINT": 3}
    folder = call("fixmatch_crest", tmp_path, keys)
    text = (folder / "log.txt").read_text()
    assert text.count("pseudo-labelled images join the labelled ones") == 1
    batches = saved(folder)["batches"]
    added = [int(word) for word in text.split("a class [")[1].split("]")[0].split(", ")]
    assert np.bincount(batches["extra_labels"].numpy(), minlength=10).tolist() == added
    assert len(batches["extra_index"].unique()) == len(batches["extra_index"]) == sum(added) > 0


def test_estimate_of_class_counts_is_what_darp_reads(tmp_path: Path) -> None:
    """A student that is right with a known confusion gives the true counts; DARP finds them under the printed name."""
    reverse = {"DATASET.REVERSE_UL_DISTRIBUTION": True}
    cfg = Config({"ALGORITHM.NAME": "DARP_ESTIM", "DATASET.NAME": "digits", **reverse,
                  "DATASET.DIGITS.NUM_UNLABELED_HEAD": 64, "SOLVER.IMS_PER_BATCH": 1, "SOLVER.MAX_ITER": 3})
    counts = long_tail_counts(64, 10, 10, reverse=True)
    confused = torch.full((10, 10), 0.02).fill_diagonal_(0.82).log()
    labels, truth = torch.arange(10).repeat_interleave(5), torch.from_numpy(np.repeat(np.arange(10), counts))
    valid, unlabelled = (SimpleNamespace(labels=part, logits=confused[part]) for part in (labels, truth))
    said: list[str] = []
    trainer = SimpleNamespace(valid=valid, batches=SimpleNamespace(unlabelled=unlabelled), folder=tmp_path,
                              predict=lambda pool: pool.logits,
                              run=SimpleNamespace(log=SimpleNamespace(print=said.append)))
    setting = Setting(10, (5,) * 10, int(counts.sum()))
    learner = DARPEstimate(cfg, setting)
    for it in range(2):
        learner.evaluated(trainer, it)
    valid.logits = torch.zeros_like(valid.logits)  # cannot be inverted: not accepted
    learner.evaluated(trainer, 2)
    assert learner.accepted == 2
    np.testing.assert_allclose(np.load(tmp_path / "estim.npy"), counts, rtol=1e-3)

    name = said[-1].split("/")[-1]
    (tmp_path / "estim.npy").rename(tmp_path / name)
    darp = Config({"ALGORITHM.DARP.EST": str(tmp_path), "DATASET.NAME": "digits", **reverse})
    with pytest.raises(UserError, match="needs .*_ul_70_10_rev_estim.npyz"):
        expected_counts(darp, setting)
    darp = darp.replaced({"DATASET.DIGITS.NUM_UNLABELED_HEAD": 64})
    np.testing.assert_allclose(expected_counts(darp, setting), counts, rtol=1e-3)


def test_refined_pseudo_labels_have_the_expected_class_counts() -> None:
    """Predictions biased towards the first class come out with the target's counts, each row a distribution."""
    target = torch.tensor([20.0, 20.0, 20.0, 20.0])
    logits = 2 * torch.eye(4).repeat(20, 1) + torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    biased = (logits + torch.tensor([2.0, 0.5, 0.0, -1.0])).softmax(1)
    assert (biased.sum(0) - target).abs().max() > 10
    refined = solve(biased, target, 10)
    torch.testing.assert_close(refined.sum(1), torch.ones(80, dtype=torch.float64))
    assert (refined.sum(0) - target).abs().max() < 0.5
    assert (refined.argmax(1) == torch.arange(4).repeat(20)).sum() > (biased.argmax(1) == torch.arange(4).repeat(20)
                                                                      ).sum()


def test_acr_adapts_to_reversed_classes_and_simpro_learns_the_shares() -> None:
    """Confident labels that contradict the labelled shares raise tau; SimPro's shares follow the unlabelled ones."""
    counts = (64, 32, 16, 8)
    setting = Setting(4, counts, 100)
    cfg = Config({"ALGORITHM.ACR.EPOCH": 50, "ALGORITHM.ACR.ESTIMATE_AFTER": 0, "ALGORITHM.ACR.MOMENTUM": 0.9})
    taus = {}
    for name, labels in ("alike", np.repeat([0, 1, 2, 3], counts)), ("reversed", np.repeat([3, 2, 1, 0], counts)):
        learner = ACR(cfg, setting)
        for it in range(50):
            learner.follow(torch.from_numpy(labels), torch.ones(len(labels), dtype=torch.bool), it)
        taus[name] = float(learner.tau)
        assert not learner.distances.any()
    assert taus["alike"] < 2 / 3 < taus["reversed"] < 2  # of three equal distances each is a third of 2.0

    learner = SimPro(Config({"ALGORITHM.SIMPRO.MOMENTUM": 0.5}), setting)
    truth = torch.from_numpy(np.repeat([3, 2, 1, 0], counts))
    images = 8 * torch.eye(4)[truth]
    learner.model = lambda images: images
    for it in range(20):
        learner.losses(Batch(images[:8], truth[:8], (images, images)), it, Draws(0, it))
    torch.testing.assert_close(learner.shares, setting.prior.flip(0), atol=0.01, rtol=0)


def test_classifier_retraining_takes_the_encoder_of_a_finished_run(tmp_path: Path) -> None:
    first = call("fixmatch", tmp_path / "first", {"SEED": 3})
    again = call("crt", tmp_path / "again", {"ALGORITHM.CRT.TARGET_DIR": str(first), "SEED": 0})
    assert again.name.endswith("_seed_3")  # the seed of the run that it continues, so the same images
    before, after = saved(first)["model"], saved(again)["model"]
    for key, value in before.items():
        moved = "running" in key or "num_batches" in key or key.startswith("classifier.")
        assert moved or after[key].equal(value), key
    assert not after["classifier.classifier.weight"].equal(before["classifier.classifier.weight"])


def test_released_estimates_are_where_darp_looks() -> None:
    """Every mismatched setting of the paper's tables finds its class counts beside main.py."""
    folder = ROOT / "DASO" / Config().ALGORITHM.DARP.EST
    settings = [{"CIFAR10.NUM_LABELED_HEAD": head, "CIFAR10.NUM_UNLABELED_HEAD": unlabelled,
                 "CIFAR10.IMB_FACTOR_UL": factor, "REVERSE_UL_DISTRIBUTION": reverse}
                for head, unlabelled in ((1500, 3000), (500, 4000)) for factor, reverse in ((1, False), (100, True))]
    settings += [{"NAME": "stl10", "STL10.NUM_LABELED_HEAD": head, "STL10.IMB_FACTOR_L": factor}
                 for head in (150, 450) for factor in (10, 20)]
    for setting in settings:
        name = estimate_name(Config({f"DATASET.{key}": value for key, value in setting.items()}))
        found = read_estimate(folder, name, 1000, 10)
        assert found.sum().item() == pytest.approx(1000, rel=1e-5) and (found > 0).all()


@pytest.mark.parametrize(("config", "keys", "message"), [
    ("fixmatch_crest", {"ALGORITHM.CREST.GEN_PERIOD_STEPS": 4}, "must be a multiple of ALGORITHM.CREST.GEN_PERIOD_STE"),
    ("crt", {"ALGORITHM.CRT.TARGET_DIR": "nowhere"}, "nowhere/model_final.pth.tar does not exist"),
    ("crt", {}, "ALGORITHM.CRT.TARGET_DIR: name the folder"),
    ("darp_estim", {"DATASET.NUM_VALID": 0}, "held-out labels"),
    ("remixmatch", {"ALGORITHM.REMIXMATCH.NUM_AUG": 3}, "ALGORITHM.REMIXMATCH.NUM_AUG: 3 is not in the range 2<=x<=2"),
])
def test_mistakes_touch_nothing(config: str, keys: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        call(config, tmp_path, keys)
    assert list(tmp_path.iterdir()) == []
