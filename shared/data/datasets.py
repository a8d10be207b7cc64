"""Data sets by name or path: `load_dataset("cifar10", "train")` and `load_dataset("my-images", "train")` alike."""
from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from shared.cli import UserError, nearest
from shared.data.cache import Allocate, Stored, cached
from shared.data.classes import find_images, labels_of
from shared.data.formats import (
    CIFAR10,
    CIFAR100,
    Layout,
    class_names,
    layout_of,
    npz_arrays,
    npz_classes,
    read_batches,
    read_mat,
    read_mnist,
)
from shared.data.images import ImageSet, read_images
from shared.data.listing import LABEL_FILE
from shared.data.safe import Member, read_members, zip_members
from shared.training.fingerprint import fingerprint

SPLITS = {"digits": ("train", "test"), "cifar10": ("train", "test"), "cifar100": ("train", "test"),
          "svhn": ("train", "test", "extra"), "stl10": ("train", "test", "unlabeled"), "mnist": ("train", "test"),
          "imagenet": ("train", "test")}
NAMES = tuple(SPLITS)
CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
TEN_DIGITS = tuple(map(str, range(10)))
# Names of the folders, archives and arrays of a user's set; the first existing one counts.
SPELLINGS = {"test": ("test", "val", "valid", "validation"), "unlabeled": ("unlabeled", "unlabelled")}
ENDINGS = ("", ".zip", ".npz")
STL10_SIDE = 96
STL10_COUNTS = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}


def load_dataset(name_or_path: str | Path, split: str, data_dir: str | Path = "./data",
                 download: bool = False, table: str | Path | None = None) -> ImageSet:
    """Return one split of a data set: train, test, extra (svhn) or unlabeled (stl10, a user's own).

    A name (see NAMES; `./NAME` means a path) reads the files below `data_dir` where torchvision keeps them, or below
    `data_dir`/NAME, the CIFAR archives as they are; digits needs none. MNIST comes padded to 32x32. `download` fetches
    missing files with torchvision, which checks them. Files that differ from the published ones are read with a
    warning.

    A path is the user's own set: a folder holding `train/`, `test/` (or `val/` or `valid/`) and if wanted `unlabeled/`,
    each a folder of class sub-folders or with a dataset.json or labels.csv, or the same as train.zip, test.zip or .npz
    files; a ZIP whose names begin with train/ and test/; an npz with x_train and x_test, or train_images and
    test_images; a CIFAR folder or archive. A folder, ZIP or npz without such parts is all training set. Labels of the
    test images are those of the training images' classes of the same name.

    table: a CSV of the labels of an own set, in place of those that lie with it.

    Images are decoded once, then opened from the cache in milliseconds (shared/data/cache.py). Raises UserError if the
    files are missing, damaged, hostile or without that split.
    """
    path, name, data_dir = Path(name_or_path), str(name_or_path), Path(data_dir)
    if name not in NAMES:
        if not path.exists():
            raise UserError(f"{name}: neither a data set ({', '.join(NAMES)}) nor a folder or file"
                            f"{nearest(name, NAMES)}")
        return _own(path, split, table)
    if table is not None:
        raise UserError(f"{table}: labels are for own images; {name} has its own")
    if split not in SPLITS[name]:
        raise UserError(f"{name} has no split {split!r}, only {', '.join(SPLITS[name])}")
    if name == "digits":
        return _image_set(cached(name, [name, split], lambda allocate: _digits(split, allocate)), name)
    if name == "imagenet":
        raise UserError("imagenet is too large to decode whole; make a set of small images of it with "
                        f"dataset_tool.py --source={data_dir}/imagenet/train --dest=imagenet.zip --resolution=64x64 "
                        "--transform=center-crop and name that file")
    data_dir = _place(name, split, data_dir)
    if download and _absent(name, split, data_dir):
        _download(name, split, data_dir)
    if absent := _absent(name, split, data_dir):
        raise UserError(f"{name}: {absent} not found in {data_dir}; put it there, or fetch it with "
                        f"TorchSSL/check_data.py --dataset={name} --data_dir={data_dir} --download")
    files = _files(name, split, data_dir)
    if name in CIFAR:
        return _cifar(files[0], CIFAR[name], split, name)
    read: Callable[[], Stored] = {"svhn": _svhn, "stl10": _stl10, "mnist": _mnist}[name]
    stored = cached(name, [name, split, fingerprint(*files)], lambda allocate: read(split, files, allocate), files[0])
    return _image_set(stored, name)


def has_split(name_or_path: str | Path, split: str) -> bool:
    """Return whether a data set by name, or the user's own by path, has that split; no file of a named one is read."""
    path, name = Path(name_or_path), str(name_or_path)
    if name in NAMES:
        return split in SPLITS[name]
    if layout_of(path) is not None:
        return split in ("train", "test")
    return path.exists() and _part(path, split)[0] is not None


def _files(name: str, split: str, data_dir: Path) -> list[Path]:
    """Return the files of a split, images first."""
    if name in CIFAR:
        folder, archive = data_dir / CIFAR[name].folder, data_dir / CIFAR[name].archive
        return [folder if folder.exists() else archive]
    if name == "svhn":
        return [data_dir / f"{split}_32x32.mat"]
    if name == "stl10":
        return [data_dir / "stl10_binary" / f"{split}_{part}.bin" for part in ("X" if split == "unlabeled" else "Xy")]
    start = "train" if split == "train" else "t10k"
    plain = [data_dir / "MNIST" / "raw" / f"{start}-{part}" for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    return [file if file.exists() else file.with_name(f"{file.name}.gz") for file in plain]


def _place(name: str, split: str, data_dir: Path) -> Path:
    """Return where the files of a split lie: in `data_dir`, in its sub-folder of the set's name, as some published code
    has it, or above it, if it is such a sub-folder; `data_dir` if they are in none."""
    above = [data_dir.parent] if data_dir.name == name else []
    return next((place for place in (data_dir, data_dir / name, *above) if not _absent(name, split, place)), data_dir)


def _absent(name: str, split: str, data_dir: Path) -> str:
    absent = [str(file.relative_to(data_dir)) for file in _files(name, split, data_dir) if not file.exists()]
    return f"{CIFAR[name].folder}/ or {absent[0]}" if absent and name in CIFAR else " and ".join(absent)


def _download(name: str, split: str, data_dir: Path) -> None:
    """Fetch the files of a split with torchvision, which checks each of them."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_and_extract_archive, download_url

    try:
        if name in CIFAR:
            source = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            download_url(source.url, data_dir, source.filename, source.tgz_md5)
        elif name == "svhn":
            download_url(*datasets.SVHN.split_list[split][:1], data_dir, *datasets.SVHN.split_list[split][1:])
        elif name == "stl10":
            download_and_extract_archive(datasets.STL10.url, data_dir, md5=datasets.STL10.tgz_md5)
        else:
            for file, checksum in datasets.MNIST.resources:
                download_url(datasets.MNIST.mirrors[0] + file, data_dir / "MNIST" / "raw", file, checksum)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name}: the download failed ({error}); fetch the files yourself and put them into "
                        f"{data_dir}") from None


# --------------------------------------------------------------------------------------------------- the user's own set

def _own(path: Path, split: str, table: str | Path | None) -> ImageSet:
    layout = layout_of(path)
    if layout is not None:
        return _cifar(path, layout, split, path.name)
    part, prefix = own_part(path, split)
    train, train_prefix = _part(path, "train") if split == "test" else (None, "")
    # The class names of the training images decide what the test images' labels mean.
    classes = None if train is None else own_classes(train, train_prefix)
    images = read_images(part, part=prefix, classes=classes or None, table=table)
    return ImageSet(images.images, images.labels, images.classes, f"{path.stem} {split}", images.vectors)


def _no_split(path: Path, split: str) -> str:
    message = (f"{path}: has no split {split!r}; expected {path}/{split}/ (class sub-folders of images), {split}.zip "
               f"or {split}.npz in that folder, or a ZIP whose names begin with {split}/")
    if split != "test" or _part(path, "train")[0] is None:
        return message
    return f"{message}; dataset_tool.py --source={path} --dest=DIR --test-fraction=0.2 divides one set into both"


def own_classes(path: Path, prefix: str = "") -> tuple[str, ...]:
    """Return the class names of an own set in label order, without decoding an image; () without labels."""
    if path.is_file() and path.suffix.lower() == ".npz":
        return npz_classes(path)
    found = labels_of(find_images(path, prefix), prefix)
    return () if found is None else found.names


def own_resize(path: Path) -> str | None:
    """Return how dataset_tool.py resized the training images of an own set, "square" or "centre"; None: not at all."""
    part, prefix = (None, "") if layout_of(path) is not None else own_part(path, "train")
    if part is None or part.suffix.lower() == ".npz":
        return None
    if part.is_dir():
        found = [Member(prefix + LABEL_FILE)] if (part / prefix / LABEL_FILE).is_file() else []
    else:
        found = [member for member in zip_members(part) if member.name == prefix + LABEL_FILE]
    how = json.loads(next(read_members(part, found))).get("resize") if found else None  # it was read before
    return how if how in ("square", "centre") else None


def training_classes(path: Path) -> tuple[str, ...]:
    """Return the class names of the training set beside an own test set (test/ or val/ beside train/, test.zip beside
    train.zip); () if `path` is none."""
    if (path.name if path.is_dir() else path.stem) not in SPELLINGS["test"]:
        return ()
    train, prefix = _part(path.absolute().parent, "train")
    return () if train is None or train == path.absolute().parent else own_classes(train, prefix)


def own_part(path: Path, split: str) -> tuple[Path, str]:
    """Return the folder or file of a split of a user's set, and the prefix of its names inside; UserError."""
    part, prefix = _part(path, split)
    if part is None:
        raise UserError(_no_split(path, split))
    return part, prefix


def _part(path: Path, split: str) -> tuple[Path | None, str]:
    """Return the folder or file of a split, and the prefix of its names inside."""
    names = SPELLINGS.get(split, (split,))
    if path.is_dir():
        there = {name: [path / f"{name}{end}" for end in ENDINGS if (path / f"{name}{end}").exists()]
                 for name in ("train", "test", *names)}
        if not there["train"]:  # without training images, val/ is a class of that name
            names = names[:1]
        found = [candidate for name in names for candidate in there[name]]
        if found:
            return found[0], ""
        return (path if split == "train" and not there["test"] else None), ""
    if path.suffix.lower() == ".zip":
        state = path.stat()
        folders = _top_folders(path, state.st_size, state.st_mtime_ns)
        found = [name for name in names[:None if "train" in folders else 1] if name in folders]
        if found:
            return path, f"{found[0]}/"
        return (path if split == "train" and not folders & {"train", "test"} else None), ""
    if path.suffix.lower() == ".npz":
        return (path if npz_arrays(path, split) else None), f"{split}/"
    return (path if split == "train" else None), ""


@lru_cache(maxsize=8)
def _top_folders(path: Path, size: int, changed: int) -> frozenset[str]:
    """Return the top-level folders of a ZIP; remembered by its size and time of change."""
    return frozenset(member.name.partition("/")[0] for member in zip_members(path) if "/" in member.name)


# --------------------------------------------------------------------------------------------------- the published sets

def _image_set(stored: Stored, name: str) -> ImageSet:
    return ImageSet(stored.images, stored.labels, stored.classes, name)


def _stored(images: np.ndarray, allocate: Allocate) -> np.ndarray:
    array = allocate(images.shape)
    array[:] = images
    return array


def _digits(split: str, allocate: Allocate) -> Stored:
    """1,797 handwritten digits, 8x8 gray; 500 of them, drawn class by class, are the test set."""
    from sklearn.datasets import load_digits  # takes a second to import, and is cached afterwards
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=500, random_state=0, stratify=labels)
    indices = parts[SPLITS["digits"].index(split)]
    images = np.rint(pixels[indices] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return Stored(_stored(images, allocate), labels[indices].astype(np.int64), TEN_DIGITS)


def _svhn(split: str, files: list[Path], allocate: Allocate) -> Stored:
    content = read_mat(files[0], ("X", "y"))
    pixels, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, len(labels)) or not set(labels.tolist()) <= {*range(11)}:
        raise UserError(f"{files[0]}: expected X uint8 [32, 32, 3, N] and N labels y from 1 to 10, got {pixels.dtype} "
                        f"{list(pixels.shape)} and {len(labels)} labels")
    # The published files call the digit 0 class 10.
    return Stored(_stored(pixels.transpose(3, 2, 0, 1), allocate), labels % 10, TEN_DIGITS)


def _stl10(split: str, files: list[Path], allocate: Allocate) -> Stored:
    row, size = 3 * STL10_SIDE**2, files[0].stat().st_size
    if not size or size % row:
        raise UserError(f"{files[0]}: cut short, {size} bytes are no whole number of images of {row} bytes")
    images = np.memmap(files[0], np.uint8, "r").reshape(-1, 3, STL10_SIDE, STL10_SIDE).transpose(0, 1, 3, 2)
    labels = np.full(len(images), -1) if split == "unlabeled" else np.fromfile(files[1], np.uint8).astype(np.int64) - 1
    if len(labels) != len(images) or split != "unlabeled" and not 0 <= labels.min() <= labels.max() <= 9:
        raise UserError(f"{files[1]}: expected {len(images)} labels from 1 to 10, got {len(labels)}")
    expected = STL10_COUNTS[split]
    notes = () if len(images) == expected else (f"{len(images)} images in place of the published {expected}",)
    names_file = files[0].with_name("class_names.txt")
    names = names_file.read_text().split() if names_file.exists() else []
    return Stored(_stored(images, allocate), labels, tuple(names) if len(names) == 10 else TEN_DIGITS, notes=notes)


def _mnist(split: str, files: list[Path], allocate: Allocate) -> Stored:
    images, labels = read_mnist(*files)
    return Stored(_stored(images, allocate), labels, TEN_DIGITS)


def _cifar(path: Path, layout: Layout, split: str, name: str) -> ImageSet:
    def read(allocate: Allocate) -> Stored:
        altered: list[str] = []
        batches = read_batches(path, layout, layout.train if split == "train" else layout.test, altered)
        images, labels = zip(*batches, strict=True)
        notes = (f"{', '.join(altered)} not as published (checksum); read all the same",) if altered else ()
        return Stored(_stored(np.concatenate(images), allocate), np.concatenate(labels), class_names(path, layout),
                      notes=notes)

    if split not in ("train", "test"):
        raise UserError(f"{path}: has no split {split!r}, only train, test")
    return _image_set(cached(name, [layout.folder, split, fingerprint(path)], read, path), name)
