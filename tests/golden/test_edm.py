"""Every golden number of EDM: run this file. The cases live in edm_<area>.py, one file an area."""
from __future__ import annotations

from collections import Counter

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
from tests.golden.cases import index
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


def names(cases) -> set[str]:
    return {case if isinstance(case, str) else case["case"] for case in cases}


def test_every_case_is_served() -> None:
    served = set().union(*(names(area.CASES) for area in AREAS))
    assert [case["case"] for case in index("edm")["cases"] if case["case"] not in served] == []


def test_no_test_hides_another() -> None:
    hidden = Counter(name for area in AREAS for name, value in vars(area).items()
                     if name.startswith("test_") and getattr(value, "__module__", "") == area.__name__)
    assert [name for name, count in hidden.items() if count > 1] == []
