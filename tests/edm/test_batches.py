"""Batches of training images: the same whatever serves them and however many processes share them."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from EDM.training.dataset import Batches, InfiniteOrder, TrainingSet
from shared.distributed import World

SIZE, BATCH, STEPS = 13, 8, 6


def training_set(labels: str) -> TrainingSet:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (SIZE, 3, 4, 4), dtype=np.uint8)
    raw = {"classes": np.arange(SIZE) % 3, "vectors": random.normal(size=(SIZE, 5)).astype(np.float32),
           "none": np.zeros((SIZE, 0), np.float32)}[labels]
    width = {"classes": 3, "vectors": 5, "none": 0}[labels]
    return TrainingSet(images, raw, np.tile(np.arange(SIZE), 2), np.repeat([False, True], SIZE), width, "set")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("labels", ["classes", "vectors", "none"])
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_a_batch_is_the_next_items_of_the_order(ranks, labels, reads_ahead):
    dataset = training_set(labels)
    order = InfiniteOrder(len(dataset), seed=1).take(0, STEPS * BATCH)
    for rank in range(ranks):
        batches = Batches(dataset, InfiniteOrder(len(dataset), seed=1), BATCH, World(rank, ranks))
        if reads_ahead:
            batches._thread = ThreadPoolExecutor(1)
        for step in (0, 1, 2, 3, 5, 4):  # also out of turn
            batch = batches(step * BATCH)
            items = [dataset[item] for item in order[step * BATCH:][:BATCH][rank::ranks]]
            pixels = torch.from_numpy(np.stack([image for image, _ in items]))
            assert torch.equal(batch.images, pixels.float() / 127.5 - 1)
            assert np.array_equal(batch.labels.numpy(), np.stack([label for _, label in items]))
            assert batch.places.tolist() == list(range(rank, BATCH, ranks))


def test_the_order_visits_every_item_about_equally():
    counts = np.bincount(InfiniteOrder(50, seed=0).take(0, 50 * 200), minlength=50)
    assert counts.min() > 150 and counts.max() < 250


def test_the_order_can_start_anywhere():
    whole = InfiniteOrder(9, seed=4).take(0, 400)
    assert np.array_equal(InfiniteOrder(9, seed=4).take(317, 40), whole[317:357])
    order = InfiniteOrder(9, seed=4)
    order.take(300, 50)
    assert np.array_equal(order.take(20, 30), whole[20:50])


def test_the_order_of_another_set_starts_anew():
    state = InfiniteOrder(9, seed=4)
    state.take(0, 20)
    order = InfiniteOrder(10, seed=4)
    order.load_state_dict(state.state_dict())
    assert np.array_equal(order.take(0, 30), InfiniteOrder(10, seed=4).take(0, 30))
