"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""
from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """Return 9 s as '9s', 75 s as '1m 15s', 4000 s as '1h 06m', 200000 s as '2d 07h'."""
    seconds = int(round(seconds))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {seconds % 60:02d}s" if minutes else f"{seconds}s"


class Progress:
    """Counts `total` units up: call `advance`, then `close`. `figures`: text shown beside the count."""

    def __init__(self, desc: str, total: int | None, unit: str = "it", initial: int = 0, shown: bool = True) -> None:
        self.desc, self.total, self.unit, self.count, self.initial = desc, total, unit, initial, initial
        self.shown, self.figures = shown, ""
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(desc=desc, total=total, unit=unit, initial=initial, dynamic_ncols=True, smoothing=0.05)

    def advance(self, count: int = 1) -> None:
        self.count += count
        if self.bar is not None:
            self.bar.set_postfix_str(self.figures, refresh=False)
            self.bar.update(count)
        elif self.shown and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(self.line(), flush=True)

    def rate(self) -> float:
        """Return units per second since the start."""
        return (self.count - self.initial) / max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        rate = self.rate()
        left = f", {duration((self.total - self.count) / rate)} left" if self.total and rate else ""
        of = f"/{self.total}" if self.total else ""
        figures = f"  {self.figures}" if self.figures else ""
        return f"{self.desc} {self.count}{of} {self.unit}, {rate:.4g} {self.unit}/s{left}{figures}"

    def print(self, text: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def progress(items: Iterable[Item], desc: str, total: int | None = None, unit: str = "it",
             shown: bool = True) -> Iterator[Item]:
    """Iterate over `items` and show how far it is."""
    counter = Progress(desc, len(items) if total is None and hasattr(items, "__len__") else total, unit, shown=shown)
    try:
        for item in items:
            yield item
            counter.advance()
    finally:
        counter.close()
