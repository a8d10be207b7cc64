"""The classifiers: variants, names, layouts, what is computed and what is not."""
from __future__ import annotations

import copy
import socket

import pytest
import torch
import torchvision
from torch.nn import functional as F

from shared.cli import UserError
from shared.distributed import World, sync_batchnorm
from TorchSSL.core.networks import (
    ResNet50,
    WideBlock,
    WideResNet,
    WideResNetVar,
    build_network,
    first_stride_for,
    unused_parameters,
)


def small(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network("WideResNet", 5, depth=10, **{"widen_factor": 2, **options})


def gradients(net: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    net(images).float().logsumexp(1).sum().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def test_blocks_of_the_three_kinds() -> None:
    net = small()
    used = {name: block.pre_activate for name, block in net.named_modules() if isinstance(block, WideBlock)}
    assert used == {"block1.layer.0": True, "block2.layer.0": False, "block3.layer.0": False}
    x = torch.randn(2, 16, 8, 8)
    block = net.block1.layer[0].eval()
    activated = F.leaky_relu(block.bn1(x), 0.1)
    branch = block.conv2(F.leaky_relu(block.bn2(block.conv1(activated)), 0.1))
    torch.testing.assert_close(block(x), block.convShortcut(activated) + branch)
    x = torch.randn(2, 32, 8, 8)
    block = net.block2.layer[0].eval()
    branch = block.conv2(F.leaky_relu(block.bn2(block.conv1(x)), 0.1))
    torch.testing.assert_close(block(x), block.convShortcut(x) + branch)


def test_unused_batch_norm_costs_nothing() -> None:
    net = small()
    for name in unused_parameters(net):
        net.get_parameter(name).data.fill_(float("nan"))
    images = torch.randn(4, 3, 16, 16)
    gradients(net, images)
    assert net(images).isfinite().all()
    assert [name for name, p in net.named_parameters() if p.grad is None] == unused_parameters(net)
    assert net.block2.layer[0].bn1.num_batches_tracked == 0 and net.block1.layer[0].bn1.num_batches_tracked == 2


def test_data_parallel_does_not_wait_for_unused_parameters() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        store = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        net = sync_batchnorm(small(), World(0, 2))
        for inner in (net, copy.deepcopy(net), torch.compile(net, backend="eager")):
            wrapped = torch.nn.parallel.DistributedDataParallel(inner)
            for _ in range(3):  # a parameter that is waited for makes the second step fail
                gradients(wrapped, torch.randn(4, 3, 16, 16))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name, size", [("WideResNet", 32), ("WideResNetVar", 32), ("ResNet50", 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_feature_and_rotation(name: str, size: int, channels: int) -> None:
    torch.manual_seed(0)
    net = build_network(name, 5, depth=10, rotation_head=True, in_channels=channels).eval()
    images = torch.randn(2, channels, size, size)
    logits, rotation = net(images)
    again, feature = net(images, return_feature=True)
    assert logits.shape == (2, 5) and rotation.shape == (2, 4) and torch.equal(logits, again)
    torch.testing.assert_close(net.rot_classifier(feature), rotation)
    plain = build_network(name, 5, depth=10, in_channels=channels)
    assert plain(images).shape == (2, 5)
    assert set(net.state_dict()) - set(plain.state_dict()) == {"rot_classifier.weight", "rot_classifier.bias"}


def test_digits_network() -> None:
    net = build_network("WideResNet", 10, depth=10, widen_factor=1, in_channels=1, bn_momentum=0.01)
    assert [net.conv1.out_channels, net.block1.layer[0].conv2.out_channels, net.block2.layer[0].conv2.out_channels,
            net.block3.layer[0].conv2.out_channels] == [16, 16, 32, 64]
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert {layer.momentum for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)} == {0.01}


def test_same_weights_as_torchvision_give_the_same_resnet50() -> None:
    torch.manual_seed(0)
    ours = ResNet50(7).eval()
    theirs = torchvision.models.resnet50(num_classes=7).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("options", [{}, {"first_stride": 2}, {"widen_factor": 1}])
def test_channels_last_gives_the_same_numbers(options: dict[str, int]) -> None:
    # In float64, where the order of sums does not show.
    net, images = small(**options).double(), torch.randn(6, 3, 16, 16).double()
    plain = gradients(net, images)
    last = gradients(net.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain)


def test_autocast_in_bfloat16() -> None:
    net, images = small(), torch.randn(16, 3, 16, 16)
    exact = gradients(net, images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(net, images)
    assert all(gradient.dtype == torch.float32 for gradient in rough)
    a, b = torch.cat([g.flatten() for g in exact]), torch.cat([g.flatten() for g in rough])
    assert F.cosine_similarity(a, b, dim=0) > 0.98


def test_dropout_only_in_training() -> None:
    net, images = small(dropout=0.5), torch.randn(2, 3, 16, 16)
    net.eval()
    assert torch.equal(net(images), net(images))
    net.train()
    assert not torch.equal(net(images), net(images))


def test_leaky_slope_is_honoured() -> None:
    images = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(small().eval()(images), small(leaky_slope=0.3).eval()(images))
    assert small(leaky_slope=0.0)(images).isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "googlenet"])
def test_torchvision_constructors(name: str) -> None:
    net = build_network(name, 7, net_from_name=True, bn_momentum=0.02)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert {layer.momentum for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)} == {0.02}


@pytest.mark.parametrize("arguments, words", [
    ({"name": "WideResnet"}, ['"WideResNet"', "did you mean"]),
    ({"name": "resnet18"}, ["net_from_name"]),
    ({"name": "resnet_18", "net_from_name": True}, ['"resnet18"', "did you mean"]),
    ({"name": "resnet18", "net_from_name": True, "in_channels": 1}, ["3 channels"]),
    ({"name": "resnet18", "net_from_name": True, "rotation_head": True}, ["rotation"]),
    ({"name": "WideResNet", "depth": 27}, ["depth", "27"]),
    ({"name": "WideResNet", "depth": 4}, ["depth", "4"]),
    ({"name": "WideResNet", "widen_factor": 1, "first_stride": 2}, ["widen_factor"]),
])
def test_networks_that_do_not_exist(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_network(num_classes=10, **arguments)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("dataset, stride", [("stl10", 2), ("STL10", 2), ("data/stl10", 2), ("cifar10", 1),
                                             ("data/castles", 1), ("digits", 1)])
def test_first_stride(dataset: str, stride: int) -> None:
    assert first_stride_for(dataset) == stride


def test_published_sizes() -> None:
    def parameters(net: torch.nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    with torch.device("meta"):
        assert parameters(WideResNet(10)) == 1_469_642
        assert parameters(WideResNet(100, widen_factor=8)) == 23_409_092
        assert parameters(WideResNetVar(10, first_stride=2)) == 5_933_770
        assert parameters(ResNet50(10)) == 23_528_522
