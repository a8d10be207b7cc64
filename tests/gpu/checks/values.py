"""Augmentations and dropout on the GPU against the CPU."""
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from EDM.training.augment import AugmentPipe
from shared.augment import randaugment, views
from shared.training.randomness import Dropout, numpy_rng, set_dropout_keys, torch_rng
from tests.gpu.checks.worker import Place

PIPE = dict(p=1, xflip=1, yflip=1, rotate_int=1, translate_int=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1,
            brightness=1, contrast=1, lumaflip=1, hue=1, saturation=1)


def augmentation(place: Place) -> dict[str, Any]:
    """RandAugment, weak and strong augmentation, the augmentation pipe and dropout masks: GPU = CPU."""
    apart: dict[str, float] = {}
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (512, 3, 32, 32), dtype=np.uint8))
    for number, name in enumerate(randaugment.OPERATIONS):
        chosen = np.full((len(images), 1), number)
        low, high = randaugment.RANGES[name]
        magnitudes = np.random.default_rng(number).uniform(low, high, chosen.shape)
        apart[name] = both(lambda x: randaugment.apply(x, chosen, magnitudes), images)  # noqa: B023 - used at once
    strong = views.draw_strong(len(images), numpy_rng(0, 0, "strong"), (32, 32))
    weak = views.draw_weak(len(images), numpy_rng(0, 0, "weak"), (32, 32), views.WeakPolicy())
    apart["strong"] = both(lambda x: views.strong(x, strong), images)
    apart["weak"] = both(lambda x: views.weak(x, weak, (0.5,) * 3, (0.25,) * 3), images)
    place.check(all(value <= (1 if name != "weak" else 1e-5) for name, value in apart.items()),
                f"grey levels apart: {apart}")

    pipe = AugmentPipe(**PIPE)
    parameters = pipe.draw(len(images), torch_rng(0, 0, "augmentation"))
    unit = images.float() / 127.5 - 1
    apart["pipe"] = both(lambda x: pipe.apply(x, parameters.to(x.device))[0], unit)
    apart["labels of the pipe"] = both(lambda x: pipe.apply(x, parameters.to(x.device))[1], unit)
    place.check(max(apart["pipe"], apart["labels of the pipe"]) < 1e-3, f"augmentation pipe: {apart}")

    layer = torch.nn.Sequential(Dropout(0.3)).train()
    layer.register_parameter("device", torch.nn.Parameter(torch.zeros(1)))

    def dropped(x: torch.Tensor) -> torch.Tensor:
        net = layer.to(x.device)
        set_dropout_keys(net, 1, 2, range(len(x)))
        return net(x)

    apart["dropout"] = both(dropped, unit)
    place.check(apart["dropout"] == 0, "dropout masks differ")
    return {} if place.null else {"apart": {name: round(value, 7) for name, value in apart.items() if value}}


def both(function: Any, values: torch.Tensor) -> float:
    """Return the largest difference between `function` on the GPU and on the CPU."""
    return float((function(values.cuda()).cpu().double() - function(values).double()).abs().max())
