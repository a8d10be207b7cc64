"""Every golden number of EDM: run this file. The cases live in edm_<area>.py, one file an area."""
from __future__ import annotations

from tests.golden import (
    edm_augment,
    edm_data,
    edm_generate,
    edm_loss,
    edm_metrics,
    edm_networks,
    edm_options,
    edm_preconditioning,
    edm_samplers,
    edm_snapshot,
    edm_training,
)
from tests.golden.cases import hidden, unserved
from tests.golden.edm_augment import *  # noqa: F403
from tests.golden.edm_data import *  # noqa: F403
from tests.golden.edm_generate import *  # noqa: F403
from tests.golden.edm_loss import *  # noqa: F403
from tests.golden.edm_metrics import *  # noqa: F403
from tests.golden.edm_networks import *  # noqa: F403
from tests.golden.edm_options import *  # noqa: F403
from tests.golden.edm_preconditioning import *  # noqa: F403
from tests.golden.edm_samplers import *  # noqa: F403
from tests.golden.edm_snapshot import *  # noqa: F403
from tests.golden.edm_training import *  # noqa: F403

AREAS = (edm_augment, edm_data, edm_generate, edm_loss, edm_metrics, edm_networks, edm_options, edm_preconditioning,
         edm_samplers, edm_snapshot, edm_training)


def test_every_case_is_served() -> None:
    assert unserved("edm", AREAS) == []


def test_no_test_hides_another() -> None:
    assert hidden(AREAS) == []
