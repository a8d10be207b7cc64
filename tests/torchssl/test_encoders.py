"""Frozen encoders, their features, and the few-label classifier."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from shared.cli import UserError
from shared.data.images import ImageSet
from shared.data.photographs import STD, PhotographSet, list_photographs, list_unlabeled
from tests.golden.cases import fill
from TorchSSL.encoders.classifier import Classifier, fit, prepared, read_classifier
from TorchSSL.encoders.encoder import CentralView, Encoder, open_encoder
from TorchSSL.encoders.features import decoded, features_of, read_features
from TorchSSL.encoders.vit import VisionTransformer

ARCHITECTURE = dict(img_size=32, patch_size=16, embed_dim=192, depth=2, num_heads=3, mlp_ratio=4)


@pytest.fixture
def net() -> VisionTransformer:
    return fill(VisionTransformer(**ARCHITECTURE)).eval()


def checkpoint(net: VisionTransformer, path: Path, **changes: torch.Tensor | None) -> Path:
    """Write a checkpoint of MSN; changes: tensors in place of the net's, None for a missing one."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    state = {**net.state_dict(), "fc.fc1.weight": torch.zeros(1), **changes}
    state = {f"module.{name}": value for name, value in state.items() if value is not None}
    torch.save({"target_encoder": state, "epoch": 3}, path)
    return path


def hugging_face(net: VisionTransformer, folder: Path) -> Path:
    """Write a folder with model.safetensors and config.json as ViTMSNModel has them."""
    folder.mkdir()
    tensors = {}
    for name, value in net.state_dict().items():
        for ours, theirs in (("blocks.", "encoder.layer."), ("norm1.", "layernorm_before."),
                             ("mlp.fc2", "output.dense"),
                             ("norm2.", "layernorm_after."), ("attn.proj", "attention.output.dense"),
                             ("mlp.fc1", "intermediate.dense"), ("cls_token", "embeddings.cls_token"),
                             ("pos_embed", "embeddings.position_embeddings"),
                             ("patch_embed.proj", "embeddings.patch_embeddings.projection")):
            name = name.replace(ours, theirs)
        name = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                tensors[name.replace("attn.qkv", f"attention.attention.{part}")] = rows.contiguous()
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    return folder


def photographs(folder: Path, count: int = 3) -> PhotographSet:
    """Make `count` photographs of each of two classes, whose files have the same names."""
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(ord(label[0]) + number).integers(70, 180, (40 + number, 50, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{number}.png")
    return list_photographs(folder)


def digits(count: int = 5) -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 1, 8, 8)).astype(np.uint8)
    return ImageSet(pixels, np.arange(count) % 2, ("a", "b"), "few")


# ------------------------------------------------------------------------------------------------------------ encoders

def test_both_layouts_are_the_same_encoder(net, tmp_path):
    images = torch.rand(2, 3, 32, 32)
    for file in (checkpoint(net, tmp_path / "msn.pth.tar"), hugging_face(net, tmp_path / "hf")):
        encoder = open_encoder(file)
        torch.testing.assert_close(encoder(images), net.features(images), rtol=0, atol=0)
        assert encoder.fingerprint == Encoder("any", net, encoder.view).fingerprint


@pytest.mark.parametrize("changes, message", [
    ({"blocks__1__norm1__weight": None}, "the tensor blocks.1.norm1.weight is missing"),
    ({"norm__bias": torch.zeros(3)}, r"norm.bias has the shape \[3\], expected \[192\]"),
    ({"norm__bias": torch.full((192,), torch.nan)}, "norm.bias holds numbers that are not finite"),
    ({"head__weight": torch.zeros(3)}, "holds head.weight, which is not part of the encoder"),
    ({"pos_embed": None}, "holds no vision transformer of MSN"),
])
def test_damaged_encoders_are_refused(net, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_encoder(checkpoint(net, tmp_path / "msn.pth.tar", **changes))


@pytest.mark.parametrize("name, message", [
    ("deit_base_p4", r"width 192 with 2 blocks and patches of 16, not deit_base_p4, which has width 768"),
    ("deit_bse", r"unknown encoder 'deit_bse' \(did you mean \"deit_base\"\?\)"),
])
def test_an_encoder_of_another_name_is_refused(net, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        open_encoder(checkpoint(net, tmp_path / "msn.pth.tar"), name)


@pytest.mark.parametrize("name, message", [
    ("timm:test_vitt", 'did you mean "test_vit"'), ("absent.pth", "no such encoder"),
    ("timm:test_vit@absent.pth", "no weights can be read")])
def test_encoders_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=message):
        open_encoder(name)


def test_networks_of_timm(tmp_path):
    with pytest.warns(UserWarning, match="random weights; give timm:test_vit@pretrained"):
        random = open_encoder("timm:test_vit")
    images = digits()
    features = random.of_pixels(torch.from_numpy(images.images))
    assert features.shape == (5, random.width) and torch.isfinite(features).all()
    with pytest.warns(UserWarning):
        assert open_encoder("timm:test_vit").fingerprint == random.fingerprint
    torch.save({**random.net.state_dict(), "head.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    loaded = open_encoder(f"timm:test_vit@{tmp_path}/weights.pth")
    assert torch.equal(loaded.of_pixels(torch.from_numpy(images.images)), features)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold this network"):
        open_encoder(f"timm:test_vit@{tmp_path}/other.pth")


# ------------------------------------------------------------------------------------------------------------ features

def test_features_are_computed_once_and_read_memory_mapped(net, tmp_path, capsys):
    encoder, source = open_encoder(checkpoint(net, tmp_path / "msn.pth.tar")), photographs(tmp_path / "images")
    made = features_of(source, encoder, tmp_path / "f.pth", batch=4)
    assert made.names == [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(3)]
    assert made.classes == ("cat", "dog") and made.labels.tolist() == [0, 0, 0, 1, 1, 1]
    again = features_of(source, encoder, tmp_path / "f.pth")
    assert capsys.readouterr().out.count("complete") == 1 and np.array_equal(again.values, made.values)
    alone = features_of(source.subset([4]), encoder, tmp_path / "one.pth")
    np.testing.assert_allclose(alone.values[0], made.values[4], atol=1e-5)
    unknown = features_of(list_unlabeled(tmp_path / "images"), encoder, tmp_path / "u.pth")
    assert np.array_equal(unknown.values, made.values) and (unknown.labels == -1).all()


def test_features_of_something_else_are_refused(net, tmp_path):
    encoder, file = open_encoder(checkpoint(net, tmp_path / "msn.pth.tar")), tmp_path / "f.pth"
    features_of(digits(), encoder, file)
    with pytest.raises(UserError, match="holds features of other images; give --overwrite"):
        features_of(digits(6), encoder, file)
    with torch.no_grad():
        net.norm.bias += 1
    other = Encoder("other", net, encoder.view)
    with pytest.raises(UserError, match="holds features of another encoder"):
        features_of(digits(), other, file)
    features_of(digits(6), encoder, file, overwrite=True)
    assert len(read_features(file)) == 6
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cut short or not a file of features"):
        features_of(digits(6), encoder, file)


def test_an_interrupted_call_is_continued(net, tmp_path, monkeypatch):
    encoder, file = open_encoder(checkpoint(net, tmp_path / "msn.pth.tar")), tmp_path / "f.pth"
    seen, compute = [], VisionTransformer.features

    def counted(self, images, *rest):
        if len(seen) == 2:
            seen.append(0)
            raise KeyboardInterrupt
        seen.append(len(images))
        return compute(self, images, *rest)

    monkeypatch.setattr(VisionTransformer, "features", counted)
    with pytest.raises(KeyboardInterrupt):
        features_of(digits(7), encoder, file, batch=2)
    made = features_of(digits(7), encoder, file, batch=2)
    assert seen == [2, 2, 0, 2, 1]
    monkeypatch.undo()
    assert np.array_equal(made.values, features_of(digits(7), encoder, tmp_path / "whole.pth", batch=2).values)


def test_a_photograph_that_cannot_be_read_is_named(net, tmp_path):
    source = photographs(tmp_path / "images")
    (tmp_path / "images/dog/1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"dog/1\.png"):
        features_of(source, open_encoder(checkpoint(net, tmp_path / "msn.pth.tar")), tmp_path / "f.pth")


@pytest.mark.parametrize("view", [CentralView(20, 24), CentralView(20, 22, "bicubic")])
def test_dali_and_pillow_agree(tmp_path, view):
    pytest.importorskip("nvidia.dali")
    source = photographs(tmp_path / "images")
    one, two = (torch.cat(list(decoded(source, view, [np.arange(4), np.arange(4, 6)], torch.device("cpu"), 2, decoder)))
                for decoder in ("torchvision", "dali"))
    assert one.shape == two.shape == (6, 3, 20, 20)
    assert float((one - two).abs().max()) <= 1.01 / 255 / min(STD)


# ---------------------------------------------------------------------------------------------------------- classifier

@pytest.mark.parametrize("classes, rows", [(2, 9), (6, 60), (6, 6)])
def test_classifier_is_the_optimum_of_scikit_learn(classes, rows):
    rng = np.random.default_rng(classes + rows)
    labels = np.arange(rows) % classes
    values = (rng.standard_normal((classes, 12))[labels] + rng.standard_normal((rows, 12))).astype(np.float32)
    x = prepared(torch.from_numpy(values))
    ours = fit(x, torch.from_numpy(labels), classes).numpy()
    theirs = LogisticRegression(C=400 * (2 if classes == 2 else 1), fit_intercept=False, tol=1e-10,
                                max_iter=10000).fit(x, labels).coef_
    theirs = np.concatenate([-theirs / 2, theirs / 2]) if classes == 2 else theirs  # it fits one vector for two classes
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())
    np.testing.assert_allclose(ours.sum(0), 0, atol=1e-6)


def test_scores_of_a_classifier(tmp_path):
    weights = torch.eye(7, dtype=torch.float64)
    classifier = Classifier(weights, tuple("abcdefg"), encoder="some")
    values = np.eye(7, dtype=np.float32)
    labels = np.array([0, 1, 2, 3, 4, 0, 6])
    assert classifier.accuracy(values, labels) == {"top1": 6 / 7, "top5": 1.0}
    classifier.save(tmp_path / "c.pkl")
    found = read_classifier(tmp_path / "c.pkl", "some")
    assert torch.equal(found.weights, weights) and found.classes == classifier.classes
    with pytest.raises(UserError, match="features of another encoder"):
        read_classifier(tmp_path / "c.pkl", "other")
    (tmp_path / "c.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="no classifier of this program"):
        read_classifier(tmp_path / "c.pkl")
