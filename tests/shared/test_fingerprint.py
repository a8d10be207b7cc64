"""A fingerprint is the content and nothing else; a record tells what an output was made from."""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.cli import UserError
from shared.data.images import ImageSet, read_images
from shared.training import fingerprint as module
from shared.training.fingerprint import fingerprint, fingerprint_arrays, fingerprints
from shared.training.record import Record


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read, with digests remembered however new a file is."""
    read: list[Path] = []
    whole = module._digest_file
    monkeypatch.setattr(module, "_digest_file", lambda path, *more: read.append(path) or whole(path, *more))
    monkeypatch.setattr(module, "SETTLED_NS", -1 << 62)
    return read


def tree(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_neither_place_nor_time_counts(tmp_path: Path) -> None:
    first = tree(tmp_path / "a", x="1", sub__y="2")
    shutil.copytree(first, tmp_path / "b")
    os.utime(tmp_path / "b" / "x", (0, 0))
    tree(tmp_path / "b", **{".lock": "", ".record.json": "{}", ".hidden__z": "3"})
    assert fingerprint(first) == fingerprint(tmp_path / "b")
    assert fingerprint(first / "x") == fingerprint(tmp_path / "b" / "x")


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "x").write_text("3"),
    lambda folder: (folder / "x").rename(folder / "z"),
    lambda folder: (folder / "new").write_text(""),
    lambda folder: (folder / "sub" / "y").unlink(),
    lambda folder: (folder / "sub" / "y").rename(folder / "y"),
])
def test_every_change_of_a_folder_counts(tmp_path: Path, change, files_read: list[Path]) -> None:
    folder = tree(tmp_path / "a", x="1", sub__y="2")
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, files_read: list[Path]) -> None:
    file = tmp_path / "x"
    file.write_text("1")
    first = fingerprint(file)
    assert fingerprint(file) == first and files_read == [file]
    state = file.stat()
    file.write_text("2")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # the size and the time of before
    assert fingerprint(file) != first and len(files_read) == 2
    replaced = tmp_path / "y"
    replaced.write_text("1")
    replaced.replace(file)
    assert fingerprint(file) == first and len(files_read) == 3


def test_a_file_of_this_moment_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x").write_text("1")
    fingerprint(tmp_path / "x")
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "a", "a b", "a b c", "\x00"])
def test_a_damaged_memory_is_read_anew(tmp_path: Path, cache: Path, files_read: list[Path], content: str) -> None:
    (tmp_path / "x").write_text("1")
    first = fingerprint(tmp_path / "x")
    memory, = (cache / ".digests").iterdir()
    memory.write_text(content)
    assert fingerprint(tmp_path / "x") == first and len(files_read) == 2


def test_without_a_cache_folder(tmp_path: Path, cache: Path, files_read: list[Path]) -> None:
    cache.write_text("a file")
    (tmp_path / "x").write_text("1")
    assert fingerprint(tmp_path / "x") == fingerprint(tmp_path / "x")


def read_often(path: Path, count: int) -> None:
    assert len({fingerprint(path) for _ in range(count)}) == 1


def test_processes_that_remember_at_the_same_time(tmp_path: Path, files_read: list[Path]) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(10_000))
    processes = [multiprocessing.get_context("fork").Process(target=read_often, args=(file, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--data: cannot read {tmp_path}/absent: No such file"):
        fingerprints({"--data": tmp_path / "absent", "--other": None})


def test_images_are_pixels_labels_and_class_names(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    pixels, labels = chance.integers(0, 256, (6, 3, 4, 4), np.uint8), np.arange(6) % 2
    images = ImageSet(pixels, labels, ("a", "b"), "x")
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels, classes=["a", "b"])
    digests = {fingerprints({"--data": found})["--data"] for found in (
        images, images.subset(np.arange(6)), read_images(tmp_path / "set.npz"))}
    assert len(digests) == 1
    for other in (ImageSet(pixels, labels, ("a", "c"), "x"), ImageSet(pixels, 1 - labels, ("a", "b"), "x"),
                  ImageSet(pixels[::-1], labels, ("a", "b"), "x"), images.subset([0, 1, 2, 3, 4])):
        assert fingerprints({"--data": other})["--data"] not in digests


def test_mapped_images_are_read_once(tmp_path: Path, files_read: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((6, 3, 4, 4), np.uint8), labels=np.arange(6))
    images, arrays = read_images(tmp_path / "set.npz"), []
    whole = module._digest_array
    monkeypatch.setattr(module, "_digest_array", lambda array: arrays.append(array.shape) or whole(array))
    for _ in range(3):
        fingerprint_arrays(images.images)
    assert arrays == [images.images.shape]
    assert fingerprint_arrays(images.images[:3]) != fingerprint_arrays(images.images[1:])


@pytest.mark.parametrize("array", [np.float64(3), np.zeros(0), np.zeros((3, 0)), np.arange(5.0)[::2]], ids=str)
def test_odd_arrays(array: np.ndarray) -> None:
    assert fingerprint_arrays(np.asarray(array)) == fingerprint_arrays(np.array(array))
    assert fingerprint_arrays(np.asarray(array)) != fingerprint_arrays(np.asarray(array, np.float32))


# ----------------------------------------------------------------------------------------------------------- records

def make(output: Path, source: Path, resolution: int = 32, overwrite: bool = False) -> bool:
    """A program: return whether it had to do something."""
    record = Record(output, {"resolution": resolution}, {"--source": source, "--labels": None})
    if record.is_complete(overwrite):
        return False
    text = f"{source.read_text()} {resolution}"
    if output.suffix:
        output.write_text(text)
    else:
        tree(output, a=text)
    record.write()
    return True


@pytest.mark.parametrize("name", ["file.txt", "folder"])
def test_the_same_call_again_does_nothing(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    source, output = tmp_path / "source", tmp_path / name
    source.write_text("1")
    assert make(output, source) and not make(output, source)
    assert capsys.readouterr().out == f"complete: {output}\n"
    shutil.copy(source, tmp_path / "copy")
    assert not make(output, tmp_path / "copy")


@pytest.mark.parametrize("name", ["file.txt", "folder"])
def test_another_input_or_setting_is_named(tmp_path: Path, name: str) -> None:
    source, output = tmp_path / "source", tmp_path / name
    source.write_text("1")
    make(output, source)
    before = fingerprint(output)
    with pytest.raises(UserError, match="resolution was 32, is 64.*--overwrite"):
        make(output, source, resolution=64)
    source.write_text("2")
    with pytest.raises(UserError, match="the content of --source has changed"):
        make(output, source)
    assert fingerprint(output) == before
    assert make(output, source, overwrite=True) and not make(output, source, overwrite=True)


@pytest.mark.parametrize("name", ["file.txt", "folder"])
@pytest.mark.parametrize("harm", ["output removed", "output changed", "record removed", "never completed"])
def test_what_is_not_whole_is_made_again(tmp_path: Path, name: str, harm: str) -> None:
    source, output = tmp_path / "source", tmp_path / name
    source.write_text("1")
    make(output, source)
    record = Record(output, {"resolution": 32}, {"--source": source})
    if harm == "output removed":
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    elif harm == "output changed":
        (output / "a" if output.is_dir() else output).write_text("")
    elif harm == "record removed":
        record.path.unlink()
    else:
        record.begin()
    assert make(output, source)


def test_a_damaged_record(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out.txt"
    source.write_text("1")
    make(output, source)
    (tmp_path / ".out.txt.record.json").write_text("{")
    with pytest.raises(UserError, match=r"\.out\.txt\.record\.json: cannot be read; remove it"):
        make(output, source)


def test_a_record_says_what_was_made_from_what(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "folder"
    source.write_text("1")
    make(output, source)
    content = json.loads((output / ".record.json").read_text())
    assert content["settings"] == {"resolution": 32} and content["inputs"] == {"--source": fingerprint(source)}
    assert content["output"] == fingerprint(output) and content["program"]
