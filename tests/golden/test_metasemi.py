"""Every golden number of metasemi: run this file. The cases live in metasemi_<area>.py, one file an area."""
from __future__ import annotations

from tests.golden import (
    metasemi_files,
    metasemi_imagenet,
    metasemi_misc,
    metasemi_networks,
    metasemi_records,
    metasemi_steps,
)
from tests.golden.cases import facts, hidden, index
from tests.golden.metasemi_files import *  # noqa: F403
from tests.golden.metasemi_imagenet import *  # noqa: F403
from tests.golden.metasemi_misc import *  # noqa: F403
from tests.golden.metasemi_networks import *  # noqa: F403
from tests.golden.metasemi_records import *  # noqa: F403
from tests.golden.metasemi_steps import *  # noqa: F403

AREAS = (metasemi_files, metasemi_imagenet, metasemi_misc, metasemi_networks, metasemi_records, metasemi_steps)


def every_case() -> set[tuple[str, str]]:
    """Return (section, case) of all that the index lists."""
    found = index("metasemi")
    cases = {(section, name) for section in ("nets", "training", "misc")
             for name in found.get(section, {}).get("cases", ())}
    cases |= {("im2rec", name) for name in facts("metasemi", found.get("im2rec", {}).get("description_file", ""))}
    cases |= {("output_facts", name) for name in found.get("output_facts", ())}
    other = set(found) - {"readme", "nets", "training", "misc", "im2rec", "output_facts"}
    return cases | {(section, section) for section in other}


def test_every_case_is_served() -> None:
    assert sorted(every_case().difference(*(area.SERVES for area in AREAS))) == []


def test_no_test_hides_another() -> None:
    assert hidden(AREAS) == []
