"""VAT: the prediction shall not change in the direction in which it would change most.

Miyato et al., "Virtual Adversarial Training: A Regularization Method for Supervised and Semi-Supervised Learning",
IEEE TPAMI 2018 (arXiv 1704.03976).

    python vat.py --c config/vat/vat_cifar10_40_0.yaml
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shared.cli import run_main
from shared.lazy import lazy
from TorchSSL.core.algorithm import Algorithm, classify, frozen_batchnorm, ramp_up
from TorchSSL.core.options import COUNT, POSITIVE, SHARE, Flag, parse_options

if TYPE_CHECKING:
    from TorchSSL.core.batches import Batch

torch = lazy("torch")

FLAGS = (
    Flag("--vat_weight", POSITIVE, 0.3, "weight of the adversarial loss"),
    Flag("--entmin_weight", POSITIVE, 0.06, "weight of the entropy of the predictions"),
    Flag("--vat_eps", POSITIVE, 6.0, "length of the perturbation of an image, in normalised grey levels"),
    Flag("--vat_xi", POSITIVE, 1e-6, "length at which its direction is searched for; the published 1e-6 is at the "
         "rounding error of fp32, so that the direction is partly noise: 0.01 finds it better"),
    Flag("--vat_iterations", COUNT, 1, "power iterations of that search"),
    Flag("--unsup_warmup_pos", SHARE, 0.4, "share of the training in which the adversarial weight rises from 0"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: this process's); UserError."""
    return parse_options("vat", __doc__, FLAGS, argv, seed=0, uratio=1, num_labels=4000, num_eval_iter=1000)


def main() -> None:
    options = parse()
    from TorchSSL.core.trainer import train  # loads torch: only once the command line is known to be right

    train(options, VAT)


class VAT(Algorithm):
    """The loss of VAT; it has no state."""

    views = ("weak",)

    def loss(self, net: torch.nn.Module, batch: Batch, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss to descend and the numbers to log."""
        options, (images,) = self.options, batch.views
        supervised = torch.nn.functional.cross_entropy(classify(net, batch.labeled), batch.labels)
        with frozen_batchnorm(net):
            logits = classify(net, images)
            adversarial = adversarial_loss(net, images, logits, self.noise(images, step), options.vat_xi,
                                           options.vat_eps, options.vat_iterations)
        uncertainty = entropy(logits)

        ramp = ramp_up(step, options.unsup_warmup_pos, options.num_train_iter)
        total = supervised + options.vat_weight * ramp * adversarial + options.entmin_weight * uncertainty
        return total, {"train/sup_loss": supervised, "train/unsup_loss": adversarial,
                       "train/loss_entmin": uncertainty, "train/total_loss": total}

    def noise(self, images: torch.Tensor, step: int) -> torch.Tensor:
        """Return where the search for the direction begins, of the shape of `images`."""
        return self.setting.normal(images, step, "vat")


def adversarial_loss(net: torch.nn.Module, images: torch.Tensor, logits: torch.Tensor, noise: torch.Tensor, xi: float,
                     length: float, iterations: int) -> torch.Tensor:
    """Return the divergence of the prediction on perturbed images from the one on clean images [] (algorithm 1).

    images [n, ...]; logits [n, C]: the clean prediction, constant here; noise: first direction, shaped as images.
    """
    target, direction = logits.detach().softmax(1), noise
    from shared.distributed import unwrap

    searched = unwrap(net)  # no gradient of the weights arises here, which data-parallel training would wait for
    for _ in range(iterations):
        direction = (xi * unit(direction)).requires_grad_()
        divergence = kl_divergence(target, classify(searched, images + direction))
        direction, = torch.autograd.grad(divergence, direction)
    return kl_divergence(target, classify(net, images + length * unit(direction)))


def unit(direction: torch.Tensor) -> torch.Tensor:
    """Return [n, ...] with every image scaled to length 1."""
    return direction / (direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1)) + 1e-16)


def kl_divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(target || softmax(logits)) [], averaged over images; both [n, C]."""
    return torch.nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean")


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of softmax(logits) [n, C] in nats, averaged over images []."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


if __name__ == "__main__":
    run_main(main)
