"""Every golden number of DPT on ImageNet: run this file. The cases live in dpt_imagenet_<area>.py, one file an area."""
from __future__ import annotations

from tests.golden import (
    dpt_imagenet_classifier,
    dpt_imagenet_latents,
    dpt_imagenet_msn,
    dpt_imagenet_samplers,
    dpt_imagenet_schedules,
    dpt_imagenet_train,
    dpt_imagenet_uvit,
    dpt_imagenet_vae,
)
from tests.golden.cases import hidden, unserved
from tests.golden.dpt_imagenet_classifier import *  # noqa: F403
from tests.golden.dpt_imagenet_latents import *  # noqa: F403
from tests.golden.dpt_imagenet_msn import *  # noqa: F403
from tests.golden.dpt_imagenet_samplers import *  # noqa: F403
from tests.golden.dpt_imagenet_schedules import *  # noqa: F403
from tests.golden.dpt_imagenet_train import *  # noqa: F403
from tests.golden.dpt_imagenet_uvit import *  # noqa: F403
from tests.golden.dpt_imagenet_vae import *  # noqa: F403

AREAS = (dpt_imagenet_classifier, dpt_imagenet_latents, dpt_imagenet_msn, dpt_imagenet_samplers, dpt_imagenet_schedules,
         dpt_imagenet_train, dpt_imagenet_uvit, dpt_imagenet_vae)


def test_every_case_is_served() -> None:
    assert unserved("dpt_imagenet", AREAS) == []


def test_no_test_hides_another() -> None:
    assert hidden(AREAS) == []
