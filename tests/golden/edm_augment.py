"""The augmentation pipe with given draws: images and labels."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from EDM.training.augment import DRAWS, GEOMETRY, AugmentPipe
from tests.golden.cases import arrays, index

AUGMENT_CASES = [case for case in index("edm")["cases"] if case["kind"] == "augment"]
CASES = {case["case"] for case in AUGMENT_CASES}


@pytest.mark.parametrize("case", AUGMENT_CASES, ids=lambda case: case["case"])
def test_augmentation(case):
    stored = {name.rsplit("/", 1)[-1]: arrays("edm", case["file"])[name] for name in case["arrays"]}
    pipe = AugmentPipe(**case["options"])
    assert pipe.label_dim == case["label_dim"]

    # The numbers are drawn in the published order, with the published distributions.
    ours = [kind for name in pipe.multipliers for kind in DRAWS[name]]
    theirs = [(kind, row) for number, (kind, _) in enumerate(case["draws"])
              for row in np.reshape(stored[f"draw{number}"], (-1, case["shape"][0]))]
    names = {"gate": "uniform", 2: "integer below 2", 4: "integer below 4"}
    assert [names.get(kind, kind) for kind in ours] == [kind for kind, _ in theirs]

    numbers = [torch.from_numpy(row.astype(np.float32)) for _, row in theirs]
    images, labels = pipe.apply(torch.from_numpy(stored["x"]), pipe.parameters(numbers))
    pixels, geometric, of_labels = (float(n) for n in re.findall(r"\d+e-\d+", case["tolerance"]))
    allowed = geometric if set(GEOMETRY).intersection(pipe.multipliers) else pixels
    assert np.abs(images.numpy() - stored["y"]).max() <= allowed
    assert np.abs(labels.numpy() - stored["labels"]).max() <= of_labels
