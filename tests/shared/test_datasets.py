"""Data sets by name and by path, their files small but in the published forms."""
from __future__ import annotations

import gzip
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import shared.data.datasets
import shared.data.formats
from shared.cli import UserError
from shared.data.datasets import NAMES, has_split, load_dataset
from shared.data.images import ImageSet
from shared.data.photographs import list_imagenet
from shared.data.writers import write_folder, write_npz, write_zip
from tests.golden.data_sources import add_to_tar, write_idx
from tests.shared.cifar_files import write_cifar
from TorchSSL.core.data import report

NOT_PUBLISHED = pytest.mark.filterwarnings("ignore:.*(not as published|in place of the published)")


def random_set(count: int = 40, channels: int = 3, side: int = 32, classes: int = 10, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    return ImageSet(rng.integers(0, 256, (count, channels, side, side), np.uint8), np.arange(count) % classes,
                    tuple(f"class{c}" for c in range(classes)), "random")


def error_of(*args, **options) -> str:
    with pytest.raises(UserError) as raised:
        load_dataset(*args, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def assert_equal(found: ImageSet, expected: ImageSet) -> None:
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_digits() -> None:
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    assert (len(train), len(test), train.channels, train.size, train.num_classes) == (1297, 500, 1, (8, 8), 10)
    assert train.images.max() == 255 and set(np.unique(train.images) * 16 % 255) <= {*range(255)}
    assert np.bincount(test.labels).min() >= 48  # stratified
    assert "0 test images are also in train" in report(train, test)


@NOT_PUBLISHED
class TestCifar:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_cifar(random_set(), tmp_path / "cifar-10-batches-py", random_set(20, seed=1))
        return tmp_path

    @pytest.mark.parametrize("place", ["", "cifar10"])
    @pytest.mark.parametrize("asked", ["", "cifar10"])
    def test_below_the_folder_or_one_of_its_name(self, tmp_path: Path, place: str, asked: str) -> None:
        """DASO's configurations name data/cifar10, all others data."""
        write_cifar(random_set(), tmp_path / place / "cifar-10-batches-py", random_set(20, seed=1))
        assert_equal(load_dataset("cifar10", "train", tmp_path / asked), random_set())

    def test_folder_archive_and_path(self, folder: Path) -> None:
        batches, archive = folder / "cifar-10-batches-py", folder / "cifar-10-python.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            for file in sorted(batches.iterdir(), reverse=True):  # the published order is not the numerical one either
                tar.add(file, f"cifar-10-batches-py/{file.name}")
        for source in ("cifar10", batches, archive):
            found = load_dataset(source, "train", folder)
            assert_equal(found, random_set())
            assert found.classes == random_set().classes
            assert_equal(load_dataset(source, "test", folder), random_set(20, seed=1))
        shutil.rmtree(batches)
        assert_equal(load_dataset("cifar10", "train", folder), random_set())
        assert not batches.exists()  # read in place
        assert has_split(archive, "test") and not has_split(archive, "extra")
        assert "no split 'extra'" in error_of(archive, "extra")

    def test_other_checksum_warns_at_every_start(self, folder: Path) -> None:
        for _ in range(2):
            with pytest.warns(UserWarning, match="data_batch_1.*not as published"):
                load_dataset("cifar10", "train", folder)

    def test_published_checksum(self, folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
        import hashlib

        monkeypatch.setenv("FEWLABEL_CACHE", str(folder / "cache"))
        for file in (folder / "cifar-10-batches-py").iterdir():
            monkeypatch.setitem(shared.data.formats.PUBLISHED, file.name, hashlib.md5(file.read_bytes()).hexdigest())
        load_dataset("cifar10", "train", folder)
        assert not recwarn.list

    def test_published_checksums_are_those_of_torchvision(self) -> None:
        from torchvision import datasets

        known = [datasets.CIFAR10.train_list, datasets.CIFAR10.test_list, datasets.CIFAR100.train_list,
                 datasets.CIFAR100.test_list]
        assert {name: md5 for files in known for name, md5 in files} == shared.data.formats.PUBLISHED

    def test_cifar100(self, tmp_path: Path) -> None:
        images = random_set(200, classes=100)
        write_cifar(images, tmp_path / "cifar-100-python", images)
        assert_equal(load_dataset("cifar100", "train", tmp_path), images)
        assert load_dataset("cifar100", "test", tmp_path).num_classes == 100

    def test_python_2_batch(self, folder: Path) -> None:
        """The published batches were written by Python 2: protocol 2, text as latin1 strings."""
        images = random_set(8)
        batch = {"batch_label": "x", "labels": images.labels.tolist(), "data": images.images.reshape(8, -1)}
        file = folder / "cifar-10-batches-py" / "data_batch_1"
        file.write_bytes(pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core"))
        found = load_dataset("cifar10", "train", folder)
        np.testing.assert_array_equal(found.images[:8], images.images)

    @pytest.mark.parametrize("content", [
        {"labels": [0] * 8}, {"data": np.zeros((8, 3072), np.uint8)}, [1, 2],
        {"data": np.zeros((8, 3072)), "labels": [0] * 8}, {"data": np.zeros((8, 3071), np.uint8), "labels": [0] * 8},
        {"data": np.zeros((8, 3072), np.uint8), "labels": [0] * 7},
        {"data": np.zeros((8, 3072), np.uint8), "labels": [10] * 8},
        {"data": np.zeros((8, 3072), np.uint8), "labels": [-1] * 8},
        {"data": np.zeros((8, 3072), np.uint8), "labels": ["a"] * 8},
        {"data": np.zeros((8, 3072), np.uint8), "labels": [0.5] * 8}])
    def test_wrong_batch(self, folder: Path, content: object) -> None:
        (folder / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(content))
        assert "data_batch_3" in error_of("cifar10", "train", folder)

    def test_damaged(self, folder: Path) -> None:
        file = folder / "cifar-10-batches-py" / "data_batch_2"
        whole = file.read_bytes()
        for share in (0.0, 0.1, 0.7, 0.999):
            file.write_bytes(whole[:int(share * len(whole))])
            assert "data_batch_2" in error_of("cifar10", "train", folder)
        file.unlink()
        assert "data_batch_2 is missing" in error_of("cifar10", "train", folder)

    def test_hostile(self, folder: Path) -> None:
        class Bomb:
            def __reduce__(self) -> tuple:
                import os

                return os.mkdir, (str(folder / "owned"),)

        (folder / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({"data": Bomb(), "labels": []}))
        assert "mkdir" in error_of("cifar10", "train", folder)
        assert not (folder / "owned").exists()

    def test_archive(self, folder: Path) -> None:
        archive, batch = folder / "cifar-10-python.tar.gz", pickle.dumps({})
        shutil.rmtree(folder / "cifar-10-batches-py")
        for name, kind, expected in (("../data_batch_1", tarfile.REGTYPE, "outside"),
                                     ("/x", tarfile.REGTYPE, "outside"),
                                     ("cifar-10-batches-py/data_batch_1", tarfile.SYMTYPE, "link"),
                                     ("cifar-10-batches-py/other", tarfile.REGTYPE, "data_batch_1 is missing")):
            with tarfile.open(archive, "w:gz") as tar:
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, "/etc/passwd"
                tar.addfile(entry)
                add_to_tar(tar, "readme", batch)
            assert expected in error_of("cifar10", "train", folder)
        archive.write_bytes(gzip.compress(b"nothing"))
        assert "not a tar archive" in error_of("cifar10", "train", folder)

    def test_bomb(self, folder: Path) -> None:
        shutil.rmtree(folder / "cifar-10-batches-py")
        with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as tar:
            add_to_tar(tar, "cifar-10-batches-py/data_batch_1", bytes(300_000_000))
        assert "unfolds" in error_of("cifar10", "train", folder)


@NOT_PUBLISHED
class TestOtherNames:
    def test_svhn(self, tmp_path: Path) -> None:
        images = random_set(30)
        for split in ("train", "extra"):
            labels = np.where(images.labels == 0, 10, images.labels)[:, None]
            savemat(tmp_path / f"{split}_32x32.mat", {"X": images.images.transpose(2, 3, 1, 0), "y": labels})
            assert_equal(load_dataset("svhn", split, tmp_path), images)
        content = (tmp_path / "train_32x32.mat").read_bytes()
        for share in (0.01, 0.5, 0.99):
            (tmp_path / "train_32x32.mat").write_bytes(content[:int(share * len(content))])
            assert "train_32x32.mat" in error_of("svhn", "train", tmp_path)
        savemat(tmp_path / "train_32x32.mat", {"X": np.zeros((3, 3)), "y": np.ones(3)})
        assert "expected X uint8" in error_of("svhn", "train", tmp_path)
        assert "test_32x32.mat not found" in error_of("svhn", "test", tmp_path)

    def test_stl10(self, tmp_path: Path) -> None:
        images, folder = random_set(12, side=96), tmp_path / "stl10_binary"
        folder.mkdir()
        images.images.transpose(0, 1, 3, 2).tofile(folder / "train_X.bin")
        (images.labels + 1).astype(np.uint8).tofile(folder / "train_y.bin")
        images.images.transpose(0, 1, 3, 2).tofile(folder / "unlabeled_X.bin")
        assert_equal(load_dataset("stl10", "train", tmp_path), images)
        assert load_dataset("stl10", "unlabeled", tmp_path).labels.tolist() == [-1] * 12
        np.ones(11, np.uint8).tofile(folder / "train_y.bin")
        assert "12 labels" in error_of("stl10", "train", tmp_path)
        (folder / "train_X.bin").write_bytes(bytes(100))
        assert "cut short" in error_of("stl10", "train", tmp_path)

    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_mnist(self, tmp_path: Path, suffix: str) -> None:
        images, raw = random_set(20, 1, 28), tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for split in ("train", "t10k"):
            write_idx(raw / f"{split}-images-idx3-ubyte{suffix}", images.images[:, 0])
            write_idx(raw / f"{split}-labels-idx1-ubyte{suffix}", images.labels.astype(np.uint8))
        for split in ("train", "test"):
            found = load_dataset("mnist", split, tmp_path)
            np.testing.assert_array_equal(found.images[:, :, 2:-2, 2:-2], images.images)
            assert found.size == (32, 32) and found.images.sum() == images.images.sum()
            np.testing.assert_array_equal(found.labels, images.labels)
        file = raw / f"train-images-idx3-ubyte{suffix}"
        whole = file.read_bytes()
        for content in (whole[:5], whole[:len(whole) // 2], b"", whole[:-1]):
            file.write_bytes(content)
            assert file.name in error_of("mnist", "train", tmp_path)

    def test_imagenet_is_listed(self, tmp_path: Path) -> None:
        for name in ("n02/b.JPEG", "n01/a.JPEG", "n02/a.JPEG"):
            (tmp_path / "imagenet" / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "imagenet" / "train" / name).write_bytes(b"not decoded")
        found = list_imagenet(tmp_path, "train")
        assert [Path(file).relative_to(tmp_path / "imagenet" / "train").as_posix() for file in found.files] == [
            "n01/a.JPEG", "n02/a.JPEG", "n02/b.JPEG"]
        assert found.labels.tolist() == [0, 1, 1] and found.classes == ("n01", "n02")
        assert "dataset_tool.py" in error_of("imagenet", "train", tmp_path)
        assert "imagenet/val" in pytest.raises(UserError, list_imagenet, tmp_path, "test").value.args[0]

    @pytest.mark.parametrize("name", sorted({*NAMES} - {"digits", "imagenet"}))
    def test_missing_files_are_named(self, name: str, tmp_path: Path) -> None:
        message = error_of(name, "train", tmp_path)
        assert "--download" in message and str(tmp_path) in message
        assert not list(tmp_path.iterdir())

    def test_names(self, tmp_path: Path) -> None:
        assert 'did you mean "cifar10"' in error_of("cifar_10", "train", tmp_path)
        assert "no split 'validation', only train, test" in error_of("cifar10", "validation", tmp_path)
        assert has_split("stl10", "unlabeled") and not has_split("cifar10", "unlabeled")

    def test_failed_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision.datasets.utils

        def refuse(*_, **__):
            raise OSError("no network")

        monkeypatch.setattr(torchvision.datasets.utils, "download_url", refuse)
        assert "fetch the files yourself" in error_of("cifar10", "train", tmp_path, download=True)

    def test_download_uses_published_checksums(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision.datasets.utils

        asked = []
        monkeypatch.setattr(torchvision.datasets.utils, "download_url", lambda *args: asked.append(args))
        for name, count in (("cifar10", 1), ("cifar100", 1), ("svhn", 1), ("mnist", 4)):
            with pytest.raises(UserError):
                load_dataset(name, "train", tmp_path, download=True)
            assert len(asked) == count and all(len(md5) == 32 and url.startswith("http") for url, _, _, md5 in asked)
            asked.clear()


class TestOwnImages:
    def test_folders(self, tmp_path: Path) -> None:
        for split, names in (("train", ("cat", "dog")), ("test", ("dog",)), ("unlabeled", ("",))):
            for index, name in enumerate(names):
                (tmp_path / split / name).mkdir(parents=True)
                Image.new("RGB", (8, 8), (index,) * 3).save(tmp_path / split / name / "a.png")
        train = load_dataset(tmp_path, "train")
        assert train.classes == ("cat", "dog") and train.labels.tolist() == [0, 1]
        with pytest.warns(UserWarning, match="no image of class cat"):
            test = load_dataset(tmp_path, "test")
        assert test.labels.tolist() == [1] and test.classes == train.classes  # the training set's numbers
        assert load_dataset(tmp_path, "unlabeled").labels.tolist() == [-1]
        assert has_split(tmp_path, "unlabeled") and not has_split(tmp_path, "extra")
        shutil.rmtree(tmp_path / "test")
        assert "has no split 'test'" in error_of(tmp_path, "test")
        assert "test images are also" not in report(train)

    def test_archives(self, tmp_path: Path) -> None:
        images = random_set(20, side=8)
        for write, suffix in ((write_zip, "zip"), (write_npz, "npz")):
            (tmp_path / suffix).mkdir()
            for split in ("train", "test"):
                write(images, tmp_path / suffix / f"{split}.{suffix}")
                assert_equal(load_dataset(tmp_path / suffix, split), images)
        assert_equal(load_dataset(tmp_path / "zip" / "train.zip", "train"), images)
        assert "names begin with test/" in error_of(tmp_path / "zip" / "train.zip", "test")

    def test_archive_with_both_parts(self, tmp_path: Path) -> None:
        import io
        import zipfile

        def png(value: int) -> bytes:
            stream = io.BytesIO()
            Image.new("L", (4, 4), value).save(stream, "png")
            return stream.getvalue()

        names = ["train/a.png", "train/x/b.png", "test/a.png"]
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for value, name in enumerate(names):
                archive.writestr(name, png(value))
            archive.writestr("dataset.json", json.dumps({"labels": [[name, i] for i, name in enumerate(names)]}))
        train, test = (load_dataset(tmp_path / "set.zip", split) for split in ("train", "test"))
        assert (train.labels.tolist(), train.images.max(axis=(1, 2, 3)).tolist()) == ([0, 1], [0, 1])
        assert (test.labels.tolist(), test.images.max()) == ([2], 2)

    def test_whole_folder_is_a_training_set(self, tmp_path: Path) -> None:
        write_folder(random_set(20, side=8), tmp_path / "set")
        assert len(load_dataset(tmp_path / "set", "train")) == 20
        assert "has no split 'test'" in error_of(tmp_path / "set", "test")


def test_report() -> None:
    train, test = random_set(40), random_set(30, seed=1)
    images, labels = train.images.copy(), train.labels.copy()
    images[7], labels[3] = images[8], -1
    test.images[0] = test.images[1] = images[8]
    text = report(ImageSet(images, labels, train.classes, "mine"), test)
    assert "mine: 10 classes, images 3 x 32 x 32" in text
    assert "train 40 images, 3 to 4 a class, 1 without a label" in text
    assert "test  30 images, 3 to 3 a class" in text
    assert "1 within train, 1 within test, 2 test images are also in train" in text
    assert "class  3 class3" in text
    assert "test images are 3 x 8 x 8" in report(train, random_set(30, side=8))
