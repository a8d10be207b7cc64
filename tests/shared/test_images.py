"""Image sets: what is read, what is refused, what the cache promises."""
from __future__ import annotations

import io
import json
import multiprocessing
import os
import stat
import struct
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import shared.data.images
from shared.cli import UserError
from shared.data.images import ImageSet, read_images
from shared.data.writers import encode_pngs, write_folder, write_npz, write_zip


def png(value: int | tuple[int, ...] = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    return saved(Image.new(mode, size, value))


def saved(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="png")
    return stream.getvalue()


def write_images(folder: Path, files: dict[str, bytes], labels: object = None) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if labels is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def zipped(path: Path, files: dict[str, bytes], labels: object = None, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def error_of(path: Path, **options) -> str:
    with pytest.raises(UserError) as raised:
        read_images(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


image_sets = st.builds(
    lambda n, c, h, w, classes, seed: ImageSet(
        np.random.default_rng(seed).integers(0, 256, (n, c, h, w), np.uint8),
        np.random.default_rng(seed).integers(0, classes, n), tuple(map(str, range(classes))), "set"),
    n=st.integers(1, 20), c=st.sampled_from([1, 3]), h=st.integers(1, 9), w=st.integers(1, 9),
    classes=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=image_sets, form=st.sampled_from(["zip", "folder", "npz", "classes"]))
def test_what_is_written_is_read(images: ImageSet, form: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("round") / {"zip": "a.zip", "npz": "a.npz"}.get(form, "a")
    {"zip": write_zip, "folder": write_zip, "npz": write_npz, "classes": write_folder}[form](images, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class may have no image
        found = read_images(path)
    order = np.argsort(images.labels, kind="stable") if form == "classes" else np.arange(len(images))
    np.testing.assert_array_equal(found.images, images.images[order])
    np.testing.assert_array_equal(found.labels, images.labels[order])
    assert found.images.dtype == np.uint8 and found.labels.dtype == np.int64


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(3, 5), (200, 150)])  # the larger one takes more than one block of the format
def test_encoded_pngs(channels: int, size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, channels, *size), np.uint8)
    for file, image in zip(encode_pngs(images), images, strict=True):
        found = Image.open(io.BytesIO(file))
        assert found.mode == ("L", "LA", "RGB", "RGBA")[channels - 1]
        np.testing.assert_array_equal(np.asarray(found).reshape(*size, channels).transpose(2, 0, 1), image)


def test_integer_folders_are_the_classes_of_that_number(tmp_path: Path) -> None:
    folder = write_images(tmp_path, {f"{c}/a.png": png(c) for c in range(12)})
    found = read_images(folder, num_classes=12)
    assert found.labels.tolist() == list(range(12)) and found.images[:, 0, 0, 0].tolist() == list(range(12))
    assert "only 11 classes" in error_of(folder, num_classes=11)
    write_images(tmp_path, {"007/a.png": png()})
    assert "same class" in error_of(tmp_path)


def test_missing_integer_folder_leaves_the_others_their_number(tmp_path: Path) -> None:
    write_images(tmp_path, {"0/a.png": png(), "2/b.png": png()})
    with pytest.warns(UserWarning, match="no image of class 1"):
        assert read_images(tmp_path).labels.tolist() == [0, 2]
    write_images(tmp_path, {"1998123/a.png": png()})
    assert "number them from 0" in error_of(tmp_path)


def test_named_folders_follow_the_training_set(tmp_path: Path) -> None:
    write_images(tmp_path, {"dog/b.png": png(1), "cat/a.JPG": png(2)})
    assert read_images(tmp_path).classes == ("cat", "dog")
    with pytest.warns(UserWarning, match="no image of class bird"):
        assert read_images(tmp_path, classes=["dog", "bird", "cat"]).labels.tolist() == [2, 0]
    assert "'dog' is not one of" in error_of(tmp_path, classes=["cat"])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"])
def test_every_format(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    Image.new("L" if suffix == "pgm" else "RGB", (8, 6), 77).save(tmp_path / "a" / f"x.{suffix}")
    found = read_images(tmp_path)
    assert found.images.shape == (1, 1 if suffix == "pgm" else 3, 6, 8)
    assert abs(int(found.images[0, 0, 3, 3]) - 77) <= 2


def test_channels(tmp_path: Path) -> None:
    gray, palette = png(9, mode="L"), io.BytesIO()
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(palette, "png")
    assert read_images(write_images(tmp_path / "gray", {"a.png": gray})).channels == 1
    assert read_images(tmp_path / "gray", channels=3).images[0, :, 0, 0].tolist() == [9, 9, 9]
    mixed = read_images(write_images(tmp_path / "mixed", {"a.png": gray, "b.png": palette.getvalue()}))
    assert mixed.images[:, :, 0, 0].tolist() == [[9, 9, 9], [200, 100, 50]]


def test_more_images_than_one_worker_takes(tmp_path: Path) -> None:
    count = 3 * shared.data.images.CHUNK + 5
    files = {f"{i:05d}.png": saved(Image.fromarray(np.full((2, 2), i % 256, np.uint8))) for i in range(count)}
    found = read_images(zipped(tmp_path / "many.zip", files, method=zipfile.ZIP_DEFLATED))
    assert found.images[:, 0, 1, 1].tolist() == [i % 256 for i in range(count)]
    files["00700.png"] = png((1, 2, 3), (2, 2))
    assert read_images(zipped(tmp_path / "colour.zip", files)).images[700, :, 0, 0].tolist() == [1, 2, 3]
    files["00701.png"] = b"nothing"
    assert "00701.png: cut short or not an image" in error_of(zipped(tmp_path / "bad.zip", files))


class TestLabels:
    FILES = {"a.png": png(), "b.png": png(), "c.png": png()}

    def labels(self, tmp_path: Path, labels: object) -> list[int]:
        return read_images(zipped(tmp_path / "set.zip", self.FILES, labels)).labels.tolist()

    def test_whole(self, tmp_path: Path) -> None:
        assert self.labels(tmp_path, [["c.png", 4], ["a.png", 0], ["b.png", 2]]) == [0, 2, 4]

    @pytest.mark.parametrize("labels", [[["a.png", 1]], [["a.png", 1], ["b.png", None], ["c.png", None]]])
    def test_partial(self, tmp_path: Path, labels: object) -> None:
        with pytest.warns(UserWarning, match=r"2 of 3 images have no label .*b\.png"):
            assert self.labels(tmp_path, labels) == [1, -1, -1]

    @pytest.mark.parametrize("labels", [None, []])
    def test_none(self, tmp_path: Path, labels: object) -> None:
        assert self.labels(tmp_path, labels) == [-1, -1, -1]

    @pytest.mark.parametrize("label", [1.5, 2.0, "cat", -1, True, 10**9, {"a": 1}])
    def test_wrong(self, tmp_path: Path, label: object) -> None:
        path = zipped(tmp_path / "set.zip", self.FILES, [["a.png", 1], ["b.png", label], ["c.png", 0]])
        assert "the label of b.png" in error_of(path)

    def test_vectors(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "set.zip", self.FILES, [["a.png", [0, 1.5]], ["b.png", [1, 1]], ["c.png", [2, 2]]])
        assert read_images(path).vectors.tolist() == [[0, 1.5], [1, 1], [2, 2]]
        for wrong in ([["a.png", [0, 1]], ["b.png", 1], ["c.png", 0]], [["a.png", [0, 1]]],
                      [["a.png", [0]], ["b.png", [1, 2]], ["c.png", [1]]]):
            assert "same length" in error_of(zipped(tmp_path / "wrong.zip", self.FILES, wrong))

    @pytest.mark.parametrize("text", ["{", "[]", "null", '{"labels": [1]}', '{"labels": 3}',
                                      '{"labels": [["a", 1, 2]]}'])
    def test_not_the_form(self, tmp_path: Path, text: str) -> None:
        (write_images(tmp_path, self.FILES) / "dataset.json").write_text(text)
        assert "dataset.json" in error_of(tmp_path)


class TestBadInput:
    def test_absent_or_empty(self, tmp_path: Path) -> None:
        assert "no such file" in error_of(tmp_path / "nowhere")
        assert "No image files found" in error_of(tmp_path)
        (tmp_path / "text.txt").write_text("x")
        assert "directory or zip" in error_of(tmp_path / "text.txt")

    def test_sizes(self, tmp_path: Path) -> None:
        write_images(tmp_path, {"a.png": png(), "b.png": png(size=(8, 9))})
        assert "b.png is 8x9" in error_of(tmp_path)
        (tmp_path / "b.png").unlink()
        assert "8x8, not 16x16" in error_of(tmp_path, resolution=16)

    def test_numbers_that_are_no_grays(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "a.tif")
        assert "neither 8 nor 16 bits a channel" in error_of(tmp_path)

    @pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
    def test_truncated(self, tmp_path: Path, share: float) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8)
        whole = ImageSet(noise, np.arange(40) % 4, ("0", "1", "2", "3"), "set")
        for name, write in (("set.zip", write_zip), ("set.npz", write_npz)):
            write(whole, tmp_path / name)
            content = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(content[:int(len(content) * share)])
            assert "cut short" in error_of(tmp_path / name)
        picture = saved(Image.fromarray(noise[0].transpose(1, 2, 0)))
        (tmp_path / "a.png").write_bytes(picture[:int(len(picture) * min(share, 0.9))])
        (tmp_path / "set.zip").unlink()
        assert "a.png" in error_of(tmp_path)

    def test_changed_byte(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "set.zip", {"a.png": png((1, 2, 3))})
        content = bytearray(path.read_bytes())
        content[content.index(b"IDAT") + 30] ^= 1
        path.write_bytes(content)
        assert "checksum" in error_of(path)

    def test_npz(self, tmp_path: Path) -> None:
        for arrays, expected in ((dict(x=np.zeros(3)), "`images`"), (dict(images=np.zeros((2, 3, 4, 4))), "uint8"),
                                 (dict(images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.zeros(3, int)), "2 integers"),
                                 (dict(images=np.zeros((2, 3, 4, 4), np.uint8), labels=np.full(2, 9), classes=["a"]),
                                  "1 `classes` but a label 9"),
                                 (dict(images=np.array([object()])), "got object"),
                                 (dict(images=np.zeros((2, 5, 4, 4), np.uint8)), "1 or 3")):
            np.savez(tmp_path / "a.npz", **arrays)
            assert expected in error_of(tmp_path / "a.npz")
        np.savez(tmp_path / "b.npz", images=np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))
        assert read_images(tmp_path / "b.npz").images[1, 2, 0, 1] == 48 + 5


class TestHostileArchives:
    @pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "C:/a.png", "a.png:hidden", "..\\a.png"])
    def test_names(self, tmp_path: Path, name: str) -> None:
        assert "points outside" in error_of(zipped(tmp_path / "set.zip", {name: png()}))

    def test_link(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            entry = zipfile.ZipInfo("a.png")
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, "/etc/passwd")
        assert "is a link" in error_of(tmp_path / "set.zip")

    def test_bomb(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "set.zip", {"a.png": bytes(1 << 24)}, method=zipfile.ZIP_DEFLATED)
        assert "unfolds" in error_of(path)

    def test_many_small_bombs(self, tmp_path: Path) -> None:
        files = {f"{i}.png": bytes(1 << 20) for i in range(40)}
        assert "100 times" in error_of(zipped(tmp_path / "set.zip", files, method=zipfile.ZIP_DEFLATED))

    def test_overlapping_entries(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "set.zip", {"a.png": os.urandom(4000), "b.png": os.urandom(4000)})
        content = path.read_bytes()
        directory = content.index(b"PK\1\2")
        entries = content[directory:content.index(b"PK\5\6")]
        first = entries[:entries.index(b"PK\1\2", 4)]
        count, copies = 4, first * 4
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(copies), directory, 0)
        path.write_bytes(content[:directory] + copies + end)
        assert "overlap" in error_of(path)

    def test_entry_count(self, tmp_path: Path) -> None:
        path = zipped(tmp_path / "set.zip", {f"{i}.png": b"" for i in range(12_000)})
        assert "no set of images" in error_of(path)

    def test_claimed_size(self, tmp_path: Path) -> None:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
        write_images(tmp_path, {"a.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")})
        assert "a.png" in error_of(tmp_path)

    def test_claimed_array(self, tmp_path: Path) -> None:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                      "shape": (1 << 40, 3, 64, 64)})
        zipped(tmp_path / "a.npz", {"images.npy": header.getvalue()})
        assert "a.npz" in error_of(tmp_path / "a.npz")


class TestCache:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def refuse_to_decode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def decode(*_):
            raise AssertionError("decoded a second time")

        monkeypatch.setattr(shared.data.images, "decode", decode)

    def test_second_read_decodes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = zipped(tmp_path / "set.zip", {"a.png": png(5), "b.png": png(6)}, [["a.png", 1]])
        with pytest.warns(UserWarning, match="no label"):
            first = read_images(path)
        self.refuse_to_decode(monkeypatch)
        with pytest.warns(UserWarning, match="no label"):  # said again
            second = read_images(path)
        np.testing.assert_array_equal(first.images, second.images)
        assert isinstance(second.images, np.memmap) and second.classes == first.classes

    def test_changed_file_is_read_again(self, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "set", {"a.png": png((5, 5, 5)), "b.png": png((6, 6, 6))})
        assert read_images(folder).images[0, 0, 0, 0] == 5
        (folder / "a.png").write_bytes(png((7, 7, 7)))
        os.utime(folder / "a.png", ns=(1, 1))
        assert read_images(folder).images[0, 0, 0, 0] == 7

    def test_writing_into_the_images_changes_no_file(self, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "set", {"a.png": png((5, 5, 5))})
        read_images(folder).images[:] = 9
        assert read_images(folder).images.max() == 5

    @pytest.mark.parametrize("file", ["images.npy", "facts.npz"])
    def test_damaged_entry_is_made_again(self, tmp_path: Path, cache: Path, file: str) -> None:
        folder = write_images(tmp_path / "set", {"a.png": png((5, 5, 5))})
        read_images(folder)
        damaged = next(cache.glob(f"*/{file}"))
        damaged.write_bytes(damaged.read_bytes()[:20])
        assert read_images(folder).images.max() == 5

    def test_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "file" / "cache"))
        folder = write_images(tmp_path / "set", {"a.png": png((5, 5, 5))})
        with pytest.warns(UserWarning, match="FEWLABEL_CACHE"):
            assert read_images(folder).images.max() == 5

    def test_bound(self, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FEWLABEL_CACHE_GB", "3e-5")  # 30 kB
        sets = [write_images(tmp_path / f"set{k}", {f"{i}.png": png((k, k, k), (32, 32)) for i in range(4)})
                for k in range(4)]  # 12 kB each
        for k, folder in enumerate(sets):
            assert read_images(folder).images.max() == k
            os.utime(next(cache.glob(f"set{k}-*")), (time.time() - 10 + k,) * 2)
        assert sorted(entry.name.partition("-")[0] for entry in cache.glob("set*")) == ["set2", "set3"]

    def test_concurrent_readers_decode_once(self, tmp_path: Path, cache: Path) -> None:
        files = {f"{i}.png": png((i % 256,) * 3, (16, 16)) for i in range(600)}
        path = zipped(tmp_path / "set.zip", files)
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            sums = pool.map(_sum_of, [path] * 4)
        assert len(set(sums)) == 1 and len(list(cache.glob("set-*"))) == 1
        assert not list(cache.glob(".part-*"))


def _sum_of(path: Path) -> int:
    return int(read_images(path).images.sum())


def test_image_set() -> None:
    images = ImageSet(np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1), np.array([0, 1, -1, 0]), ("a", "b"), "set")
    assert (len(images), images.num_classes, images.channels, images.size) == (4, 2, 1, (1, 1))
    part = images.subset([2, 0])
    assert part.labels.tolist() == [-1, 0] and part.images[:, 0, 0, 0].tolist() == [2, 0] and part.has_labels
    assert not images.subset([2]).has_labels
    assert len(images.concatenate(part)) == 6
    with pytest.raises(UserError, match="3 x 1 x 1"):
        images.concatenate(ImageSet(np.zeros((1, 3, 1, 1), np.uint8), np.zeros(1, int), ("a", "b"), "other"))
    with pytest.raises(UserError, match="classes"):
        images.concatenate(ImageSet(part.images, part.labels, ("b", "a"), "other"))
