"""Every golden number of daso: run this file. The cases live in daso_<area>.py, one file an area."""
from __future__ import annotations

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
from tests.golden.cases import hidden, unserved
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
    assert unserved("daso", AREAS) == []


def test_no_test_hides_another() -> None:
    assert hidden(AREAS) == []
