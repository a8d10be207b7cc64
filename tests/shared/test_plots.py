"""Pictures: the right size, the right pixels, and clear refusals."""
import numpy as np
import pytest
from PIL import Image

from shared.report.plots import Panel, confusion_matrices, curves, heat_map, image_grid


def test_image_grid_shows_every_image_enlarged_without_blending(tmp_path):
    red, blue = np.zeros((2, 3, 4, 4), np.uint8), np.zeros((1, 3, 4, 4), np.uint8)
    red[:, 0], blue[:, 2] = 255, 255
    image_grid({"red": red, "blue": blue}, tmp_path / "grid.png", "title", scale=10)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).reshape(-1, 3)
    for colour, images in (((255, 0, 0), 2), ((0, 0, 255), 1)):
        # 40x40 screen pixels an image; the renderer may lose a row or column at the edges.
        assert 0.9 * 1600 * images <= (pixels == colour).all(1).sum() <= 1.1 * 1600 * images


def test_images_beside_stand_on_the_right_of_their_row(tmp_path):
    rows = {"a": np.full((2, 1, 4, 4), 90, np.uint8), "b": np.full((1, 1, 4, 4), 90, np.uint8)}
    beside = {"b": np.full((1, 1, 4, 4), 180, np.uint8), "c": rows["a"]}
    image_grid(rows, tmp_path / "grid.png", scale=10, beside=beside)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    (dark_y, dark_x), (light_y, light_x) = (np.nonzero(pixels == grey) for grey in (90, 180))
    assert len(light_x) > 1400 and light_x.min() > dark_x.max() and light_y.min() > dark_y.min() + 30


def test_gray_images_and_rows_of_different_lengths(tmp_path):
    rows = {str(c): np.full((c + 1, 1, 8, 8), 10 * c, np.uint8) for c in range(3)}
    image_grid(rows, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[0] > 3 * 48
    with pytest.raises(ValueError, match="one shape"):
        image_grid({"a": np.zeros((1, 1, 8, 8), np.uint8), "b": np.zeros((1, 3, 8, 8), np.uint8)}, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_curves_with_gaps(tmp_path):
    curves({"loss": Panel({"run": ([1, 2, 3], [1.0, float("nan"), 2.0])}), "empty": Panel({})},
           tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (840, 320)


@pytest.mark.parametrize("classes", [2, 10, 30])
def test_confusion_matrices(tmp_path, classes):
    counts = np.eye(classes, dtype=np.int64) * 5
    names = [f"class {c}" for c in range(classes)]
    confusion_matrices({"one": counts, "two": counts}, names, tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").size[0] > 600
    with pytest.raises(ValueError, match="two: expected counts for"):
        confusion_matrices({"two": counts[1:]}, names, tmp_path / "no.png")


def test_heat_map(tmp_path):
    values = np.array([[1.0, 2.0, float("nan")], [4.0, 5.0, 6.0]])
    heat_map(values, ["1", "11"], ["out_1", "out_2", "out_3"], tmp_path / "map.png", title="accuracy")
    colours = {tuple(pixel) for pixel in np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).reshape(-1, 3)}
    assert len(colours) > 5
    with pytest.raises(ValueError, match="expected values"):
        heat_map(values, ["1"], ["out_1"], tmp_path / "no.png")
