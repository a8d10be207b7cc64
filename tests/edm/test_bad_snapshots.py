"""Network snapshots that are damaged or made to do harm: noticed or read, in one line, quickly."""
from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from EDM.training import snapshots
from EDM.training.networks import EDMPrecond
from EDM.training.published import Record, describe, is_plain
from EDM.training.snapshots import (
    FORMAT,
    load_network,
    load_training_state,
    read_snapshot,
    save_snapshot,
    write_snapshot,
)
from shared.cli import UserError
from tests.edm.published_form import write_published
from tests.shared.programs import PLAIN_NAMES, assert_same, doubled, pickled_names

NETWORK = dict(img_resolution=8, img_channels=3, label_dim=4, model_type="SongUNet", model_channels=8,
               channel_mult=[1], num_blocks=1, attn_resolutions=[], augment_dim=0, dropout=0.1, use_fp16=False)


@pytest.fixture(scope="module")
def net() -> EDMPrecond:
    return EDMPrecond(**NETWORK).eval().requires_grad_(False)


def save_state(path: Path, net: EDMPrecond) -> None:
    torch.save(dict(net=dict(net.state_dict()), optimizer_state={"state": {}, "param_groups": []}), path)


def contents(path: Path) -> dict[str, Any]:
    return load_training_state(path) if path.suffix == ".pt" else vars(read_snapshot(path))


@pytest.fixture(autouse=True)
def quietly(recwarn: pytest.WarningsRecorder) -> None:
    """Damaged bytes may look like a pickle of the future, of which torch warns."""


FORMS: dict[str, Callable[[Path, EDMPrecond], None]] = {
    "ours.pkl": save_snapshot, "ours.safetensors": save_snapshot, "training-state-000001.pt": save_state,
    "published.pkl": lambda path, net: write_published(path, net, NETWORK)}


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_noticed(form: str, net: EDMPrecond, tmp_path: Path) -> None:
    """Cut short or with a byte changed at 200 places, a file of ours is refused, or holds what it held; a published
    one, which has no checksum, is refused or read. Nothing else happens."""
    path, chance = tmp_path / form, random.Random(0)
    FORMS[form](path, net)
    good, expected, refused = path.read_bytes(), contents(path), 0
    for case in range(200):
        bad = bytearray(good)
        place = chance.randrange(len(bad) if case % 4 > 1 else 3000)  # half of them where the structure is
        if case % 2:
            bad[place] ^= 1 << chance.randrange(8)
        else:
            bad = bad[:place]
        path.write_bytes(bad)
        try:
            found = contents(path)
        except UserError as error:
            assert "\n" not in str(error) and form in str(error)
            refused += 1
            continue
        if form != "published.pkl":
            assert_same(found, expected)
    assert refused >= 100


def write_safetensors(path: Path, entries: dict[str, Any], data: bytes = b"") -> Path:
    about = dict(class_name="EDMPrecond", init_kwargs=NETWORK, dataset_kwargs={})
    header = json.dumps({"__metadata__": {"format": FORMAT, "about": json.dumps(about)}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "100,000 empty tensors": {f"t{i}": entry([0], 0, 0) for i in range(100_000)},
    "9,000 empty tensors": {f"t{i}": entry([0], 0, 0) for i in range(9_000)},
    "overlapping tensors": {"a": entry([4], 0, 16), "b": entry([4], 8, 24)},
    "the same bytes twice": {"a": entry([6], 0, 24), "b": entry([6], 0, 24)},
    "a shape beyond its data": {"a": entry([1 << 40, 1 << 20], 0, 24)},
    "a shape that overflows": {"a": entry([1 << 62, 1 << 62], 0, 24)},
    "data beyond the file": {"a": entry([1 << 30], 0, 1 << 32)},
    "data that is left over": {"a": entry([1], 0, 4)},
    "negative offsets": {"a": entry([1], -4, 0)},
    "an unknown type": {"a": entry([6], 0, 24, "F99")},
}


@pytest.mark.parametrize("name", HEADERS)
def test_harmful_safetensors_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a header of endlessly many tensors, of which none is looked at."""
    path = write_safetensors(tmp_path / "x.safetensors", HEADERS[name], bytes(24) if "empty" not in name else b"")
    looked_at: list[object] = []
    if name == "100,000 empty tensors":
        monkeypatch.setattr(snapshots, "safe_open", lambda *args, **options: looked_at.append(args))
    with pytest.raises(UserError) as error:
        load_network(path)
    assert not looked_at and "\n" not in str(error.value) and "x.safetensors" in str(error.value)


def test_a_header_as_long_as_it_likes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 1 << 40) + b"{")
        file.truncate(1 << 33)  # of holes
    with pytest.raises(UserError, match=r"refused, a header of 1099511627776 bytes"):
        load_network(path)


def test_what_unfolds_without_end_is_refused(net: EDMPrecond, tmp_path: Path) -> None:
    assert not is_plain(doubled(40)) and is_plain(doubled(5))
    write_published(tmp_path / "x.pkl", net, {**NETWORK, "channel_mult": doubled(30)})
    with pytest.raises(UserError, match="not plain keywords"):
        read_snapshot(tmp_path / "x.pkl")
    module = Record()
    for _ in range(31):
        outer = Record()
        outer.class_name, outer.state = "EDMPrecond", dict(_init_kwargs={}, _modules=dict(a=module, b=module))
        module = outer
    with pytest.raises(UserError, match="endlessly many"):
        describe(module, "x")
    for wrong in (dict(_modules=[1]), dict(_parameters=True), dict(_buffers={3: torch.zeros(1)}),
                  dict(_modules=dict(a=1)), dict(_parameters=dict(a=1))):
        module.state = dict(_init_kwargs={}, **wrong)
        with pytest.raises(UserError):
            describe(module, "x")


@pytest.mark.parametrize("claim", [{"num_blocks": 1_000_000}, {"model_channels": 1_000_000},
                                   {"channel_mult": [1] * 100_000}, {"img_channels": 1 << 40}], ids=str)
def test_a_network_far_larger_than_its_tensors_is_not_built(net: EDMPrecond, tmp_path: Path, claim: dict) -> None:
    save_snapshot(tmp_path / "x.pkl", net)
    honest = read_snapshot(tmp_path / "x.pkl")
    write_snapshot(tmp_path / "x.pkl", replace(honest, init_kwargs={**honest.init_kwargs, **claim}))
    with pytest.raises(UserError, match=r"x\.pkl: .*(far larger|no EDMPrecond can be made)"):
        load_network(tmp_path / "x.pkl")


def test_snapshots_name_nothing_but_tensors(net: EDMPrecond, tmp_path: Path) -> None:
    """As scanners of pickles see them."""
    save_snapshot(tmp_path / "a.pkl", net)
    save_state(tmp_path / "b.pt", net)
    assert pickled_names(tmp_path / "a.pkl") <= PLAIN_NAMES and pickled_names(tmp_path / "b.pt") <= PLAIN_NAMES
    write_published(tmp_path / "c.pkl", net, NETWORK)
    assert "torch_utils.persistence _reconstruct_persistent_obj" in pickled_names(tmp_path / "c.pkl")
