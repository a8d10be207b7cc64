"""Which folder is which class: the same for folders, ZIPs, the converter and ImageNet, whatever lies beside them."""
from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from EDM.dataset_tool import convert
from shared.cli import UserError
from shared.data.classes import class_folders, class_numbers, classes_by_folder
from shared.data.images import ImageSet, read_images
from shared.data.photographs import list_photographs

EXTRAS = {
    "nothing": [], "an empty folder": ["aaa_empty/"], "a folder of notes": ["about/readme.txt"],
    "a hidden folder": [".ipynb_checkpoints/x.png"], "what macOS leaves": ["__MACOSX/cat/._1.png", "cat/._1.png"],
    "thumbnails": ["@eaDir/1.png", "cat/@eaDir/1.png"],
}


def write(folder: Path, extras: list[str], names: tuple[str, ...] = ("dog", "cat")) -> Path:
    """Write two images of each class, whose gray level is 10 times the place of their class in `names` plus one."""
    for name in extras:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(b"no image")
    for level, name in enumerate(names, 1):
        for image in (1, 2):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 10 * level).save(folder / name / f"{image}.png")
    return folder


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("extra", EXTRAS)
def test_all_containers_and_readers_agree(extra: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", EXTRAS[extra])
    archive = zipped(folder, tmp_path / "set.zip")
    for source in (folder, archive):
        found = read_images(source)
        assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 0, 1, 1]
        assert found.images.max((1, 2, 3)).tolist() == [20, 20, 10, 10]
        convert(source, tmp_path / "out.zip")
        assert read_images(tmp_path / "out.zip").labels.tolist() == [0, 0, 1, 1]
    assert class_folders(folder) == ["cat", "dog"]
    listed = list_photographs(folder)
    assert listed.classes == ("cat", "dog") and [Path(file).parent.name for file in listed.files] == [
        "cat", "cat", "dog", "dog"]


def test_numbers_are_the_class_of_that_number() -> None:
    assert class_numbers(["10", "9", "2"], "set") == {"2": 2, "9": 9, "10": 10}
    assert class_numbers(["10", "9", "b"], "set") == {"10": 0, "9": 1, "b": 2}
    with pytest.raises(UserError, match="same class"):
        class_numbers(["1", "01"], "set")


def test_the_folders_of_the_converter_are_no_classes() -> None:
    numbered = [f"{index // 1000:05d}/img{index:08d}.png" for index in (0, 999, 1000)]
    assert classes_by_folder(numbered, "set") is None
    assert classes_by_folder([*numbered, "00001/other.png"], "set").labels.tolist() == [0, 0, 1, 1]


def test_images_beside_the_folders(tmp_path: Path) -> None:
    """The converter counts them as a class of their own, as published; others leave them out and say so."""
    names = ["a/x.png", "top.png"]
    assert classes_by_folder(names, "set").labels.tolist() == [0, -1]
    assert classes_by_folder(names, "set", loose=True).labels.tolist() == [1, 0]
    folder = write(tmp_path / "set", [])
    Image.new("L", (4, 4)).save(folder / "top.png")
    with pytest.warns(UserWarning, match="1 images that lie in no class folder are left out"):
        assert read_images(folder).labels.tolist() == [0, 0, 1, 1]


def test_the_same_content_has_the_same_fingerprint(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [])
    images, other = read_images(folder), read_images(zipped(folder, tmp_path / "other.zip"))
    assert images.fingerprint == other.fingerprint
    changed = np.array(images.images)
    changed[0, 0, 0, 0] ^= 1
    for pixels, labels, classes in ((changed, images.labels, images.classes),
                                    (images.images, images.labels[::-1].copy(), images.classes),
                                    (images.images, images.labels, ("a", "b"))):
        assert images.fingerprint != ImageSet(pixels, labels, classes, "set").fingerprint
