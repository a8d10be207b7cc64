"""What the golden cases of TDSM share."""
from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden import cases as golden
from tests.golden.cases import facts, golden_dir

PAPER = "tdsm"
stored = functools.partial(golden.stored, PAPER)
tensors = functools.partial(golden.tensors, PAPER)
ALL = golden.cases(PAPER)


def kind_of(case: dict[str, Any]) -> str:
    """Return what a case is about, from its fields and arrays; "" for what no test knows."""
    keys = set(case.get("keys", ()))
    kinds = {"label flips": {"clean", "noisy"} <= keys,
             "conversion": "flags" in case,
             "folder labels": "files" in case,
             "denoiser loss": "denoiser_kwargs" in case,
             "sampler": "net_kwargs" in case,
             "network": "state_file" in case,
             "volmin": {"raw", "grad_raw"} <= keys,
             "weights": {"w", "w_exact"} <= keys,
             "classifier loss": {"z", "loss"} <= keys,
             "transition": bool(keys & {"T", "S"}) and "loss" not in keys}
    return next((kind for kind, is_it in kinds.items() if is_it), "")


def cases_of(kind: str) -> list[dict[str, Any]]:
    return [case for case in ALL if kind_of(case) == kind]


def assert_state(net: torch.nn.Module, file: str, listed: bool = True) -> None:
    """Assert names, order and shapes of parameters and buffers. listed: the index names the file."""
    if not (golden_dir(PAPER) / file).exists():
        if listed:
            pytest.skip(f"there is no {file}")
        return
    expected = facts(PAPER, file)
    for kind, ours in (("parameters", net.named_parameters()), ("buffers", net.named_buffers())):
        if kind in expected:
            assert [[name, list(tensor.shape)] for name, tensor in ours] == \
                [[name, shape] for name, shape in expected[kind].items()]
    if "n_params" in expected:
        assert sum(parameter.numel() for parameter in net.parameters()) == expected["n_params"]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, absolute: float, relative: float) -> None:
    """Assert that every element is within either bound."""
    ours, theirs = ours.detach().double(), theirs.double()
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() <= torch.maximum(torch.tensor(absolute), relative * theirs.abs())).all(), \
        float((ours - theirs).abs().max())


def one_hot(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    return torch.from_numpy(np.eye(num_classes, dtype=np.float32))[labels]
