"""Labelled sets and streams: Python's own shuffles, without keeping them all in memory."""
from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest

from MetaSemi.core.data import Stream, shuffle, split, streams


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 8, 9, 63, 64, 65, 1000])
def test_shuffle_is_that_of_python(count: int) -> None:
    ours, theirs = list(range(count)), list(range(count))
    one, two = random.Random(count), random.Random(count)
    for _ in range(3):
        shuffle(ours, one.getrandbits)
        two.shuffle(theirs)
    assert ours == theirs and one.getstate() == two.getstate()


def original(targets: np.ndarray, per_class: int, steps: int, size: int, seed: int) -> tuple[list[int], ...]:
    """Do it the plain way: everything as lists, made up front."""
    random.seed(seed)
    order = list(range(len(targets)))
    random.shuffle(order)
    counts, labeled, unlabeled = [0] * (max(targets) + 1), [], []
    for index in order:
        if counts[targets[index]] < per_class:
            counts[targets[index]] += 1
            labeled.append(index)
        else:
            unlabeled.append(index)
    found = [list(labeled), list(unlabeled)]
    for values in (labeled, unlabeled):
        stream: list[int] = []
        for _ in range(steps * size // len(values) + 1):
            random.shuffle(values)
            stream += values
        found.append(stream[:steps * size])
    return tuple(found)


@pytest.mark.parametrize("seed, per_class, steps, size", [(1, 3, 10, 7), (2, 5, 20, 10), (3, 30, 3, 50)])
def test_split_and_streams_are_those_of_the_plain_way(seed: int, per_class: int, steps: int, size: int) -> None:
    targets = np.random.default_rng(seed).integers(0, 4, 200)
    wanted = original(targets, per_class, steps, size, seed)
    rng = random.Random(seed)
    labeled, unlabeled = split(targets, per_class, rng)
    found = [labeled.tolist(), unlabeled.tolist()]
    for stream in streams(labeled, unlabeled, steps * size, rng):
        found.append([int(index) for step in range(steps) for index in stream.take(step * size, size)])
    assert found == list(wanted)


def test_stream_at_the_published_length_needs_little_memory() -> None:
    """51.2 million positions: one permutation at a time, wherever the run is."""
    stream = Stream(range(4000), 400_000 * 128, random.Random(0))
    tracemalloc.start()
    for step in range(300):
        assert len(stream.take(step * 128, 128)) == 128
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.epochs == 12_801 and peak < 1_000_000


def test_stream_does_not_go_back() -> None:
    stream = Stream(range(10), 100, random.Random(0))
    stream.take(30, 10)
    with pytest.raises(ValueError, match="cannot go back"):
        stream.take(0, 10)
