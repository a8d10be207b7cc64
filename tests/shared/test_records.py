"""Record files: every content survives, and what is damaged is named by file and record."""
from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MetaSemi.imagenet.records import MAGIC, MAX_CONTENT, PART, Damaged, RecordFile, encode_record, split_content
from shared.cli import UserError

# Contents in which the magic word is likely, at any offset.
PIECES = st.lists(st.one_of(st.just(MAGIC), st.binary(max_size=6), st.just(MAGIC[:2]), st.just(MAGIC[2:])), max_size=9)
CONTENTS = st.lists(PIECES.map(b"".join), min_size=1, max_size=5)


def write(folder: Path, payloads: list[bytes], labels: tuple[float, ...] = (1.0,), scalar: bool = True) -> Path:
    """Write records with the ids 10, 11, ... and return the .rec file."""
    data, index = b"", ""
    for number, payload in enumerate(payloads, 10):
        index += f"{number}\t{len(data)}\n"
        data += b"".join(encode_record(number, labels, payload, scalar))
    (folder / "x.rec").write_bytes(data)
    (folder / "x.idx").write_text(index)
    return folder / "x.rec"


@given(payloads=CONTENTS, labels=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes],
                                 labels: list[float]) -> None:
    path = write(tmp_path_factory.mktemp("records"), payloads, tuple(labels), scalar=False)
    file = RecordFile(path)
    assert [file.read(position).payload for position in range(len(file))] == payloads
    assert file.read(0).labels == tuple(labels) and file.read(0).number == 10


@given(content=PIECES.map(b"".join))
@settings(max_examples=200, deadline=None)
def test_parts_are_as_the_format_says(content: bytes) -> None:
    """No part holds the magic word at a multiple of four, and all but the last are multiples of four long."""
    parts = [bytes(part) for part in split_content(content)]
    assert MAGIC.join(parts) == content
    assert all(len(part) % 4 == 0 for part in parts[:-1])
    assert all(part[at:at + 4] != MAGIC for part in parts for at in range(0, len(part), 4))


def test_the_example_of_the_format() -> None:
    """A payload of 19 bytes with the magic word at byte 8: two parts, 56 bytes."""
    data = b"".join(encode_record(5, [2.0], b"12345678" + MAGIC + b"7654321", True))
    assert len(data) == 56
    assert PART.unpack_from(data) == (MAGIC, 1 << 29 | 32) and PART.unpack_from(data, 40) == (MAGIC, 3 << 29 | 7)


def test_too_large_a_record_is_refused() -> None:
    class Long(bytes):
        def __len__(self) -> int:
            return MAX_CONTENT

    with pytest.raises(ValueError, match="too many"):
        encode_record(0, [0.0], Long(), True)


def test_reading_from_many_threads(tmp_path: Path) -> None:
    payloads = [bytes([number]) * (number + 1) for number in range(200)]
    file = RecordFile(write(tmp_path, payloads))
    with ThreadPoolExecutor(8) as pool:
        assert [record.payload for record in pool.map(file.read, range(200))] == payloads


def test_index_in_any_order_with_spaces(tmp_path: Path) -> None:
    path = write(tmp_path, [b"a", b"bb", b"ccc"])
    lines = path.with_suffix(".idx").read_text().replace("\t", " ").splitlines()
    path.with_suffix(".idx").write_text("\n".join(reversed(lines)))
    file = RecordFile(path)
    assert [file.read(position).payload for position in range(3)] == [b"a", b"bb", b"ccc"]


class TestDamage:
    PAYLOADS = (b"first", b"second " * 9, b"with" + MAGIC * 2, b"last one.")

    def change(self, tmp_path: Path, rec=lambda data: data, idx=lambda lines: lines) -> Path:
        path = write(tmp_path, list(self.PAYLOADS))
        path.write_bytes(rec(path.read_bytes()))
        lines = idx(path.with_suffix(".idx").read_text().splitlines())
        path.with_suffix(".idx").write_text("".join(f"{line}\n" for line in lines))
        return path

    def error(self, path: Path) -> str:
        with pytest.raises(UserError) as caught:
            RecordFile(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("lost", [1, 5, 40])
    def test_cut_short(self, tmp_path: Path, lost: int) -> None:
        path = self.change(tmp_path, rec=lambda data: data[:-lost])
        assert "record 3 (id 13)" in self.error(path) and "cut short" in self.error(path)
        file = RecordFile(path, skip_bad=True)
        assert len(file) == 3 and len(file.skipped) == 1 and file.read(2).payload == self.PAYLOADS[2]

    def test_records_missing_at_the_end(self, tmp_path: Path) -> None:
        path = self.change(tmp_path, rec=lambda data: data[:60])
        message = self.error(path)
        assert "record 1 (id 11)" in message and "cut short" in message
        file = RecordFile(path, skip_bad=True)
        assert len(file) == 1 and len(file.skipped) == 3

    def test_magic_word_changed(self, tmp_path: Path) -> None:
        path = write(tmp_path, list(self.PAYLOADS))
        start = int(path.with_suffix(".idx").read_text().splitlines()[1].split()[1])
        data = bytearray(path.read_bytes())
        data[start] ^= 1
        path.write_bytes(data)
        assert "record 1 (id 11): no record begins at byte" in self.error(path)
        assert len(RecordFile(path, skip_bad=True)) == 3

    def test_length_changed(self, tmp_path: Path) -> None:
        path = write(tmp_path, list(self.PAYLOADS))
        data = bytearray(path.read_bytes())
        data[4:8] = struct.pack("<I", 1000)
        path.write_bytes(data)
        assert "record 0 (id 10)" in self.error(path)

    def test_index_of_fewer_records(self, tmp_path: Path) -> None:
        path = self.change(tmp_path, idx=lambda lines: lines[:1] + lines[2:])
        assert "record 0 (id 10)" in self.error(path) and "index does not match" in self.error(path)
        path = self.change(tmp_path, idx=lambda lines: lines[1:])
        assert "begins at byte 40 and not at 0" in self.error(path)

    def test_files_that_are_none(self, tmp_path: Path) -> None:
        assert "no such file" in self.error(tmp_path / "missing")
        for content in (["not an index"], ["1\t2\t3"], ["1\t-5"], [f"1\t{1 << 70}"]):
            assert "not an index" in self.error(self.change(tmp_path, idx=lambda lines, given=content: given))
        assert "index is empty" in self.error(self.change(tmp_path, idx=lambda lines: []))
        assert "both begin" in self.error(self.change(tmp_path, idx=lambda lines: [lines[0], lines[0]]))
        assert "record 0" in self.error(self.change(tmp_path, rec=lambda data: b""))

    def test_too_many_labels_for_the_content(self, tmp_path: Path) -> None:
        path = write(tmp_path, [b""])
        data = bytearray(path.read_bytes())
        data[8:12] = struct.pack("<I", 1 << 30)
        path.write_bytes(data)
        with pytest.raises(Damaged, match="record 0 .* labels"):
            RecordFile(path).read(0)
