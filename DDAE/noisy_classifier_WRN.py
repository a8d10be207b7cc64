"""A noise-conditional WideResNet, trained from scratch on noisy images: what DDAE features are compared with.

    python noisy_classifier_WRN.py --mode DDPM       # variance preserving noise, as DDPM's
    python noisy_classifier_WRN.py --mode EDM        # variance exploding noise, as EDM's
    torchrun --standalone --nproc_per_node=4 noisy_classifier_WRN.py --mode DDPM

The same command again continues. The result is a curve of accuracy over noise levels.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from DDAE.ddae.options import choose_precision, ddae_parser
from shared.cli import UserError, run_main
from shared.lazy import lazy
from shared.training.precision import autocast, set_arithmetic

if TYPE_CHECKING:
    from DDAE.ddae.batches import TrainBatches
    from DDAE.ddae.diffusion import DDPM, EDM
    from DDAE.ddae.wideresnet import WideResNet
    from shared.training.run import Run

torch = lazy("torch")

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
BETAS, STEPS = (1e-4, 0.02), 1000


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ddae_parser(__doc__, config=False)
    parser.add_argument("--mode", choices=("DDPM", "EDM"), default="DDPM", help="VP or VE noise [DDPM]")
    parser.add_argument("--batch_size", type=int, default=128, help="per process [128]")
    parser.add_argument("--lr", type=float, default=0.1, help="whatever the number of processes [0.1]")
    parser.add_argument("--epoch", type=int, default=200, help="epochs of training [200]")
    parser.add_argument("--warm_epoch", type=int, default=5, help="epochs over which the rate rises [5]")
    parser.add_argument("--gpus", type=int, default=None, help="processes that --batch_size is meant for [as many as "
                        "there are]")
    parser.add_argument("--dataset", default="cifar", help="cifar, cifar100, tiny, digits, or images by path [cifar]")
    parser.add_argument("--no_flip", action="store_true", help="do not mirror training images")
    parser.add_argument("--pad", type=int, default=4, help="crop from images padded by so many pixels [4]")
    parser.add_argument("--blocks_per_group", type=int, default=4, help="residual blocks, depth is 6 B + 4 [4]")
    parser.add_argument("--channel_multiplier", type=int, default=10, help="width [10]")
    parser.add_argument("--save_dir", default=None, metavar="DIR", help="results [./output_WRN_{mode}]")
    parser.add_argument("--compare", nargs="*", default=[], metavar="JSON", help="draw the curves of these result.json "
                        "files as well")
    options = parser.parse_args(argv)
    for name in ("batch_size", "epoch", "blocks_per_group", "channel_multiplier"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if options.warm_epoch < 0 or options.pad < 0 or options.lr <= 0:
        raise UserError("--warm_epoch and --pad must not be negative, --lr above 0")
    return options


def main() -> None:
    options = parse()
    from DDAE.ddae.batches import TestItems, TrainBatches
    from DDAE.ddae.data import load_images
    from DDAE.ddae.diffusion import DDPM, EDM
    from DDAE.ddae.noise_classifier import accuracy_by_level, read_curve, report_by_level
    from DDAE.ddae.perturbation import test_view
    from shared import distributed
    from shared.cpu.allocator import keep_freed_memory

    for path in options.compare:
        read_curve(path)
    world = distributed.start(options.device)
    precision = choose_precision(options, world.device)
    set_arithmetic(strict=False, tf32=precision != "fp32")
    if world.device.type == "cpu":
        keep_freed_memory()
    train, test = (load_images(options.dataset, split, options.data_dir) for split in ("train", "test"))
    diffusion = DDPM(BETAS, STEPS) if options.mode == "DDPM" else EDM()
    net = make_network(options, train.channels, train.num_classes).to(world.device)
    if world.device.type == "cuda":
        net = net.to(memory_format=torch.channels_last)
    if world.main:
        layers = sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in net.modules())
        print(f"WRN-{6 * options.blocks_per_group + 4}-{options.channel_multiplier}: "
              f"{sum(p.numel() for p in net.parameters()):,} parameters, {layers} layers", flush=True)
    size = options.batch_size * (options.gpus or world.size)
    batches = TrainBatches(train, size, world, options.seed, not options.no_flip, options.pad)
    run = fit(net, diffusion, batches, precision, options)

    def classify(images: torch.Tensor, level: int, noise: torch.Tensor) -> torch.Tensor:
        with autocast(world.device, precision):
            return net(*test_view(diffusion, images, level, noise)).float()

    net.eval()
    items = TestItems(test, options.batch_size, world, options.seed)
    report_by_level(run, f"WRN {options.mode}", accuracy_by_level(classify, items, diffusion.test_levels(), world),
                    options.compare)
    distributed.stop()


def make_network(options: argparse.Namespace, channels: int, classes: int) -> WideResNet:
    from DDAE.ddae.wideresnet import WideResNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return WideResNet(options.blocks_per_group, options.channel_multiplier, channels, classes)


def fit(net: WideResNet, diffusion: DDPM | EDM, batches: TrainBatches, precision: str, options: argparse.Namespace
        ) -> Run:
    """Train, each image at a noise level of its own: SGD, linear warm-up, cosine."""
    from DDAE.ddae.perturbation import training_view
    from DDAE.ddae.wideresnet import learning_rate
    from shared import distributed
    from shared.training.randomness import torch_rng
    from shared.training.log import Log
    from shared.training.run import Run

    world, seed = batches.world, options.seed
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=options.lr, momentum=MOMENTUM,
                                weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    config = {name: getattr(options, name) for name in (
        "mode", "lr", "epoch", "warm_epoch", "dataset", "no_flip", "pad", "blocks_per_group", "channel_multiplier",
        "seed")} | {"batch": batches.size, "precision": precision}
    outdir = Path(options.save_dir or f"./output_WRN_{options.mode}")
    log = Log(outdir, world, image_batch=batches.size, desc="WRN")
    run = Run(outdir, config, dict(net=net, optimizer=optimizer, scaler=scaler), world, log=log)
    model = distributed.data_parallel(net, world)
    net.train()
    for step in run.steps(options.epoch * batches.per_epoch):
        epoch, place = divmod(step, batches.per_epoch)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(epoch, options.lr, options.epoch, options.warm_epoch)
        batch = batches(step)
        drawn = diffusion.draw(batch.count, torch_rng(seed, step, "levels"))[batch.part].to(world.device)
        noisy, time = training_view(diffusion, batch.images, drawn, batch.noise(seed, step, "noise"))
        with autocast(world.device, precision):
            logits = model(noisy, time)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over ranks, whose parts of the batch may differ in size.
        scaler.scale(loss * (batch.share * world.size)).backward()
        scaler.step(optimizer)
        scaler.update()
        accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        run.log.add(loss=loss.detach(), acc=accuracy)
        if place % 100 == 0:
            run.log.print(f"[epoch {epoch} / iter {place}]: lr {lr:.4f} loss: {loss:.4f}, acc: {accuracy:.3f}")
    return run


if __name__ == "__main__":
    run_main(main)
