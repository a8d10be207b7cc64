"""One TDSM training step: the flat pass over (image, class) pairs against one pass a class.

    python -m tests.bench.tdsm_step [--size digits] [--images 16] [--classes 10] [--sharpness 4] [--tau 0.01]
    python -m tests.bench.tdsm_step --kept          # cost against candidates kept, K = 10
    python -m tests.bench.tdsm_step --size cifar --classes 100 --images 4 --memory

DDPM++ under 40 % symmetric noise, without dropout: classifier, weights, forward passes, backward, clean-up of
gradients, Adam, average; --tau=0 keeps all classes. --size: digits is the network for the 8x8 digits, mnist that of
--arch=ddpmpp_mnist, cifar the 56M one of --arch=ddpmpp. The classifier's logits, which have learned nothing, are
replaced by normal ones times --sharpness, so that the number of candidates is known. Three ways, and a sum:
    original  eager NCHW network, T and its inverse made anew at every step, an emptiness test and a pass a class;
              Python loops over the parameters for the gradients, Adam and the average
    loop      the trainer, but a pass a class
    flat      the trainer
    sum       of the step without candidates, and the candidates at the speed at which the network computes the batch
              itself without gradient: what arithmetic leaves, unless the candidates make a fuller batch
Times are the best of --repeats; with one thread, of the processor.
Exit status 1 where flat is not 2 times as fast as the original, or loss and gradients are more than 1e-5 apart.
"""
from __future__ import annotations

import argparse
import copy
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from EDM.tdsm.classifiers import EDMPrecond_classifier
from EDM.tdsm.loss import TDSMLoss, clean_class_weights, log_matrix
from EDM.tdsm.transition import clean_posterior, transition_matrix
from EDM.training.dataset import Batch
from EDM.training.loss import EDMLoss
from EDM.training.networks import EDMPrecond, use_channels_last
from EDM.training.training_loop import draw, forward_backward, update
from shared.cpu.allocator import keep_freed_memory
from shared.training.ema import EMA
from tests.bench import eager_unet

BAR, RATE = 2.0, 0.4
SIZES = {  # image, network, classifier
    "digits": (dict(img_resolution=8, img_channels=1), dict(model_channels=16, channel_mult=[1, 2], num_blocks=1,
                                                            attn_resolutions=[4]), "cnn"),
    "mnist": (dict(img_resolution=32, img_channels=1), dict(model_channels=32, channel_mult=[2, 2, 2], num_blocks=1),
              "cnn"),
    "cifar": (dict(img_resolution=32, img_channels=3), dict(model_channels=128, channel_mult=[2, 2, 2]), "resnet18")}
LR, BETA = 1e-3, 0.999


class Sharp(torch.nn.Module):
    """A classifier that costs what one costs, and says what it is told."""

    def __init__(self, net: torch.nn.Module, logits: torch.Tensor) -> None:
        super().__init__()
        self.net, self.logits = net, logits

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self.logits + 0 * self.net(x, sigma)


class PerClassLoss(TDSMLoss):
    """The same loss by one pass a class."""

    def __init__(self, *arguments, rebuild: bool, **settings) -> None:
        super().__init__(*arguments, **settings)
        self.matrix, self.rebuild = arguments[1], rebuild

    def __call__(self, net, images, labels, augment_labels, level, noise):
        sigma = self.sigma(level)
        noisy, observed = images + sigma * noise, labels.argmax(1)
        weights = self.weights_by_inverse(noisy, sigma, observed) if self.rebuild else \
            self.weights(noisy, sigma, observed)
        mixture = weights.gather(1, observed[:, None]).view(-1, 1, 1, 1) * net(noisy, sigma, labels)
        for label in range(self.num_classes):
            chosen = (weights[:, label] > self.tau) & (observed != label)
            if chosen.sum() == 0:
                continue
            one_hot = torch.zeros(int(chosen.sum()), self.num_classes)
            one_hot[:, label] = 1
            with torch.no_grad():
                other = net((images + sigma * noise)[chosen], sigma[chosen], one_hot)
            added = torch.zeros_like(images)
            added[chosen] = weights[chosen, label].view(-1, 1, 1, 1) * other
            mixture = mixture + added
        return self.levels.weight(sigma) * (mixture - images) ** 2

    @torch.no_grad()
    def weights_by_inverse(self, noisy, sigma, observed):
        """Return the weights as published, through the inverse of a [K, K] matrix an image."""
        matrix = torch.from_numpy(transition_matrix("sym", RATE, self.num_classes)).float()
        clean = self.classifier(noisy, sigma).softmax(1)
        posterior = torch.from_numpy(clean_posterior(matrix.numpy().astype(np.float64))).float()
        ratio = clean @ matrix / (matrix.sum(0) / self.num_classes)
        every = posterior * (ratio @ posterior.inverse().T)[:, None, :] / ratio[:, :, None]  # [N, K, K]
        weights = every[torch.arange(len(noisy)), observed].clamp(0, 1)
        return weights / weights.sum(1, keepdim=True)


class Way:
    """A network, its optimizer and average, and `step(number)`."""

    def __init__(self, name: str, net: EDMPrecond, classifier: Sharp, images: int, tau: float) -> None:
        self.name, self.net, classes = name, net, net.label_dim
        self.shape = [net.img_channels, net.img_resolution, net.img_resolution]
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(classes, [images], generator=generator)
        self.batch = Batch(2 * torch.rand([images, *self.shape], generator=generator) - 1, torch.eye(classes)[labels],
                           np.arange(images))
        matrix = transition_matrix("sym", RATE, classes)
        if name == "flat":
            self.loss_fn = TDSMLoss(EDMLoss(), matrix, classifier, tau=tau)
        else:
            self.loss_fn = PerClassLoss(EDMLoss(), matrix, classifier, tau=tau, rebuild=name == "original")
        if name == "original":
            net.model.forward = lambda *inputs: eager_unet.forward(net.model, *inputs)
        else:
            use_channels_last(net)
            classifier.net.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=LR, **(
            {"foreach": False} if name == "original" else {"fused": True}))
        self.ema = EMA(net, buffers="keep")

    def step(self, number: int) -> float:
        draws = draw(self.loss_fn, None, 0, number, len(self.batch.images), self.batch)
        if self.name == "original":
            return self._original_step(draws)
        sums, _ = forward_backward(self.net, self.loss_fn, None, self.batch, draws)
        update(self.net, self.optimizer, LR)
        self.ema.update(self.net, BETA)
        return sums[0].item() / self.batch.images.numel()

    def _original_step(self, draws) -> float:
        batch = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_fn(self.net, batch.images, batch.labels, None, draws.level, draws.noise)
        loss.sum().mul(1 / len(batch.images)).backward()
        for parameter in self.net.parameters():
            torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.module.parameters(), self.net.parameters(), strict=True):
                average.copy_(parameter.lerp(average, BETA))
        return loss.mean().item()

    def gradients(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in self.net.parameters() if p.grad is not None])


def make(args: argparse.Namespace, sharpness: float) -> tuple[EDMPrecond, Sharp]:
    torch.manual_seed(0)
    image, network, encoder = SIZES[args.size]
    net = EDMPrecond(**image, label_dim=args.classes, model_type="SongUNet", dropout=0.0, **network)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    kind = dict(model_type="ClassifierSong_MNIST", encoder_type="standard") if encoder == "cnn" else \
        dict(model_type="ClassifierSong", encoder_type=encoder)
    classifier = EDMPrecond_classifier(**image, label_dim=args.classes, **kind).eval().requires_grad_(False)
    logits = sharpness * torch.randn(args.images, args.classes, generator=torch.Generator().manual_seed(1))
    return net, Sharp(classifier, logits)


def candidates(classifier: Sharp, way: Way) -> float:
    observed = way.batch.labels.argmax(1)
    matrix = log_matrix(transition_matrix("sym", RATE, len(way.batch.labels[0])), "cpu")
    weights = clean_class_weights(classifier.logits, observed, matrix)
    return float((weights > way.loss_fn.tau).scatter(1, observed[:, None], False).sum() / len(observed))


def seconds(work: Callable[[int], object], repeats: int) -> float:
    work(0)  # warms up
    # With one thread, what other processes take away is left out.
    clock, times = time.process_time if torch.get_num_threads() == 1 else time.perf_counter, []
    for number in range(1, repeats + 1):
        start = clock()
        work(number)
        times.append(clock() - start)
    return min(times)  # what other processes take away belongs to neither


def of_parts(way: Way, kept: float, repeats: int) -> float:
    """Return the seconds of a step without candidates, and of `kept` an image at the speed of the batch itself."""
    images, sigma = way.batch.images, torch.ones(len(way.batch.images))

    @torch.no_grad()
    def forward(number: int) -> None:
        way.net(images, sigma, way.batch.labels)

    way.loss_fn.tau = 1.0
    return seconds(way.step, repeats) + kept * seconds(forward, repeats)


def compare(args: argparse.Namespace) -> int:
    net, classifier = make(args, args.sharpness)
    ways = {name: Way(name, copy.deepcopy(net), copy.deepcopy(classifier), args.images, args.tau)
            for name in ("original", "loop", "flat")}
    kept = candidates(classifier, ways["flat"])
    print(f"{kept:.2f} candidates an image, {args.images} images, K = {args.classes}")
    losses = {name: way.step(0) for name, way in ways.items()}
    reference = ways["original"].gradients()
    apart = float((ways["flat"].gradients() - reference).norm() / reference.norm())
    difference = abs(losses["flat"] / losses["original"] - 1)
    print(f"loss {difference:.1e} apart, gradients {apart:.1e} apart", flush=True)
    times = {}
    for name, way in ways.items():
        if name != "original":
            keep_freed_memory()
        times[name] = seconds(way.step, args.repeats)
        print(f"{name:>9}: {times[name]:.4f} s, {times['original'] / times[name]:.2f} x as fast as the original",
              flush=True)
    parts = of_parts(ways["flat"], kept, args.repeats)
    print(f"      sum: {parts:.4f} s, {times['original'] / parts:.2f} x")
    return 0 if times["original"] >= BAR * times["flat"] and max(difference, apart) < 1e-5 else 1


def cost_of_candidates(args: argparse.Namespace) -> int:
    """Time the step for classifiers from undecided to certain."""
    keep_freed_memory()
    for sharpness in (0.0, 2.0, 4.0, 8.0, 30.0):
        net, classifier = make(args, sharpness)
        way = Way("flat", net, classifier, args.images, args.tau)
        print(f"{candidates(classifier, way):5.2f} candidates an image: {seconds(way.step, args.repeats):.4f} s",
              flush=True)
    return 0


def memory(args: argparse.Namespace) -> int:
    """Show the memory of a step in which every class is a candidate (symmetric noise alone would drop them all)."""
    net, classifier = make(args, 0.0)
    way = Way("flat", net, classifier, args.images, args.tau)
    for tau, kept in ((1.0, "no other class"), (0.0, "all other classes")):
        way.loss_fn.tau = tau
        way.step(0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{kept}: {float(way.loss_fn.statistics['candidates']):.0f} candidates an image, peak {peak:.2f} GiB",
              flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--size", choices=SIZES, default="digits")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--sharpness", type=float, default=4.0)
    parser.add_argument("--tau", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kept", action="store_true", help="cost against candidates")
    parser.add_argument("--memory", action="store_true", help="peak memory")
    args = parser.parse_args()
    return cost_of_candidates(args) if args.kept else memory(args) if args.memory else compare(args)


if __name__ == "__main__":
    sys.exit(main())
