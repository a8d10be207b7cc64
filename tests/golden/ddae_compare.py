"""What the golden cases of DDAE share: their kinds, and how they state closeness."""
from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.golden import cases as golden
from tests.golden.cases import NUMBER, facts
from tests.golden.recipes import computed

PAPER = "ddae"
ALL = golden.cases(PAPER)
given = functools.partial(golden.stored, PAPER)
tensors = functools.partial(golden.tensors, PAPER)


def kind_of(case: dict[str, Any]) -> str:
    """Return what a case is about, from its constructor and arrays; "" for what no test knows."""
    keys, made = case.get("keys", {}).keys(), case.get("constructor", {})
    kinds = {"sampling script": "options" in made,
             "training": "n_epoch" in made,
             "unet": "ch_mults" in made,
             "wide resnet": "blocks_per_group" in made,
             "dit feature": "blockname" in made,
             "dit": "depth" in made,
             "block": any(key.startswith("out") for key in keys) and bool(
                 {"in_channels", "d_k", "use_conv", "augment_dim"} & made.keys()),
             "vp": {"train_x", "x01"} <= keys and "betas" in made,
             "ve": "train_x" in keys and "p_std" in made,
             "learning rate": "warm_epoch" in made,
             "noise head": "dim" in made,
             "test levels": {"ddpm", "edm"} <= keys,
             "decay": any(key.startswith("decay_") for key in keys),
             "average": {"online", "averaged"} <= keys,
             "probe": "times" in made,
             "contrastive": "batches" in made,
             "pixels": bool({"grid_uint8", "png_uint8"} & keys),
             "enlargement": "out_strided" in keys,
             "dit tables": "sqrt_ab_f64" in keys,
             "sinusoid": "emb" in keys and "out" not in keys,
             "respacing": "timestep_map" in keys,
             "dit samplers": bool({"ancestral_out", "ddim_out"} & keys),
             "positions": "row_sums" in keys,
             "sample": "xT" in keys,
             "pipe": "labels" in keys and "images" in keys,
             "features": any(key.startswith("tint_raw") for key in keys),
             "gradients": "grad_norms" in keys,
             "perturb": "x_noised" in keys,
             "augmented loss": "same draws as" in case.get("inputs", {}),
             "schedules": all(re.fullmatch(r"steps\d+_f64|dd[pi]m_\w+", key) for key in keys)}
    return next((kind for kind, is_it in kinds.items() if is_it), "")


def cases_of(*kinds: str) -> list[dict[str, Any]]:
    return [case for case in ALL if kind_of(case) in kinds]


def check_state(net: torch.nn.Module, file: str) -> None:
    """Assert names, shapes and order of a network's tensors where there is such a file: optimizer states are numbered
    in that order."""
    listed = facts(PAPER, file)
    state = [(name, list(tensor.shape)) for name, tensor in net.state_dict().items()]
    assert not listed or state == list(listed.items())


def analytic(text: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return f of a stand-in network that is described as "f(x,c) = 0.6*sin(x + c); ..."."""
    formula = re.search(r"f\(x, ?c\) = ([^;]+)", text)[1]
    functions = {name: getattr(torch, name) for name in ("sin", "cos", "tanh", "exp")}
    return lambda x, c: computed(formula, x=x, c=c, **functions)


def stated(tolerance: str, word: str) -> str:
    """Return the part of a tolerance that speaks of `word`: parts are separated by semicolons or commas, and a part of
    names alone belongs to the one before it. Raises LookupError where there is none."""
    found = None
    for part in re.split("[;,]", re.sub(r"\(.*?\)", "", tolerance)):
        found = part if found is None or re.search(r"\d", part) else found + "," + part
        if re.search(rf"(?<!\w){word}(?!\w)", part):
            return found
    raise LookupError(f"{tolerance!r} says nothing of {word}")


def assert_close(ours: Any, reference: Any, tolerance: str, name: str = "") -> None:
    """Check an array against a stated tolerance.

    "exact"; "relative R"; a number: largest absolute difference, times max(1, max|ref|) where the text says so; both
    ("A relative R"): the looser of the two, per element.
    """
    ours = ours.detach().cpu() if isinstance(ours, torch.Tensor) else ours
    reference = reference.cpu() if isinstance(reference, torch.Tensor) else reference
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"{name}: shape {ours.shape}, expected {reference.shape}"
    difference = np.abs(ours - reference)
    relative = re.search(rf"relative {NUMBER}", tolerance)
    rest = tolerance.replace(relative[0], "") if relative else tolerance
    absolute = re.search(rf"(?<![\w.]){NUMBER}", rest)
    if absolute is None and relative is None:
        assert "exact" in tolerance, f"no tolerance in {tolerance!r}"
        assert not difference.any(), f"{name}: not exact, {difference.max():.3g} apart"
        return
    allowed = np.zeros_like(reference)
    if absolute is not None:
        scale = max(1.0, float(np.abs(reference).max(initial=0))) if "max(1" in rest else 1.0
        allowed = allowed + float(absolute[1]) * scale
    if relative is not None:
        allowed = np.maximum(allowed, float(relative[1]) * np.abs(reference))
    worst = np.unravel_index(np.argmax(difference - allowed), difference.shape)
    assert (difference <= allowed).all(), (
        f"{name}{list(worst)}: {ours[worst]:.8g}, expected {reference[worst]:.8g}, {difference[worst]:.3g} apart")
