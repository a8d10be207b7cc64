"""Types of command-line flags that say in one line what they expect."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def number(kind: type, low: float | None = None, high: float | None = None) -> Callable[[str], Any]:
    """Return a reader of int or float in low..high (None: unbounded), both ends included, as argparse's `type`."""
    name = "a whole number" if kind is int else "a number"
    if low is not None:
        name += f" of at least {low:g}" if high is None else f" from {low:g} to {high:g}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
            fits = (low is None or value >= low) and (high is None or value <= high) and abs(value) != float("inf")
        except ValueError:
            fits = False
        if not fits or value != value:
            raise argparse.ArgumentTypeError(f"expected {name}, got {text!r}")
        return value

    read.__name__ = name
    return read
