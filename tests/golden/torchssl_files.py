"""Files that the TorchSSL tools write and read: pseudo-labels, pseudo data set, its ZIP, folders of extra images."""
from __future__ import annotations

import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.data.images import read_images
from tests.golden.cases import arrays, facts, fill, index
from tests.golden.data_sources import write_cifar_archive
from tests.shared.programs import run
from TorchSSL.core.data import NORMALISATION
from TorchSSL.core.networks import WideResNet

CASES = {case["id"]: case for case in index("torchssl")["cases"] if case["file"] == "files.npz"}
SERVES = {"get_labels", "dataset_zip_labels"} & CASES.keys()


def fact(name: str) -> Any:
    return facts("torchssl", "file_facts.json")[name]


def random_integers(text: str) -> np.ndarray:
    """Return what a recipe `numpy.random.default_rng(seed).integers(low, high, shape, ...)` describes."""
    seed, low, high, shape = re.search(r"default_rng\((\d+)\)\.integers\((\d+),(\d+),(\([\d,]+\)|\d+)", text).groups()
    size = [int(number) for number in re.findall(r"\d+", shape)]
    kind = np.uint8 if "uint8" in text else np.int64
    return np.random.default_rng(int(seed)).integers(int(low), int(high), size, dtype=kind)


def cycling_labels(text: str) -> np.ndarray:
    """Return what `arange(count) % classes` describes."""
    count, classes = (int(number) for number in re.search(r"arange\((\d+)\) % (\d+)", text).groups())
    return np.arange(count) % classes


def write_batches(folder: Path, names: list[str], images: np.ndarray, labels: np.ndarray) -> None:
    """Write CIFAR batches of uint8 [N, 32, 32, 3]."""
    folder.mkdir(parents=True)
    for name, rows in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
        batch = {"data": images[rows].transpose(0, 3, 1, 2).reshape(len(rows), -1), "labels": labels[rows].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))


def write_checkpoint(path: Path) -> None:
    """Write fill() weights as the moving average of a run under DistributedDataParallel."""
    net = fill(WideResNet(10, depth=28, widen_factor=2))
    torch.save({"ema_model": {f"module.{name}": tensor for name, tensor in net.state_dict().items()}}, path)


def test_get_labels(tmp_path: Path) -> None:
    case = CASES["get_labels"]
    images, labels = random_integers(case["arguments"]["images"]), cycling_labels(case["arguments"]["targets"])
    write_batches(tmp_path / "data" / "cifar-10-batches-py", [f"data_batch_{k}" for k in range(1, 6)], images, labels)
    write_checkpoint(tmp_path / "model_best.pth")
    result = run("TorchSSL/get_labels.py", "--load_path", tmp_path / "model_best.pth", "--save_path", tmp_path / "out",
                 "--data_dir", tmp_path / "data")
    written = np.load(tmp_path / "out" / fact("get_labels")["file"])
    assert str(written.dtype) == fact("get_labels")["dtype"]
    np.testing.assert_array_equal(written, arrays("torchssl", case["file"])[case["output_keys"]["pseudo_label"]])
    assert result.stdout.splitlines()[-1] == fact("get_labels")["last_stdout_line"]


def test_eval(tmp_path: Path) -> None:
    images, labels = random_integers(fact("eval")["images"]), cycling_labels(fact("eval")["images"])
    write_batches(tmp_path / "cifar-10-batches-py", ["test_batch"], images, labels)
    write_checkpoint(tmp_path / "model_best.pth")
    result = run("TorchSSL/eval.py", "--load_path", tmp_path / "model_best.pth", "--data_dir", tmp_path)
    assert result.stdout.splitlines()[-1] == fact("eval")["last_stdout_line"]


@pytest.fixture(scope="module")
def pseudo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, str]:
    """Run pseudo_dataset.py on 50,000 images; return the folder, the true labels and what was printed."""
    folder = tmp_path_factory.mktemp("pseudo")
    labels = random_integers(CASES["dataset_zip_labels"]["arguments"]["pseudo_labels"])
    true = np.arange(len(labels)) % 10
    rows = np.zeros((len(labels), 3072), np.uint8)
    rows[:, 0], rows[:, 1025], rows[:, 3071] = true, np.arange(len(labels)) % 251, 255
    write_cifar_archive(folder / "cifar" / "cifar-10-python.tar.gz", rows, true.tolist())
    with tarfile.open(folder / "cifar" / "cifar-10-python.tar.gz") as archive:
        archive.extractall(folder / "cifar", filter="data")
    (folder / "out").mkdir()
    np.save(folder / "out" / "pseudo_label.npy", labels)
    result = run("TorchSSL/pseudo_dataset.py", "--data_path", folder / "cifar" / "cifar-10-batches-py", "--save_path",
                 folder / "out")
    return folder, true, result.stdout


def test_pseudo_dataset(pseudo: tuple[Path, np.ndarray, str]) -> None:
    folder, true, printed = pseudo
    facts = fact("pseudo_dataset")
    out, labels = folder / "out", np.load(folder / "out" / "pseudo_label.npy")
    written = [f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file() and not f.name.startswith(".")]
    assert sorted(written) == facts["written"]
    for k in range(1, 6):
        content = (out / "cifar-10-batches-py" / f"data_batch_{k}").read_bytes()
        assert content[:2] == bytes((0x80, facts["pickle_protocol"]))
        batch = pickle.loads(content)
        original = pickle.loads((folder / "cifar" / "cifar-10-batches-py" / f"data_batch_{k}").read_bytes())
        assert sorted(batch) == facts["batch_keys"]
        assert type(batch["labels"]).__name__ == facts["labels_type"]
        assert (str(batch["labels"].dtype), str(batch["data"].dtype)) == (facts["labels_dtype"], facts["data_dtype"])
        assert [*batch["data"].shape] == facts["data_shape"]
        np.testing.assert_array_equal(batch["data"], original["data"])
        np.testing.assert_array_equal(batch["labels"], np.array_split(labels, 5)[k - 1])
    with tarfile.open(out / "cifar-10-python.tar.gz") as archive:
        members = sorted([member.name, "dir" if member.isdir() else "file"] for member in archive)
    assert members == facts["tar_members_sorted"]
    assert printed.splitlines()[-1] == str(float(np.mean(labels == true)))  # the recorded form: a bare fraction
    assert float(facts["stdout_tail"]) <= 1


def test_dataset_zip_labels(pseudo: tuple[Path, np.ndarray, str]) -> None:
    case, expected = CASES["dataset_zip_labels"], fact("dataset_tool")
    labels = arrays("torchssl", case["file"])[case["output_keys"]["labels"]]
    dest = pseudo[0] / "set.zip"
    run("TorchSSL/dataset_tool.py", f"--source={pseudo[0]}/out/cifar-10-python.tar.gz", f"--dest={dest}",
        f"--max-images={len(labels)}")
    with zipfile.ZipFile(dest) as archive:
        names = archive.namelist()
        text = archive.read("dataset.json").decode()
        assert {entry.compress_type for entry in archive.infolist()} == {expected["compress_type"]}
        with archive.open(names[3]) as file:
            image = Image.open(file)
            image.load()
    assert len(names) == expected["n"]
    assert names[:len(expected["names_first"])] == expected["names_first"]
    assert names[-len(expected["names_last"]):] == expected["names_last"]
    assert text.startswith(expected["dataset_json_head"])
    assert (image.mode, [*image.size]) == (expected["image3_mode"], expected["image3_size"])
    pixels = np.asarray(image)
    assert (pixels[0, 0, 0], pixels[0, 1, 1], pixels[-1, -1, 2]) == (3, 3, 255)
    np.testing.assert_array_equal(read_images(dest).labels, labels)


def test_folder_of_extra_images(tmp_path: Path) -> None:
    expected = fact("aug_path")
    for (name, _), value in zip(expected["order"], expected["pixel_of_each"], strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / name)
    found = read_images(tmp_path, channels=3)
    recorded = dict(map(tuple, expected["order"]))
    if all(name.isdigit() for name in expected["classes_in_folder"]):
        # The published reader sorts numbers as text, which mislabels from ten classes on; here they are the classes.
        recorded = {name: int(name.partition("/")[0]) for name in recorded}
    order = sorted(recorded, key=lambda name: recorded[name])
    value_of = {name: value for (name, _), value in zip(expected["order"], expected["pixel_of_each"], strict=True)}
    assert found.labels.tolist() == [recorded[name] for name in order]
    assert found.images[:, 0, 0, 0].tolist() == [value_of[name] for name in order]


def test_normalisation() -> None:
    recorded = facts("torchssl", "normalisation.json")
    for name, mean in recorded["mean"].items():
        assert NORMALISATION[name] == (pytest.approx(mean, abs=1e-12), pytest.approx(recorded["std"][name], abs=1e-12))
