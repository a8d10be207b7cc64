"""Fine-tune a DDAE as a classifier: its network up to one block, the mean over pixels, a linear head, end to end.

    python finetune.py --config config/EDM_ddpmpp.yaml --epoch 1200 --use_amp
    python finetune.py --config config/EDM_ddpmpp.yaml --encoder untrained           # the same from scratch
    torchrun --standalone --nproc_per_node=4 finetune.py --config ... --randaugment --mixup 0.8

The image is noised to the config's level as in the probe (--no_noise: only scaled), and the decoder behind the config's
block is left out. AdamW, the head at ten times the rate of the body, linear warm-up, cosine. The recipe is our own: the
paper's is not published in detail. The same command again continues.
"""
from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from DDAE.ddae.encoder import Encoder, encoder_parser, load_encoder, load_split
from shared.cli import UserError, run_main
from shared.lazy import lazy
from shared.training.precision import autocast

if TYPE_CHECKING:
    from DDAE.ddae.batches import Batch, TestItems, TrainBatches
    from DDAE.ddae.classifier import Classifier
    from shared.training.run import Run

np, torch = lazy("numpy"), lazy("torch")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = encoder_parser(__doc__)
    parser.add_argument("--block", default=None, metavar="NAME", help="last block [the config's linear.blockname]")
    parser.add_argument("--time", type=int, default=None, metavar="N", help="noise level [linear.timestep]")
    parser.add_argument("--no_noise", action="store_true", help="the network is told the level, but no noise is added")
    parser.add_argument("--encoder", choices=("trained", "untrained"), default="trained", help="start from the "
                        "checkpoint, or from fresh weights to compare with [trained]")
    parser.add_argument("--epochs", type=int, default=100, help="of fine-tuning [100]")
    parser.add_argument("--warm_epoch", type=float, default=5, help="epochs over which the rate rises [5]")
    parser.add_argument("--batch_size", type=int, default=128, help="per process [128]")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the body, per 256 images of the global batch [1e-4]")
    parser.add_argument("--head_lr", type=float, default=10.0, help="the head's rate, times the body's [10]")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="of weights, not of biases and norms [0.05]")
    parser.add_argument("--randaugment", action="store_true", help="two operations of RandAugment and a cutout")
    parser.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="mix images and labels, "
                        "Beta(ALPHA, ALPHA) [0: do not]")
    parser.add_argument("--eval_every", type=int, default=10, metavar="N", help="epochs between two tests [10]")
    parser.add_argument("--outdir", default=None, metavar="DIR", help="results [{save_dir}/finetune/...]")
    options = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "eval_every"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if min(options.lr, options.head_lr) <= 0 or min(options.warm_epoch, options.weight_decay, options.mixup) < 0:
        raise UserError("--lr and --head_lr must be above 0; --warm_epoch, --weight_decay and --mixup not negative")
    return options


def main() -> None:
    options = parse()
    from DDAE.ddae.batches import TestItems, TrainBatches
    from DDAE.ddae.classifier import Classifier
    from shared import distributed

    world = distributed.start(options.device)
    encoder = load_encoder(options, world.device)
    probe = encoder.probe
    block, level = options.block or probe.blockname, probe.timestep if options.time is None else options.time
    encoder.check_names([block])
    encoder.check_levels([level])
    train, test = load_split(encoder, "train", options), load_split(encoder, "test", options)
    net = Classifier(encoder, block, level, not options.no_noise, options.seed).to(world.device)
    batches = TrainBatches(train, options.batch_size * (options.gpus or world.size), world, options.seed, probe.flip,
                           probe.pad)
    fit(net, encoder, batches, TestItems(test, options.batch_size, world, options.seed), options)
    distributed.stop()


def fit(net: Classifier, encoder: Encoder, batches: TrainBatches, test: TestItems, options: argparse.Namespace) -> None:
    """Train and test, and leave result.json, curve.png and the weights in the output folder."""
    from shared import distributed
    from shared.training.dropout import set_dropout_keys
    from shared.training.log import Log
    from shared.training.run import Run

    world, per_epoch, seed = batches.world, batches.per_epoch, options.seed
    optimizer = make_optimizer(net, batches.size, options)
    rates = [group["lr"] for group in optimizer.param_groups]
    scaler = torch.amp.GradScaler(world.device.type, enabled=encoder.precision == "fp16")
    probe = encoder.probe
    config = {name: getattr(options, name) for name in (
        "no_noise", "epochs", "warm_epoch", "lr", "head_lr", "weight_decay", "randaugment", "mixup", "seed")} | {
        "block": net.block, "level": net.level, "dataset": encoder.config.dataset, "encoder": encoder.name,
        "weights": encoder.facts(), "batch": batches.size, "flip": probe.flip, "pad": probe.pad,
        "precision": encoder.precision}
    outdir = options.outdir or (Path(encoder.config.save_dir) / "finetune" / f"{encoder.name}_{net.level}_{net.block}")
    log = Log(outdir, world, image_batch=batches.size, desc="fine-tune")
    run = Run(outdir, config, dict(net=net, optimizer=optimizer, scaler=scaler), world, log=log, restart=True)
    model = distributed.data_parallel(net, world)
    run.state.setdefault("tests", [])
    for step in run.steps(options.epochs * per_epoch):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / per_epoch, options.warm_epoch, options.epochs)
        batch = batches(step)
        images, target = augmented(batch, batches, net.classes, step, options)
        net.train()
        set_dropout_keys(net, seed, step, range(batch.part.start, batch.part.stop))
        with autocast(world.device, encoder.precision):
            loss = torch.nn.functional.cross_entropy(model(images, batch.noise(seed, step, "noise")).float(), target)
        optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over ranks, whose parts of the batch may differ in size.
        scaler.scale(loss * (batch.share * world.size)).backward()
        scaler.step(optimizer)
        scaler.update()
        run.log.add(loss=loss.detach())
        epoch, place = divmod(step, per_epoch)
        if place == per_epoch - 1 and ((epoch + 1) % options.eval_every == 0 or epoch == options.epochs - 1):
            accuracy = test_accuracy(net, test, encoder)
            run.state["tests"] = [*run.state["tests"], [epoch, accuracy]]
            run.log.print(f"[epoch {epoch}] Test acc: {accuracy:.2f}")
    report(run, encoder)


def make_optimizer(net: Classifier, batch: int, options: argparse.Namespace) -> torch.optim.AdamW:
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


def augmented(batch: Batch, batches: TrainBatches, classes: int, step: int, options: argparse.Namespace
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images [n, C, H, W] in [0, 1] and their targets: int64 [n], or float32 [n, classes] with mixup."""
    from shared.training.randomness import numpy_rng

    images = randaugment(batch, step, options) if options.randaugment else batch.images
    if not options.mixup:
        return images, batch.labels
    # Each image is mixed with the one at the mirrored place of the global batch, all with one share.
    other = batches.mirrored(step)
    partners = randaugment(other, step, options) if options.randaugment else other.images
    share = float(numpy_rng(options.seed, step, "mixup").beta(options.mixup, options.mixup))
    one_hot = torch.nn.functional.one_hot
    target = share * one_hot(batch.labels, classes) + (1 - share) * one_hot(other.labels, classes)
    return share * images + (1 - share) * partners, target


def randaugment(batch: Batch, step: int, options: argparse.Namespace) -> torch.Tensor:
    """Return the images after two operations of RandAugment and a cutout, which follow from step and place."""
    from shared.augment.views import draw_strong, strong
    from shared.training.randomness import numpy_rng

    rng = numpy_rng(options.seed, step, "randaugment")
    draws = draw_strong(batch.count, rng, tuple(batch.images.shape[2:]), 2)[batch.part]
    return strong((255 * batch.images).round().to(torch.uint8), draws).float().div_(255)


def test_accuracy(net: Classifier, items: TestItems, encoder: Encoder) -> float:
    """Return the accuracy in percent over the items of all ranks; an image's noise depends on the image alone."""
    from shared import distributed

    world = items.world
    net.eval()
    correct = torch.zeros((), dtype=torch.int64, device=world.device)
    with torch.no_grad():
        for batch in items:
            with autocast(world.device, encoder.precision):
                logits = net(batch.images, items.noise(batch, "test noise 0"))
            correct += (logits.argmax(1) == batch.labels).sum()
    return 100 * int(distributed.sum_(correct, world)) / len(items)


def report(run: Run, encoder: Encoder) -> None:
    """Print the last accuracy, which is the result; write result.json and curve.png."""
    from shared.report.plots import curves
    from shared.training.files import atomic
    from shared.training.hardware import computed_on

    tests: list[Any] = run.state["tests"]
    run.log.print(f"Test acc: {tests[-1][1]:.2f}")
    if not run.world.main:
        return
    with atomic(run.outdir / "result.json", "w") as file:
        json.dump({"accuracy": {"last": tests[-1][1] / 100, "best_on_test": max(test[1] for test in tests) / 100},
                   "tests": tests, "seed": run.config["seed"], "iterations": run.step, "precision": encoder.precision,
                   "seconds": round(run.seconds, 1), **computed_on(run.world.device), "config": run.config}, file,
                  indent=1)
    curves({"fine-tuning": {encoder.name: ([epoch for epoch, _ in tests], [accuracy for _, accuracy in tests])}},
           run.outdir / "curve.png", {"fine-tuning": "epoch"})


if __name__ == "__main__":
    run_main(main)
