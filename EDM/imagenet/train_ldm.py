"""Train the large U-ViT, with the continuous noise schedule, on latents with pseudo-labels.

    python train_ldm.py --config=configs/accelerate_b4_subset1_2img_k_128_large.py
    torchrun --standalone --nproc_per_node=8 train_ldm.py --config=...
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 train_ldm.py --config=...

It needs the latents of extract_imagenet_features_semi.py. In assets/DPM/... it writes checkpoints, previews, and the
FID of each checkpoint if there are statistics to compare with. The same command again continues.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from EDM.imagenet.experiment.config import Config, parse
from EDM.imagenet.experiment.images import training_images
from EDM.imagenet.experiment.layout import Layout
from EDM.latent.alignment import Aligned, Targets
from EDM.latent.generation import Sampler, fid
from EDM.latent.latents import LatentBatches, read_latents
from EDM.latent.schedules import ContinuousSchedule, Schedule
from EDM.latent.training import train
from EDM.latent.uvit import UViT, make_uvit
from EDM.latent.vae import load_coder
from EDM.metrics.detectors import load_detector
from EDM.tdsm.transition import clean_posterior, load_transition
from shared import distributed
from shared.cli import Bool, Choice, Flag, Float, Int, Option, Text, UserError, run_main
from shared.training.precision import compiles, default_precision

MACHINE = (
    Option("--device", Text, None, "cpu, cuda, cuda:N", default_help="a GPU if available", metavar="NAME"),
    Option("--precision", Choice("fp32", "bf16"), None, "arithmetic of networks",
           default_help="bf16 on a GPU that has it, else fp32"),
    Option("--strict", Flag, False, "the published arithmetic: fp32, attention included, and no fused operation"),
)
SCORES = (
    Option("--fid_stats", Text, None, "npz with the statistics of real images, such as fid.py ref writes",
           default_help="assets/fid_stats/fid_stats_imagenet{resolution}_guided_diffusion.npz", metavar="FILE"),
    Option("--detector", Text, "inception", "inception, dinov2 or a file of weights, see fid.py", metavar="NAME|FILE"),
)
FLAGS = {
    "main options": (
        Option("--workdir", Text, None, "output folder", default_help="assets/DPM/...", metavar="DIR"),
        Option("--dataset_path", Text, None, "folder of latents, ours or published",
               default_help="pretrained/datasets/...", metavar="DIR"),
        Option("--transition", Text, None, "transition matrix p(pseudo-label | class), .json or .npy; each visit of a "
               "latent then draws its class from p(class | pseudo-label)", metavar="FILE"),
        Option("--repa", Text, None, "align inner tokens with the patch tokens of this encoder (REPA), to train in "
               "fewer steps; as suggest_labels.py --encoder", metavar="ENCODER"),
        Option("--repa_weight", Float(0), 0.5, "weight of this alignment in the loss"),
        Option("--repa_block", Int(0), None, "block whose tokens are aligned", default_help="7, or the middle one"),
        Option("--overwrite", Flag, False, "move another run in --workdir aside and start anew (without it: an error)"),
        Option("--compile", Bool, None, "compile the blocks: slow to start, then faster",
               default_help="on a GPU, unless --strict"),
        Option("--checkpoint_minutes", Float(0, open=True), 10.0, "time between two checkpoints", unit="minutes"),
    ),
    "FID": SCORES,
    "machine": MACHINE,
}


def main(doc: str = __doc__, schedule_of: Callable[[Config], Schedule] = lambda config: ContinuousSchedule(config.pred),
         argv: Sequence[str] | None = None) -> None:
    options, config = parse(doc, FLAGS, argv)
    world = distributed.start(options.device)
    precision = options.precision or default_precision(world.device, options.strict)
    layout, schedule = Layout(config), schedule_of(config)
    workdir = Path(options.workdir or layout.workdir)

    # Inputs, checked before the training.
    latents = read_latents(Path(options.dataset_path or config.dataset.path or layout.latents), config.z_shape)
    coder = load_coder(config.autoencoder.pretrained_path, config.z_shape, config.resolution,
                       "--config.autoencoder.pretrained_path").to(world.device)
    if latents.coder not in ("", coder.fingerprint):
        raise UserError(f"{latents.folder}: latents of another VAE than {config.autoencoder.pretrained_path}; name "
                        "theirs, or make them anew: extract_imagenet_features_semi.py --overwrite")
    statistics = Path(options.fid_stats or layout.fid_statistics)
    detector = load_detector(options.detector, world.device, world=world) if statistics.is_file() else None
    if options.fid_stats and detector is None:
        raise UserError(f"--fid_stats: there is no file {statistics}")
    if detector is None and world.main:
        print(f"without FID: there is no {statistics} (fid.py ref writes one)", flush=True)
    net = make_uvit(config.nnet, config.z_shape, config.seed)
    check_classes(net, latents.classes, str(latents.folder))
    posterior = None
    if options.transition:
        posterior = clean_posterior(load_transition(options.transition, net.none_label))
    aligned = targets = None
    if options.repa:
        from TorchSSL.encoders.encoder import open_encoder  # takes timm's time to import

        encoder = open_encoder(options.repa)
        side = config.nnet.img_size // config.nnet.patch_size
        targets = Targets(training_images(config), encoder, config.resolution, side, len(latents), world.device,
                          options.repa_weight)
        aligned = Aligned(net, targets.width, options.repa_block)
    batches = LatentBatches(latents, config.train.batch_size, config.seed,
                            config.dataset.p_uncond if config.dataset.cfg else 0.0, net.none_label, world,
                            config.train.n_steps - 1, posterior, targets.read if targets else None)

    # Train.
    def sampler_of(averaged: UViT) -> Sampler:
        return Sampler(averaged, schedule, coder, config.z_shape, precision, options.strict)

    def score(sampler: Sampler, count: int) -> float:
        return fid(sampler, count, config.seed, config.sample.sample_steps, 0.0, config.sample.mini_batch_size,
                   detector, statistics, world)

    train(config, net, schedule, batches, sampler_of, workdir, world, precision=precision, strict=options.strict,
          compiled=compiles(options.compile, world.device, options.strict), aligned=aligned, targets=targets,
          score=score if detector else None, overwrite=options.overwrite,
          checkpoint_seconds=60 * options.checkpoint_minutes)
    distributed.stop()


def check_classes(net: UViT, classes: Sequence[str], source: str) -> None:
    """Raise UserError for a network that is made for another number of classes."""
    if classes and net.num_classes > 0 and len(classes) != net.none_label:
        raise UserError(f"{source} has {len(classes)} classes, --config.nnet.num_classes={net.num_classes} is made for "
                        f"{net.none_label} and none; give --config.nnet.num_classes={len(classes) + 1}")


if __name__ == "__main__":
    run_main(main)
