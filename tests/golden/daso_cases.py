"""What the golden cases of DASO share: their kinds, their arrays, and inputs drawn step by step."""
from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import torch

from tests.golden import cases as golden
from tests.golden.cases import Stored, tolerance, whole
from tests.golden.recipes import Normal, assigned

PAPER = "daso"
Case = dict[str, Any]
stored = functools.partial(golden.stored, PAPER)
ALL = golden.cases(PAPER)


def kind_of(case: Case) -> str:
    """Return what a case is about, from its fields and the names of its arrays; "" for what no test knows."""
    keys, made = set(golden.keys_of(case)), case.get("ctor", {})

    def all_match(pattern: str) -> bool:
        return all(re.fullmatch(pattern, key) for key in keys)

    kinds = {"training": "overrides" in case,
             "split": "labels_recipe" in case,
             "learning rates": "configs" in case,
             "alignment": "default_exponent" in case,
             "average": "ema_decay" in made,
             "daso step": "queue_max" in made,
             "usadtm step": "DTM_THRES" in made,
             "darp": "NUM_DARP_ITERS" in made,
             "crest": "labelled_counts" in made,
             "network": any(key.startswith(("logits_", "features_")) for key in keys),
             "class counts": all_match(r"\d+_[\d.]+_\d+_(fwd|rev)"),
             "permutations": all_match(r"\d+_\d+_\d+") and "sampler" in case.get("what", ""),
             "relative counts": all_match(r"\d+_[\d.]+_\d+"),
             "weighted draws": all_match(r"s\d+_b[\d.]+_(nosh|sh|probs)"),
             "operations": all_match(r"\w+_L\d+[pm]|_input\d*"),
             "cutout": all_match(r"s\d+(_uniforms)?") and any(key.endswith("_uniforms") for key in keys),
             "randaugment": all_match(r"s\d+"),
             "pipelines": all_match(r"\w+_s\d+|_input\d*"),
             "losses": {"in_logits", "in_soft"} <= keys,
             "mutual information": bool({"triplet", "pair_xy"} & keys),
             "accuracy": "top1_top5" in keys,
             "evaluation": any(key.startswith("out/") for key in keys),
             "median": keys == {"in", "out"},
             "ramps": "iters" in keys,
             "queue": all_match(r"\w+_st\d+_(feat|proto|sizes|y)"),
             "estimate": {"q", "val_logits"} <= keys,
             "estimate files": all_match(r".*estim\.npyz?"),
             "targets": all_match(r"\w+_-?[\d.]+_-?[\d.]+_-?[\d.]+_-?[\d.]+_(True|False)(_prob)?"),
             "interleaving": all_match(r"b\d+_nu\d+(_offsets)?"),
             "statistics": any(key.endswith("_gt_labels") for key in keys)}
    return next((kind for kind, is_it in kinds.items() if is_it), "")


def cases_of(kind: str) -> list[Case]:
    return [case for case in ALL if kind_of(case) == kind]


def close(found: Any, wanted: Any, case: Case, what: str) -> None:
    """Assert that an array is what is wanted, as closely as the case states."""
    found = found.detach().cpu() if isinstance(found, torch.Tensor) else found
    np.testing.assert_allclose(found, wanted, err_msg=what, **tolerance(case["tolerance"]))


def named_array(case: Case, pattern: str) -> np.ndarray:
    """Return the array whose whole key the words of a case name."""
    return golden.arrays(PAPER, case["file"])[re.search(pattern, case["what"])[1]]


def of_step(wanted: Stored, step: int) -> dict[str, np.ndarray]:
    """Return the arrays of a step by name, without the draws in it."""
    return {key.partition("/")[2]: value for key, value in wanted.items()
            if key.startswith(f"st{step}/") and "/draw" not in key}


class Recipe:
    """Inputs that a case describes as "seed 1; ASSIGNMENTS; per step: ASSIGNMENTS"."""

    def __init__(self, text: str, **names: Any) -> None:
        self.rng = np.random.default_rng(whole(text, "seed #"))
        first, self.every = re.split(r"per (?:step|call):", text)
        self.known = assigned(first, **names, rng=self.rng, normal=Normal(self.rng))

    def step(self, text: str | None = None, **names: Any) -> dict[str, Any]:
        """Draw what every step draws, or what `text` says, and return it with all that was drawn before the steps."""
        return assigned(self.every if text is None else text, **{**self.known, **names})
