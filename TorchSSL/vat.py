"""VAT: the prediction stays the same in the direction of its largest change.

Miyato et al., "Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised Learning",
IEEE TPAMI 2018 (arXiv 1704.03976).

    python vat.py --c config/vat/vat_cifar10_40_0.yaml
"""
from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import Float, Int, Option, run_main
from shared.distributed import unwrap
from shared.training.randomness import torch_rng
from TorchSSL.core.algorithm import Algorithm, Batch, classify, frozen_batchnorm, ramp_up
from TorchSSL.core.options import learner_options
from TorchSSL.core.trainer import train

FLAGS = (
    Option("--vat_weight", Float(0), 0.3, "weight of the adversarial loss"),
    Option("--entmin_weight", Float(0), 0.06, "weight of the entropy of the predictions"),
    Option("--vat_eps", Float(0), 6.0, "length of the perturbation of an image", unit="normalised grey levels"),
    Option("--vat_xi", Float(0), 1e-6, "length at which its direction is searched for; the published 1e-6 is at the "
           "rounding error of fp32 and gives a noisy direction; 0.01 is better"),
    Option("--vat_iterations", Int(1), 1, "power iterations of that search"),
    Option("--unsup_warmup_pos", Float(0, 1), 0.4, "fraction of the training in which the adversarial weight rises "
           "from 0"),
)
parse = partial(learner_options, "vat", __doc__, FLAGS, seed=0, uratio=1, num_labels=4000, num_eval_iter=1000)


class VAT(Algorithm):
    """The loss of VAT; it has no state."""

    views = ("weak",)

    def loss(self, net: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to descend and the numbers to log."""
        options, (images,) = self.options, batch.views
        supervised = F.cross_entropy(classify(net, batch.labeled), batch.labels)
        with frozen_batchnorm(net):
            logits = classify(net, images)
            adversarial = adversarial_loss(net, images, logits, self.noise(images, step), options.vat_xi,
                                           options.vat_eps, options.vat_iterations)
        uncertainty = entropy(logits)

        ramp = ramp_up(step, options.unsup_warmup_pos, options.num_train_iter)
        total = supervised + options.vat_weight * ramp * adversarial + options.entmin_weight * uncertainty
        return total, {"train/sup_loss": supervised, "train/unsup_loss": adversarial,
                       "train/loss_entmin": uncertainty, "train/total_loss": total}

    def noise(self, images: Tensor, step: int) -> Tensor:
        """Return the first direction of the search: this rank's part of normal noise for the global batch."""
        world, count = self.setting.world, len(images) * self.setting.world.size
        generator = torch_rng(self.setting.seed, step, "vat", images.device)
        noise = torch.randn(count, *images.shape[1:], generator=generator, dtype=images.dtype, device=images.device)
        return noise[world.slice(count)]


def adversarial_loss(net: nn.Module, images: Tensor, logits: Tensor, noise: Tensor, xi: float, length: float,
                     iterations: int) -> Tensor:
    """Return the divergence [] of the prediction on perturbed images from the one on clean images (algorithm 1).

    images [n, ...]; logits [n, C]: the clean prediction, constant here; noise: first direction, shaped as images.
    """
    target, direction = logits.detach().softmax(1), noise
    searched = unwrap(net)  # data-parallel training would wait for gradients of the weights, which the search has not
    for _ in range(iterations):
        direction = (xi * unit(direction)).requires_grad_()
        divergence = kl_divergence(target, classify(searched, images + direction))
        direction, = torch.autograd.grad(divergence, direction)
    return kl_divergence(target, classify(net, images + length * unit(direction)))


def unit(direction: Tensor) -> Tensor:
    """Return [n, ...] with every image scaled to length 1."""
    return direction / (direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1)) + 1e-16)


def kl_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(target || softmax(logits)) [], averaged over images; both [n, C]."""
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean")


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy [] of softmax(logits) [n, C] in nats, averaged over images."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


if __name__ == "__main__":
    run_main(lambda: train(parse(), VAT))
