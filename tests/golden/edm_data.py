"""dataset_tool.py and the training set: outputs, labels and errors of the published converter and data set class."""
from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from EDM.dataset_tool import main
from EDM.training.dataset import open_training_set
from shared.cli import UserError
from tests.golden.cases import arrays, facts, index
from tests.golden.data_sources import write_image_folder, write_source

TOOL = [case for case in index("edm")["cases"] if case["kind"] == "dataset tool"]
SETS = [case for case in index("edm")["cases"] if case["kind"] == "dataset"]
CASES = {case["case"] for case in (*TOOL, *SETS)}


def each(cases: list[dict[str, Any]]) -> pytest.MarkDecorator:
    found = [pytest.param(case, name, id=f"{case['case']}-{name}")
             for case in cases for name in facts("edm", case["file"])]
    return pytest.mark.parametrize("case, name", found)


@pytest.fixture(scope="module")
def made_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Run the converter cases in their order in one folder, since some start from the output of others.

    Returns the folder and the error message of every case that ended with one.
    """
    folder, errors, before = tmp_path_factory.mktemp("tool"), {}, Path.cwd()
    os.chdir(folder)
    try:
        for case in TOOL:
            for name, fact in facts("edm", case["file"]).items():
                write_source(folder, fact["source"], fact["note"], arrays("edm", case["arrays_file"]))
                args = fact["args"]
                if limit(args) == 0:
                    errors[f"{name} as given"] = convert(args)
                    args = ["--max-images=1" if a.startswith("--max-images") else a for a in args]
                error = convert(args)
                if error is not None:
                    errors[name] = error
    finally:
        os.chdir(before)
    return folder, errors


def limit(args: list[str]) -> int | None:
    found = [int(a.partition("=")[2]) for a in args if a.startswith("--max-images=")]
    return found[0] if found else None


def convert(args: list[str]) -> str | None:
    """Run the command line and return its error, None without one."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            main(args)
        except UserError as error:
            return str(error)
    return None


def read_output(path: Path) -> dict[str, bytes]:
    """Return name -> content in the order of writing (a folder's by name, dataset.json last)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    names = sorted((file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()),
                   key=lambda name: (name == "dataset.json", name))
    return {name: (path / name).read_bytes() for name in names}


def words(text: str) -> str:
    """Messages are compared without white space: one of the recorded ones lacks a space, one has line breaks."""
    return "".join(text.split())


@each(TOOL)
def test_dataset_tool(case: dict[str, Any], name: str, made_files: tuple[Path, dict[str, str]]) -> None:
    folder, errors = made_files
    fact = facts("edm", case["file"])[name]
    dest = folder / next(a for a in fact["args"] if a.startswith("--dest=")).partition("=")[2]
    if limit(fact["args"]) == 0:
        # The published tool takes one image for a limit of zero; here that is an error, and the record that of one.
        assert "--max-images" in errors[f"{name} as given"]
    if "error" in fact:
        assert words(fact["error"]) in words(errors[name])
        return
    assert name not in errors
    members = read_output(dest)
    assert list(members) == fact["members"]
    assert members["dataset.json"].decode() == fact["dataset_json"]
    pngs = [content for member, content in members.items() if member != "dataset.json"]
    assert [len(png) for png in pngs][:len(fact["png_sizes"])] == fact["png_sizes"]
    stored = arrays("edm", case["arrays_file"])
    scaled = any(a.startswith("--resolution") for a in fact["args"])
    found = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs]).astype(int)
    assert found.shape == stored[f"{name}/pixels"].shape
    assert np.abs(found - stored[f"{name}/pixels"]).max() <= (1 if scaled else 0)
    if f"{name}/png0_bytes" in stored:
        assert pngs[0][:8] == stored[f"{name}/png0_bytes"].tobytes()[:8]
        assert chunks(pngs[0]) == chunks(stored[f"{name}/png0_bytes"].tobytes())
    if dest.suffix == ".zip":
        with zipfile.ZipFile(dest) as archive:
            entries = archive.infolist()
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in entries) == fact["all_stored"]
        for entry, expected in ((entries[0], fact["zip_first"]), (entries[-1], fact["zip_last"])):
            assert {"name": entry.filename, "compress_type": entry.compress_type, "flag_bits": entry.flag_bits,
                    "external_attr": hex(entry.external_attr), "create_system": entry.create_system} == expected


def chunks(png: bytes) -> list[tuple[bytes, int]]:
    """Return (kind, length) of each chunk of a PNG."""
    found, place = [], 8
    while place < len(png):
        length = int.from_bytes(png[place:place + 4], "big")
        found.append((png[place + 4:place + 8], length))
        place += length + 12
    return found


@each(SETS)
def test_training_set(case: dict[str, Any], name: str, made_files: tuple[Path, dict[str, str]],
                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made_files[0])
    fact = facts("edm", case["file"])[name]
    args = dict(fact["args"])
    if "source" in fact:
        write_image_folder(made_files[0], fact["source"], arrays("edm", TOOL[0]["arrays_file"]))
    if "random_seed" in args:
        args["seed"] = args.pop("random_seed")
    if "error" in fact:
        with pytest.raises(UserError) as raised:
            open_training_set(**args)
        assert fact["message"] in str(raised.value)
        return
    found = open_training_set(**args)
    assert found.name == fact["name"] and len(found) == fact["len"]
    assert [*found.images.shape[1:]] == fact["image_shape"]
    assert (found.num_channels, found.resolution) == (fact["num_channels"], fact["resolution"])
    assert [found.label_dim] == fact["label_shape"] and found.label_dim == fact["label_dim"]
    assert (found.has_labels, found.has_onehot_labels) == (fact["has_labels"], fact["has_onehot_labels"])
    assert found.indices.tolist() == fact["raw_idx"] and found.flipped.tolist() == [bool(x) for x in fact["xflip"]]
    items = [found[i] for i in range(len(found))]
    assert [label.tolist() for _, label in items] == fact["labels"]
    assert {str(label.dtype) for _, label in items} == {fact["label_dtype"]}
    assert {str(image.dtype) for image, _ in items} == {fact["image_dtype"]}
    assert [found.details(0), found.details(len(found) - 1)] == fact["details"]
    if "first_pixels" in fact:
        assert [image[:, 0, 0].tolist() for image, _ in items] == fact["first_pixels"]
        assert [image[:, 0, -1].tolist() for image, _ in items] == fact["last_column_pixels"]
