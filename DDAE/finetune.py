"""Fine-tune a DDAE as a classifier: its network up to one block, the mean over pixels, a linear head, end to end.

    python finetune.py --config config/EDM_ddpmpp.yaml --epoch 1200 --use_amp
    python finetune.py --config config/EDM_ddpmpp.yaml --encoder untrained           # the same from scratch
    torchrun --standalone --nproc_per_node=4 finetune.py --config ... --randaugment --mixup 0.8

The image is noised to the config's level as in the probe (--no_noise: only scaled), and the decoder behind the config's
block is left out. AdamW, the head at ten times the rate of the body, linear warm-up, cosine. The recipe is our own: the
paper's is not published in detail. The same command again continues.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from DDAE.ddae.data import Batch, TestItems, TrainBatches
from DDAE.ddae.model import check_names
from DDAE.ddae.probe import ENCODER, Encoder, load_encoder, load_split, write_result
from shared import cli, distributed
from shared.augment.views import draw_strong, strong
from shared.cli import Choice, Flag, Float, Int, Option, Text, less_memory, run_main
from shared.report.plots import Panel, curves
from shared.training.log import Log
from shared.training.precision import autocast
from shared.training.randomness import numpy_rng, set_dropout_keys, torch_rng
from shared.training.run import Run

FLAGS = (
    *ENCODER,
    Option("--block", Text, None, "last block in use", default_help="the config's linear.blockname", metavar="NAME"),
    Option("--time", Int(0), None, "noise level", default_help="linear.timestep"),
    Option("--no_noise", Flag, False, "the network is told the level, but no noise is added"),
    Option("--encoder", Choice("trained", "untrained"), "trained", "start from the checkpoint, or from fresh weights"),
    Option("--epochs", Int(1), 100, "epochs of fine-tuning"),
    Option("--warm_epoch", Float(0), 5.0, "epochs over which the rate rises"),
    Option("--batch_size", Int(1), 128, "batch of the training", unit="images per process"),
    Option("--lr", Float(0, open=True), 1e-4, "learning rate of the body, per 256 images of the global batch"),
    Option("--head_lr", Float(0, open=True), 10.0, "learning rate of the head, times that of the body"),
    Option("--weight_decay", Float(0), 0.05, "weight decay, not of biases and norms"),
    Option("--randaugment", Flag, False, "augment by two operations of RandAugment and a cutout"),
    Option("--mixup", Float(0), 0.0, "mix images and labels, Beta(ALPHA, ALPHA); 0: no mix-up", metavar="ALPHA"),
    Option("--eval_every", Int(1), 10, "epochs between two tests"),
    Option("--outdir", Text, None, "folder of the results", default_help="{save_dir}/finetune/...", metavar="DIR"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("--batch_size")
def main() -> None:
    options = parse()
    world = distributed.start(options.device)
    encoder = load_encoder(options, world.device)
    probe = encoder.probe
    block, level = options.block or probe.blockname, probe.timestep if options.time is None else options.time
    check_names([block], encoder.widths)
    encoder.check_levels([level])
    train, test = load_split(encoder, "train", options), load_split(encoder, "test", options)
    inputs = {**encoder.inputs(train, world), "test images": encoder.inputs(test, world)["dataset"]}
    net = Classifier(encoder, block, level, not options.no_noise, options.seed).to(world.device)
    size = options.batch_size * (options.gpus or world.size)
    batches = TrainBatches(train, size, world, options.seed, probe.flip, probe.pad)
    fit(net, encoder, batches, TestItems(test, options.batch_size, world, options.seed), inputs, options)
    distributed.stop()


class Classifier(nn.Module):
    """(images [N, C, H, W] in [0, 1], standard normal noise of that shape) -> logits [N, classes].

    The encoder's network becomes `body` and is trained; later blocks do not run and stay frozen.
    noisy: whether noise of the level is added, or the image is only scaled as at that level.
    """

    def __init__(self, encoder: Encoder, block: str, level: int, noisy: bool, seed: int) -> None:
        super().__init__()
        self.block, self.level, self.noisy, self.classes = block, level, noisy, encoder.config.classes
        self.body, self.diffusion = encoder.net, encoder.diffusion
        width = encoder.widths[block]
        self.head = nn.Linear(width, self.classes)
        rng, bound = torch_rng(seed, 0, "head"), 1 / math.sqrt(width)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.uniform_(-bound, bound, generator=rng)
        # Parameters that the feature does not depend on are frozen.
        self.body.requires_grad_(True)
        self.feature(torch.zeros(1, *self.body.image_shape)).sum().backward()
        for parameter in self.body.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None

    def feature(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the block's output averaged over pixels: float32 [N, width]."""
        images = images.to(next(self.body.parameters()).device)
        noise = torch.zeros_like(images) if noise is None or not self.noisy else noise
        return self.diffusion.features(self.body, images, self.level, noise, [self.block])[self.block]

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        return self.head(self.feature(images, noise))


def fit(net: Classifier, encoder: Encoder, batches: TrainBatches, test: TestItems, inputs: dict[str, str],
        options: SimpleNamespace) -> None:
    """Train and test, and leave result.json, curve.png and the weights in the output folder."""
    world, per_epoch, seed, probe = batches.world, batches.per_epoch, options.seed, encoder.probe
    optimizer = make_optimizer(net, batches.size, options)
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(world.device.type, enabled=encoder.precision == "fp16")
    config = {name: getattr(options, name) for name in (
        "no_noise", "epochs", "warm_epoch", "lr", "head_lr", "weight_decay", "randaugment", "mixup", "seed")} | {
        "block": net.block, "level": net.level, "dataset": encoder.config.dataset, "encoder": encoder.name,
        "batch": batches.size, "flip": probe.flip, "pad": probe.pad, "precision": encoder.precision}
    outdir = options.outdir or (Path(encoder.config.save_dir) / "finetune" / f"{encoder.name}_{net.level}_{net.block}")
    log = Log(outdir, world, image_batch=batches.size, desc="fine-tune")
    run = Run(outdir, config, dict(net=net, optimizer=optimizer, scaler=scaler), world, log=log, overwrite=True,
              inputs=inputs, ignore=("weights",), extra=lambda: {"classes": batches.classes})
    model = distributed.data_parallel(net, world)
    tests = run.state.setdefault("tests", [])
    for step in run.steps(options.epochs * per_epoch):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / per_epoch, options.warm_epoch, options.epochs)
        batch = batches(step)
        images, target = augmented(batch, batches, net.classes, step, options)
        net.train()
        set_dropout_keys(net, seed, step, range(batch.part.start, batch.part.stop))
        with autocast(world.device, encoder.precision):
            loss = F.cross_entropy(model(images, batch.noise(seed, step, "noise")).float(), target)
        optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over ranks, whose parts of the batch may differ in size.
        scaler.scale(loss * (batch.fraction * world.size)).backward()
        scaler.step(optimizer)
        scaler.update()
        log.add(loss=loss.detach())
        epoch, place = divmod(step, per_epoch)
        if place == per_epoch - 1 and ((epoch + 1) % options.eval_every == 0 or epoch == options.epochs - 1):
            accuracy = test_accuracy(net, test, encoder)
            tests.append([epoch, accuracy])
            log.print(f"[epoch {epoch}] Test acc: {accuracy:.2f}")
    log.print(f"Test acc: {tests[-1][1]:.2f}")  # of the last epoch, which is the result
    if world.main:
        write_result(run, {"last": tests[-1][1] / 100, "best_on_test": max(test[1] for test in tests) / 100},
                     tests=tests)
        epochs, accuracies = zip(*tests, strict=True)
        curves({"Fine-tuning": Panel({encoder.name: (epochs, accuracies)}, "epoch", "test accuracy, %")},
               run.outdir / "curve.png")


def make_optimizer(net: Classifier, batch: int, options: SimpleNamespace) -> torch.optim.AdamW:
    """Return AdamW; weight decay on tensors of two dimensions and more, the head at its own rate."""
    lr = options.lr * batch / 256
    groups = []
    for part, rate in ((net.body, lr), (net.head, lr * options.head_lr)):
        trained = [p for p in part.parameters() if p.requires_grad]
        groups += [{"params": [p for p in trained if p.ndim >= 2], "lr": rate, "weight_decay": options.weight_decay},
                   {"params": [p for p in trained if p.ndim < 2], "lr": rate, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def schedule(epoch: float, warm_epoch: float, epochs: int) -> float:
    """Return the factor on the rates: a linear rise over `warm_epoch` epochs, then a cosine to 0."""
    if epoch < warm_epoch:
        return (epoch + 1e-8) / warm_epoch
    return 0.5 * (1 + math.cos(math.pi * (epoch - warm_epoch) / max(1e-8, epochs - warm_epoch)))


def augmented(batch: Batch, batches: TrainBatches, classes: int, step: int, options: SimpleNamespace
              ) -> tuple[Tensor, Tensor]:
    """Return the images [n, C, H, W] in [0, 1] and their targets: int64 [n], or float32 [n, classes] with mixup."""
    images = randaugment(batch, step, options.seed) if options.randaugment else batch.images
    if not options.mixup:
        return images, batch.labels
    # Each image is mixed with the one at the mirrored place of the global batch, all in one ratio.
    other = batches.mirrored(step)
    partners = randaugment(other, step, options.seed) if options.randaugment else other.images
    ratio = float(numpy_rng(options.seed, step, "mixup").beta(options.mixup, options.mixup))
    target = ratio * F.one_hot(batch.labels, classes) + (1 - ratio) * F.one_hot(other.labels, classes)
    return ratio * images + (1 - ratio) * partners, target


def randaugment(batch: Batch, step: int, seed: int) -> Tensor:
    """Return the images after two operations of RandAugment and a cutout, which follow from step and place."""
    draws = draw_strong(batch.count, numpy_rng(seed, step, "randaugment"), tuple(batch.images.shape[2:]), 2)[batch.part]
    return strong((255 * batch.images).round().to(torch.uint8), draws).float().div_(255)


@torch.no_grad()
def test_accuracy(net: Classifier, items: TestItems, encoder: Encoder) -> float:
    """Return the accuracy in percent over the items of all ranks; an image's noise depends on the image alone."""
    world = items.world
    net.eval()
    correct = torch.zeros((), dtype=torch.int64, device=world.device)
    for batch in items:
        with autocast(world.device, encoder.precision):
            logits = net(batch.images, items.noise(batch, "test noise 0"))
        correct += (logits.argmax(1) == batch.labels).sum()
    return 100 * int(distributed.all_sum(correct, world)) / len(items)


if __name__ == "__main__":
    run_main(main)
