"""Published snapshot and training-state files, whose embedded source raises when it is run."""
from __future__ import annotations

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from EDM.training.published import read_pickle
from EDM.training.snapshots import load_training_state, read_snapshot
from tests.golden.cases import arrays, each, fill, name_of, serves
from tests.golden.edm_cases import PAPER, cases

SNAPSHOTS = cases(kind="file format")
SERVES = serves(SNAPSHOTS)
# (case, key) of every snapshot file: whole files are stored as bytes.
FILES = [pytest.param(case, name, id=f"{name_of(case)}-{name}") for case in SNAPSHOTS
         for name, content in arrays(PAPER, case.get("file", "")).items()
         if content.dtype == np.uint8 and content.ndim == 1 and "state" not in name]


def stored(case: dict, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays(PAPER, case["file"]).items()
            if name.startswith(prefix)}


@pytest.mark.parametrize(("case", "writer"), FILES)
def test_snapshot_file(case: dict, writer: str, tmp_path: Path) -> None:
    content = arrays(PAPER, case["file"])[writer].tobytes()
    path = tmp_path / "network-snapshot-000000.pkl"
    path.write_bytes(content)
    snapshot = read_snapshot(path)
    assert snapshot.class_name == case["class_name"]
    assert snapshot.init_kwargs == case["init_kwargs"]
    assert snapshot.dataset_kwargs == case["dataset_kwargs"]
    top = read_pickle(io.BytesIO(content), "snapshot")
    assert list(top) == case["top_level_keys"]
    assert top["loss_fn"].class_name == case["loss_class"]

    net = snapshot.build()
    assert [name for name, _ in net.named_parameters()] == case["parameter_order"]
    expected = dict(fill(copy.deepcopy(net)).named_parameters())
    for name in case["parameter_order"]:
        assert torch.equal(snapshot.state_dict[name], expected[name]), name
        assert torch.equal(net.get_parameter(name), expected[name]), name
    buffers = stored(case, "tensor:")
    assert set(snapshot.state_dict) == {*case["parameter_order"], *buffers}
    for name, value in buffers.items():
        assert np.array_equal(snapshot.state_dict[name].numpy(), value), name
        assert np.array_equal(net.get_buffer(name).numpy(), value), name


@each(SNAPSHOTS)
def test_training_state_file(case: dict, tmp_path: Path) -> None:
    path = tmp_path / "training-state-000000.pt"
    path.write_bytes(arrays(PAPER, case["file"])["training_state_pt"].tobytes())
    state = load_training_state(path)
    expected = stored(case, "state_tensor:")
    assert set(state["net"]) == set(expected)
    for name, value in expected.items():
        assert np.array_equal(state["net"][name].numpy(), value), name
    adam = state["optimizer_state"]
    assert adam["param_groups"][0]["params"] == list(range(len(case["parameter_order"])))
    for number, name in enumerate(case["parameter_order"]):
        assert adam["state"][number]["exp_avg"].shape == state["net"][name].shape
    assert np.array_equal(adam["state"][0]["exp_avg"].numpy(), arrays(PAPER, case["file"])["adam_exp_avg_first"])
