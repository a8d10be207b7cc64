"""Every golden number of daso: run this file. The cases live in daso_<area>.py, one file an area."""
from __future__ import annotations

from collections import Counter

from tests.golden import (
    daso_align,
    daso_augment,
    daso_config,
    daso_crest,
    daso_darp,
    daso_daso_features,
    daso_distlog,
    daso_ema,
    daso_longtail,
    daso_losses,
    daso_metric_names,
    daso_mix,
    daso_networks,
    daso_samplers,
    daso_schedules,
    daso_splits,
    daso_steps,
    daso_usadtm,
)
from tests.golden.cases import index
from tests.golden.daso_align import *  # noqa: F403
from tests.golden.daso_augment import *  # noqa: F403
from tests.golden.daso_config import *  # noqa: F403
from tests.golden.daso_crest import *  # noqa: F403
from tests.golden.daso_darp import *  # noqa: F403
from tests.golden.daso_daso_features import *  # noqa: F403
from tests.golden.daso_distlog import *  # noqa: F403
from tests.golden.daso_ema import *  # noqa: F403
from tests.golden.daso_longtail import *  # noqa: F403
from tests.golden.daso_losses import *  # noqa: F403
from tests.golden.daso_metric_names import *  # noqa: F403
from tests.golden.daso_mix import *  # noqa: F403
from tests.golden.daso_networks import *  # noqa: F403
from tests.golden.daso_samplers import *  # noqa: F403
from tests.golden.daso_schedules import *  # noqa: F403
from tests.golden.daso_splits import *  # noqa: F403
from tests.golden.daso_steps import *  # noqa: F403
from tests.golden.daso_usadtm import *  # noqa: F403

AREAS = (daso_align, daso_augment, daso_config, daso_crest, daso_darp, daso_daso_features, daso_distlog, daso_ema,
         daso_longtail, daso_losses, daso_metric_names, daso_mix, daso_networks, daso_samplers, daso_schedules,
         daso_splits, daso_steps, daso_usadtm)


def test_every_case_is_served() -> None:
    served = set().union(*(getattr(area, "SERVES", set()) for area in AREAS))
    cases = {(case["file"], case["name"]) for case in index("daso")["cases"]}
    assert cases - served == set()


def test_no_test_hides_another() -> None:
    names = Counter(name for area in AREAS for name in vars(area) if name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []
