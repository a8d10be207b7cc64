"""docs/own_images.md: its commands, as they are typed, on small photographs of unequal sizes."""
from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.shared.programs import ROOT, run

# What makes a command short, by its script; the encoder is one that needs no download.
SHORT = {"suggest_labels": ["--budget=6", "--encoder=timm:test_vit"],
         "dataset_tool": ["--resolution=16x16"],
         "freematch": ["--num_train_iter=6", "--depth=10", "--widen_factor=1", "--batch_size=4"],
         "audit_labels": ["--folds=2", "--num_train_iter=6"]}
CLASSES = {"flower": (1, 60, 200), "leaves": (1, 250, 0), "temple": (0, 150, 120)}  # photograph, top, left


def commands() -> list[tuple[str, list[str]]]:
    """Return (script, words) of the commands of the page that are typed in TorchSSL/."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/own_images.md").read_text(), re.DOTALL)
    lines = [line for line in "\n".join(blocks).splitlines() if line.startswith("python ")]
    return [(shlex.split(line)[1], shlex.split(line)[2:]) for line in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, in which every command has been run."""
    home = tmp_path_factory.mktemp("home")
    photographs, random = load_sample_images().images, np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3), ("unlabeled", 6)):
        for name, (which, top, left) in CLASSES.items():
            folder = home / "photos" / part / ("" if part == "unlabeled" else name)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                y, x, size = top + random.integers(60), left + random.integers(60), random.integers(40, 90)
                image = Image.fromarray(photographs[which][y:y + size, x:x + size * 3 // 4])
                image.save(folder / f"{name}{number}.jpg")
    places = {"$photos": str(home / "photos"), "$work": str(home / "work")}
    for script, words in commands():
        for place, path in places.items():
            words = [word.replace(place, path) for word in words]
        run(f"TorchSSL/{script}", *words, *SHORT.get(script.removesuffix(".py"), []), cwd=ROOT / "TorchSSL")
    return home


def test_every_image_is_predicted_and_sorted(home: Path) -> None:
    with (home / "work/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    photos = {path.name for path in (home / "photos/unlabeled").iterdir()}
    assert {row["file"] for row in rows} == photos and {row["class"] for row in rows} <= set(CLASSES)
    assert {path.name for path in (home / "work/sorted").rglob("*.jpg")} == photos


def test_photographs_are_resized_as_the_training_images_were(home: Path) -> None:
    """The same images, converted, get the same probabilities."""
    out = home / "converted.csv"
    run("TorchSSL/predict.py", f"--load_path={home}/work/runs/first/latest_model.pth",
        f"--images={home}/work/set/unlabeled.zip", f"--out={out}", cwd=ROOT / "TorchSSL")
    originals, converted = (list(csv.DictReader(path.open())) for path in (home / "work/predictions.csv", out))
    assert [{**row, "file": ""} for row in originals] == [{**row, "file": ""} for row in converted]


def test_suggestions_and_findings_are_there(home: Path) -> None:
    with (home / "work/suggested/label_these.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all((home / "photos/unlabeled" / row["file"]).is_file() for row in rows)
    for name in ("suggested/contact_sheet.png", "predictions.html", "audit/audit.html", "corrected.csv"):
        assert (home / "work" / name).stat().st_size > 0, name


def test_the_exported_file_runs_elsewhere(home: Path) -> None:
    session = onnxruntime.InferenceSession(home / "work/photos.onnx", providers=["CPUExecutionProvider"])
    wanted = session.get_inputs()[0]
    logits, = session.run(None, {wanted.name: np.zeros((2, 3, 16, 16), np.float32)})
    assert logits.shape == (2, len(CLASSES))
    assert all(name in session.get_modelmeta().custom_metadata_map.__str__() for name in CLASSES)
