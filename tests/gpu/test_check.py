"""tests/gpu/check.py: every part starts on the null GPU, and what fails or is late does not end the others."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.checks.parts import PARTS
from tests.gpu.measure import unavailable
from tests.gpu.programs import ROOT

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"the null GPU is left out: {unavailable()}")
LEFT_OUT_THERE = {"nccl", "dali"}


def check(*args: str, cwd: Path) -> tuple[int, list[dict]]:
    """Return the exit status of check.py and its lines."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "gpu" / "check.py", *args], capture_output=True, text=True,
                          timeout=1200, cwd=cwd)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_part_starts(tmp_path):
    status, lines = check("--null", "--seconds", "1000", cwd=tmp_path)
    ended = {line["part"]: line for line in lines if "ok" in line or "left out" in line}
    assert list(ended) == list(PARTS)
    assert {name for name, line in ended.items() if "left out" in line} == LEFT_OUT_THERE
    assert all(line["ok"] for name, line in ended.items() if name not in LEFT_OUT_THERE), lines
    assert status == 0


def test_what_is_late_says_so(tmp_path):
    status, lines = check("--null", "--seconds", "0", "versions", "steps", cwd=tmp_path)
    assert lines == [{"part": "versions", "left out": "time"}, {"part": "steps", "left out": "time"}]
    assert status == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_parts_are_left_out(tmp_path):
    status, lines = check("versions", "waits", cwd=tmp_path)
    assert lines == [{"part": "versions", "left out": "no GPU"}, {"part": "waits", "left out": "no GPU"}]
    assert status == 0
