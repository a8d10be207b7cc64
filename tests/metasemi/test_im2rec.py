"""Splitting and packing: what a stopped command continues, what is refused in one line, what DALI reads."""
from __future__ import annotations

import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from MetaSemi.imagenet import im2rec, packing, split_imagenet
from MetaSemi.imagenet.records import RecordFile
from shared.cli import UserError
from tests.metasemi.photographs import CLASSES, TRAIN, call, make_tree
from tests.shared import programs
from tests.shared.clean import clean_process


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


def error(script, *args: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        call(script, *args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestSplit:
    @pytest.fixture()
    def data(self, tree: Path, tmp_path: Path) -> Path:
        os.symlink(tree / "train", tmp_path / "train")
        return tmp_path

    def split(self, data: Path, *extra: str) -> None:
        call(split_imagenet, "--data-path", data, "--list-path", data / "lists", "--per-class", "2", *extra)

    def content(self, folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def test_every_image_is_in_one_part(self, data: Path) -> None:
        self.split(data)
        labeled, unlabeled = (self.content(data / part) for part in ("labeled", "unlabeled"))
        assert labeled | unlabeled == self.content(data / "train") and not set(labeled) & set(unlabeled)
        assert Counter(name.split("/")[0] for name in labeled) == dict.fromkeys(CLASSES, 2)
        assert all(path.is_symlink() for path in (data / "labeled").rglob("*.JPEG"))

    def test_copies_and_again(self, data: Path) -> None:
        self.split(data)
        links = self.content(data / "labeled")
        self.split(data, "--copy")
        assert self.content(data / "labeled") == links
        assert not any(path.is_symlink() for path in (data / "labeled").rglob("*"))

    def test_given_lists_are_taken_as_they_are(self, data: Path) -> None:
        (data / "lists").mkdir()
        names = sorted(f"{path.parent.name}/{path.name}" for path in (data / "train").rglob("*.JPEG"))
        (data / "lists" / "train_labeled.txt").write_text("".join(f"{name} ignored\n" for name in names[::TRAIN]))
        (data / "lists" / "train_unlabeled.txt").write_text("\n".join(sorted(set(names) - set(names[::TRAIN]))))
        self.split(data)
        assert sorted(self.content(data / "labeled")) == names[::TRAIN]

    def test_what_is_refused(self, data: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        flags = ("--data-path", data, "--list-path", data / "lists")
        assert "none would remain unlabelled" in error(split_imagenet, *flags)
        assert not (data / "lists").exists() and not (data / "labeled").exists()
        assert "no folder train/" in error(split_imagenet, "--data-path", tmp_path_factory.mktemp("empty"))
        self.split(data)
        (data / "lists" / "train_unlabeled.txt").unlink()
        assert "train_labeled.txt alone" in error(split_imagenet, *flags)
        (data / "lists" / "train_labeled.txt").unlink()
        assert "was made from another list" in error(split_imagenet, *flags, "--per-class", "2", "--seed", "1")
        (data / "lists").mkdir(exist_ok=True)
        (data / "lists" / "train_labeled.txt").write_text("../../etc/passwd\n")
        (data / "lists" / "train_unlabeled.txt").write_text("\n")
        assert "line 1 must begin with <wnid>/<file name>" in error(split_imagenet, *flags)

    def test_missing_image_is_named(self, data: Path) -> None:
        (data / "lists").mkdir()
        for part in ("labeled", "unlabeled"):
            (data / "lists" / f"train_{part}.txt").write_text(f"{CLASSES[0]}/{part}.JPEG\n")
        message = error(split_imagenet, "--data-path", data, "--list-path", data / "lists")
        assert "train_labeled.txt: line 1" in message and f"{CLASSES[0]}/labeled.JPEG" in message

    def test_a_class_missing_from_val_would_shift_the_labels(self, data: Path) -> None:
        (data / "val" / CLASSES[1]).mkdir(parents=True)
        assert CLASSES[0] in error(split_imagenet, "--data-path", data, "--list-path", data / "lists", "--per-class",
                                   "2")


def packed(tree: Path, prefix: Path, *extra: str) -> tuple[bytes, bytes]:
    call(im2rec, prefix, tree / "train", "--pass-through", "--pack-label", "--recursive", *extra)
    return prefix.with_suffix(".rec").read_bytes(), prefix.with_suffix(".idx").read_bytes()


@pytest.fixture()
def prefix(tree: Path, tmp_path: Path) -> Path:
    call(im2rec, tmp_path / "all", tree / "train", "--recursive", "--list")
    return tmp_path / "all"


def test_number_of_workers_makes_no_difference(tree: Path, prefix: Path) -> None:
    one = packed(tree, prefix, "--num-thread", "1")
    assert packed(tree, prefix, "--num-thread", "4") == one
    assert packed(tree, prefix, "--num-thread", "3", "--verify") == one
    assert not list(prefix.parent.glob(".*"))


def test_prefix_beside_a_folder_of_that_name(tree: Path, tmp_path: Path) -> None:
    """The published commands for val: they find val.lst although val/ is a folder."""
    (tmp_path / "val").symlink_to(tree / "val")
    for extra in (["--list"], ["--pass-through", "--pack-label", "--no-shuffle"]):
        call(im2rec, tmp_path / "val", tmp_path / "val", "--recursive", *extra)
    assert len(RecordFile(tmp_path / "val.rec")) == 15


def test_prefix_of_another_list_is_left_alone(tree: Path, prefix: Path) -> None:
    shutil.copy(prefix.with_suffix(".lst"), prefix.parent / "all_others.lst")
    packed(tree, prefix)
    assert not (prefix.parent / "all_others.rec").exists()


def test_labels_by_a_file_of_classes(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(reversed(CLASSES)))
    call(im2rec, tmp_path / "all", tree / "train", "--recursive", "--list", "--classes", tmp_path / "classes.txt")
    for line in (tmp_path / "all.lst").read_text().splitlines():
        _, label, path = line.split("\t")
        assert CLASSES[2 - int(float(label))] == path.split("/")[0]
    (tmp_path / "classes.txt").write_text(CLASSES[0])
    assert CLASSES[1] in error(im2rec, tmp_path / "all", tree / "train", "--recursive", "--list", "--classes",
                               tmp_path / "classes.txt")


def test_links_that_lead_back_end(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    shutil.copy(next((tree / "train").rglob("*.JPEG")), tmp_path / "a" / "x.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    call(im2rec, tmp_path / "out", tmp_path, "--recursive", "--list")
    assert (tmp_path / "out.lst").read_text() == "0\t0.000000\ta/x.jpg\n"


def _killed_packing(prefix: Path, root: Path, after: int) -> None:
    packing.SECONDS_BETWEEN_NOTES, packing.CHUNK = 0.0, 4
    add, blocks = packing.Output.add, iter(range(10 ** 6))

    def counted(output, *args):
        if next(blocks) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        add(output, *args)

    packing.Output.add = counted
    call(im2rec, prefix, root, "--pass-through", "--pack-label", "--recursive", "--num-thread", "2")


def test_killed_and_continued(tree: Path, prefix: Path, capfd: pytest.CaptureFixture) -> None:
    whole = packed(tree, prefix)
    for file in (".rec", ".idx"):
        prefix.with_suffix(file).unlink()
    process = clean_process(_killed_packing, prefix, tree / "train", 3)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not prefix.with_suffix(".rec").exists()
    assert packed(tree, prefix) == whole
    assert re.search(r"continuing .*all.rec at record 12 of 24", capfd.readouterr().out)


def test_an_image_changed_meanwhile_is_packed_as_it_is(tree: Path, prefix: Path, capfd: pytest.CaptureFixture) -> None:
    root = prefix.parent / "copy"
    shutil.copytree(tree / "train", root)
    process = clean_process(_killed_packing, prefix, root, 3)
    process.start()
    process.join(60)
    first = root / prefix.with_suffix(".lst").read_text().splitlines()[0].split("\t")[-1]
    changed = bytearray(first.read_bytes())
    changed[len(changed) // 2] ^= 1
    first.write_bytes(changed)
    call(im2rec, prefix, root, "--pass-through", "--pack-label", "--recursive")
    assert "images have changed since" in capfd.readouterr().out
    assert bytes(changed) in prefix.with_suffix(".rec").read_bytes()


def test_other_settings_are_not_continued(tree: Path, prefix: Path) -> None:
    process = clean_process(_killed_packing, prefix, tree / "train", 3)
    process.start()
    process.join(60)
    call(im2rec, prefix, tree / "train", "--resize", "16")
    sizes = {min(Image.open(path).size) for path in (tree / "train").rglob("*.JPEG")}
    assert len(sizes) > 1 and len(RecordFile(prefix.with_suffix(".rec"))) == 24
    assert not list(prefix.parent.glob(".*"))


class TestBadInput:
    def spoiled(self, tree: Path, tmp_path: Path, name: str | None = None) -> tuple[Path, Path]:
        """Return a copy of the images in which the one of record 4 is missing, or cut short, and the prefix."""
        root = tmp_path / "copy"
        shutil.copytree(tree / "train", root)
        call(im2rec, tmp_path / "all", root, "--recursive", "--list")
        line = (tmp_path / "all.lst").read_text().splitlines()[4]
        path = root / line.split("\t")[-1]
        content = path.read_bytes()
        path.unlink()
        if name == "short":
            path.write_bytes(content[:-100])
        return root, tmp_path / "all"

    @pytest.mark.parametrize("flags", [["--pass-through"], ["--pass-through", "--num-thread", "1"], ["--resize", "8"]])
    def test_missing_file(self, tree: Path, tmp_path: Path, flags: list[str],
                          capsys: pytest.CaptureFixture) -> None:
        root, prefix = self.spoiled(tree, tmp_path)
        message = error(im2rec, prefix, root, *flags)
        assert message.startswith("record 4 (id ") and "No such file" in message and "--skip-bad" in message
        assert not prefix.with_suffix(".rec").exists()
        call(im2rec, prefix, root, *flags, "--skip-bad")
        captured = capsys.readouterr()
        assert "record 4 (id " in captured.err and "23 records" in captured.out and "1 bad left out" in captured.out
        assert len(RecordFile(prefix.with_suffix(".rec"))) == 23

    @pytest.mark.parametrize("flags", [["--pass-through", "--verify"], ["--resize", "8"]])
    def test_image_that_does_not_decode(self, tree: Path, tmp_path: Path, flags: list[str]) -> None:
        root, prefix = self.spoiled(tree, tmp_path, "short")
        message = error(im2rec, prefix, root, *flags)
        assert message.startswith("record 4 (id ") and "cut short or not an image" in message
        call(im2rec, prefix, root, *flags, "--skip-bad")
        assert len(RecordFile(prefix.with_suffix(".rec"))) == 23

    def test_nothing_to_list_or_pack(self, tree: Path, tmp_path: Path) -> None:
        assert "give --recursive" in error(im2rec, tmp_path / "all", tree / "train", "--list")
        assert "Did not find and list file with prefix" in error(im2rec, tmp_path / "all", tree / "train")
        assert "no folder" in error(im2rec, tmp_path / "all", tmp_path / "nowhere", "--list")
        (tmp_path / "all.lst").write_text("no list\n")
        assert "no line of it" in error(im2rec, tmp_path / "all", tree / "train")

    def test_wrong_values(self, tree: Path) -> None:
        for flags in (["--chunks", "0"], ["--quality", "101"], ["--num-thread", "0"], ["--resize", "-1"],
                      ["--train-ratio", "0.9", "--test-ratio", "0.2"], ["--color", "2"], ["--encoding", ".gif"]):
            assert flags[0] in error(im2rec, "all", tree, *flags)

    def test_as_a_program(self, tmp_path: Path) -> None:
        result = programs.run("MetaSemi/imagenet/im2rec.py", tmp_path / "all", tmp_path, status=2)
        assert "Did not find" in programs.one_line_error(result)


def test_dali_reads_the_records(tree: Path, prefix: Path) -> None:
    """By its own reader of the format, with several labels and a payload that holds the magic word."""
    dali = pytest.importorskip("nvidia.dali", reason="NVIDIA DALI, which requirements.txt names, is not installed")
    files = sorted(path.relative_to(tree / "train") for path in (tree / "train").rglob("*.JPEG"))[:6]
    lines = [f"{number + 3}\t{number}.5\t7\t{path}\n" for number, path in enumerate(files)]
    prefix.with_suffix(".lst").write_text("".join(lines))
    image = bytearray((tree / "train" / files[2]).read_bytes())
    # In a comment behind the first marker, at a multiple of four bytes of the record's content.
    comment = b"\xff\xfe\x00\x10\0\0" + b"\x0a\x23\xd7\xce" * 3
    image[2:2] = comment
    root = prefix.parent / "train"
    shutil.copytree(tree / "train", root)
    (root / files[2]).write_bytes(image)
    call(im2rec, prefix, root, "--pass-through", "--pack-label")
    stored = prefix.with_suffix(".rec").read_bytes()
    assert [(root / path).read_bytes() in stored for path in files] == [True, True, False, True, True, True]
    pipeline = dali.Pipeline(len(files), 1, None)
    with pipeline:
        pipeline.set_outputs(*dali.fn.readers.mxnet(path=[str(prefix.with_suffix(".rec"))],
                                                    index_path=[str(prefix.with_suffix(".idx"))]))
    payloads, labels = pipeline.run()
    for number, path in enumerate(files):
        assert bytes(np.array(payloads[number])) == (root / path).read_bytes()
        assert np.array(labels[number]).tolist() == [number + 0.5, 7.0]
        record = RecordFile(prefix.with_suffix(".rec")).read(number)
        assert record.payload == (root / path).read_bytes() and record.number == number + 3


class TestClasses:
    """Classes keep their names from the folders to the records, whatever lies beside them and whatever they hold."""

    def tree(self, folder: Path, files: dict[str, int]) -> Path:
        for name, level in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (level, level, level)).save(folder / name)
        return folder

    def packed(self, root: Path, prefix: Path, *extra: str | Path) -> RecordFile:
        call(im2rec, prefix, root, "--recursive", "--list", "--no-shuffle", *extra)
        call(im2rec, prefix, root, "--recursive", "--pass-through", "--num-thread", "1", *extra)
        return RecordFile(prefix)

    def test_names_lie_beside_the_records(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        root = self.tree(tmp_path / "set", {"owl/a b.png": 1, "cat/1.png": 2, ".ipynb_checkpoints/1.png": 3,
                                            "cat/2.gif": 4})
        (root / "empty").mkdir()
        records = self.packed(root, tmp_path / "val")
        assert records.classes == ("cat", "owl") and [records.get(i)[1] for i in range(2)] == [0, 1]
        said = "left out 2 files that are hidden or end with none of .jpeg .jpg .png (first: .ipynb_checkpoints/1.png)"
        assert said in capsys.readouterr().out

    def test_records_are_matched_by_name(self, tmp_path: Path) -> None:
        train = self.packed(self.tree(tmp_path / "train", {"cat/1.png": 1, "dog/1.png": 2, "owl/1.png": 3}),
                            tmp_path / "train_label")
        val = self.packed(self.tree(tmp_path / "test", {"dog/1.png": 2, "owl/1.png": 3}), tmp_path / "val")
        assert [val.get(i)[1] for i in range(2)] == [0, 1]
        val.match_classes(train.classes)
        assert [val.get(i)[1] for i in range(2)] == [1, 2]
        with pytest.raises(UserError, match=r"val.synset.txt: the class 'dog' is not one of .*\(cat, owl\)"):
            val.match_classes(("cat", "owl"))

    def test_numbers_are_classes(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path / "set", {"1/1.png": 1, "2/1.png": 2, "10/1.png": 3})
        records = self.packed(root, tmp_path / "set")
        assert sorted(records.get(i)[1] for i in range(3)) == [1, 2, 10] and not (records.classes[1:] == ("1", "10"))

    def test_a_list_of_classes_with_words(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path / "set", {"n01/1.png": 1, "n03/1.png": 2})
        (tmp_path / "classes.txt").write_bytes("\ufeffn01 tench, Tinca tinca\r\nn02 goldfish\r\nn03 shark\r\n".encode())
        records = self.packed(root, tmp_path / "set", "--classes", tmp_path / "classes.txt")
        assert [records.get(i)[1] for i in range(2)] == [0, 2] and records.classes == ("n01", "n02", "n03")

    def test_images_without_class_folders(self, tmp_path: Path) -> None:
        root = self.tree(tmp_path / "val", {"1.png": 1, "2.png": 2})
        message = error(im2rec, tmp_path / "val", root, "--recursive", "--list")
        assert "all 2 images lie directly in it" in message and "write " in message
        (tmp_path / "val.lst").write_bytes("\ufeff0\t1\t1.png\r\n1\t0\t2.png\r\n".encode())  # the remedy
        call(im2rec, tmp_path / "val", root, "--recursive", "--pass-through")
        records = RecordFile(tmp_path / "val")
        assert [records.get(i)[1] for i in range(2)] == [1, 0] and records.classes == ()

    @pytest.mark.parametrize(("content", "message"), [
        (b"0\tnan\ta.png\n", "no line of it"), (b"\x89PNG\0\xff", "not UTF-8"), (b"0\t0\ta\0.png\n", "binary")])
    def test_lists_that_are_none(self, content: bytes, message: str, tmp_path: Path,
                                 capsys: pytest.CaptureFixture) -> None:
        (tmp_path / "val.lst").write_bytes(content)
        assert message in error(im2rec, tmp_path / "val", self.tree(tmp_path / "set", {"a.png": 1}))
        if b"nan" in content:
            assert "the label nan is no class" in capsys.readouterr().err

    def test_splitting_reads_what_it_wrote(self, tmp_path: Path) -> None:
        self.tree(tmp_path / "train", {f"{name}/an owl {i}.png": i for name in ("cat", "owl") for i in range(4)})
        arguments = ["--data-path", tmp_path, "--list-path", tmp_path / "lists", "--per-class", "1"]
        for _ in range(2):
            call(split_imagenet, *arguments)
        assert len(list((tmp_path / "unlabeled").rglob("*.png"))) == 6
        for list_file in (tmp_path / "lists").iterdir():
            list_file.write_bytes(b"\xef\xbb\xbf" + list_file.read_bytes().replace(b"\n", b"\r\n"))
        call(split_imagenet, *arguments)
        self.tree(tmp_path / "val", {"1.png": 1})
        assert "val: its images lie in no class folders" in error(split_imagenet, *arguments)
