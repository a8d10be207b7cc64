"""A noise-conditional classifier on frozen DDAE features: a small head that is told the noise level.

    python noisy_classifier_DDAE.py --config config/DDPM_ddpm.yaml --use_amp --epoch 1999
    python noisy_classifier_DDAE.py --config config/EDM_ddpmpp.yaml --use_amp --epoch 1200
    python noisy_classifier_DDAE.py --config ... --compare output_WRN_DDPM/result.json      # both curves in one picture

Features are those of the config's block. The same command again continues.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from DDAE.ddae.data import TestItems, TrainBatches
from DDAE.ddae.model import check_names
from DDAE.ddae.noise_classifier import COMPARE, accuracy_by_level, read_curve, report_by_level
from DDAE.ddae.probe import ENCODER, Encoder, NoiseHead, cosine_rate, load_encoder, load_split
from shared import cli, distributed
from shared.cli import Option, Text, less_memory, run_main
from shared.training.log import Log
from shared.training.precision import to_device
from shared.training.randomness import numpy_rng
from shared.training.run import Run

FLAGS = (
    *ENCODER,
    Option("--block", Text, None, "block of the features", default_help="linear.blockname", metavar="NAME"),
    COMPARE,
    Option("--outdir", Text, None, "folder of the results", metavar="DIR",
           default_help="{save_dir}/noisy_classifier/..."),
)


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    return cli.parse(__doc__, FLAGS, argv)


@less_memory("linear.batch_size of the config (--set linear.batch_size=N)")
def main() -> None:
    options = parse()
    for path in options.compare:
        read_curve(path)
    world = distributed.start(options.device)
    encoder = load_encoder(options, world.device)
    probe, block = encoder.probe, options.block or encoder.probe.blockname
    check_names([block], encoder.widths)
    train, test = load_split(encoder, "train", options), load_split(encoder, "test", options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = NoiseHead(encoder.widths[block], encoder.config.classes).to(world.device)
    batches = TrainBatches(train, probe.batch_size * (options.gpus or world.size), world, options.seed, probe.flip,
                           probe.pad)
    run = fit(head, encoder, block, batches, encoder.inputs(train, world), options)

    def classify(images: Tensor, level: int, noise: Tensor) -> Tensor:
        feature = encoder.features(images, level, noise, [block])[block]
        return head(feature, torch.full((len(images),), level, device=images.device))

    items = TestItems(test, probe.batch_size, world, options.seed)
    accuracies = accuracy_by_level(classify, items, encoder.diffusion.test_levels())
    report_by_level(run, f"DDAE {encoder.config.model_type} {encoder.name} {block}", accuracies, options.compare)
    distributed.stop()


def fit(head: NoiseHead, encoder: Encoder, block: str, batches: TrainBatches, inputs: dict[str, str],
        options: SimpleNamespace) -> Run:
    """Train the head on features of images at random noise levels: Adam, a cosine step per epoch."""
    world, seed, probe = batches.world, options.seed, encoder.probe
    lr, highest = probe.lrate * (options.gpus or world.size), encoder.diffusion.levels()[-1]
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    config = {"block": block, "dataset": encoder.config.dataset, "encoder": encoder.name, "batch": batches.size,
              "lr": lr, "epochs": probe.n_epoch, "flip": probe.flip, "pad": probe.pad, "seed": seed,
              "precision": encoder.precision}
    outdir = options.outdir or Path(encoder.config.save_dir) / "noisy_classifier" / f"{encoder.name}_{block}"
    log = Log(outdir, world, image_batch=batches.size, desc="noisy classifier")
    run = Run(outdir, config, dict(head=head, optimizer=optimizer), world, log=log, overwrite=True, inputs=inputs,
              ignore=("weights",), extra=lambda: {"classes": batches.classes})
    model = distributed.data_parallel(head, world)
    for step in run.steps(probe.n_epoch * batches.per_epoch):
        optimizer.param_groups[0]["lr"] = cosine_rate(step // batches.per_epoch, lr, probe.n_epoch)
        batch = batches(step)
        drawn = numpy_rng(seed, step, "levels").integers(1, highest + 1, batch.count)[batch.part]
        level = to_device(drawn, world.device)
        feature = encoder.features(batch.images, level, batch.noise(seed, step, "noise"), [block])[block]
        logits = model(feature, level)
        loss = F.cross_entropy(logits, batch.labels)
        optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over ranks, whose parts of the batch may differ in size.
        (loss * (batch.fraction * world.size)).backward()
        optimizer.step()
        log.add(loss=loss.detach(), acc=(logits.detach().argmax(1) == batch.labels).float().mean())
    return run


if __name__ == "__main__":
    run_main(main)
