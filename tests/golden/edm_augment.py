"""The augmentation pipe with given draws: images and labels."""
from __future__ import annotations

import numpy as np
import torch

from EDM.training.augment import DRAWS, GEOMETRY, AugmentPipe
from tests.golden.cases import each, number, serves, stored
from tests.golden.edm_cases import PAPER, cases, largest

AUGMENT_CASES = cases(kind="augment")
SERVES = serves(AUGMENT_CASES)


@each(AUGMENT_CASES)
def test_augmentation(case):
    given = stored(PAPER, case)
    pipe = AugmentPipe(**case["options"])
    assert pipe.label_dim == case["label_dim"]

    # The numbers are drawn in the published order, with the published distributions.
    ours = [kind for name in pipe.multipliers for kind in DRAWS[name]]
    theirs = [(kind, row) for place, (kind, _) in enumerate(case["draws"])
              for row in np.reshape(given[f"draw{place}"], (-1, len(given["x"])))]
    described = [f"integer below {kind}" if isinstance(kind, int) else "uniform" if kind == "gate" else kind
                 for kind in ours]
    assert described == [kind for kind, _ in theirs]

    numbers = [torch.from_numpy(row.astype(np.float32)) for _, row in theirs]
    images, labels = pipe.apply(torch.from_numpy(given["x"]), pipe.parameters(numbers))
    pixels = number(case["tolerance"], "y: #")
    geometric = number(case["tolerance"], "geometric cases #", pixels)
    allowed = geometric if set(GEOMETRY).intersection(pipe.multipliers) else pixels
    assert largest(images.numpy() - given["y"]) <= allowed
    assert labels.shape == given["labels"].shape
    assert largest(labels.numpy() - given["labels"]) <= number(case["tolerance"], "labels: #")
