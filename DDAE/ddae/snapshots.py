"""Features of EDM networks: the snapshots of EDM/train.py, and those of EDM, DPT and TDSM, probed like a DDAE."""
from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from DDAE.ddae.diffusion import EDM, FEATURE_STEPS, pool
from EDM.training.networks import UNetBlock
from EDM.training.snapshots import load_network
from shared.cli import UserError, nearest

SIGMA_RANGE = (0.002, 80.0)  # of the schedule in which noise levels are counted, within what the network allows


class SnapshotNet(nn.Module):
    """A preconditioned EDM network whose decoder blocks can be asked for by the names out_1, out_2, ...

    Counted are the blocks that take a skip connection, in computing order; up-samplers and the two deepest blocks have
    no name. Conditional networks are asked without a class.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.image_shape = (net.img_channels, net.img_resolution, net.img_resolution)
        layers = [layer for name, layer in net.model.dec.items() if "_block" in name and isinstance(layer, UNetBlock)]
        self.blocks = {f"out_{number}": layer for number, layer in enumerate(layers, start=1)}
        self.widths = {name: layer.conv1.weight.shape[0] for name, layer in self.blocks.items()}

    @property
    def block_names(self) -> list[str]:
        """The decoder blocks, in computing order."""
        return list(self.widths)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise UserError for a block that does not exist, naming those that do."""
        for name in names:
            if name not in self.widths:
                raise UserError(f"this network has no block {name!r}{nearest(str(name), self.widths)}; it has "
                                f"{', '.join(self.widths)}")

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the denoised image of x [N, C, R, R] at noise levels sigma [N] or [1]."""
        return self.net(x, sigma)

    def features(self, x: torch.Tensor, sigma: torch.Tensor, names: Sequence[str] | None = None
                 ) -> dict[str, torch.Tensor]:
        """Return the outputs of the blocks `names` (None: all) for the noisy images x at levels sigma, computing no
        block behind the last of them."""
        names = self.block_names if names is None else list(names)
        self.check_names(names)
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str) -> None:
            def hook(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
                kept[name] = output
                if len(kept) == len(set(names)):
                    raise _Enough
            handles.append(self.blocks[name].register_forward_hook(hook))

        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for name in set(names):
                keep(name)
            self.net(x, sigma)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: kept[name] for name in names}


class _Enough(Exception):
    """Ends a forward pass: all that was asked for is there."""


class SnapshotDiffusion(EDM):
    """The noise levels of EDM for a SnapshotNet, which does its own preconditioning."""

    def features(self, net: SnapshotNet, x01: torch.Tensor, t: int | torch.Tensor, noise: torch.Tensor,
                 names: Sequence[str] | None = None, norm: bool = False, steps: int = FEATURE_STEPS
                 ) -> dict[str, torch.Tensor]:
        """Return pooled outputs of the blocks `names` (None: all) for images noised to place t of the schedule."""
        noised, sigma = self.perturb(2 * x01 - 1, t, noise, steps)
        return pool(net.features(noised, sigma.flatten(), names), norm)


def load_snapshot(path: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[SnapshotNet, SnapshotDiffusion]:
    """Return the network of a snapshot (file or URL) in eval mode without gradients, and its noise levels.

    Raises UserError for a file that is missing, damaged or no snapshot.
    """
    net = load_network(path, device).eval().requires_grad_(False)
    low, high = max(SIGMA_RANGE[0], float(net.sigma_min)), min(SIGMA_RANGE[1], float(net.sigma_max))
    return SnapshotNet(net), SnapshotDiffusion(sigma_min=low, sigma_max=high)
