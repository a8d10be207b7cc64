"""From photographs to latents and from latents to PNGs: crops, order of rows, names of files, configurations; the
published sampling scripts' images; the Fréchet distance.
"""
from __future__ import annotations

import re

import numpy as np
import torch
from PIL import Image

from EDM.imagenet.experiment.config import Config, hparams, read_config
from EDM.imagenet.experiment.layout import Layout
from EDM.latent.extraction import centre_crop, published_rows, training_image
from EDM.latent.generation import Sampler, chunks, to_uint8
from EDM.latent.latents import drop_labels
from EDM.latent.schedules import ContinuousSchedule, DiscreteSchedule
from EDM.latent.uvit import UViT
from EDM.latent.vae import Coder, to_unit
from EDM.metrics.metrics import Moments, frechet_distance
from shared.data.photographs import list_photographs
from tests.golden.cases import arrays, each, facts, serves
from tests.golden.dpt_imagenet_cases import PAPER, bound, cases_of, filled, given, near, tensors
from tests.golden.dpt_imagenet_vae import published_vae
from tests.shared.programs import ROOT

CROPS, PIXELS, LISTINGS, DROPOUT = (cases_of(kind) for kind in ("centre_crop", "training_image", "listing",
                                                               "label_dropout"))
ROUNDING, FACTS, DISTANCES = cases_of("png_rounding"), cases_of("facts"), cases_of("frechet")
GENERATED = cases_of("generate")
SERVES = serves(CROPS, PIXELS, LISTINGS, DROPOUT, ROUNDING, FACTS, DISTANCES, GENERATED)


@each(CROPS)
def test_centre_crop(case):
    found = arrays(PAPER, case["file"])
    sources = sorted(key for key in case["arrays"] if key.endswith("/in"))
    for key, size in zip(sources, case["sizes"], strict=True):
        assert found[key].shape[:2] == (size["height"], size["width"])
        ours = np.asarray(centre_crop(Image.fromarray(found[key]), size["resolution"]))
        np.testing.assert_array_equal(ours, found[re.sub("in$", "out", key)], err_msg=key)


@each(PIXELS)
def test_training_image(case):
    source = Image.fromarray(arrays(PAPER, case["file"])[case["source"]])
    np.testing.assert_array_equal(training_image(source, case["resolution"]), given(case)["out"])


@each(LISTINGS)
def test_order_of_photographs(case, tmp_path):
    wanted = facts(PAPER, case["file"])
    for name in wanted["files"]:
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = list_photographs(tmp_path / "train")
    assert found.names == wanted["order"]
    assert [found.classes[label] for label in found.labels] == wanted["classes"]


@each(DROPOUT)
def test_label_dropout(case):
    known = facts(PAPER, case["file"])
    found = drop_labels(np.array(known["labels"]), np.array(known["draws"]), known["p_uncond"], known["none_label"])
    assert found.tolist() == known["result"]


@each(ROUNDING)
def test_png_rounding(case):
    stored = tensors(case)
    assert torch.equal(to_uint8(to_unit(stored["v"])), stored["bytes"])


@each(DISTANCES)
def test_frechet_distance(case):
    both = []
    for name in ("features1", "features2"):
        moments = Moments(given(case)[name].shape[1])
        moments.add(tensors(case)[name])
        both += moments.mean_and_covariance()
    assert abs(frechet_distance(*both) / case["value"] - 1) <= bound(case["tolerance"])


@each(FACTS)
def test_facts(case):
    known = facts(PAPER, case["file"])
    for text, sizes in known.get("amortize", {}).items():
        count, size = map(int, text.split(","))
        assert [len(part) for part in chunks(range(count), size)] == sizes
    for order in known.get("extraction_order", ()):
        images, mirrored = published_rows(order["images"], order["batch"])
        for name, kind in (("file_of_image", False), ("file_of_mirror", True)):
            rows = np.flatnonzero(mirrored == kind)
            assert rows[np.argsort(images[rows])].tolist() == order[name]
    for name, config in known.get("configs", {}).items():
        found = read_config(ROOT / "EDM/imagenet/configs" / f"{name}.py")
        assert plain(found) == config, name
    if "names" in known:
        names = known["names"]
        assert hparams([word for word in names["argv"] if word.startswith("--config.")]) == names["hparams"]


def plain(value):
    """Return nested values as JSON gives them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


@each(FACTS)
def test_names_of_files(case):
    for known in facts(PAPER, case["file"]).get("paths", ()):
        layout = Layout(Config(known, pretrained="pretrained/", dpm_path="assets/DPM", image_path=""))
        for name, path in known.items():
            if name == "generated":
                assert f"{layout.generated}/WNID/0.png" == path
            elif hasattr(layout, name):
                assert str(getattr(layout, name)) == path, name


@each(GENERATED)
def test_generated_images(case):
    stored = tensors(case)
    coder = Coder(published_vae(case))
    coder.scale = case["scale_factor"]
    schedule = DiscreteSchedule() if "discrete" in case["script"] else ContinuousSchedule()
    net = filled(UViT(**case["constructor"]))
    assert net.none_label == case["none_label"]
    sampler = Sampler(net, schedule, coder, tuple(stored["latents"].shape[2:]))
    per_class, batches = case["augmentation_K"], len(stored["latents"]) // len(case["classes"])
    pixels = []
    for number, (noise, reference) in enumerate(zip(stored["latents"], stored["samples"], strict=True)):
        labels = torch.full((len(noise),), case["classes"][number // batches])
        ours = sampler.latents(noise, labels, case["sample_steps"], case["scale"])
        near(ours, reference, bound(case["tolerance"]["samples"]), "samples")
        pixels.append(sampler.decode(ours).permute(0, 2, 3, 1))
    ours = torch.cat([torch.cat(pixels[start:start + batches])[:per_class]
                      for start in range(0, len(pixels), batches)]).int()
    difference = (ours - stored["pixels"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.005
    assert len(ours) == len(case["files"])
