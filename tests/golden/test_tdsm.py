"""Every golden number of TDSM: run this file. The cases live in tdsm_<area>.py, one file an area."""
from __future__ import annotations

from tests.golden import tdsm_data, tdsm_losses, tdsm_networks, tdsm_sampler, tdsm_transition
from tests.golden.cases import hidden, unserved
from tests.golden.tdsm_data import *  # noqa: F403
from tests.golden.tdsm_losses import *  # noqa: F403
from tests.golden.tdsm_networks import *  # noqa: F403
from tests.golden.tdsm_sampler import *  # noqa: F403
from tests.golden.tdsm_transition import *  # noqa: F403

AREAS = (tdsm_data, tdsm_losses, tdsm_networks, tdsm_sampler, tdsm_transition)


def test_every_case_is_served() -> None:
    assert unserved("tdsm", AREAS) == []


def test_no_test_hides_another() -> None:
    assert hidden(AREAS) == []
