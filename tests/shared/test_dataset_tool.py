"""The converter: round trips, transforms, labels, and mistakes that touch nothing."""
from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import EDM.dataset_tool
from EDM.dataset_tool import convert, main, transformed
from shared.cli import UserError
from shared.data.images import ImageSet, read_images
from shared.data.writers import write_folder, write_npz, write_zip
from tests.golden.data_sources import write_cifar_archive
from tests.shared.programs import one_line_error, run

UNLABELLED = pytest.mark.filterwarnings("ignore:.*(no labels|left out)")


def random_set(count: int, channels: int = 3, side: int = 8, classes: int = 4, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    return ImageSet(rng.integers(0, 256, (count, channels, side, side), np.uint8), np.arange(count) % classes,
                    tuple(map(str, range(classes))), "set")


def quietly(*args, **options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        convert(*args, **options)


def error_of(*args, **options) -> str:
    with pytest.raises(UserError) as raised:
        quietly(*args, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 30), channels=st.sampled_from([1, 3]), side=st.sampled_from([1, 2, 8, 16]),
       source=st.sampled_from(["zip", "npz", "folder"]), dest=st.sampled_from(["out.zip", "out"]),
       limit=st.none() | st.integers(1, 40))
def test_pixels_and_labels_survive(count: int, channels: int, side: int, source: str, dest: str, limit: int | None,
                                   tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tool")
    images = random_set(count, channels, 4 if source == "npz" and side < 4 else side)
    path = folder / {"zip": "a.zip", "npz": "a.npz", "folder": "a"}[source]
    (write_npz if source == "npz" else write_zip)(images, path)
    quietly(path, folder / dest, max_images=limit)
    found = read_images(folder / dest)
    np.testing.assert_array_equal(found.images, images.images[:limit])
    np.testing.assert_array_equal(found.labels, images.labels[:limit])


@pytest.mark.parametrize("form", ["npz", "zip"])
def test_any_number_of_cores_gives_the_same_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / f"a.{form}"
    (write_npz if form == "npz" else write_zip)(random_set(3 * EDM.dataset_tool.CHUNK + 7), source)
    written = []
    for cores in ("1", "2", "3"):
        monkeypatch.setenv("FEWLABEL_CORES", cores)
        convert(source, tmp_path / "out.zip", resolution=(4, 4) if form == "zip" else None)
        written.append((tmp_path / "out.zip").read_bytes())
    assert written[0] == written[1] == written[2]


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), out=st.tuples(st.integers(1, 24), st.integers(1, 24)),
       transform=st.sampled_from([None, "center-crop", "center-crop-wide"]), gray=st.booleans())
def test_transforms(height: int, width: int, out: tuple[int, int], transform: str | None, gray: bool) -> None:
    out = (max(out), min(out)) if transform == "center-crop-wide" else out
    pixels = np.random.default_rng(0).integers(0, 256, (height, width) if gray else (height, width, 3), np.uint8)
    found = transformed(Image.fromarray(pixels), transform, out)
    if transform is not None and gray:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    out_width, out_height = out
    if transform == "center-crop":
        side = min(height, width)
        pixels = pixels[(height - side) // 2:][:side, (width - side) // 2:][:, :side]
    if transform == "center-crop-wide":
        rows = round(out_width * height / width)
        if width < out_width or rows < out_height:
            assert found is None
            return
        pixels = pixels[(height - rows) // 2:(height + rows) // 2] if rows < height else pixels
        scaled = Image.fromarray(np.ascontiguousarray(pixels)).resize(out, Image.Resampling.LANCZOS)
        canvas = np.zeros((out_width, out_width, 3), np.uint8)
        canvas[(out_width - out_height) // 2:][:out_height] = scaled
        np.testing.assert_array_equal(np.asarray(found), canvas)
        return
    expected = Image.fromarray(np.ascontiguousarray(pixels))
    expected = expected if expected.size == out else expected.resize(out, Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


class TestLabels:
    def folder(self, tmp_path: Path, names: list[str]) -> Path:
        for name in names:
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "src" / name)
        return tmp_path / "src"

    def test_integer_folders_count_by_value(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path, [f"{c}/a.png" for c in range(12)])
        convert(source, tmp_path / "out.zip")
        assert sorted(read_images(tmp_path / "out.zip").labels.tolist()) == list(range(12))
        with zipfile.ZipFile(tmp_path / "out.zip") as archive:  # in path order, where 10 precedes 2
            labels = [label for _, label in json.loads(archive.read("dataset.json"))["labels"]]
        assert labels == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]

    def test_no_labels_is_said(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path, ["a.png", "b.png"])
        with pytest.warns(UserWarning, match="no labels, so train.py --cond=1 cannot"):
            convert(source, tmp_path / "out.zip")

    def test_partial_labels_are_dropped_and_said(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path, ["a.png", "b.png"])
        (source / "dataset.json").write_text('{"labels": [["a.png", 3]]}')
        with pytest.warns(UserWarning, match="1 of 2 images have no label, so all labels are dropped"):
            convert(source, tmp_path / "out.zip")
        with zipfile.ZipFile(tmp_path / "out.zip") as archive:
            assert archive.read("dataset.json") == b'{"labels": null}'

    def test_vectors(self, tmp_path: Path) -> None:
        source = self.folder(tmp_path, ["a.png"])
        (source / "dataset.json").write_text('{"labels": [["a.png", [0.5, 1]]]}')
        convert(source, tmp_path / "out.zip")
        assert read_images(tmp_path / "out.zip").vectors.tolist() == [[0.5, 1]]

    @pytest.mark.parametrize("labels", [np.arange(20) % 9, np.arange(20) % 9 + 1], ids=["no top class", "no class 0"])
    def test_labels_of_an_archive_span_all_classes(self, labels: np.ndarray, tmp_path: Path) -> None:
        """Those of all its images, also where --max-images takes the first of them; nothing is written."""
        write_cifar_archive(tmp_path / "cifar-10-python.tar.gz", np.zeros((20, 3072), np.uint8), labels)
        with pytest.warns(UserWarning, match="20 images in place of 50000"), \
                pytest.raises(UserError, match="no image of class [09]; expected labels from 0 to 9"):
            convert(tmp_path / "cifar-10-python.tar.gz", tmp_path / "out.zip", max_images=3)
        assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]

    def test_other_missing_classes_are_said(self, tmp_path: Path) -> None:
        labels = np.where(np.arange(20) % 10 == 4, 5, np.arange(20) % 10)
        write_cifar_archive(tmp_path / "cifar-10-python.tar.gz", np.zeros((20, 3072), np.uint8), labels)
        with pytest.warns(UserWarning, match="no image of class 4"):
            convert(tmp_path / "cifar-10-python.tar.gz", tmp_path / "out.zip")
        assert read_images(tmp_path / "out.zip").labels.tolist() == labels.tolist()


def test_palette_and_bilevel_images_are_converted(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "src" / "a.png")
    quietly(tmp_path / "src", tmp_path / "out.zip")
    assert read_images(tmp_path / "out.zip").images[0, :, 0, 0].tolist() == [200, 100, 50]
    Image.new("1", (8, 8), 1).save(tmp_path / "src" / "a.png")
    quietly(tmp_path / "src", tmp_path / "out2.zip")
    assert read_images(tmp_path / "out2.zip").images.tolist() == [[[[255] * 8] * 8]]


@UNLABELLED
def test_skipped_images_leave_gaps(tmp_path: Path) -> None:
    for name, size in (("a.png", (32, 32)), ("b.png", (4, 4)), ("c.png", (20, 20))):
        (tmp_path / "src").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "src" / name)
    with pytest.warns(UserWarning, match="left out 1 images smaller"):
        convert(tmp_path / "src", tmp_path / "out.zip", transform="center-crop-wide", resolution=(16, 8))
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png", "00000/img00000002.png", "dataset.json"]


@UNLABELLED
def test_lmdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package lmdb is optional, so a stand-in with the few calls that are used takes its place."""
    import sys
    from types import SimpleNamespace

    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(stream, "webp", lossless=True)
    values = [stream.getvalue()] * 200
    values[150] = b"damaged"

    class Transaction:
        def __enter__(self) -> Transaction:
            return self

        def __exit__(self, *_: object) -> None: ...

        def cursor(self) -> list:
            return list(enumerate(values))

    environment = SimpleNamespace(begin=lambda buffers: Transaction(), stat=lambda: {"entries": len(values)})
    monkeypatch.setitem(sys.modules, "lmdb", SimpleNamespace(open=lambda *_, **__: environment, Error=OSError))
    (tmp_path / "church_lmdb").mkdir()
    with pytest.warns(UserWarning, match="entry 150"):
        convert(tmp_path / "church_lmdb", tmp_path / "out.zip")
    found = read_images(tmp_path / "out.zip")
    assert len(found) == 199 and found.images[-1, :, 3, 3].tolist() == [9, 8, 7]
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "pip install lmdb" in error_of(tmp_path / "church_lmdb", tmp_path / "out2.zip")


class TestMistakes:
    """One line, and the destination stays as it was."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        write_folder(random_set(8), tmp_path / "src")
        return tmp_path / "src"

    def test_late_error_leaves_nothing(self, source: Path, tmp_path: Path) -> None:
        (source / "3" / "zzz.png").write_bytes(b"damaged")
        (tmp_path / "old.zip").write_bytes(b"precious")
        for dest in ("new.zip", "new", "old.zip"):
            assert "zzz.png" in error_of(source, tmp_path / dest)
        assert sorted(f.name for f in tmp_path.iterdir()) == ["old.zip", "src"]
        assert (tmp_path / "old.zip").read_bytes() == b"precious"

    def test_checks(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.zip"
        assert "power-of-two. Got 12x12; pass --resolution=8x8" in error_of(source, out, resolution=(12, 12))
        assert "Got 16x8" in error_of(source, out, resolution=(16, 8))
        assert "--resolution=WxH" in error_of(source, out, transform="center-crop")
        assert "is not wide" in error_of(source, out, resolution=(8, 16), transform="center-crop-wide")
        Image.new("L", (8, 8)).save(source / "0" / "000000.png")
        assert "1/3" in error_of(source, out)
        assert not out.exists()

    def test_sources(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "x.rar").write_bytes(b"")
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"")
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
        (tmp_path / "x.zip").write_bytes(b"PK")
        for name, expected in (("nowhere", "Missing input file"), ("empty", "No image files"), ("x.rar", "Unknown"),
                               ("train-images-idx3-ubyte.gz", "train-labels"), ("x.zip", "not a ZIP"),
                               ("cifar-10-python.tar.gz", "not a tar archive")):
            assert expected in error_of(tmp_path / name, tmp_path / "out.zip")
        assert not (tmp_path / "out.zip").exists()

    @pytest.mark.parametrize("script", ["EDM/dataset_tool.py", "TorchSSL/dataset_tool.py"])
    def test_command_line(self, script: str, source: Path, tmp_path: Path) -> None:
        dest = tmp_path / "out.zip"
        assert "-resolution" in run(script, "--help").stdout
        run(script, f"--source={source}", f"--dest={dest}", "--max-images=5", "--resolution=4,4")
        assert read_images(dest).images.shape == (5, 3, 4, 4)
        before = dest.read_bytes()
        for args, expected in ((["--resolution=4by4"], "4x4"), (["--max-images=0"], "--max-images"),
                               (["--dest="], "--dest"), (["--transform=crop"], "--transform"),
                               (["--sauce=x"], "--sauce"),
                               (["--resolution=8x8"], "give --overwrite"),
                               (["--resolution=12x12", "--overwrite"], "power-of-two")):
            message = one_line_error(run(script, f"--source={source}", f"--dest={dest}", *args, status=2))
            assert expected in message or "32x32" in message
        assert dest.read_bytes() == before

    def test_again(self, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        """The same command does nothing; with another source it says so, and overwrites when told to."""
        command = [f"--source={source}", f"--dest={tmp_path / 'out.zip'}"]
        main(command)
        made = os.stat(tmp_path / "out.zip")
        main(command)
        assert "complete: " in capsys.readouterr().out and os.stat(tmp_path / "out.zip").st_ino == made.st_ino
        (source / "0" / "000000.png").write_bytes((source / "0" / "000004.png").read_bytes())
        with pytest.raises(UserError, match="the content of --source has changed.* --overwrite"):
            main(command)
        main([*command, "--overwrite"])
        found = read_images(tmp_path / "out.zip").images
        np.testing.assert_array_equal(found[0], found[1])

    def test_destination(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "x").write_text("")
        assert "must be empty" in error_of(source, tmp_path / "full")
        (tmp_path / "none").mkdir()
        convert(source, tmp_path / "none")
        assert len(read_images(tmp_path / "none")) == 8
        (tmp_path / "file").write_text("")
        assert "cannot create the folder" in error_of(source, tmp_path / "file" / "out.zip")
