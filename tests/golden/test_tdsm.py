"""Every golden number of TDSM: run this file. The cases live in tdsm_<area>.py, one file an area."""
from __future__ import annotations

from collections import Counter

from tests.golden import tdsm_data, tdsm_losses, tdsm_networks, tdsm_sampler, tdsm_transition
from tests.golden.cases import index
from tests.golden.tdsm_data import *  # noqa: F403
from tests.golden.tdsm_losses import *  # noqa: F403
from tests.golden.tdsm_networks import *  # noqa: F403
from tests.golden.tdsm_sampler import *  # noqa: F403
from tests.golden.tdsm_transition import *  # noqa: F403

AREAS = (tdsm_data, tdsm_losses, tdsm_networks, tdsm_sampler, tdsm_transition)


def test_every_case_is_served() -> None:
    served = set().union(*(area.CASES for area in AREAS))
    assert [case["case"] for case in index("tdsm")["cases"] if case["case"] not in served] == []


def test_no_test_hides_another() -> None:
    hidden = Counter(name for area in AREAS for name, value in vars(area).items()
                     if name.startswith("test_") and getattr(value, "__module__", "") == area.__name__)
    assert [name for name, count in hidden.items() if count > 1] == []
