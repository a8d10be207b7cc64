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
from tests.golden.cases import each, facts, fill, numbers, serves
from tests.golden.data_sources import write_cifar_archive
from tests.golden.recipes import computed
from tests.golden.torchssl_cases import PAPER, cases_of, expected
from tests.shared.programs import run
from TorchSSL.core.data import NORMALISATION
from TorchSSL.core.networks import WideResNet

LABELLED, ZIPPED = cases_of("pseudo-labels"), cases_of("zip labels")
SERVES = serves(LABELLED, ZIPPED)


def fact(name: str) -> Any:
    return facts(PAPER, "file_facts.json")[name]


def write_batches(folder: Path, names: list[str], images: np.ndarray, labels: np.ndarray) -> None:
    """Write CIFAR batches of uint8 [N, 32, 32, 3]."""
    folder.mkdir(parents=True)
    for name, rows in zip(names, np.array_split(np.arange(len(images)), len(names)), strict=True):
        batch = {"data": images[rows].transpose(0, 3, 1, 2).reshape(len(rows), -1), "labels": labels[rows].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))


def sizes_of(case: dict[str, Any] | None) -> list[int]:
    """Return depth and width of the network whose weights a case labels images with."""
    found = re.search(r"WideResNet-(\d+)-(\d+)", case["what"] if case else "")
    return [int(size) for size in found.groups()] if found else [28, 2]


def write_checkpoint(path: Path, sizes: list[int], classes: int) -> list[str]:
    """Write fill() weights as the moving average of a run under DistributedDataParallel; return the flags for it."""
    depth, widen_factor = sizes
    net = fill(WideResNet(classes, depth=depth, widen_factor=widen_factor))
    torch.save({"ema_model": {f"module.{name}": tensor for name, tensor in net.state_dict().items()}}, path)
    return ["--load_path", str(path), f"--depth={depth}", f"--widen_factor={widen_factor}"]


@each(LABELLED)
def test_get_labels(case: dict[str, Any], tmp_path: Path) -> None:
    images, labels = computed(case["arguments"]["images"]), computed(case["arguments"]["targets"])
    write_batches(tmp_path / "data" / "cifar-10-batches-py", [f"data_batch_{k}" for k in range(1, 6)], images, labels)
    flags = write_checkpoint(tmp_path / "model_best.pth", sizes_of(case), 10)
    result = run("TorchSSL/get_labels.py", *flags, "--save_path", tmp_path / "out", "--data_dir", tmp_path / "data")
    written = np.load(tmp_path / "out" / "pseudo_label.npy")
    np.testing.assert_array_equal(written, expected(case)["pseudo_label"])
    facts_ = fact("get_labels")
    assert ("pseudo_label.npy", str(written.dtype)) == (facts_["file"], facts_["dtype"])
    assert result.stdout.splitlines()[-1] == facts_["last_stdout_line"]


def test_eval(tmp_path: Path) -> None:
    images, targets = fact("eval")["images"].split(", targets ")
    write_batches(tmp_path / "cifar-10-batches-py", ["test_batch"], computed(images), computed(targets))
    flags = write_checkpoint(tmp_path / "model_best.pth", sizes_of(LABELLED[0] if LABELLED else None), 10)
    result = run("TorchSSL/eval.py", *flags, "--data_dir", tmp_path)
    assert result.stdout.splitlines()[-1] == fact("eval")["last_stdout_line"]


@pytest.fixture(scope="module")
def pseudo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, str]:
    """Run pseudo_dataset.py on 50,000 images; return the folder, the true labels and what was printed."""
    folder = tmp_path_factory.mktemp("pseudo")
    recipes = [case["arguments"]["pseudo_labels"] for case in ZIPPED] + ["default_rng(0).integers(0, 10, 50000)"]
    labels = computed(recipes[0])
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
    batches = [name for name in sorted(written) if "batch_" in name]
    for name, rows in zip(batches, np.array_split(np.arange(len(labels)), len(batches)), strict=True):
        content = (out / name).read_bytes()
        assert content[:2] == bytes((0x80, facts["pickle_protocol"]))
        batch, original = pickle.loads(content), pickle.loads((folder / "cifar" / name).read_bytes())
        assert sorted(batch) == facts["batch_keys"]
        assert type(batch["labels"]).__name__ == facts["labels_type"]
        assert (str(batch["labels"].dtype), str(batch["data"].dtype)) == (facts["labels_dtype"], facts["data_dtype"])
        assert [*batch["data"].shape] == facts["data_shape"]
        np.testing.assert_array_equal(batch["data"], original["data"])
        np.testing.assert_array_equal(batch["labels"], labels[rows])
    with tarfile.open(out / "cifar-10-python.tar.gz") as archive:
        members = sorted([member.name, "dir" if member.isdir() else "file"] for member in archive)
    assert members == facts["tar_members_sorted"]
    assert printed.splitlines()[-1] == str(float(np.mean(labels == true)))  # the recorded form: a bare fraction
    assert float(facts["stdout_tail"]) <= 1


@each(ZIPPED)
def test_dataset_zip_labels(case: dict[str, Any], pseudo: tuple[Path, np.ndarray, str]) -> None:
    labels = expected(case)["labels"]
    dest = pseudo[0] / f"{case['id']}.zip"
    run("TorchSSL/dataset_tool.py", f"--source={pseudo[0]}/out/cifar-10-python.tar.gz", f"--dest={dest}",
        f"--max-images={len(labels)}")
    np.testing.assert_array_equal(read_images(dest).labels, labels)
    wanted = fact("dataset_tool")
    with zipfile.ZipFile(dest) as archive:
        names = archive.namelist()
        text = archive.read("dataset.json").decode()
        assert {entry.compress_type for entry in archive.infolist()} == {wanted["compress_type"]}
        for key in (key for key in wanted if re.fullmatch(r"image\d+_mode", key)):
            number, = numbers(key)
            with archive.open(names[number]) as file:
                image = Image.open(file)
                image.load()
            assert (image.mode, [*image.size]) == (wanted[key], wanted[f"image{number}_size"])
            pixels = np.asarray(image)
            assert (pixels[0, 0, 0], pixels[0, 1, 1], pixels[-1, -1, 2]) == (number % 10, number, 255)
    assert len(names) == wanted["n"]
    assert names[:len(wanted["names_first"])] == wanted["names_first"]
    assert names[-len(wanted["names_last"]):] == wanted["names_last"]
    assert text.startswith(wanted["dataset_json_head"])


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
    recorded = facts(PAPER, "normalisation.json")
    for name, mean in recorded["mean"].items():
        assert NORMALISATION[name] == (pytest.approx(mean, abs=1e-12), pytest.approx(recorded["std"][name], abs=1e-12))
