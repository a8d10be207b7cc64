"""What the golden cases of TorchSSL share: their kinds, inputs, networks and flags described in words."""
from __future__ import annotations

import functools
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.golden import cases as golden
from tests.golden.cases import fill, number, whole
from TorchSSL.core.networks import WideResNet

PAPER = "torchssl"
ALL = golden.cases(PAPER)
expected = functools.partial(golden.stored, PAPER)
# Published method, as the cases name it, in letters alone -> its script and class.
METHODS = {"freematch": ("freematch", "FreeMatch"), "softmatch": ("softmatch", "SoftMatch"),
           "fixmatch": ("fixmatch", "FixMatch"), "flexmatch": ("flexmatch", "FlexMatch"), "uda": ("uda", "UDA"),
           "pseudolabel": ("pseudolabel", "PseudoLabel"), "pimodel": ("pimodel", "PiModel"),
           "meanteacher": ("meanteacher", "MeanTeacher"), "fullysupervised": ("fullysupervised", "FullySupervised"),
           "mixmatch": ("mixmatch", "MixMatch"), "remixmatch": ("remixmatch", "ReMixMatch"), "vat": ("vat", "VAT")}


def kind_of(case: dict[str, Any]) -> str:
    """Return what a case is about, from its fields and arrays; "" for what no test knows."""
    outputs, given = set(case.get("output_keys", ())), case.get("arguments", {})
    drawn = {entry["name"] for entry in case.get("inputs", {}).get("recipe", ())}
    kinds = {"network": "state_dict_file" in case,
             "training": "final_param_l2" in outputs,
             "freematch series": {"time_p", "mask"} <= outputs,
             "freematch state": "time_p" in outputs,
             "cross entropy": bool(outputs & {"hard_none", "hard_mean", "soft_none"}),
             "schedule": {"lr", "total", "warmup"} <= given.keys(),
             "average": "decay" in given,
             "optimiser": "weight_decay" in given,
             "metrics": any(name.startswith("eval__") for name in outputs),
             "alignment": given.get("use_DA") is True,
             "annealing": outputs <= {"linear", "exp", "log", "none"},
             "annealed cross entropy": "tsa" in given,
             "softmatch series": "ulb_prob_t" in outputs,
             "masked loss": "pseudo_label" in outputs and "p_cutoff" in given,
             "difference": {"a", "b"} <= drawn and outputs <= {"loss", "grad"},
             "interleaving": all(re.match("interleave_|offsets_", name) for name in outputs),
             "mixup": "mixed_x" in outputs,
             "adversarial loss": "vat_loss" in outputs,
             "operation": "range_in_policy" in given,
             "randaugment": "plans" in given,
             "rotation": "angles" in given,
             "cutout": all(re.fullmatch(r"\w+@v.*_x.*_y.*", name) for name in outputs),
             "weak transform": any(re.search(r"_flip\d|_eval$", name) for name in outputs),
             "split": "num_labels" in given,
             "informational": "not required to match" in str(case.get("tolerance")),
             "pseudo-labels": {"images", "targets"} <= given.keys(),
             "zip labels": "pseudo_labels" in given}
    return next((kind for kind, is_it in kinds.items() if is_it), "")


def cases_of(kind: str) -> list[dict[str, Any]]:
    return [case for case in ALL if kind_of(case) == kind]


def draw_inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(case["inputs"]["seed"])
    drawn = {}
    for entry in case["inputs"]["recipe"]:
        match entry["draw"]:
            case "normal":
                value = rng.standard_normal(entry["shape"]).astype(np.float32) * np.float32(entry.get("scale", 1))
            case "integers":
                value = rng.integers(entry["low"], entry["high"], entry["shape"])
            case "uint8":
                value = rng.integers(0, 256, entry["shape"], dtype=np.uint8)
            case other:
                raise ValueError(f"{case['id']}: unknown draw {other!r}")
        drawn[entry["name"]] = torch.from_numpy(value)
    return drawn


def stored_input(case: dict[str, Any], name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(golden.arrays(PAPER, case["file"])[case["stored_input_keys"][name]]))


def method_of(case: dict[str, Any]) -> tuple[str, str]:
    """Return script and class of the method that the words of a case begin with."""
    letters = re.sub("[^a-z]", "", case["what"].lower())
    name = max((name for name in METHODS if letters.startswith(name)), key=len, default=None)
    if name is None:
        raise LookupError(f"{case['id']}: no method in {case['what']!r}")
    script, kind = METHODS[name]
    with_fairness = "ent_loss_ratio" in case.get("arguments", {}) or "fairness" in case["what"]
    return ("freematch_entropy" if script == "freematch" and with_fairness else script), kind


def flags_of(given: dict[str, Any], script: ModuleType, **further: Any) -> list[str]:
    """Return those arguments of a case that are flags of a script, as it takes them."""
    known = vars(script.parse([]))
    return [f"--{name}={value}" for name, value in {**given, **further}.items()
            if name in known and not isinstance(value, (dict, list))]


def options_of(given: dict[str, Any], script: ModuleType) -> SimpleNamespace:
    """Read the set-up of a training case, part of which the index states in words."""
    text = given["optimizer"]
    return script.parse(flags_of(given, script, lr=number(text, "lr #"), momentum=number(text, "nesterov #"),
                                 weight_decay=number(text, "weight decay #"), ema_m=given["ema_decay"]))


def network_of(text: str, rotation_head: bool = False) -> torch.nn.Module:
    """Return the filled network of e.g. "WideResNet depth 10 widen 1, 10 classes, fill() then fc.weight x 5"."""
    net = fill(WideResNet(whole(text, "# classes", 10), depth=whole(text, "depth #"),
                          widen_factor=whole(text, "widen #"), rotation_head=rotation_head))
    with torch.no_grad():
        net.fc.weight.mul_(number(text, "fc.weight x #", 1))
    return net.double() if "float64" in text else net


def norms(tensors: Any) -> list[float]:
    """Return L2 norms, -1 for a gradient that is not there."""
    return [-1.0 if tensor is None else tensor.detach().double().norm().item() for tensor in tensors]
