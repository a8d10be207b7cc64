"""Every golden number of DDAE: run this file. The cases live in ddae_<area>.py, one file an area."""
from __future__ import annotations

from tests.golden import (
    ddae_classifiers,
    ddae_diffusion,
    ddae_dit,
    ddae_images,
    ddae_metrics,
    ddae_networks,
    ddae_probe,
    ddae_sample,
    ddae_scan,
    ddae_training,
)
from tests.golden.cases import hidden, unserved
from tests.golden.ddae_classifiers import *  # noqa: F403
from tests.golden.ddae_diffusion import *  # noqa: F403
from tests.golden.ddae_dit import *  # noqa: F403
from tests.golden.ddae_images import *  # noqa: F403
from tests.golden.ddae_metrics import *  # noqa: F403
from tests.golden.ddae_networks import *  # noqa: F403
from tests.golden.ddae_probe import *  # noqa: F403
from tests.golden.ddae_sample import *  # noqa: F403
from tests.golden.ddae_scan import *  # noqa: F403
from tests.golden.ddae_training import *  # noqa: F403

AREAS = (ddae_classifiers, ddae_diffusion, ddae_dit, ddae_images, ddae_metrics, ddae_networks, ddae_probe, ddae_sample,
         ddae_scan, ddae_training)


def test_every_case_is_served() -> None:
    assert unserved("ddae", AREAS) == []


def test_no_test_hides_another() -> None:
    assert hidden(AREAS) == []
