"""Lists that people write: labels as CSV, names of classes, whatever program wrote them."""
from __future__ import annotations

from pathlib import Path

import pytest

from shared.cli import UserError
from shared.data.listing import read_class_names, read_label_csv, read_lines

TABLES = {
    "plain": ("file,label\na.png,cat\nb c.png,dog\n", ["cat", "dog"]),
    "with a byte order mark": ("\ufefffile,label\r\na.png,cat\r\nb c.png,dog\r\n", ["cat", "dog"]),
    "of Excel": ("file;label\na.png;cat\nb c.png;dog\n", ["cat", "dog"]),
    "between tabs": ("file\tlabel\na.png\tcat\nb c.png\tdog\n", ["cat", "dog"]),
    "without a header": ("a.png,cat\nb c.png,dog\n", ["cat", "dog"]),
    "with other columns": ("file,cluster,rank,score,label\na.png,0,1,0.5,cat\nb c.png,1,2,0.4,\n", ["cat", None]),
    "in another order": ("label,File\ncat,./a.png\ndog,b c.png\n", ["cat", "dog"]),
    "quoted": ('file,label\n"a.png","cat, small"\n"b c.png","dog"\n', ["cat, small", "dog"]),
    "numbers": ("file,label\na.png,0\nb c.png,10\n", ["0", "10"]),
    "numbers with a gap": ("file,label\na.png,3.0\nb c.png,\n", ["3", None]),
    "unknown": ("file,label\na.png,nan\nb c.png,NaN\n", [None, None]),
    "a blank line": ("file,label\n\na.png,cat\n\nb c.png,dog\n\n", ["cat", "dog"]),
    "said twice": ("file,label\na.png,cat\na.png,cat\nb c.png,dog\n", ["cat", "dog"]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_labels(kind: str, tmp_path: Path) -> None:
    text, labels = TABLES[kind]
    (tmp_path / "labels.csv").write_bytes(text.encode())
    found = read_label_csv(tmp_path / "labels.csv")
    assert found.files == ("a.png", "b c.png") and list(found.labels) == labels


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"\x89PNG\0\0", "not UTF-8"), (b"file,label\na\0.png,1\n", "binary"),
    (b"file,score\na.png,1\n", "no column `label`"), (b"name,cluster,label\na.png,1,2\n", "no column `file`"),
    (b"file,label\na.png\n", "line 2 has 1 column"), (b"file,label\n,cat\n", "line 2 names no file"),
    (b"file,label\na.png,cat\nb.png,cat\na.png,dog\n", "lists a.png twice, as cat in line 2 and as dog in line 4"),
])
def test_labels_that_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_label_csv(tmp_path / "labels.csv")
    assert str(raised.value).startswith(f"{tmp_path}/labels.csv")


def test_class_names(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffn01 tench, Tinca tinca\r\nn02 goldfish, Carassius auratus\r\n".encode())
    assert read_class_names(file, ["n02"]) == ("n01", "n02")
    file.write_text("great grey owl\nbarn owl\n")
    assert read_class_names(file, ["barn owl"]) == ("great grey owl", "barn owl")
    file.write_text("a x\nb\na y\n")
    with pytest.raises(UserError, match="'a' twice"):
        read_class_names(file, ["a"])
    file.write_text("\n")
    with pytest.raises(UserError, match="no class names"):
        read_class_names(file)


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"a b\r\n\r\n c \n")
    assert read_lines(tmp_path / "list") == [(1, "a b"), (3, "c")]
