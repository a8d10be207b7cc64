"""Work in processes: order, bounded look-ahead, errors, and nothing left behind."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from shared.cli import UserError
from shared.parallel import cores, one_ahead, ordered_map
from tests.shared.programs import environment, wait_until


@pytest.fixture(params=["1", "3"], autouse=True)
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWLABEL_CORES", request.param)


def square(number: int) -> int:
    time.sleep(0.01 * (number % 3))
    return number * number


def fail(number: int) -> int:
    if number == 5:
        raise UserError("five is refused")
    return number


def die(number: int) -> int:
    os._exit(3)


def test_order() -> None:
    assert list(ordered_map(square, iter(range(20)))) == [n * n for n in range(20)]
    assert list(ordered_map(square, [])) == [] and list(ordered_map(square, [3])) == [9]


def test_looks_ahead_no_further_than_it_must() -> None:
    taken = []
    results = ordered_map(square, (taken.append(n) or n for n in range(1000)))
    for _ in range(5):
        next(results)
    assert len(taken) <= 5 + 2 * cores() + 1
    results.close()


def test_errors() -> None:
    with pytest.raises(UserError, match="five is refused"):
        list(ordered_map(fail, range(100)))


def test_lost_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWLABEL_CORES", "2")
    with pytest.raises(UserError, match="worker process ended"):
        list(ordered_map(die, range(100)))


def test_workers_end_with_the_program() -> None:
    program = ("import os, time\nfrom shared.parallel import ordered_map\n"
               "def work(n):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(1 if n < 2 else 0)\n"
               "for _ in ordered_map(work, range(4)): pass\ntime.sleep(60)\n")
    # The pool lives as long as the loop; the program is killed inside it.
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                               env=environment(FEWLABEL_CORES="2"))
    pids = {int(process.stdout.readline()) for _ in range(2)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(running(pid) for pid in pids))


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_one_ahead() -> None:
    made = []
    items = one_ahead(made.append(n) or n for n in range(5))
    assert next(items) == 0
    assert list(items) == [1, 2, 3, 4] and made == [0, 1, 2, 3, 4]

    def broken():
        yield 1
        raise UserError("cut short")

    with pytest.raises(UserError, match="cut short"):
        list(one_ahead(broken()))
