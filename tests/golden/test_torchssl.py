"""Every golden number of torchssl: run this file. The cases live in torchssl_<area>.py, one file an area."""
from __future__ import annotations

from collections import Counter

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
from tests.golden.cases import index
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
    served = set().union(*(area.SERVES for area in AREAS))
    assert [case["id"] for case in index("torchssl")["cases"] if case["id"] not in served] == []


def test_no_test_hides_another() -> None:
    names = Counter(name for area in AREAS for name in vars(area) if name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []
