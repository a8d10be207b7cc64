"""Numbers over seeds: mean, standard deviation, paired differences, and the distance to a printed number."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def known(values: Sequence[float | None]) -> list[float]:
    """Return the values that are there."""
    return [value for value in values if value is not None]


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known values, None where there is none."""
    return statistics.fmean(known(values)) if known(values) else None


def deviation(values: Sequence[float | None]) -> float | None:
    """Return the standard deviation of a sample (n - 1), None for fewer than two values."""
    return statistics.stdev(known(values)) if len(known(values)) > 1 else None


def difference(a: Sequence[float | None], b: Sequence[float | None]) -> dict[str, Any] | None:
    """Return mean and standard error of the differences a - b of the seeds that have both, and how many are above 0."""
    pairs = [x - y for x, y in zip(a, b, strict=False) if x is not None and y is not None]
    if not pairs:
        return None
    spread = deviation(pairs)
    return {"mean": statistics.fmean(pairs), "standard_error": None if spread is None else spread / len(pairs) ** 0.5,
            "positive": sum(pair > 0 for pair in pairs), "seeds": len(pairs)}


def deviations_from_print(measured: float | None, measured_std: float | None, printed: float,
                          printed_std: float | None) -> float | None:
    """Return (measured - printed) in standard deviations of one run: the printed one, else the measured one.

    None where neither is known or it is 0: then a difference has no scale.
    """
    scale = printed_std or measured_std
    return None if measured is None or not scale else (measured - printed) / scale
