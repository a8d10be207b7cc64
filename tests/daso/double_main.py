"""main.py with a network and images in double precision: what then differs between runs is no matter of rounding."""
from __future__ import annotations

import torch

from DASO import main
from DASO.lib.data.augment import Look
from DASO.lib.trainer import Trainer


def in_double() -> None:
    """Let networks and views be float64 from here on."""
    new_model, view = Trainer.new_model, Look.view
    Trainer.new_model = lambda self, seed: new_model(self, seed).double()
    Look.view = lambda self, *given: view(self, *given).double()


if __name__ == "__main__":
    torch.set_num_threads(1)
    in_double()
    main.main()
