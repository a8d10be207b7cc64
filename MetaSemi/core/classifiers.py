"""torchvision's classification networks as the ImageNet scripts train them: images of any side to logits alone."""
from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import nn

from shared.cli import UserError

# These also classify from their middle; here they are built without, so that their output is logits and nothing else.
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def make_classifier(name: str, classes: int, side: int) -> nn.Module:
    """Return torchvision's untrained network `name` for images of `side` x `side`, on the CPU, in train mode.

    Networks whose weights depend on the size of the images (ViT, MaxViT) are built for `side`. Raises UserError for a
    side that the network does not take.
    """
    sized: dict[str, Any] = {}
    if name.startswith("vit_"):
        sized["image_size"] = side
    elif name == "maxvit_t":
        sized["input_size"] = (side, side)
    elif name in WITH_AUXILIARY_HEADS:
        sized = {"aux_logits": False, "init_weights": True}
    try:
        net = torchvision.models.get_model(name, weights=None, num_classes=classes, **sized)
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--imcrop {side}: {name} does not take images of this size "
                        f"({str(error).partition(chr(10))[0]})") from None
    if logits.shape != (1, classes):
        raise UserError(f"--arch {name}: expected {classes} logits an image, found {tuple(logits.shape)}")
    return net.train()
