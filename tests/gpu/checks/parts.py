"""What tests/gpu/check.py does, in the order of worth."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """module: in this folder; it has a function of the part's name. seconds: the budget. needs: packages beyond
    PyTorch, torchvision, NumPy, SciPy, scikit-learn, Pillow, tqdm, PyYAML, matplotlib and timm.

    null: what the null GPU cannot show of it.
    """

    module: str
    seconds: float
    null: str
    needs: tuple[str, ...] = ()


PARTS = {
    "versions": Part("libraries", 10, ""),
    "augmentation": Part("values", 20, "values are not compared"),
    "steps": Part("methods", 75, "values are not compared"),
    "golden": Part("golden", 40, "values are not compared", ("pytest",)),
    "freematch_speed": Part("speed", 70, "no times, no CUDA graphs, nothing compiled"),
    "edm_speed": Part("speed", 95, "no times, no CUDA graphs, nothing compiled"),
    "waits": Part("methods", 40, ""),
    "memory": Part("methods", 30, ""),
    "resume": Part("methods", 25, "values are not compared"),
    "sampling": Part("speed", 30, "no times"),
    "nccl": Part("libraries", 15, "NCCL is not there"),
    "dali": Part("libraries", 20, "DALI is not there", ("nvidia.dali",)),
}
