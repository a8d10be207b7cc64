"""Detectors from files of weights: the same features as torch-fidelity's, nothing run, one line for every mistake."""
import os
import pickle
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import inception_v3

from EDM.metrics import detectors
from EDM.metrics.detectors import build_dinov2, load_detector, preprocess
from shared.cli import UserError
from tests.edm.scored_images import write_classifier

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*not the published Inception file")  # they are random


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights of the real network (torchvision has its layout), drawn at random but of ordinary size."""
    torch.manual_seed(0)
    net = inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for name, tensor in net.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
    path = tmp_path_factory.mktemp("weights") / detectors.INCEPTION_FILES[0]
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def dinov2_state():
    """Weights under the published names, for images of 518 x 518, drawn at random but of ordinary size."""
    net = VisionTransformer(img_size=518, patch_size=14, embed_dim=128, depth=2, num_heads=2, init_values=1.0,
                            num_classes=0)
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    return {**net.state_dict(), "mask_token": torch.zeros(1, 128)}


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """A machine on which no weights have been put anywhere."""
    monkeypatch.setattr(detectors, "asset_folders", lambda: [tmp_path / "assets", tmp_path / "hub"])
    return tmp_path / "assets"


def images(size: int = 32, count: int = 2, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


class TestInception:
    def test_is_that_of_torch_fidelity(self, inception_file):
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(inception_file))
        with pytest.warns(UserWarning, match="not the published Inception file"):
            ours = load_detector(str(inception_file), CPU)
        features, logits = ours(images())
        assert features.abs().mean() > 0.01
        assert all(torch.equal(a, b) for a, b in zip(theirs(images()), (features, logits), strict=True))
        assert (ours.num_features, ours.num_logits, ours.channels) == (2048, 1008, 3) == \
            (features.shape[1], logits.shape[1], 3)
        assert ours.kind == "inception" and "TF1" in ours.resize and len(ours.sha256) == 64

    def test_is_found_by_name(self, inception_file, monkeypatch):
        monkeypatch.setenv("FEWLABEL_ASSETS", str(inception_file.parent))
        assert load_detector("inception", CPU).file == str(inception_file)

    def test_its_resize_is_that_of_tensorflow_1(self):
        """Pixel i of the result lies at i * in / out of the source, without a shift by half a pixel."""
        source = images().double()
        at = torch.arange(299, dtype=torch.float64) * (32 / 299)
        low, weight = at.long(), at % 1
        high = (low + 1).clamp(max=31)
        columns = source[..., low] * (1 - weight) + source[..., high] * weight
        expected = columns[:, :, low] * (1 - weight[:, None]) + columns[:, :, high] * weight[:, None]
        theirs = interpolate_bilinear_2d_like_tensorflow1x(images().float(), size=(299, 299), align_corners=False)
        torch.testing.assert_close(theirs.double(), expected, rtol=0, atol=1e-3)

    def test_weights_of_another_network(self, inception_file, tmp_path):
        state = torch.load(inception_file, weights_only=True)
        state["fc.weight"] = state["fc.weight"][:1000]
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(UserError, match="does not fit Inception-v3 .*fc.weight"):
            load_detector(str(tmp_path / "other.pth"), CPU)


class TestDinov2:
    def test_is_that_of_torch_fidelity(self, dinov2_state, tmp_path, monkeypatch):
        torch.save(dinov2_state, tmp_path / "dinov2.pth")
        ours = load_detector(str(tmp_path / "dinov2.pth"), CPU)
        monkeypatch.setattr(torch.hub, "load", lambda *_: build_dinov2(dinov2_state, ""))
        theirs = FeatureExtractorDinoV2("dinov2-vit-s-14", ["dinov2"])
        same_size = images(224)  # no resize, in which the two differ
        torch.testing.assert_close(ours(same_size)[0], theirs(same_size)[0], rtol=1e-4, atol=1e-4)
        assert ours(images())[0].shape == (2, 128) and ours(images())[1] is None
        assert (ours.kind, ours.num_features, ours.num_logits) == ("dinov2", 128, 0)

    @pytest.mark.parametrize("size", [(32, 32), (224, 224), (100, 300)])
    def test_its_resize_is_that_of_pillow(self, size):
        import numpy as np
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        expected = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        ours = preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
        mean, std = torch.tensor(detectors.DINOV2_MEAN), torch.tensor(detectors.DINOV2_STD)
        grey = ((ours * std + mean) * 255).round().numpy().astype(int)
        assert abs(grey - expected).max() <= 1 and (grey != expected).mean() < 0.01

    def test_positions_of_the_training_are_resampled(self, dinov2_state):
        net, table = build_dinov2(dinov2_state, ""), dinov2_state["pos_embed"]
        assert net.pos_embed.shape == (1, 1 + 16 * 16, 128)
        assert torch.equal(net.pos_embed[:, 0], table[:, 0])
        flat = torch.cat([table[:, :1], torch.full_like(table[:, 1:], 0.5)], 1)
        resampled = build_dinov2({**dinov2_state, "pos_embed": flat}, "").pos_embed
        torch.testing.assert_close(resampled[:, 1:], torch.full((1, 256, 128), 0.5))

    def test_a_variant_with_registers(self, dinov2_state, tmp_path):
        torch.save({**dinov2_state, "register_tokens": torch.zeros(1, 4, 128)}, tmp_path / "registers.pth")
        with pytest.raises(UserError, match="not served .register_tokens"):
            load_detector(str(tmp_path / "registers.pth"), CPU)


class TestClassifier:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_gives_features_and_logits(self, tmp_path, channels):
        detector = load_detector(str(write_classifier(tmp_path / "classifier.pth", channels)), CPU)
        features, logits = detector(images(8, channels=channels))
        assert features.shape == (2, detector.num_features) and logits.shape == (2, detector.num_logits) == (2, 5)
        assert (detector.kind, detector.resize, detector.channels) == ("classifier", "none", channels)

    def test_a_checkpoint_that_does_not_say_what_it_is(self, tmp_path):
        file = write_classifier(tmp_path / "classifier.pth")
        content = torch.load(file, weights_only=True)
        torch.save({name: content[name] for name in ("ema_model", "mean", "std")}, file)
        with pytest.raises(UserError, match="no checkpoint of a TorchSSL run"):
            load_detector(str(file), CPU)


class TestFiles:
    @pytest.mark.parametrize(("name", "download", "advice"), [
        ("inception", False, "give --download"), ("inception", None, "fetch https://"),  # None: there is no such flag
        ("dinov2", False, "fetch https://")])
    def test_absent_weights_are_never_fetched_unasked(self, no_weights, monkeypatch, name, download, advice):
        monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("fetched unasked"))
        with pytest.raises(UserError, match=f"no {name} weights here; {advice}"):
            load_detector(name, CPU, download)

    def test_download_checks_the_hash(self, no_weights, monkeypatch, inception_file):
        asked = {}

        def fetch(url: str, target: str, hash_prefix: str) -> None:
            asked.update(url=url, hash_prefix=hash_prefix)
            Path(target).symlink_to(inception_file)

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        assert load_detector("inception", CPU, download=True).file == str(no_weights / detectors.INCEPTION_FILES[0])
        assert asked["hash_prefix"] and f"-{asked['hash_prefix']}.pth" in asked["url"]
        asked.clear()
        load_detector("inception", CPU, download=True)
        assert not asked, "fetched although it was there"

    def test_a_download_that_fails(self, no_weights, monkeypatch):
        def fetch(*_, **__):
            raise RuntimeError('invalid hash value (expected "6726825d", got "00")')

        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        with pytest.raises(UserError, match="--download: cannot fetch https://.*invalid hash"):
            load_detector("inception", CPU, download=True)
        with pytest.raises(UserError, match="no checksum of the dinov2 weights"):
            load_detector("dinov2", CPU, download=True)

    def test_a_file_that_is_not_there(self):
        with pytest.raises(UserError, match="--detector: nowhere.pth is no file; expected inception, dinov2 or a file"):
            load_detector("nowhere.pth", CPU)

    def test_another_file_of_tensors(self, tmp_path):
        torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
        with pytest.raises(UserError, match="holds neither Inception-v3 nor DINOv2 .*it has weight"):
            load_detector(str(tmp_path / "other.pth"), CPU)

    def test_a_hostile_file_runs_nothing(self, tmp_path):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"Mixed_7c.branch_pool.conv.weight": Hostile()}, tmp_path / "hostile.pth")
        (tmp_path / "detector.pkl").write_bytes(pickle.dumps(Hostile()))
        for name, message in (("hostile.pth", "refused"), ("detector.pkl", "in the form of a program")):
            with pytest.raises(UserError, match=message):
                load_detector(str(tmp_path / name), CPU)
        assert not (tmp_path / "ran").exists()
