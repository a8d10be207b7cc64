"""What is logged about pseudo-labels, and the histogram that DASO blends by."""
from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from DASO.lib.algorithm.daso import Blender
from DASO.lib.algorithm.interface import Setting
from DASO.lib.config.config import Config
from DASO.lib.report import PseudoLabelStatistics, pseudo_label_numbers
from tests.golden.cases import facts
from tests.golden.daso_cases import each, of_file, serves, stored, tolerance

CASES = of_file("distlog.npz")
SERVES = serves(CASES)


def batches(wanted: dict[str, np.ndarray]) -> list[dict[str, torch.Tensor]]:
    count = sum(key.endswith("_gt_labels") for key in wanted)
    return [{key.partition("_")[2]: torch.from_numpy(value).long() for key, value in wanted.items()
             if key.startswith(f"in{number}_")} for number in range(count)]


@each(CASES)
def test_numbers(case: dict[str, Any]) -> None:
    wanted, published = stored(case), facts("daso", "distlog_metrics.json")
    classes = 1 + max(int(name.rpartition("/")[2]) for name in published if name.rpartition("/")[2].isdigit())
    statistics = PseudoLabelStatistics(classes, torch.device("cpu"))
    for batch in batches(wanted):
        statistics.add(batch["gt_labels"], batch["ul_labels"], {
            "main": batch["pseudo_labels"], "linear": batch["linear_pl"], "semantic": batch["sem_pl"]})
    found = pseudo_label_numbers(statistics.counts())
    assert found.keys() == published.keys()
    for name, value in published.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=tolerance(case)["atol"]), name


@each(CASES)
def test_histogram(case: dict[str, Any]) -> None:
    wanted = stored(case)
    refreshes = {int(key.rpartition("_")[2]): value for key, value in wanted.items() if "pl_dist_after" in key}
    period = min(refreshes)
    blender = Blender(Config({"ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": period}),
                      Setting(len(wanted[f"pl_dist_after_{period}"]), (1,)))
    for it, batch in enumerate(batches(wanted)):
        blender.count(batch["pseudo_labels"], it)
        if it + 1 in refreshes:
            np.testing.assert_allclose(blender.histogram, refreshes[it + 1], **tolerance(case))
    assert re.search("since the previous refresh", case["what"])
