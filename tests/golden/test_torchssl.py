"""Every golden number of torchssl: run this file. The cases live in torchssl_<area>.py, one file an area."""
from __future__ import annotations

from tests.golden import (
    torchssl_algorithms,
    torchssl_augment,
    torchssl_configs,
    torchssl_files,
    torchssl_losses,
    torchssl_networks,
    torchssl_splits,
    torchssl_training,
)
from tests.golden.cases import hidden, unserved
from tests.golden.torchssl_algorithms import *  # noqa: F403
from tests.golden.torchssl_augment import *  # noqa: F403
from tests.golden.torchssl_configs import *  # noqa: F403
from tests.golden.torchssl_files import *  # noqa: F403
from tests.golden.torchssl_losses import *  # noqa: F403
from tests.golden.torchssl_networks import *  # noqa: F403
from tests.golden.torchssl_splits import *  # noqa: F403
from tests.golden.torchssl_training import *  # noqa: F403

AREAS = (torchssl_algorithms, torchssl_augment, torchssl_configs, torchssl_files, torchssl_losses, torchssl_networks,
         torchssl_splits, torchssl_training)


def test_every_case_is_served() -> None:
    assert unserved("torchssl", AREAS) == []


def test_no_test_hides_another() -> None:
    assert hidden(AREAS) == []
