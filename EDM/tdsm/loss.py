"""The losses of "Label-Noise Robust Diffusion Models" (Na et al., ICLR 2024): learning the scores of clean classes from
noisy labels.

Label noise turns class y into ỹ with probability T[y, ỹ]. Then the denoiser of a noisy label is a mixture of those of
the clean classes, D(x_t | ỹ) = Σ_y w_y D(x_t | y) with w_y = p(y | x_t, ỹ), and transition-aware weighted denoising
score matching (TDSM, equation 8) fits the mixture to the data. The weights come from a classifier c(x_t) of the clean
class: w_y = T[y, ỹ] c_y / Σ_k T[k, ỹ] c_k, which needs no inverse of T.

Losses are called like those of EDM/training/loss.py and take their noise levels from one of them.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from EDM.tdsm.classifiers import class_logits
from EDM.training.loss import DenoisingLoss
from shared import distributed
from shared.training.randomness import derived_dropout_keys

VOLUME_WEIGHT = 1e-4  # of log det T in VolMinNet
PIXELS_IN_CACHE = 8192  # of candidates on a CPU, whose caches hold the features of no more


def clean_class_weights(logits: torch.Tensor, observed: torch.Tensor, log_transition: torch.Tensor,
                        temp: float = 1.0) -> torch.Tensor:
    """Return w[n, y] = p(y | x_t, ỹ_n), float32 [N, K], for logits [N, K], noisy labels `observed` int64 [N] and log T.

    Where T rules a class out its weight is 0; a label that T makes impossible gives NaN (see transition.check_labels).
    """
    return (log_transition.T[observed] + F.log_softmax(logits.float() / temp, dim=1)).softmax(dim=1)


def noisy_log_posterior(logits: torch.Tensor, log_transition: torch.Tensor, temp: float = 1.0) -> torch.Tensor:
    """Return log p(ỹ | x_t) = log (Tᵀ softmax(logits / temp)), float32 [N, K]."""
    log_clean = F.log_softmax(logits.float() / temp, dim=1)
    return torch.logsumexp(log_clean[:, :, None] + log_transition, dim=1)


def log_matrix(transition: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Return log T as float32 [K, K] on `device`; -inf where T is 0."""
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(transition)).to(torch.float32).to(device)


# ---------------------------------------------------------------------------------------------------- the classifier

class ClassifierLoss:
    """Forward-corrected cross entropy -log (Tᵀ c(x_t))_ỹ, which trains c as a classifier of the clean classes (Patrini
    et al., CVPR 2017). Returns float32 [N]."""

    def __init__(self, levels: DenoisingLoss, transition: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.levels, self.draw, self.sigma = levels, levels.draw, levels.sigma
        self.log_transition = log_matrix(transition, device)

    def __call__(self, net: Callable, images: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor | None,
                 level: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma(level)
        logits = net(images + sigma * noise, sigma, labels, augment_labels=augment_labels)
        into_observed = self.log_transition.T[labels.argmax(1)]
        return -torch.logsumexp(into_observed + F.log_softmax(logits.float(), dim=1), dim=1)


class VolMinLoss:
    """Cross entropy through a transition matrix that is learned with the classifier, made small in volume (VolMinNet,
    Li et al., ICML 2021). The network returns (logits, T). Returns float32 [N]; each holds the volume term."""

    def __init__(self, levels: DenoisingLoss) -> None:
        self.levels, self.draw, self.sigma = levels, levels.draw, levels.sigma

    def __call__(self, net: Callable, images: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor | None,
                 level: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma(level)
        logits, transition = net(images + sigma * noise, sigma, labels, augment_labels=augment_labels)
        noisy = (logits.float().softmax(dim=1) * transition.T[labels.argmax(1)]).sum(1)
        return -(noisy + 1e-12).log() + VOLUME_WEIGHT * torch.linalg.slogdet(transition).logabsdet


# ------------------------------------------------------------------------------------------------------ the denoiser

class TDSMLoss:
    """λ(σ)·(Σ_y w_y D(x_t, y) - images)², unreduced [N, C, R, R].

    levels: noise levels and λ. transition: T, float64 [K, K]. classifier: estimates the clean class; in eval mode, and
    called without augmentation labels, as published. None stands for labels without noise: w is the label itself.
    tau: beside the observed class, those of weight above tau count; the others are dropped, and what is left does not
    add up to 1 unless `renormalise`. relative_tau: tau is in units of 1/K. temp: divides the logits.
    full_gradient: train the network on all classes of the mixture, as equation 8 has it; otherwise, as published, on
    the observed one alone, while the others are constants.
    label_dropout: fraction of images trained without class, by the plain loss.
    pair_batch: most (image, class) pairs in one forward without gradient; None: four times the batch on a GPU, on a
    CPU what its caches hold.

    After a call `statistics` holds scalars on the device: dsm (the plain loss of the observed class), candidates (pairs
    an image), kept_mass (Σ of the weights that count) and observed_weight.
    """

    def __init__(self, levels: DenoisingLoss, transition: np.ndarray, classifier: torch.nn.Module | None, *,
                 tau: float = 0.01, temp: float = 1.0, relative_tau: bool = False, renormalise: bool = False,
                 full_gradient: bool = False, label_dropout: float = 0.0, pair_batch: int | None = None,
                 device: torch.device | str = "cpu") -> None:
        self.levels, self.classifier, self.temp = levels, classifier, temp
        self.num_classes = len(transition)
        self.tau = tau / self.num_classes if relative_tau else tau
        self.renormalise, self.full_gradient, self.label_dropout = renormalise, full_gradient, label_dropout
        self.pair_batch = pair_batch
        self.log_transition = log_matrix(transition, device)
        self.statistics: dict[str, torch.Tensor] = {}

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return [count, 1, 1, 1], from which noise levels follow; with label dropout [count, 2, 1, 1], the second
        uniform in [0, 1)."""
        level = self.levels.draw(count, generator)
        if not self.label_dropout:
            return level
        return torch.cat([level, torch.rand(level.shape, generator=generator, device=generator.device)], dim=1)

    def sigma(self, level: torch.Tensor) -> torch.Tensor:
        """Return the noise level of drawn numbers, [N, 1, 1, 1]."""
        return self.levels.sigma(level[:, :1])

    def __call__(self, net: Callable, images: torch.Tensor, labels: torch.Tensor, augment_labels: torch.Tensor | None,
                 level: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma(level)
        noisy, observed = images + sigma * noise, labels.argmax(1)
        weights = self.weights(noisy, sigma, observed)
        if self.label_dropout:
            dropped = (level[:, 1] < self.label_dropout).view(-1, 1)
            weights = torch.where(dropped, F.one_hot(observed, self.num_classes), weights)
            labels = torch.where(dropped, 0, labels)
        candidates = (weights > self.tau).scatter_(1, observed[:, None], False)
        own_weight = weights.gather(1, observed[:, None]).view(-1, 1, 1, 1)
        rows, classes = candidates.nonzero(as_tuple=True)  # the one place where the host waits for the device
        pairs = Pairs(rows, classes, weights[rows, classes].view(-1, 1, 1, 1), self.num_classes)

        given = (noisy, sigma, augment_labels)
        if self.full_gradient:
            own, others = pairs.denoise_with_batch(net, *given, labels)
        else:
            batch = 4 * len(images) if images.is_cuda else max(1, PIXELS_IN_CACHE // images[0, 0].numel())
            others = pairs.denoise(distributed.unwrap(net), *given, self.pair_batch or batch)
            own = net(noisy, sigma, labels, augment_labels=augment_labels)
        mixture = own_weight * own + others
        kept_mass = own_weight.flatten() + (weights * candidates).sum(1)
        if self.renormalise:
            mixture = mixture / kept_mass.view(-1, 1, 1, 1)
        scale = self.levels.weight(sigma)
        with torch.no_grad():
            self.statistics = dict(dsm=(scale * (own - images) ** 2).mean(), candidates=candidates.sum() / len(images),
                                   kept_mass=kept_mass.mean(), observed_weight=own_weight.mean())
        return scale * (mixture - images) ** 2

    @torch.no_grad()
    def weights(self, noisy: torch.Tensor, sigma: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
        """Return p(y | x_t, ỹ), float32 [N, K]."""
        if self.classifier is None:
            return F.one_hot(observed, self.num_classes).to(torch.float32)
        logits = class_logits(self.classifier(noisy, sigma))
        return clean_class_weights(logits, observed, self.log_transition, self.temp)


class Pairs:
    """The (image, class) pairs whose denoised images enter a mixture beside that of the observed class.

    rows, classes: int64 [P], image by image. weights: [P, 1, 1, 1].
    """

    def __init__(self, rows: torch.Tensor, classes: torch.Tensor, weights: torch.Tensor, num_classes: int) -> None:
        self.rows, self.classes, self.weights, self.num_classes = rows, classes, weights, num_classes

    @torch.no_grad()
    def denoise(self, net: torch.nn.Module, noisy: torch.Tensor, sigma: torch.Tensor,
                augment_labels: torch.Tensor | None, batch: int) -> torch.Tensor:
        """Return Σ w D(x_t, y) over the pairs of each image, without gradient, in forwards of at most `batch`."""
        total = torch.zeros_like(noisy)
        if not len(self.rows):
            return total
        parts = -(-len(self.rows) // batch)  # of equal size, as a small one would cost more an image
        for rows, classes, weights in zip(*(values.tensor_split(parts) for values in
                                            (self.rows, self.classes, self.weights)), strict=True):
            count = len(rows)
            if noisy.is_cuda and count < batch:  # few different shapes, as kernels are chosen for each anew
                filler = min(1 << (count - 1).bit_length(), batch) - count
                rows, classes = F.pad(rows, (0, filler)), F.pad(classes, (0, filler))
            labels = F.one_hot(classes, self.num_classes).to(torch.float32)
            with derived_dropout_keys(net, rows, classes):
                denoised = net(noisy[rows], sigma[rows], labels,
                               augment_labels=None if augment_labels is None else augment_labels[rows])
            total.index_add_(0, rows[:count], weights * denoised[:count])
        return total

    def denoise_with_batch(self, net: Callable, noisy: torch.Tensor, sigma: torch.Tensor,
                           augment_labels: torch.Tensor | None, labels: torch.Tensor
                           ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (D(x_t, labels), the sum as of `denoise`), both with gradient, from a single forward."""
        batch = torch.arange(len(noisy), device=noisy.device)
        rows = torch.cat([batch, self.rows])
        wanted = torch.cat([labels, F.one_hot(self.classes, self.num_classes).to(labels.dtype)])
        tags = torch.cat([torch.full_like(batch, self.num_classes), self.classes])
        with derived_dropout_keys(distributed.unwrap(net), rows, tags):
            denoised = net(noisy[rows], sigma[rows], wanted,
                           augment_labels=None if augment_labels is None else augment_labels[rows])
        own, others = denoised.split([len(batch), len(self.rows)])
        return own, torch.zeros_like(own).index_add(0, self.rows, self.weights * others)
