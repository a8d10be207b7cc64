"""The allocator keeps memory where glibc is; elsewhere it says so."""
from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cpu import allocator

# A process of its own: the setting lasts as long as the process does.
CHURN = """
import resource, sys
import torch
from shared.cpu.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def churn():
    for _ in range(10):
        torch.zeros(40 << 20, dtype=torch.uint8)
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CHURN, mode], check=True, capture_output=True, text=True,
                          cwd=Path(__file__).parents[2])
    return int(done.stdout)


def test_pages_are_cleared_once() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert not allocator.keep_freed_memory()
        return
    assert page_faults("keep") < 0.1 * page_faults("default")


@pytest.mark.parametrize("where", ["another system", "another C library"])
def test_nothing_happens_without_glibc(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "another system":
        monkeypatch.setattr(allocator.sys, "platform", "darwin")
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert allocator.keep_freed_memory() is False
