"""Where labels come from: lists beside images, npz of the usual forms, splits; and names that are matched."""
from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from EDM.dataset_tool import convert, main
from EDM.metrics.sources import FileImages
from shared.cli import UserError
from shared.data.classes import match_labels
from shared.data.datasets import has_split, load_dataset
from shared.data.images import read_images, with_names
from shared.data.writers import write_npz, write_zip
from tests.shared.test_classes import write, zipped

ROOT = Path(__file__).parents[2]


def flat(folder: Path, names: str = "abcd") -> Path:
    folder.mkdir(parents=True)
    for level, name in enumerate(names):
        Image.new("L", (4, 4), 10 * level).save(folder / f"{name}.png")
    return folder


# ---------------------------------------------------------------------------------------------------- labels as CSV

@pytest.mark.parametrize(("place", "text"), [
    ("set/labels.csv", "file,label\na.png,owl\nb.png,cat\nd.png,owl\n"),
    ("set/label_these.csv", "file,cluster,label\na.png,0,owl\nb.png,1,cat\nc.png,2,\nd.png,3,owl\n"),
    ("labels.csv", "file,label\nset/a.png,owl\nset/b.png,cat\nset/d.png,owl\nother/e.png,dog\n"),
    ("set.csv", "file;label\n./a.png;owl\nb.png;cat\nd.png;owl\n")])
def test_csv_in_or_beside_a_folder(place: str, text: str, tmp_path: Path) -> None:
    flat(tmp_path / "set")
    if "other" in text:
        text = text.replace("other/e.png,dog\n", "")
    (tmp_path / place).write_text(text)
    with pytest.warns(UserWarning, match=r"1 of 4 images have no label in \S+.csv \(first: c.png\)"):
        found = read_images(tmp_path / "set")
    assert found.labels.tolist() == [1, 0, -1, 1] and found.classes == ("cat", "owl")


@pytest.mark.parametrize("text", ["name,size\na.png,3\n", "file,label\nelsewhere.png,owl\n", "\0"])
def test_a_csv_beside_a_folder_may_be_about_something_else(text: str, tmp_path: Path) -> None:
    write(tmp_path / "set", [])
    (tmp_path / "set.csv").write_text(text)
    with pytest.warns(UserWarning, match=r"the CSV beside it is not used \("):
        assert read_images(tmp_path / "set").labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError):  # but not if it is asked for
        read_images(tmp_path / "set", table=tmp_path / "set.csv")


def test_csv_by_a_flag(tmp_path: Path) -> None:
    flat(tmp_path / "set")
    (tmp_path / "mine.csv").write_text("file,label\na.png,3\nb.png,1\nc.png,3\nd.png,0\n")
    assert read_images(tmp_path / "set", table=tmp_path / "mine.csv").labels.tolist() == [3, 1, 3, 0]
    main([f"--source={tmp_path}/set", f"--dest={tmp_path}/out.zip", f"--labels={tmp_path}/mine.csv"])
    assert read_images(tmp_path / "out.zip").labels.tolist() == [3, 1, 3, 0]


def test_a_changed_csv_is_read_again(tmp_path: Path) -> None:
    flat(tmp_path / "set", "ab")
    for labels in ([0, 1], [1, 0]):
        (tmp_path / "set.csv").write_text("file,label\n" + "".join(f"{n}.png,{v}\n" for n, v in
                                                                 zip("ab", labels, strict=True)))
        assert read_images(tmp_path / "set").labels.tolist() == labels


# --------------------------------------------------------------------------------------------------- lists and files

def listed(folder: Path, pairs: list, **more: object) -> Path:
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs, **more}))
    return folder


def test_a_list_that_names_nothing(tmp_path: Path) -> None:
    folder = listed(flat(tmp_path / "set"), [["img/a.png", 0], ["img/b.png", 1]])
    message = r"dataset.json lists 2 files, none of which is there \(listed: img/a.png; found: a.png\)"
    for read in (read_images, lambda path: convert(path, tmp_path / "out.zip"),
                 lambda path: FileImages(str(path), labelled=True)):
        with pytest.raises(UserError, match=message):
            read(folder)
    (folder / "dataset.json").unlink()
    (folder / "labels.csv").write_text("file,label\nx.png,0\n")
    with pytest.raises(UserError, match=r"labels.csv lists 1 files, none of which is there \(listed: x.png"):
        read_images(folder)


def test_a_list_that_names_a_part_in_vain(tmp_path: Path) -> None:
    folder = listed(flat(tmp_path / "set"), [[f"{name}.png", 0] for name in "abcdx"])
    with pytest.warns(UserWarning, match=r"dataset.json lists 1 files that are not there \(first: x.png\)"):
        assert len(read_images(folder)) == 4


def test_a_file_listed_twice(tmp_path: Path) -> None:
    folder = listed(flat(tmp_path / "set", "a"), [["a.png", 0], ["a.png", 1]])
    with pytest.raises(UserError, match="lists a.png twice, as 0 and as 1"):
        read_images(folder)
    assert read_images(listed(folder, [["a.png", 1], ["./a.png", 1]])).labels.tolist() == [1]


def test_names_of_the_classes(tmp_path: Path) -> None:
    folder = listed(flat(tmp_path / "set"), [[f"{name}.png", 1] for name in "abcd"], classes=["cat", "owl", "yak"])
    assert read_images(folder).classes == ("cat", "owl", "yak")
    for classes, message in ((["cat"], "class number from 0 to 0"), (["a", "a"], "different names"),
                             ([1, 2], "different names")):
        with pytest.raises(UserError, match=message):
            read_images(listed(folder, [["a.png", 1]], classes=classes))


# ------------------------------------------------------------------------------------------------------------- npz

@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("names", [("x_train", "y_train", "x_test", "y_test"),
                                   ("train_images", "train_labels", "test_images", "test_labels"),
                                   ("train_images", "train_labels", "val_images", "val_labels")])
def test_npz_with_both_parts(names: tuple[str, ...], gray: bool, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7) if gray else (5, 6, 7, 3), np.uint8)
    content = dict(zip(names, (pixels, np.arange(5)[:, None] % 2, pixels[:2], np.array([1, 0])), strict=True))
    np.savez(tmp_path / "set.npz", **content)
    train, test = (load_dataset(tmp_path / "set.npz", split) for split in ("train", "test"))
    assert train.images.shape == (5, 1 if gray else 3, 6, 7) and train.labels.tolist() == [0, 1, 0, 1, 0]
    assert len(test) == 2 and test.labels.tolist() == [1, 0] and not has_split(tmp_path / "set.npz", "unlabeled")
    expected = pixels[2] if gray else pixels[2].transpose(2, 0, 1)
    assert np.array_equal(train.images[2].squeeze(), expected.squeeze())
    assert np.array_equal(read_images(tmp_path / "set.npz").images, train.images)


def test_npz_without_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", np.zeros((3, 4, 4), np.uint8), np.array([[2], [0], [1]]))
    assert read_images(tmp_path / "set.npz").labels.tolist() == [2, 0, 1]
    np.savez(tmp_path / "set.npz", x_train=np.zeros((2, 4, 4), np.uint8), y_train=np.array(["owl", "cat"]))
    found = load_dataset(tmp_path / "set.npz", "train")
    assert found.classes == ("cat", "owl") and found.labels.tolist() == [1, 0]
    with pytest.raises(UserError, match="no split 'test'.*--test-fraction"):
        load_dataset(tmp_path / "set.npz", "test")


# ------------------------------------------------------------------------------------------------------------ splits

@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
@pytest.mark.parametrize("container", ["folder", "zip", "zips", "npz"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_test_images_follow_the_names_of_the_training_images(name: str, container: str, tmp_path: Path) -> None:
    write(tmp_path / "set" / "train", [], ("airplane", "bird", "ship"))
    write(tmp_path / "set" / name, [], ("bird", "ship"))
    path = tmp_path / "set"
    if container == "zip":
        path = zipped(path, tmp_path / "set.zip")
    elif container in ("zips", "npz"):
        path = tmp_path / "made"
        path.mkdir()
        for part in ("train", name):
            images = read_images(tmp_path / "set" / part)  # numbers of its own
            (write_zip if container == "zips" else write_npz)(images, path / f"{part}.{container.rstrip('s')}")
    test = load_dataset(path, "test")
    assert test.classes == ("airplane", "bird", "ship") and test.labels.tolist() == [1, 1, 2, 2]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sets_that_are_converted_apart_can_be_compared(tmp_path: Path) -> None:
    write(tmp_path / "a", [], ("airplane", "bird", "ship"))
    write(tmp_path / "b", [], ("bird", "ship"))
    for name in "ab":
        convert(tmp_path / name, tmp_path / f"{name}.zip")
    train, test = (read_images(tmp_path / f"{name}.zip") for name in "ab")
    assert test.labels.tolist() == [0, 0, 1, 1] and test.classes == ("bird", "ship")
    assert with_names(test, train.classes, "b.zip").labels.tolist() == [1, 1, 2, 2]
    # As test/ beside train/ it gets the training set's numbers at once.
    (tmp_path / "set").mkdir()
    (tmp_path / "a").rename(tmp_path / "set" / "train")
    (tmp_path / "b").rename(tmp_path / "set" / "test")
    convert(tmp_path / "set" / "test", tmp_path / "c.zip")
    assert read_images(tmp_path / "c.zip").labels.tolist() == [1, 1, 2, 2]


def test_matching() -> None:
    labels = np.array([0, 1, -1, 1])
    assert match_labels(labels, ("b", "c"), ("a", "b", "c"), "set").tolist() == [1, 2, -1, 2]
    assert match_labels(labels, ("0", "1"), ("a", "b", "c"), "set").tolist() == labels.tolist()
    assert match_labels(labels, ("b", "c", "never seen"), ("c", "b"), "set").tolist() == [1, 0, -1, 0]
    with pytest.raises(UserError, match=r"set: the class 'birb' is not one of .*did you mean \"bird\".*\(bird, cat\)"):
        match_labels(labels, ("birb", "cat"), ("bird", "cat"), "set")


def test_a_folder_is_divided_by_a_seed(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name, count in (("cat", 10), ("owl", 5)):
        flat(folder / name, "abcdefghij"[:count])
    flags = [f"--source={folder}", "--test-fraction=0.2"]
    for dest in ("one", "two"):
        main([*flags, f"--dest={tmp_path / dest}", "--seed=1"])
    train, test = (load_dataset(tmp_path / "one", split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [8, 4] and np.bincount(test.labels).tolist() == [2, 1]
    assert train.classes == test.classes == ("cat", "owl")
    whole = {(label, int(image.max())) for images in (train, test) for image, label in zip(
        images.images, images.labels.tolist(), strict=True)}
    assert len(whole) == 15
    assert (tmp_path / "one" / "test.zip").read_bytes() == (tmp_path / "two" / "test.zip").read_bytes()
    main([*flags, f"--dest={tmp_path / 'one'}", "--seed=1"])  # complete
    with pytest.raises(UserError, match="name a folder in place of"):
        main([*flags, f"--dest={tmp_path}/x.zip"])
    with pytest.raises(UserError, match="images without a class"):
        main([f"--source={flat(tmp_path / 'flat')}", "--test-fraction=0.5", f"--dest={tmp_path}/y"])


# ---------------------------------------------------------------------------------------------- one place for classes

# Whoever lists folders by itself, and why that numbers no classes.
LISTS_FOLDERS = {
    "shared/data/classes.py": "decides which folder is which class",
    "shared/data/listing.py": "finds the images", "shared/training/files.py": "walks folders for both",
    "shared/data/cache.py": "its own entries", "shared/data/writers.py": "whether a folder is empty",
    "shared/training/fingerprint.py": "the content of all files", "shared/report/tables.py": "runs",
    "MetaSemi/imagenet/im2rec.py": "class_numbers, but for folders in folders MXNet's order",
    "MetaSemi/imagenet/split_imagenet.py": "draws inside a class", "EDM/training/config.py": "runs",
    "EDM/latent/latents.py": "latents, one file an image", "TorchSSL/predict.py": "its own output",
    "TorchSSL/core/plan.py": "whether a folder is empty",
    "DDAE/ddae/data.py": "tiny-imagenet, refused unless all of its 200 folders are there"}
LISTING = re.compile(r"os\.walk\(|scandir\(|\.iterdir\(|listdir\(|ImageFolder\(|walk_folders\(")
# Whoever gives names numbers by their order.
NUMBERS_NAMES = {
    "shared/data/classes.py": "the one place", "MetaSemi/imagenet/im2rec.py": "MXNet's order, or that of --classes",
    "DDAE/ddae/data.py": "tiny-imagenet", "EDM/imagenet/experiment/images.py": "positions of images",
    "TorchSSL/suggest_labels.py": "positions of images", "TorchSSL/encoders/images.py": "positions of images",
    "TorchSSL/audit_labels.py": "the classes of a set"}
NUMBERING = re.compile(r"enumerate\(sorted\(|\{\w+: \w+ for \w+, \w+ in enumerate\(|LabelEncoder\(")


@pytest.mark.parametrize(("pattern", "known"), [(LISTING, LISTS_FOLDERS), (NUMBERING, NUMBERS_NAMES)])
def test_no_other_file_turns_names_into_classes(pattern: re.Pattern, known: dict[str, str]) -> None:
    """A new reader or writer goes through shared/data/classes.py; another reason is one more line in the table."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    product = [name for name in files.split() if not name.startswith("tests/") and (ROOT / name).exists()]
    found = {name for name in product if pattern.search((ROOT / name).read_text(encoding="utf-8"))}
    assert not found - set(known), "does it decide which name is which class?"
