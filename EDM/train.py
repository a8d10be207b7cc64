"""Train a diffusion model of "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364).

    python train.py --outdir=training-runs --data=datasets/cifar10-32x32.zip --cond=1 --arch=ddpmpp
    torchrun --standalone --nproc_per_node=4 train.py --outdir=training-runs --data=... --cond=1 --arch=ddpmpp

The same command again continues an interrupted run.
"""
from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from EDM.training import config
from EDM.training.dataset import TrainingSet, open_data
from EDM.training.launch import check, foresee_denoiser, join, launch
from EDM.training.training_loop import Denoising
from shared.cli import Choice, UserError, parse, run_main
from shared.data.images import ImageSet

FLAGS = {
    "main options": config.main_options(
        Choice("ddpmpp", "ncsnpp", "adm", further=["ddpmpp_mnist"]), ["vp", "ve", "edm"],
        "train a class-conditional model"),
    "hyperparameters": config.HYPERPARAMETERS,
    "performance": config.PERFORMANCE,
    "files": config.FILES,
    "running": config.RUNNING,
    "schedules": config.SCHEDULES,
    "U-Net": config.UNET,
    "noise levels": config.LEVELS,
}


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    check(flags)

    def plan() -> tuple[TrainingSet, dict[str, Any]]:
        dataset = open_data(flags.data, flags.cond, flags.xflip)
        return dataset, option_dictionary(flags, dataset)

    world, (dataset, options) = join(flags, plan)
    launch(options, dataset, Denoising, flags, world)


def foresee(flags: SimpleNamespace, images: ImageSet, processes: int) -> int:
    """Return the least number of bytes that a run on such images writes; UserError for an error at its start."""
    check(flags)
    label_dim = images.num_classes if flags.cond else 0
    dataset = TrainingSet(images.images, images.labels, np.arange(len(images)), np.zeros(len(images), bool), label_dim,
                          images.name)
    return foresee_denoiser(flags, dataset, option_dictionary(flags, dataset), processes)


# Networks and constants of table 1 and appendix F; ddpmpp_mnist is the one of "Label-Noise Robust Diffusion Models" for
# MNIST.
DDPMPP = dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard", decoder_type="standard",
              channel_mult_noise=1, resample_filter=[1, 1], model_channels=128, channel_mult=[2, 2, 2])
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": DDPMPP,
    "ncsnpp": dict(model_type="SongUNet", embedding_type="fourier", encoder_type="residual", decoder_type="standard",
                   channel_mult_noise=2, resample_filter=[1, 3, 3, 1], model_channels=128, channel_mult=[2, 2, 2]),
    "ddpmpp_mnist": dict(DDPMPP, model_channels=32, num_blocks=1),
    "adm": dict(model_type="DhariwalUNet", model_channels=192, channel_mult=[1, 2, 3, 4]),
}
PRECONDITIONINGS = {"vp": "VP", "ve": "VE", "edm": "EDM"}
AUGMENTATIONS = dict(xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
AUGMENT_DIM = 9


def option_dictionary(flags: SimpleNamespace, dataset: TrainingSet) -> dict[str, Any]:
    """Return the published option dictionary of the command line `flags`, without run_dir; the seed is random without
    --seed. Flags that the published command line does not have leave no trace unless they were given.
    """
    kind = PRECONDITIONINGS[flags.precond]
    network = dict(ARCHITECTURES[flags.arch], class_name=f"training.networks.{kind}Precond")
    loss: dict[str, Any] = dict(class_name=f"training.loss.{kind}Loss")
    set_given(network, model_channels=flags.cbase, channel_mult=flags.cres)
    if flags.augment:
        network["augment_dim"] = AUGMENT_DIM
    network.update(dropout=flags.dropout, use_fp16=flags.fp16)
    options: dict[str, Any] = dict(
        dataset_kwargs=dict(class_name="training.dataset.ImageFolderDataset", path=flags.data, use_labels=flags.cond,
                            xflip=flags.xflip, cache=flags.cache, resolution=dataset.resolution, max_size=len(dataset)),
        data_loader_kwargs=dict(pin_memory=True, num_workers=flags.workers, prefetch_factor=2),
        network_kwargs=network,
        loss_kwargs=loss,
        optimizer_kwargs=dict(class_name="torch.optim.Adam", lr=flags.lr, betas=[0.9, 0.999], eps=1e-8))
    if flags.augment:
        options["augment_kwargs"] = dict(class_name="training.augment.AugmentPipe", p=flags.augment, **AUGMENTATIONS)
    options.update(
        total_kimg=max(int(flags.duration * 1000), 1), ema_halflife_kimg=int(flags.ema * 1000),
        batch_size=flags.batch, batch_gpu=flags.batch_gpu, loss_scaling=flags.ls, cudnn_benchmark=flags.bench,
        kimg_per_tick=flags.tick, snapshot_ticks=flags.snap, state_dump_ticks=flags.dump,
        seed=secrets.randbelow(1 << 31) if flags.seed is None else flags.seed)
    if flags.transfer is not None:
        options.update(resume_pkl=flags.transfer, ema_rampup_ratio=None)
    elif flags.resume is not None:
        options.update(resume_keys(flags.resume))

    # Beyond the published command line.
    edm_constants = dict(sigma_data=flags.sigma_data, P_mean=flags.p_mean, P_std=flags.p_std)
    if flags.precond != "edm" and any(value is not None for value in edm_constants.values()):
        raise UserError("--sigma-data, --p-mean and --p-std belong to --precond=edm")
    set_given(network, num_blocks=flags.num_blocks, attn_resolutions=flags.attn_resolutions,
              channel_mult_emb=flags.channel_mult_emb, label_dropout=flags.label_dropout, sigma_data=flags.sigma_data)
    set_given(loss, **edm_constants)
    set_given(options, lr_rampup_kimg=flags.lr_rampup, lr_decay=flags.lr_decay, ema_rampup_ratio=flags.ema_rampup,
              ema_sigma_rel=flags.ema_sigma_rel, precision=flags.precision, strict=flags.strict or None,
              compile=flags.compile)
    return options


def set_given(target: dict[str, Any], **values: Any) -> None:
    """Enter the values that are not None."""
    target.update({name: value for name, value in values.items() if value is not None})


def resume_keys(state_file: str) -> dict[str, Any]:
    """Return the option dictionary's entries for --resume; UserError unless it is a training state."""
    match = re.fullmatch(r"training-state-(\d+)\.pt", os.path.basename(state_file))
    if not match or not os.path.isfile(state_file):
        raise UserError("--resume must point to training-state-*.pt from a previous training run")
    snapshot = os.path.join(os.path.dirname(state_file), f"network-snapshot-{match[1]}.pkl")
    return dict(resume_pkl=snapshot, resume_kimg=int(match[1]), resume_state_dump=state_file)


if __name__ == "__main__":
    run_main(main)
