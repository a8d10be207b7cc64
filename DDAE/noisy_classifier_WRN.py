"""A noise-conditional WideResNet, trained from scratch on noisy images, to compare with DDAE features.

    python noisy_classifier_WRN.py --mode DDPM       # variance preserving noise, as DDPM's
    python noisy_classifier_WRN.py --mode EDM        # variance exploding noise, as EDM's
    torchrun --standalone --nproc_per_node=4 noisy_classifier_WRN.py --mode DDPM

The same command again continues. The result is a curve of accuracy over noise levels.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from DDAE.ddae.config import DATA, GPUS, MACHINE, choose_precision
from DDAE.ddae.data import TestItems, TrainBatches, load_images
from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.noise_classifier import (
    COMPARE,
    WideResNet,
    accuracy_by_level,
    learning_rate,
    read_curve,
    report_by_level,
    test_view,
    training_view,
)
from shared import cli, distributed
from shared.cli import Choice, Flag, Float, Int, Option, Text, less_memory, run_main
from shared.cpu.allocator import keep_freed_memory
from shared.training.fingerprint import fingerprints
from shared.training.log import Log
from shared.training.precision import autocast, set_arithmetic, to_device
from shared.training.randomness import torch_rng
from shared.training.run import Run

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
BETAS, STEPS = (1e-4, 0.02), 1000
FLAGS = (
    *MACHINE, *DATA, GPUS, COMPARE,
    Option("--mode", Choice("DDPM", "EDM"), "DDPM", "VP or VE noise"),
    Option("--batch_size", Int(1), 128, "batch of the training", unit="images per process"),
    Option("--lr", Float(0, open=True), 0.1, "learning rate, for any number of processes"),
    Option("--epoch", Int(1), 200, "epochs of training"),
    Option("--warm_epoch", Int(0), 5, "epochs over which the rate rises"),
    Option("--dataset", Text, "cifar", "cifar, cifar100, tiny, digits, or images by path"),
    Option("--no_flip", Flag, False, "do not mirror training images"),
    Option("--pad", Int(0), 4, "black margin of an image before it is cropped", unit="pixels"),
    Option("--blocks_per_group", Int(1), 4, "residual blocks, depth is 6 B + 4"),
    Option("--channel_multiplier", Int(1), 10, "width"),
    Option("--save_dir", Text, None, "folder of the results", default_help="./output_WRN_{mode}", metavar="DIR"),
    Option("--overwrite", Flag, False, "move another run in that folder aside and start anew (without it: an error)"),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("--batch_size")
def main() -> None:
    options = parse()
    for path in options.compare:
        read_curve(path)
    world = distributed.start(options.device)
    precision = choose_precision(options, world.device)
    set_arithmetic(strict=False, tf32=precision != "fp32")
    if world.device.type == "cpu":
        keep_freed_memory()
    train, test = (load_images(options.dataset, split, options.data_dir) for split in ("train", "test"))
    diffusion = DDPM(BETAS, STEPS) if options.mode == "DDPM" else EDM()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        net = WideResNet(options.blocks_per_group, options.channel_multiplier, train.channels, train.num_classes)
    net.to(world.device)
    if world.device.type == "cuda":
        net.to(memory_format=torch.channels_last)
    if world.main:
        layers = sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in net.modules())
        print(f"WRN-{6 * options.blocks_per_group + 4}-{options.channel_multiplier}: "
              f"{sum(p.numel() for p in net.parameters()):,} parameters, {layers} layers", flush=True)
    size = options.batch_size * (options.gpus or world.size)
    batches = TrainBatches(train, size, world, options.seed, not options.no_flip, options.pad)
    inputs = distributed.on_main(lambda: fingerprints({"--dataset": train}), world)
    run = fit(net, diffusion, batches, precision, inputs, options)

    def classify(images: Tensor, level: int, noise: Tensor) -> Tensor:
        with autocast(world.device, precision):
            return net(*test_view(diffusion, images, level, noise)).float()

    net.eval()
    items = TestItems(test, options.batch_size, world, options.seed)
    accuracies = accuracy_by_level(classify, items, diffusion.test_levels())
    report_by_level(run, f"WRN {options.mode}", accuracies, options.compare)
    distributed.stop()


def fit(net: WideResNet, diffusion: DDPM | EDM, batches: TrainBatches, precision: str, inputs: dict[str, str],
        options: SimpleNamespace) -> Run:
    """Train, each image at a noise level of its own: SGD, linear warm-up, cosine."""
    world, seed = batches.world, options.seed
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=options.lr, momentum=MOMENTUM,
                                weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    config = {name: getattr(options, name) for name in (
        "mode", "lr", "epoch", "warm_epoch", "dataset", "no_flip", "pad", "blocks_per_group", "channel_multiplier",
        "seed")} | {"batch": batches.size, "precision": precision}
    outdir = Path(options.save_dir or f"./output_WRN_{options.mode}")
    log = Log(outdir, world, image_batch=batches.size, desc="WRN")
    run = Run(outdir, config, dict(net=net, optimizer=optimizer, scaler=scaler), world, log=log, inputs=inputs,
              overwrite=options.overwrite, extra=lambda: {"classes": batches.classes})
    model = distributed.data_parallel(net, world)
    net.train()
    for step in run.steps(options.epoch * batches.per_epoch):
        epoch, place = divmod(step, batches.per_epoch)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(epoch, options.lr, options.epoch, options.warm_epoch)
        batch = batches(step)
        drawn = to_device(diffusion.draw(batch.count, torch_rng(seed, step, "levels"))[batch.part], world.device)
        noisy, time = training_view(diffusion, batch.images, drawn, batch.noise(seed, step, "noise"))
        with autocast(world.device, precision):
            logits = model(noisy, time)
            loss = F.cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over ranks, whose parts of the batch may differ in size.
        scaler.scale(loss * (batch.fraction * world.size)).backward()
        scaler.step(optimizer)
        scaler.update()
        accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        log.add(loss=loss.detach(), acc=accuracy)
        if place % 100 == 0:
            log.print(f"[epoch {epoch} / iter {place}]: lr {lr:.4f} loss: {loss:.4f}, acc: {accuracy:.3f}")
    return run


if __name__ == "__main__":
    run_main(main)
