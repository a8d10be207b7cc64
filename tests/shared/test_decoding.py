"""One decoding policy for every reader: orientation, transparency, depth, colour models, size; and what is left out."""
from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from EDM.dataset_tool import convert
from EDM.metrics.sources import FileImages
from MetaSemi.imagenet.encoding import payload
from shared.cli import UserError
from shared.data.classes import find_images
from shared.data.images import PIXELS_VARIABLE, open_image, read_images, to_chw
from shared.data.photographs import list_photographs
from shared.data.pool import PhotographPool

SIDE = 16


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def halves(left: object, right: object, mode: str = "RGB") -> Image.Image:
    """Return an image of two colours, the left one half as wide."""
    image = Image.new(mode, (SIDE, SIDE), right)
    image.paste(left, (0, 0, SIDE // 2, SIDE))
    return image


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(halves((255, 0, 0), (0, 0, 255)), "JPEG", exif=exif, quality=100, subsampling=0)


def palette() -> Image.Image:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 255, 0, 0, 0, 0])
    image.paste(0, (0, 0, SIDE // 2, SIDE))
    return image


def sixteen_bits(kind: str) -> bytes:
    values = np.full((SIDE, SIDE), 65_535, np.uint16)
    values[:, :SIDE // 2] = 257 * 100
    return encoded(Image.fromarray(values), kind)


RED, BLUE, BLACK, WHITE, GREEN = (255, 0, 0), (0, 0, 255), (0,) * 3, (255,) * 3, (0, 255, 0)
# Name -> (content, the colours of the upper left, upper right and lower left corner).
CASES = {
    "a.jpg": (lambda: turned(1), (RED, BLUE, RED)),
    "turned half.jpg": (lambda: turned(3), (BLUE, RED, BLUE)),
    "turned left.jpg": (lambda: turned(8), (BLUE, BLUE, RED)),
    "turned right.jpg": (lambda: turned(6), (RED, RED, BLUE)),
    "mirrored.jfif": (lambda: turned(2), (BLUE, RED, BLUE)),
    "transparent.png": (lambda: encoded(halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"), "PNG"), (BLACK, WHITE, BLACK)),
    "gray and transparent.png": (lambda: encoded(halves((0, 255), (0, 0), "LA"), "PNG"), (BLACK, WHITE, BLACK)),
    "colour key.png": (lambda: encoded(halves(RED, BLACK), "PNG", transparency=BLACK), (RED, WHITE, RED)),
    "palette.png": (lambda: encoded(palette(), "PNG"), (GREEN, BLACK, GREEN)),
    "transparent palette.gif": (lambda: encoded(palette(), "GIF", transparency=1), (GREEN, WHITE, GREEN)),
    "two frames.gif": (lambda: encoded(palette(), "GIF", save_all=True,
                                       append_images=[Image.new("P", (SIDE, SIDE))]), (GREEN, BLACK, GREEN)),
    "bilevel.png": (lambda: encoded(halves(0, 1, "1"), "PNG"), (BLACK, WHITE, BLACK)),
    "16 bits.png": (lambda: sixteen_bits("PNG"), ((100,) * 3, WHITE, (100,) * 3)),
    "16 bits.tif": (lambda: sixteen_bits("TIFF"), ((100,) * 3, WHITE, (100,) * 3)),
    "cmyk.jpg": (lambda: encoded(halves((0, 0, 0, 0), (0, 0, 0, 255), "CMYK"), "JPEG", quality=100),
                 (WHITE, BLACK, WHITE)),
    "a.jp2": (lambda: encoded(halves(RED, BLUE), "JPEG2000"), (RED, BLUE, RED)),
    "a.webp": (lambda: encoded(halves(RED, BLUE), "WEBP", lossless=True), (RED, BLUE, RED)),
    "without an ending": (lambda: encoded(halves(RED, BLUE), "PNG"), (RED, BLUE, RED)),
}


def by_set(folder: Path) -> np.ndarray:
    return read_images(folder, channels=3).images[0]


def by_archive(folder: Path) -> np.ndarray:
    with zipfile.ZipFile(folder.parent / "set.zip", "w") as archive:
        for file in folder.rglob("*/*"):
            archive.write(file, file.relative_to(folder))
    return read_images(folder.parent / "set.zip", channels=3).images[0]


def by_converter(folder: Path) -> np.ndarray:
    convert(folder, folder.parent / "out.zip")
    return read_images(folder.parent / "out.zip", channels=3).images[0]


def by_scorer(folder: Path) -> np.ndarray:
    return next(FileImages(str(folder)).batches([[0]]))[0][0].numpy()


def by_packer(folder: Path) -> np.ndarray:
    options = SimpleNamespace(color=1, pass_through=False, center_crop=False, resize=0, encoding=".png", quality=1)
    return to_chw(open_image(payload(str(next(folder.rglob("*/*"))), options), "packed"), 3)


def by_pool(folder: Path, decoder: str) -> np.ndarray:
    pool = PhotographPool(list_photographs(folder), (0.0,) * 3, (1.0,) * 3, torch.device("cpu"), 1, decoder)
    return pool._decode(np.array([0]))[0].numpy()


READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "read_images": by_set, "ZIP": by_archive, "dataset_tool": by_converter, "fid": by_scorer, "im2rec": by_packer,
    "torchvision": lambda folder: by_pool(folder, "torchvision"), "DALI": lambda folder: by_pool(folder, "dali")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_decodes_alike(reader: str, tmp_path: Path) -> None:
    for number, (name, (make, corners)) in enumerate(CASES.items()):
        file = tmp_path / str(number) / "set" / "class" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(make())
        pixels = READERS[reader](tmp_path / str(number) / "set").astype(int)
        assert pixels.shape == (3, SIDE, SIDE), name
        found = pixels[:, [0, 0, -1], [0, -1, 0]].T
        assert np.abs(found - corners).max() <= 6, f"{name}: {found.tolist()}"


@pytest.mark.parametrize(("size", "mode"), [((4961, 7016), "RGB"), ((8000, 12000), "L")])
def test_scans_and_large_photographs(size: tuple[int, int], mode: str) -> None:
    assert open_image(encoded(Image.new(mode, size, 255 if mode == "L" else WHITE), "JPEG"), "scan.jpg").size == size


def test_bombs_and_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("1", (20_000, 10_000)), "PNG")
    with pytest.raises(UserError, match=rf"unfold to 20000x10000 pixels; .*{PIXELS_VARIABLE}=200000000"):
        open_image(bomb, "bomb.png")
    monkeypatch.setenv(PIXELS_VARIABLE, "200000000")
    assert open_image(bomb, "bomb.png").size == (20_000, 10_000)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    image = encoded(halves(RED, BLUE), "PNG")
    for name, content in {"cat/1.png": image, "dog/1": image, "dog/notes": b"text", "cat/a.svg": b"<svg/>",
                          "readme.txt": b"x", ".ipynb_checkpoints/1.png": image, "cat/._1.png": b"",
                          "@eaDir/1.png": image, "cat/.DS_Store": b"", "dataset.csv": b""}.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    files = find_images(tmp_path / "set")
    assert files.names == ["cat/1.png", "dog/1"]
    assert files.notes == ("files left out: 2 hidden (first: .ipynb_checkpoints/1.png), 1 in system folders (first: "
                           "@eaDir/1.png), 4 that are no images by name or content (first: cat/a.svg)",)
    with pytest.warns(UserWarning, match="files left out: 2 hidden"):
        assert read_images(tmp_path / "set").labels.tolist() == [0, 1]


def test_links_that_lead_back_up(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(encoded(halves(RED, BLUE), "PNG"))
        os.symlink("..", tmp_path / "set" / name / "up")
    os.symlink("dog", tmp_path / "set" / "owl")  # another folder's images: followed
    assert find_images(tmp_path / "set").names == ["cat/1.png", "dog/1.png", "owl/1.png"]
    assert len(read_images(tmp_path / "set")) == 3
