"""The few-label classifier, the lists of images, and stages 1 and 3 from beginning to end."""
from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from EDM.imagenet import train_classifier
from EDM.imagenet.experiment.config import Config
from EDM.imagenet.experiment.images import labelled_images, training_images
from tests.golden.cases import each, facts, fill, number, serves, whole
from tests.golden.dpt_imagenet_cases import PAPER, bound, cases_of, given, near, tensors
from TorchSSL.encoders.classifier import Classifier, fit, label_and_probability, objective, prepared, read_classifier
from TorchSSL.encoders.features import read_features
from TorchSSL.encoders.vit import SIZES, VisionTransformer

CLASSIFIERS, PIPELINES = cases_of("classifier"), cases_of("pipeline")
LISTINGS, SUBSETS, SUBSET_FILES = cases_of("listing"), cases_of("label_subset"), cases_of("subset_files")
SERVES = serves(CLASSIFIERS, PIPELINES, LISTINGS, SUBSETS, SUBSET_FILES)
CONFIG = Path(train_classifier.__file__).with_name("configs") / "accelerate_b4_subset1_2img_k_128_large.py"


@each(CLASSIFIERS)
def test_classifier(case):
    stored, tolerance = tensors(case), case["tolerance"]
    rows, labels = prepared(stored["features"]), stored["labels"]
    assert float((rows - stored["rows"]).abs().max()) <= bound(tolerance["rows"])
    weights = fit(rows, labels, case["classes"], case["lambd"])
    value = float(objective(weights, rows, labels, case["lambd"])[0]) / len(rows)
    assert value <= case["objective_optimum"] * (1 + 1e-6)
    near(weights, stored["weights_optimum"], bound(tolerance["weights_optimum"]), "weights")
    classifier = Classifier(weights, tuple(map(str, range(case["classes"]))))
    predicted, _ = classifier.predict(stored["test_features"].numpy())
    assert np.array_equal(predicted, stored["predictions_optimum"])
    score = classifier.accuracy(stored["test_features"].numpy(), stored["test_labels"].numpy())["top1"]
    assert score == pytest.approx(case["test_score_optimum"])
    # As published, of raw features.
    labels, probabilities = label_and_probability(stored["test_features"] @ stored["weights_cyanure"].T)
    assert np.array_equal(labels, stored["pseudo_label"])
    allowed = number(tolerance["pseudo_probability"], ": #")
    assert float((probabilities - stored["pseudo_probability"]).abs().max()) <= allowed


def make_folder(root: Path, names: list[str]) -> Config:
    """Make empty files; nothing here decodes them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return Config(image_path=str(root))


@each(LISTINGS)
def test_listing(case, tmp_path):
    listed = facts(PAPER, case["file"])
    images = training_images(make_folder(tmp_path, [f"train/{name}" for name in listed["files"]]))
    assert images.names == [f"train/{name}" for name in listed["order"]]
    assert [images.classes[label] for label in images.labels] == listed["classes"]


@each(SUBSETS)
def test_label_subset(case, tmp_path):
    listed = facts(PAPER, case["file"])
    names = [name for name, _ in listed["samples"]] + [f"train/{name}/{name}_0.JPEG" for name in listed["folders"]]
    config, layout = make_folder(tmp_path, names), SimpleNamespace(subset=tmp_path / "list.txt")
    layout.subset.write_text(listed["text"])
    images = labelled_images(layout, training_images(config))
    assert [[name, label] for name, label in zip(images.names, images.labels.tolist(), strict=True)] == \
        listed["samples"]


@each(SUBSET_FILES)
def test_names_of_the_published_lists_are_read(case, tmp_path):
    names = {entry[end] for entry in facts(PAPER, case["file"]).values() for end in ("first", "last")}
    config = make_folder(tmp_path, [f"train/{name.partition('_')[0]}/{name}" for name in names])
    layout = SimpleNamespace(subset=tmp_path / "list.txt")
    layout.subset.write_text("\n".join(names))  # the last line need not end
    assert [Path(name).name for name in labelled_images(layout, training_images(config)).names] == list(names)


# ------------------------------------------------------------------------------------------------------------ pipeline

def picture(seed: int, c: int, height: int, width: int) -> Image.Image:
    """Return the image of a case's recipe."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:height, :width]
    planes = [127 + 100 * np.sin(xx / (6 + 9 * c) + rng.uniform(0, 6)),
              127 + 90 * np.cos(yy / (5 + 7 * c) + rng.uniform(0, 6)), 60 * c + xx * 80 / width]
    values = np.stack(planes, axis=-1) + rng.integers(-25, 26, (height, width, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def make_images(case: dict, generated: Path) -> None:
    """Write train, val and generated images below the current folder."""
    seed = case["first_seed"]
    height, width = (whole(case["files_recipe"], size) for size in (r"\+i, #x\d", r"\+i, \d+x#,"))
    for c, folder in enumerate(case["folders"]):
        for part, i in [("train", i) for i in range(case["train"])] + [("val", i) for i in range(case["val"])]:
            seed += 1
            image = picture(seed, c, case["height"][0] + case["height"][1] * i,
                            case["width"][0] + case["width"][1] * c)
            name = f"{folder}_{case['a'] * i + case['b']}" if part == "train" else f"ILSVRC2012_val_{seed:08d}"
            target = Path("images", part, folder, f"{name}.JPEG")
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target, "PNG")
        (generated / folder).mkdir(parents=True)
        for i in range(case["generated"]):
            picture(case["generated_seed"] + 10 * c + i, c, height, width).save(generated / folder / f"{i}.png")


@each(PIPELINES)
def test_pipeline(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = case["files_written"]
    file = next(found[1] for name in written if (found := re.search(r"/val-features-fnames-(.+)", name)))
    tag = next(found[1] for name in written if (found := re.search(r"train-features-fnames-(.+)-accelerate", name)))
    logs = [name for name in written if name.startswith("log")]
    features = next(name for name in written if "aug-" in name and name.endswith("features-label.pth.tar"))
    resolution, count = re.search(r"/(\d+)/aug-(\d+)-", features).groups()
    subset = Path(tag.replace("-", "/") + ".txt")
    subset.parent.mkdir(parents=True, exist_ok=True)
    subset.write_text(case["subset_text"])
    make_images(case, Path("assets/DPM", f"{case['model_name']}-{tag}", resolution, "samples_for_classifier",
                           f"aug_{count}_samples", "train"))
    net = fill(VisionTransformer(224, **SIZES[case["model_name"]]._asdict()))
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    Path("pretrained").mkdir()
    torch.save({"target_encoder": {**state, "module.fc.fc1.weight": torch.zeros(2, 2)}}, f"pretrained/{file}")

    flags = [f"--config={CONFIG}", "--config.image_path=images", f"--config.subset_path={subset}",
             f"--config.fname={file}", f"--config.model_name={case['model_name']}", f"--config.lambd={case['lambd']}",
             f"--config.resolution={resolution}", f"--config.augmentation_K={count}", "--device=cpu"]
    for name in train_classifier.FUNCTIONS:
        log = {"train_classifier_stage1": logs[:1], "train_classifier_stage3": logs[-1:]}.get(name, [])
        train_classifier.main([*flags, f"--func={name}", *(f"--config.output_path={path}" for path in log)])

    assert [name for name in written if not Path(name).exists()] == []
    stored, allowed = given(case), bound(case["tolerance"]["features"])
    everything = read_features(next(name for name in written if name.endswith("features-label-fnames.pth.tar")))
    labelled = read_features(next(name for name in written if "train-features" in name))
    test = read_features(next(name for name in written if "val-features" in name))
    generated = read_features(features)
    for found, kind in ((everything, "train"), (labelled, "labelled"), (test, "val"), (generated, "generated")):
        by_name = kind in ("train", "labelled")
        order = sorted(range(len(found)), key=lambda row, found=found, by_name=by_name: (
            found.names[row] if by_name else (found.labels[row], found.values[row, 0])))
        assert np.array_equal(found.labels[order], stored[f"{kind}_labels"])
        near(found.values[order], stored[f"{kind}_features"], allowed, kind)
    for kind, keys in case["keys"].items():
        path = {"all_features": "features-label-fnames", "labelled": "train-features", "val": "val-features",
                "generated": "features-label.pth"}[kind]
        content = torch.load(next(name for name in written if path in name), weights_only=True)
        assert set(keys) <= set(content)

    order = np.argsort(everything.names)
    predicted = np.load(next(name for name in written if name.endswith("preds.npy")))
    assert np.array_equal(predicted[order], stored["pseudo_labels"])
    raw = torch.from_numpy(everything.values[order]) @ torch.tensor(stored["stage1_weights"]).float().T
    difference = np.abs(label_and_probability(raw)[1].numpy() - stored["pseudo_probabilities"]).max()
    assert difference <= bound(case["tolerance"]["pseudo_probabilities"])
    for stage, parts in ((1, [labelled]), (3, [generated, labelled])):
        file = next(name for name in written if name.endswith(".pkl") and (f"-aug-{count}" in name) == (stage == 3))
        rows = torch.cat([prepared(torch.from_numpy(part.values)) for part in parts])
        labels = torch.from_numpy(np.concatenate([part.labels for part in parts]))
        ours, theirs = (float(objective(weights.double(), rows, labels, case["lambd"])[0]) for weights in (
            read_classifier(Path(file)).weights, torch.tensor(stored[f"stage{stage}_weights"])))
        assert ours <= theirs
        text = Path(logs[0 if stage == 1 else -1]).read_text()
        assert number(text, "train score: #") == pytest.approx(case[f"stage{stage}_train_score"])
        assert number(text, "test score: #") == pytest.approx(case[f"stage{stage}_test_score"])
