"""Networks of timm, weights to start from, frozen parts and a learning rate of the label layer alone."""
from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from shared.cli import UserError
from shared.distributed import World, sync_batchnorm
from shared.networks import TimmNetwork, freeze, label_layers, start_from, train_mode
from shared.training.batchnorm import GlobalBatchNorm
from tests.torchssl.tiny import TINY, call, checkpoint, learner_class
from TorchSSL import freematch, remixmatch
from TorchSSL.core.algorithm import frozen_batchnorm
from TorchSSL.core.networks import build_network
from TorchSSL.core.trainer import make_optimizer, train

DIGITS = tuple("0123456789")


def small(classes: int = 10, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_network("WideResNet", classes, depth=10, widen_factor=1, in_channels=1)


def save(net: torch.nn.Module, path: Path, **facts: object) -> str:
    torch.save({"ema_model": net.state_dict(), **facts}, path)
    return str(path)


# ---------------------------------------------------------------- networks of timm

@pytest.mark.parametrize("name, channels, size", [("test_resnet", 1, (8, 8)), ("test_efficientnet", 3, (32, 32)),
                                                  ("test_vit", 3, (32, 32)), ("test_vit", 1, (64, 64))])
def test_a_network_of_timm_gives_logits_features_and_quarter_turns(name: str, channels: int, size: tuple) -> None:
    net = build_network(f"timm:{name}", 5, in_channels=channels, size=size, rotation_head=True).eval()
    images = torch.randn(3, channels, *size)
    logits, turns = net(images)
    assert logits.shape == (3, 5) and turns.shape == (3, 4)
    torch.testing.assert_close(net(images, return_feature=True)[0], net.body(images))
    assert net.feature(images).shape == (3, net.rot_classifier.in_features)


@pytest.mark.parametrize("name, words", [
    ("timm:test_resnot", 'no network "test_resnot" (did you mean "test_resnet"?)'),
    ("timm:test_vit", "takes no images of 1x8x8"),
    ("timms:test_vit", "timm:NAME"),
])
def test_a_network_that_cannot_be_is_one_line(name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_network(name, 10, in_channels=1, size=(8, 8))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_learners_train_networks_of_timm_and_say_that_weights_are_random(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--net=timm:test_resnet", "--num_train_iter=2", "--num_eval_iter=2"]
    call(*flags[len(TINY):])
    assert "timm:test_resnet: random weights" in capsys.readouterr().out
    known = remixmatch.parse([flag for flag in flags if not flag.startswith("--ema_p")] + ["--save_name=turned"])
    train(known, learner_class(remixmatch))
    started = ["--net=timm:test_resnet", "--num_train_iter=2", "--num_eval_iter=2", "--save_name=again",
               "--pretrained=saved_models/tiny/latest_model.pth", "--freeze=backbone", "--head_lr=0.5"]
    call(*started)
    before, after = checkpoint(tmp_path), torch.load("saved_models/again/latest_model.pth", weights_only=True)
    changed = {name for name, value in before["ema_model"].items() if not torch.equal(after["model"][name], value)}
    assert changed == {"body.fc.weight", "body.fc.bias"}
    call(*started)
    assert "complete" in capsys.readouterr().out


def test_batch_norm_over_ranks_keeps_the_activation_of_fused_layers() -> None:
    net = TimmNetwork("test_efficientnet", 10, 3, (32, 32)).eval()
    images = torch.randn(4, 3, 32, 32)
    alone = net(images)
    converted = sync_batchnorm(net, World(size=2))
    assert isinstance(converted.body.bn1, GlobalBatchNorm)
    torch.testing.assert_close(converted.eval()(images), alone)


def test_norms_biases_and_position_embeddings_of_timm_do_not_decay() -> None:
    net = TimmNetwork("test_vit", 10, 3, (32, 32))
    options = freematch.parse(["--weight_decay=0.1", "--head_lr=0.5", "--lr=0.2"])
    groups = make_optimizer(net, options, label_layers(net, 10)).param_groups
    names = {id(value): name.removeprefix("body.") for name, value in net.named_parameters()}
    by = {(group["lr"], group["weight_decay"]): {names[id(value)] for value in group["params"]} for group in groups}
    assert by[0.5, 0.1] == {"head.weight"} and by[0.5, 0.0] == {"head.bias"}
    assert {"pos_embed", "cls_token", "norm.weight", "norm.bias"} <= by[0.2, 0.0]
    assert "blocks.0.attn.qkv.weight" in by[0.2, 0.1] and "blocks.0.attn.qkv.bias" in by[0.2, 0.0]


# ---------------------------------------------------------------- weights to start from

def test_all_weights_are_taken_and_mean_and_std_with_them(tmp_path: Path) -> None:
    there, net = small(seed=1), small()
    start = start_from(net, save(there, tmp_path / "a.pth", classes=DIGITS, mean=(0.25,), std=(0.5,)), DIGITS, 1)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in there.state_dict().items())
    assert (start.mean, start.std) == ((0.25,), (0.5,)) and "55 of 55 tensors taken" in start.note


@pytest.mark.parametrize("classes, facts", [(7, {}), (10, {"classes": tuple("abcdefghij")})])
def test_other_classes_get_a_fresh_label_layer(tmp_path: Path, classes: int, facts: dict) -> None:
    there, net = small(classes, 1), small()
    before = net.fc.weight.detach().clone()
    start = start_from(net, save(there, tmp_path / "a.pth", **facts), DIGITS, 1)
    assert torch.equal(net.fc.weight, before) and torch.equal(net.conv1.weight, there.conv1.weight)
    assert "53 of 55 tensors taken; a fresh label layer (fc.weight, fc.bias)" in start.note


@pytest.mark.parametrize("prefix", ["", "module.", "encoder_q."])
def test_safetensors_and_wrapped_weights_of_timm_are_taken(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(1)
    there = timm.create_model("test_vit", num_classes=3, in_chans=3, img_size=(64, 64))
    save_file({prefix + name: value for name, value in there.state_dict().items()}, tmp_path / "a.safetensors")
    net = TimmNetwork("test_vit", 10, 1, (32, 32))  # gray, and of another size
    start = start_from(net, str(tmp_path / "a.safetensors"), DIGITS, 1)
    assert torch.equal(net.body.blocks[0].attn.qkv.weight, there.blocks[0].attn.qkv.weight)
    torch.testing.assert_close(net.body.patch_embed.proj.weight, there.patch_embed.proj.weight.sum(1, keepdim=True))
    assert len(start.mean) == 1 and "a fresh label layer (body.head.weight, body.head.bias)" in start.note


def unfit_files(folder: Path) -> dict[str, tuple[str, str]]:
    odd = small()
    odd.conv1.weight.data[0, 0, 0, 0] = float("nan")
    (folder / "text.pth").write_text("hello")
    (folder / "text.safetensors").write_text("hello")
    other = build_network("WideResNet", 10, depth=10, widen_factor=2, in_channels=1)
    return {"missing": (str(folder / "no.pth"), "there is no file"),
            "text": (str(folder / "text.pth"), "text.pth"),
            "safetensors": (str(folder / "text.safetensors"), "not a readable .safetensors file"),
            "not finite": (save(odd, folder / "nan.pth"), "not finite"),
            "wider": (save(other, folder / "wide.pth"), "the weights of another network"),
            "nothing": (save(torch.nn.Linear(2, 2), folder / "linear.pth"), "no tensor of it has a name of this one"),
            "other timm": ("timm:test_resnet", "needs --net timm:test_resnet")}


@pytest.mark.parametrize("case", ["missing", "text", "safetensors", "not finite", "wider", "nothing", "other timm"])
def test_an_unfit_file_is_one_line_and_changes_nothing(tmp_path: Path, case: str) -> None:
    source, words = unfit_files(tmp_path)[case]
    net = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        start_from(net, source, DIGITS, 1)
    assert words in str(caught.value) and "\n" not in str(caught.value) and source in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ---------------------------------------------------------------- frozen parts

def test_frozen_parts_keep_weights_and_batch_statistics() -> None:
    net = small()
    freeze(net, "conv1,block1", 10)
    train_mode(net)
    with frozen_batchnorm(net):
        assert not net.block1.training and net.block2.training
    assert not net.block1.training and net.block2.training
    kept, moved = net.block1.layer[0].bn1.running_mean.clone(), net.block3.layer[0].bn2.running_mean.clone()
    net(torch.randn(8, 1, 8, 8)).sum().backward()
    assert torch.equal(net.block1.layer[0].bn1.running_mean, kept)
    assert not torch.equal(net.block3.layer[0].bn2.running_mean, moved)
    assert net.conv1.weight.grad is None and net.fc.weight.grad is not None


def test_backbone_is_all_but_the_label_layer_of_any_network() -> None:
    for net in (small(), TimmNetwork("test_resnet", 10, 3, (32, 32)), TimmNetwork("test_vit", 10, 3, (32, 32)),
                build_network("squeezenet1_1", 10, net_from_name=True)):
        head, = label_layers(net, 10)
        freeze(net, "backbone", 10)
        learning = {name for name, value in net.named_parameters() if value.requires_grad}
        assert learning == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize("parts, words", [("blok1", '(did you mean "block1"?)'),
                                          ("conv1,block1,block2,block3,bn1,fc", "nothing would be left to learn")])
def test_parts_that_cannot_be_frozen_are_one_line(parts: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        freeze(small(), parts, 10)
    assert words in str(caught.value)
