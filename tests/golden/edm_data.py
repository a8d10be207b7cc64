"""dataset_tool.py and the training set: outputs, labels and errors of the published converter and data set class."""
from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections import ChainMap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from EDM.dataset_tool import main
from EDM.training.dataset import open_training_set
from shared.cli import UserError
from tests.golden.cases import arrays, facts, name_of, number, serves
from tests.golden.data_sources import write_image_folder, write_source
from tests.golden.edm_cases import PAPER, cases, flag

TOOL, SETS = cases(kind="dataset tool"), cases(kind="dataset")
SERVES = serves(TOOL, SETS)
Case = dict[str, Any]


def each_fact(found: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case, name", [
        pytest.param(case, name, id=f"{name_of(case)}-{name}") for case in found
        for name in facts(PAPER, case.get("file", ""))])


def pixels_of(case: Case) -> ChainMap:
    """Return the arrays of a case's sources; a data set's may stand in the file of a converter's."""
    files = [case[field] for field in ("arrays_file",) if field in case] + [other["arrays_file"] for other in TOOL]
    return ChainMap(*(arrays(PAPER, file) for file in files))


@pytest.fixture(scope="module")
def made_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Run the converter cases in their order in one folder, since some start from the output of others.

    Returns the folder and the error message of every case that ended with one.
    """
    folder, errors, before = tmp_path_factory.mktemp("tool"), {}, Path.cwd()
    os.chdir(folder)
    try:
        for case in TOOL:
            for name, fact in facts(PAPER, case["file"]).items():
                try:
                    write_source(folder, fact["source"], fact.get("note", ""), pixels_of(case))
                except (KeyError, ValueError) as error:
                    errors[name] = f"its source cannot be written: {error!r}"
                    continue
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
    found = flag(args, "--max-images")
    return None if found is None else int(found)


def convert(args: list[str]) -> str | None:
    """Run the command line and return its error, None without one."""
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


@each_fact(TOOL)
def test_dataset_tool(case: Case, name: str, made_files: tuple[Path, dict[str, str]]) -> None:
    folder, errors = made_files
    known = facts(PAPER, case["file"])
    fact, given = known[name], arrays(PAPER, case["arrays_file"])
    if fact["source"].get("kind") == "output of case" and fact["source"]["case"] not in known:
        pytest.skip(f"there is no {fact['source']['case']} to start from")
    if any(f"source:{image}" not in given for image in fact["source"].get("images", ())):
        pytest.skip("there are no pixels of the source")
    if limit(fact["args"]) == 0:
        # The published tool takes one image for a limit of zero; here that is an error, and the record that of one.
        assert "--max-images" in errors[f"{name} as given"]
    if "error" in fact:
        assert name in errors, "no error"
        # A published assertion says nothing; here it is a sentence.
        assert "Assertion" in fact["error"] or words(fact["error"]) in words(errors[name])
        return
    assert name not in errors, errors[name]
    dest = folder / flag(fact["args"], "--dest")
    members = read_output(dest)
    assert list(members) == fact["members"]
    assert without_names(members["dataset.json"].decode()) == fact["dataset_json"]
    pngs = [content for member, content in members.items() if member != "dataset.json"]
    if "png_sizes" in fact:
        assert [len(png) for png in pngs][:len(fact["png_sizes"])] == fact["png_sizes"]
    if f"{name}/png0_bytes" in given:
        assert pngs[0][:8] == given[f"{name}/png0_bytes"].tobytes()[:8]
        assert chunks(pngs[0]) == chunks(given[f"{name}/png0_bytes"].tobytes())
    if "zip_first" in fact:
        with zipfile.ZipFile(dest) as archive:
            entries = archive.infolist()
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in entries) == fact["all_stored"]
        for entry, expected in ((entries[0], fact["zip_first"]), (entries[-1], fact["zip_last"])):
            assert {"name": entry.filename, "compress_type": entry.compress_type, "flag_bits": entry.flag_bits,
                    "external_attr": hex(entry.external_attr), "create_system": entry.create_system} == expected
    found = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs]).astype(int)
    assert found.shape == given[f"{name}/pixels"].shape
    allowed = 0 if flag(fact["args"], "--resolution") is None else number(case["tolerance"], r"\+-#", 1)
    assert np.abs(found - given[f"{name}/pixels"]).max() <= allowed


def without_names(text: str) -> str:
    """Return a dataset.json as the published tool writes it, without names of classes and what became of their size."""
    return json.dumps({key: value for key, value in json.loads(text).items() if key not in ("classes", "resize")})


def chunks(png: bytes) -> list[tuple[bytes, int]]:
    """Return (kind, length) of each chunk of a PNG."""
    found, place = [], 8
    while place < len(png):
        length = int.from_bytes(png[place:place + 4], "big")
        found.append((png[place + 4:place + 8], length))
        place += length + 12
    return found


@each_fact(SETS)
def test_training_set(case: Case, name: str, made_files: tuple[Path, dict[str, str]],
                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made_files[0])
    fact, pixels = facts(PAPER, case["file"])[name], pixels_of(case)
    args = dict(fact["args"])
    if "source" in fact and any(f"source:{image}" not in pixels for image in fact["source"]["images"]):
        pytest.skip("there are no pixels of the source")
    if "source" in fact:
        write_image_folder(made_files[0], fact["source"], pixels)
    elif not Path(args["path"]).exists() and fact.get("error") != "FileNotFoundError":
        pytest.skip(f"no converter case wrote {args['path']}")
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
    for key, column in (("first_pixels", 0), ("last_column_pixels", -1)):
        if key in fact:
            assert [image[:, 0, column].tolist() for image, _ in items] == fact[key]
