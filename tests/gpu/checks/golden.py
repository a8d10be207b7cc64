"""Numbers of the GPU against those of the originals."""
from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import pytest

from tests.gpu.checks.worker import Place
from tests.gpu.programs import ROOT

# Tests of networks and losses that take their device from GOLDEN_DEVICE.
GOLDEN = {"test_edm.py": {"test_network_output_and_gradients", "test_loss"}, "test_tdsm.py": {"test_classifier"},
          "test_ddae.py": {"test_unet", "test_unet_block"}, "test_torchssl.py": {"test_forward_and_backward"},
          "test_daso.py": {"test_forward"}, "test_metasemi.py": {"test_output"}}


class Outcomes:
    """A plugin of pytest that runs the tests of GOLDEN only, and collects what became of each."""

    def __init__(self) -> None:
        self.passed, self.failed, self.broken = 0, [], []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.originalname in GOLDEN[item.path.name]]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        if report.failed:
            wrong = call.excinfo.errisinstance(AssertionError)
            reason = " ".join(str(call.excinfo.value).split())[:200]
            (self.failed if wrong else self.broken).append(f"{item.name}: {reason}")
        elif report.when == "call" and report.passed:
            self.passed += 1
        return report


def golden(place: Place) -> dict[str, Any]:
    """Networks and losses on the GPU against numbers of the originals."""
    os.environ["GOLDEN_DEVICE"] = "cuda"
    outcomes = Outcomes()
    files = [str(ROOT / "tests" / "golden" / file) for file in GOLDEN]
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main([*files, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir", str(ROOT)],
                             plugins=[outcomes])
    assert status in (0, 1), f"pytest ended with status {status}"
    assert not outcomes.broken, outcomes.broken[:3]
    place.check(not outcomes.failed, f"{len(outcomes.failed)} differ: {outcomes.failed[:3]}")
    return {"passed": outcomes.passed, **({"without values": len(outcomes.failed)} if place.null else {})}
