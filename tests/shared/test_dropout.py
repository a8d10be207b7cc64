"""Dropout whose masks are a function of seed, step, layer, image and element."""
from __future__ import annotations

import itertools

import pytest
import torch

from shared.training.randomness import Dropout, derived_dropout_keys, set_dropout_keys

P = 0.13
SHAPE = (8, 32, 32)


class Net(torch.nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.layers = torch.nn.ModuleList(Dropout(P) for _ in range(layers))


def dropped(net: Net, step: int = 0, places=range(16), seed: int = 0, dtype=torch.float32,
            layout=torch.contiguous_format) -> torch.Tensor:
    """Return which elements every layer drops: bool [layers, N, *SHAPE]."""
    set_dropout_keys(net, seed, step, places)
    ones = torch.ones([len(places), *SHAPE], dtype=dtype).contiguous(memory_format=layout)
    return torch.stack([layer(ones) == 0 for layer in net.layers])


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the correlation of two masks in units of its deviation between independent ones."""
    a, b = (mask.flatten().double() - P for mask in (a, b))
    return ((a * b).mean() / (P * (1 - P)) * len(a) ** 0.5).item()


def test_rate_and_scale():
    net = Net()
    rates = dropped(net).double().mean(dim=(2, 3, 4))
    deviation = (P * (1 - P) / torch.tensor(SHAPE).prod()).sqrt()
    assert ((rates - P).abs() < 4.5 * deviation).all()
    assert (rates.mean() - P).abs() < 4.5 * deviation / rates.numel() ** 0.5
    kept = net.layers[0](torch.ones(16, *SHAPE))
    assert torch.equal(kept.unique(), torch.tensor([0, 1 / (1 - P)]))


def test_layers_images_steps_and_seeds_are_independent():
    net = Net()
    masks = dropped(net)
    pairs = [(masks[a], masks[b]) for a, b in itertools.combinations(range(3), 2)]
    pairs += [(masks[0, a], masks[0, b]) for a, b in itertools.combinations(range(16), 2)]
    pairs += [(masks, dropped(net, step=1)), (masks, dropped(net, seed=1)),
              (dropped(net, step=1), dropped(net, step=2))]
    assert max(abs(correlation(a, b)) for a, b in pairs) < 5


@pytest.mark.parametrize("offset", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 2), (0, 1, 1), (4, 0, 0), (0, 16, 0)])
def test_neighbours_are_independent(offset):
    masks = torch.cat([dropped(Net(), step) for step in range(4)]).flatten(0, 1)
    here = masks[:, :SHAPE[0] - offset[0], :SHAPE[1] - offset[1], :SHAPE[2] - offset[2]]
    there = masks[:, offset[0]:, offset[1]:, offset[2]:]
    assert abs(correlation(here, there)) < 4.5


def test_counts_per_image_are_binomial():
    masks = torch.cat([dropped(Net(), step) for step in range(20)])
    counts = masks.flatten(2).sum(2).double().flatten()
    expected = P * (1 - P) * torch.tensor(SHAPE).prod()
    assert 0.8 < counts.var() / expected < 1.25  # 960 images: 5 deviations


def test_masks_belong_to_images_and_not_to_ranks():
    net = Net()
    whole = dropped(net, places=range(8))
    parts = [dropped(net, places=list(places)) for places in ((0, 2, 4, 6), (1, 3, 5, 7))]
    assert torch.equal(whole[:, ::2], parts[0]) and torch.equal(whole[:, 1::2], parts[1])


def test_masks_depend_neither_on_generators_nor_on_form():
    net = Net()
    torch.manual_seed(1)
    first = dropped(net)
    torch.manual_seed(2)
    assert torch.equal(first, dropped(net))
    assert torch.equal(first, dropped(net, dtype=torch.bfloat16))
    assert torch.equal(first, dropped(net, layout=torch.channels_last))
    compiled = torch.compile(net.layers[1], fullgraph=True, backend="aot_eager")
    assert torch.equal(first[1], compiled(torch.ones(16, *SHAPE)) == 0)


def test_gradient_passes_where_the_image_does():
    net = Net()
    set_dropout_keys(net, 0, 0, range(2))
    x = torch.randn(2, *SHAPE, requires_grad=True)
    out = net.layers[0](x)
    out.sum().backward()
    assert torch.allclose(x.grad * x, out)


def test_without_keys_it_is_pytorchs():
    layer, x = Dropout(P), torch.randn(4, *SHAPE)
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(x, P)
    torch.manual_seed(3)
    assert torch.equal(layer(x), expected)


def test_nothing_is_dropped_in_evaluation():
    net, x = Net().eval(), torch.randn(2, *SHAPE)
    set_dropout_keys(net, 0, 0, range(2))
    assert net.layers[0](x) is x


def test_derived_masks_are_those_of_row_and_tag():
    """Independent between tags, and from the masks they derive from, which come back afterwards."""
    net = Net()
    before = dropped(net)
    ones = torch.ones([6, *SHAPE])
    rows, tags = torch.tensor([0, 0, 0, 1, 1, 5]), torch.tensor([0, 1, 99, 0, 1, 1])
    with derived_dropout_keys(net, rows, tags):
        derived = torch.stack([layer(ones) == 0 for layer in net.layers])
    with derived_dropout_keys(net, rows[[4, 2]], tags[[4, 2]]):
        again = torch.stack([layer(ones[:2]) == 0 for layer in net.layers])
    assert torch.equal(again, derived[:, [4, 2]])
    assert abs(derived.float().mean() - P) < 0.01
    masks = [*derived.flatten(0, 1), *before[:, :2].flatten(0, 1)]
    assert max(abs(correlation(a, b)) for a, b in itertools.combinations(masks, 2)) < 5
    assert torch.equal(torch.stack([layer(torch.ones([16, *SHAPE])) == 0 for layer in net.layers]), before)


def test_layers_without_keys_stay_without_them():
    net = Net()
    with derived_dropout_keys(net, torch.tensor([0]), torch.tensor([1])):
        assert all(layer.keys is None for layer in net.layers)
