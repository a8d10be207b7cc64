"""A conditional diffusion model as a classifier: the class whose denoiser explains an image best.

Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier", ICCV 2023; Clark and Jaini, "Text-to-Image
Diffusion Models are Zero-Shot Classifiers", NeurIPS 2023.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, ndtri
from torch import nn

from EDM.training.snapshots import read_snapshot
from shared.cli import UserError
from shared.data.classes import has_names
from shared.training.progress import Progress
from shared.training.randomness import numpy_rng

P_MEAN, P_STD = -1.2, 1.2  # of ln(sigma) in EDM's training
BATCH = 512  # evaluations of the denoiser at a time


def open_denoiser(path: str, classes: Sequence[str], shape: tuple[int, int, int]) -> tuple[nn.Module, np.ndarray]:
    """Return (denoiser, its number of each of our classes); UserError unless it knows all of them."""
    snapshot = read_snapshot(path)
    net = snapshot.build()
    theirs = snapshot.dataset_kwargs.get("classes")
    if not net.label_dim:
        raise UserError(f"--diffusion: {path} is unconditional; give a model of EDM/train.py --cond=1")
    if (net.img_channels, net.img_resolution, net.img_resolution) != shape:
        raise UserError(f"--diffusion: {path} takes images of {net.img_channels}x{net.img_resolution}x"
                        f"{net.img_resolution}, these are {'x'.join(map(str, shape))}")
    if theirs and has_names(theirs) and has_names(classes):
        if absent := [name for name in classes if name not in theirs]:
            raise UserError(f"--diffusion: {path} does not know the class {absent[0]}")
        return net, np.array([list(theirs).index(name) for name in classes])
    if net.label_dim != len(classes):
        raise UserError(f"--diffusion: {path} knows {net.label_dim} classes, the data set has {len(classes)}")
    return net, np.arange(len(classes))


@torch.no_grad()
def denoising_errors(net: nn.Module, images: np.ndarray, classes: np.ndarray, num_draws: int, seed: int,
                     device: torch.device) -> np.ndarray:
    """Return the mean weighted denoising error of each image under each class, float64 [N, K].

    images: uint8 [N, C, R, R]. The draws of noise are the same for all classes, and the noise levels are the quantiles
    of their distribution in the training of EDM: comparing classes needs far fewer draws than either error would. The
    weight is EDM's, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """
    net, count = net.to(device), len(classes)
    one_hot = torch.eye(net.label_dim, device=device)[torch.from_numpy(classes).to(device)]
    sigmas = np.exp(P_MEAN + P_STD * ndtri((np.arange(num_draws) + 0.5) / num_draws))
    spread, errors, rows = getattr(net, "sigma_data", 0.5), np.zeros((len(images), count)), max(1, BATCH // count)
    progress = Progress("denoising", len(images) * num_draws, "image draws")
    for draw, sigma in enumerate(sigmas):
        weight = (sigma ** 2 + spread ** 2) / (sigma * spread) ** 2
        for start in range(0, len(images), rows):
            clean = torch.from_numpy(images[start:start + rows].copy()).to(device).float() / 127.5 - 1
            drawn = numpy_rng(seed, start, f"denoising {draw}").standard_normal(clean.shape, np.float32)
            noisy = clean + float(sigma) * torch.from_numpy(drawn).to(device)
            x, y = noisy.repeat_interleave(count, 0), one_hot.repeat(len(clean), 1)
            denoised = net(x, torch.full((len(x),), float(sigma), device=device), y)
            difference = denoised - clean.repeat_interleave(count, 0)
            found = difference.square().flatten(1).mean(1).view(len(clean), count)
            errors[start:start + len(clean)] += weight * found.double().cpu().numpy()
            progress.advance(len(clean))
    progress.close()
    if not np.isfinite(errors).all():
        raise UserError("--diffusion: the denoising errors are not finite")
    return errors / num_draws


def class_probabilities(errors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return softmax(-errors / temperature), float64 [N, K], at the temperature that maximises the likelihood of the
    given labels.

    errors: [N, K]. labels: int64 [N], -1 unknown. The mean error is the log likelihood up to a factor, such as the
    number of pixels.
    """
    known = np.flatnonzero(labels >= 0)

    def surprise(log_temperature: float) -> float:
        logs = log_softmax(-errors[known] / np.exp(log_temperature), 1)
        return -logs[np.arange(len(known)), labels[known]].mean()

    scale = np.log(max(float(np.std(errors - errors.mean(1, keepdims=True))), 1e-12))
    best = minimize_scalar(surprise, bounds=(scale - 7, scale + 7), method="bounded").x
    return np.exp(log_softmax(-errors / np.exp(best), 1))


def combined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the normalised geometric mean of two opinions, float64 [N, K]."""
    logs = (np.log(np.maximum(one, 1e-12)) + np.log(np.maximum(other, 1e-12))) / 2
    return np.exp(log_softmax(logs, 1))
