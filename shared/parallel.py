"""Work on all cores, with results in order and bounded memory."""
from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import Generic, TypeVar

from shared.cli import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores that this process may use; FEWLABEL_CORES overrules it."""
    given = os.environ.get("FEWLABEL_CORES", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item],
                workers: int | None = None, threads: bool = False) -> Iterator[Result]:
    """Yield function(item) for each item in order, computed in processes, or threads: `workers`, or one a core.

    For processes `function` must be importable and should take a chunk of work. `items` is read no further ahead than
    twice the number of workers, so a stream of any length fits. A single item and a single worker stay in this process.
    """
    workers, items = workers or cores(), iter(items)
    head = list(islice(items, 2))
    if workers == 1 or len(head) < 2 or multiprocessing.current_process().daemon:
        yield from map(function, head)
        yield from map(function, items)
        return
    # Forked workers start at once and only touch NumPy and Pillow; elsewhere forking is not safe or not there.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ThreadPoolExecutor(workers) if threads else \
        ProcessPoolExecutor(workers, mp_context=context, initializer=_exit_with_parent)
    try:
        pending = deque(pool.submit(function, item) for item in head)
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process ended without a result: it ran out of memory or was killed") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _exit_with_parent() -> None:
    """Exit when the parent is killed; otherwise the worker blocks forever."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items while a thread already makes the next one, for instance unpacks it."""
    end, items = object(), iter(items)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


class Prefetched(Generic[Result]):
    """Calls `make(step)` for the next step, up to `last`, in a thread while the caller works on this one."""

    def __init__(self, make: Callable[[int], Result], last: int) -> None:
        self.make, self.last = make, last
        self.thread = ThreadPoolExecutor(1)
        self.following: tuple[int, Future[Result]] | None = None

    def __call__(self, step: int) -> Result:
        ready = self.following is not None and self.following[0] == step
        future = self.following[1] if ready else self.thread.submit(self.make, step)
        result = future.result()
        if step < self.last:
            self.following = (step + 1, self.thread.submit(self.make, step + 1))
        return result
