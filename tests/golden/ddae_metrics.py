"""Alignment and uniformity."""
from __future__ import annotations

import numpy as np

from DDAE.contrastive import alignment, formatted, uniformity
from tests.golden.cases import each, serves
from tests.golden.ddae_compare import assert_close, cases_of, tensors

MEASURED = cases_of("contrastive")
SERVES = serves(MEASURED)


@each(MEASURED)
def test_alignment_and_uniformity(case):
    stored = tensors(case)
    rows, sizes = [], []
    for number, (count, *_) in enumerate(case["constructor"]["batches"]):
        x, y = stored[f"x{number}"].double(), stored[f"y{number}"].double()
        rows.append([float(value) for value in (alignment(x, y, 2), (uniformity(x, 2) + uniformity(y, 2)) / 2,
                                                alignment(x, y, 1), uniformity(x, 3))])
        sizes.append(count)
        single = [float(alignment(x.float(), y.float(), 2)), float(uniformity(x.float(), 2))]
        assert_close(single, [rows[-1][0], float(uniformity(x, 2))], case["tolerance"], "in float32")
    assert_close(rows, stored["values_f64"], case["tolerance"], "values")
    means = np.average(np.array(rows)[:, :2], axis=0, weights=sizes)
    assert_close(means, stored["averages_f64"], case["tolerance"], "averages")
    printed = [formatted(column) for column in np.array(rows).T[:2]]
    assert printed == case.get("notes", {}).get("history_format", printed)
