"""What is logged about pseudo-labels, and the histogram that DASO blends by."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from DASO.lib.algorithm.daso import Blender
from DASO.lib.algorithm.interface import Setting
from DASO.lib.config.config import Config
from DASO.lib.report import PseudoLabelStatistics, pseudo_label_numbers
from tests.golden.cases import each, facts, serves, tolerance
from tests.golden.daso_cases import PAPER, Case, cases_of, close, stored

STATISTICS = cases_of("statistics")
SERVES = serves(STATISTICS)


def batches(wanted: dict[str, np.ndarray]) -> list[dict[str, torch.Tensor]]:
    count = sum(key.endswith("_gt_labels") for key in wanted)
    return [{key.partition("_")[2]: torch.from_numpy(value).long() for key, value in wanted.items()
             if key.startswith(f"in{number}_")} for number in range(count)]


def histograms(wanted: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the histograms of DASO by the number of batches after which they are refreshed."""
    return {int(key.rpartition("_")[2]): value for key, value in wanted.items() if "pl_dist_after" in key}


@each(STATISTICS)
def test_numbers(case: Case) -> None:
    wanted, published = stored(case), facts(PAPER, re.search(r"\S+\.json", case["what"])[0])
    if not published:
        pytest.skip("there are no numbers")
    classes = 1 + max(int(name.rpartition("/")[2]) for name in published if name.rpartition("/")[2].isdigit())
    statistics = PseudoLabelStatistics(classes, torch.device("cpu"))
    for batch in batches(wanted):
        statistics.add(batch["gt_labels"], batch["ul_labels"], {
            "main": batch["pseudo_labels"], "linear": batch["linear_pl"], "semantic": batch["sem_pl"]})
    found = pseudo_label_numbers(statistics.counts())
    assert published.keys() <= found.keys()
    for name, value in published.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=tolerance(case["tolerance"])["atol"]), name


@each(STATISTICS)
def test_histogram(case: Case) -> None:
    wanted = stored(case)
    refreshes = histograms(wanted)
    period = min(refreshes)
    blender = Blender(Config({"ALGORITHM.DASO.PL_DIST_UPDATE_PERIOD": period}),
                      Setting(len(refreshes[period]), (1,)))
    for it, batch in enumerate(batches(wanted)):
        blender.count(batch["pseudo_labels"], it)
        if it + 1 in refreshes:
            close(blender.histogram, refreshes[it + 1], case, f"after {it + 1}")
