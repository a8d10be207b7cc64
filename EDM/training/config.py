"""What a training run is: its option dictionary, its folder and its name, all in the published form."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shared.cli import UserError
from shared.training.files import LOCK, atomic, in_use

OPTIONS_FILE = "training_options.json"
RESULT_FILE = "result.json"

# Networks and constants of "Elucidating the Design Space of Diffusion-Based Generative Models", table 1 and appendix F;
# ddpmpp_mnist is the one of "Label-Noise Robust Diffusion Models" for MNIST.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard",
                   decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1],
                   model_channels=128, channel_mult=[2, 2, 2]),
    "ncsnpp": dict(model_type="SongUNet", embedding_type="fourier", encoder_type="residual",
                   decoder_type="standard", channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
                   model_channels=128, channel_mult=[2, 2, 2]),
    "ddpmpp_mnist": dict(model_type="SongUNet", embedding_type="positional", encoder_type="standard",
                         decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1],
                         model_channels=32, channel_mult=[2, 2, 2], num_blocks=1),
    "adm": dict(model_type="DhariwalUNet", model_channels=192, channel_mult=[1, 2, 3, 4]),
}
PRECONDITIONINGS = {"vp": "VP", "ve": "VE", "edm": "EDM"}
AUGMENTATIONS = dict(xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
AUGMENT_DIM = 9
# Classifiers of noisy images ("Label-Noise Robust Diffusion Models", Na et al., ICLR 2024).
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "ddpmpp": dict(model_type="ClassifierSong", embedding_type="positional", decoder_type="standard"),
    "ncsnpp": dict(model_type="ClassifierSong", embedding_type="fourier", channel_mult_noise=2),
    "adm": dict(model_type="ClassifierDhariwal", model_channels=192, channel_mult=[1, 2, 3, 4]),
}

# How a run is carried out, as opposed to what it computes: may differ between the parts of an interrupted run.
FREE_KEYS = ("run_dir", "data_loader_kwargs", "batch_gpu", "cudnn_benchmark", "compile", "cls", "pairs_gpu")


def option_dictionary(flags: SimpleNamespace, resolution: int, size: int, seed: int) -> dict[str, Any]:
    """Return the published option dictionary of the command line `flags`, without run_dir.

    resolution, size: side of the images and length of the training set (mirrored copies included). Flags that the
    published command line does not have leave no trace in the dictionary unless they were given.
    """
    network = dict(ARCHITECTURES[flags.arch])
    kind = PRECONDITIONINGS[flags.precond]
    network["class_name"] = f"training.networks.{kind}Precond"
    if flags.cbase is not None:
        network["model_channels"] = flags.cbase
    if flags.cres is not None:
        network["channel_mult"] = flags.cres
    if flags.augment:
        network["augment_dim"] = AUGMENT_DIM
    network.update(dropout=flags.dropout, use_fp16=flags.fp16)
    loss: dict[str, Any] = dict(class_name=f"training.loss.{kind}Loss")

    options: dict[str, Any] = dict(
        dataset_kwargs=dict(class_name="training.dataset.ImageFolderDataset", path=flags.data, use_labels=flags.cond,
                            xflip=flags.xflip, cache=flags.cache, resolution=resolution, max_size=size),
        data_loader_kwargs=dict(pin_memory=True, num_workers=flags.workers, prefetch_factor=2),
        network_kwargs=network,
        loss_kwargs=loss,
        optimizer_kwargs=dict(class_name="torch.optim.Adam", lr=flags.lr, betas=[0.9, 0.999], eps=1e-8))
    if flags.augment:
        options["augment_kwargs"] = dict(class_name="training.augment.AugmentPipe", p=flags.augment, **AUGMENTATIONS)
    options.update(
        total_kimg=max(int(flags.duration * 1000), 1), ema_halflife_kimg=int(flags.ema * 1000),
        batch_size=flags.batch, batch_gpu=flags.batch_gpu, loss_scaling=flags.ls, cudnn_benchmark=flags.bench,
        kimg_per_tick=flags.tick, snapshot_ticks=flags.snap, state_dump_ticks=flags.dump, seed=seed)
    if flags.transfer is not None:
        options.update(resume_pkl=flags.transfer, ema_rampup_ratio=None)
    elif flags.resume is not None:
        options.update(_resume_keys(flags.resume))
    _add_extras(options, flags)
    return options


def _resume_keys(state_file: str) -> dict[str, Any]:
    match = re.fullmatch(r"training-state-(\d+)\.pt", os.path.basename(state_file))
    if not match or not os.path.isfile(state_file):
        raise UserError("--resume must point to training-state-*.pt from a previous training run")
    snapshot = os.path.join(os.path.dirname(state_file), f"network-snapshot-{match[1]}.pkl")
    return dict(resume_pkl=snapshot, resume_kimg=int(match[1]), resume_state_dump=state_file)


def _add_extras(options: dict[str, Any], flags: SimpleNamespace) -> None:
    """Enter what was given of the flags that the published command line does not have."""
    network, loss = options["network_kwargs"], options["loss_kwargs"]
    edm_constants = dict(sigma_data=flags.sigma_data, P_mean=flags.p_mean, P_std=flags.p_std)
    if flags.precond != "edm" and any(value is not None for value in edm_constants.values()):
        raise UserError("--sigma-data, --p-mean and --p-std belong to --precond=edm")
    inner = dict(num_blocks=flags.num_blocks, attn_resolutions=flags.attn_resolutions,
                 channel_mult_emb=flags.channel_mult_emb, label_dropout=flags.label_dropout,
                 sigma_data=flags.sigma_data)
    run = dict(lr_rampup_kimg=flags.lr_rampup, lr_decay=flags.lr_decay, ema_rampup_ratio=flags.ema_rampup,
               ema_sigma_rel=flags.ema_sigma_rel,
               precision=flags.precision, strict=flags.strict or None, compile=flags.compile)
    for target, values in ((network, inner), (loss, edm_constants), (options, run)):
        target.update({name: value for name, value in values.items() if value is not None})


def summary(options: Mapping[str, Any], flags: SimpleNamespace, world_size: int) -> list[str]:
    """Return the lines printed below the option dictionary."""
    return [f"Output directory:        {options['run_dir']}",
            f"Dataset path:            {options['dataset_kwargs']['path']}",
            f"Class-conditional:       {options['dataset_kwargs']['use_labels']}",
            f"Network architecture:    {flags.arch}",
            f"Preconditioning & loss:  {flags.precond}",
            f"Number of GPUs:          {world_size}",
            f"Batch size:              {options['batch_size']}",
            f"Mixed-precision:         {options['network_kwargs']['use_fp16']}"]


def classifier_dictionary(flags: SimpleNamespace, resolution: int, size: int, seed: int, encoder: str, learned: bool,
                          noise: Mapping[str, Any]) -> dict[str, Any]:
    """Return the option dictionary of a classifier's training; see `option_dictionary`.

    encoder: "cnn", "resnet18", "resnet34" or "resnet34_64". learned: whether the transition matrix is learned.
    noise: what is recorded of the label noise.
    """
    kind = PRECONDITIONINGS[flags.precond]
    options = option_dictionary(flags, resolution, size, seed)
    network = dict(CLASSIFIERS[flags.arch])
    if encoder == "cnn":
        network["model_type"], encoder = "ClassifierSong_MNIST", "standard"
    network["encoder_type"] = encoder
    if flags.cbase is not None:
        network["model_channels"] = flags.cbase
    if flags.augment:
        network["augment_dim"] = AUGMENT_DIM
    if flags.sigma_data is not None:
        network["sigma_data"] = flags.sigma_data
    wrapper = f"{kind}Precond_classifier" + "_with_transition_matrix" * learned
    options["network_kwargs"] = dict(network, class_name=f"training.networks.{wrapper}", dropout=flags.dropout,
                                     use_fp16=flags.fp16)
    name = f"{kind}ClassifierWithVMLoss" if learned else f"{kind}ClassifierLoss"
    options["loss_kwargs"] = dict(options["loss_kwargs"], class_name=f"training.loss.{name}", **noise)
    if flags.optimizer == "sgd":
        options["optimizer_kwargs"] = dict(class_name="torch.optim.SGD", lr=flags.lr, momentum=0.9, weight_decay=0)
    own = dict(averaged=flags.averaged or None, accuracy_images=flags.accuracy_images, eval_data=flags.eval_data,
               vm_schedule_kimg=flags.vm_schedule if learned else None)
    options.update({key: value for key, value in own.items() if value is not None})
    return options


def denoiser_dictionary(flags: SimpleNamespace, resolution: int, size: int, seed: int, noise: Mapping[str, Any],
                        classifier: str | None) -> dict[str, Any]:
    """Return the option dictionary of a TDSM training; see `option_dictionary`.

    noise: what is recorded of the label noise. classifier: digest of the classifier's snapshot.
    """
    kind = PRECONDITIONINGS[flags.precond]
    options = option_dictionary(SimpleNamespace(**{**vars(flags), "label_dropout": None}), resolution, size, seed)
    loss = dict(options["loss_kwargs"], class_name=f"training.loss.{kind}NoiseLoss", **noise, tau=flags.tau,
                temp=flags.temp)
    own = dict(relative_tau=flags.relative_tau or None, renormalise=flags.renormalise or None,
               full_gradient=flags.full_gradient or None, label_dropout=flags.label_dropout or None,
               classifier=classifier)
    loss.update({key: value for key, value in own.items() if value is not None})
    options["loss_kwargs"] = loss
    if flags.cls is not None:
        options["cls"] = flags.cls
    if flags.pairs_gpu is not None:
        options["pairs_gpu"] = flags.pairs_gpu
    return options


# ------------------------------------------------------------------------------------------------- the run's folder

def run_description(flags: SimpleNamespace, gpus: int | str) -> str:
    """Return the run's name without its number: data set, conditioning, network, loss, GPUs, batch, precision."""
    name = os.path.splitext(os.path.basename(flags.data))[0]
    arch = getattr(flags, "arch_name", flags.arch)
    parts = [name, "cond" if flags.cond else "uncond", arch, flags.precond, f"gpus{gpus}",
             f"batch{flags.batch}", "fp16" if flags.fp16 else "fp32"]
    return "-".join(parts + ([flags.desc] if flags.desc is not None else []))


def numbered_runs(outdir: str) -> list[tuple[int, str]]:
    """Return (number, folder name) of the folders in `outdir` whose name starts with a decimal number, by number."""
    if not os.path.isdir(outdir):
        return []
    runs = [(int(match[0]), entry.name) for entry in os.scandir(outdir)
            if entry.is_dir() and (match := re.match(r"\d+", entry.name))]
    return sorted(runs)


def choose_folder(flags: SimpleNamespace, options: dict[str, Any], world_size: int) -> tuple[str, str | None]:
    """Return the run's folder and, when an earlier run in it is taken up again, a line that says so.

    With --nosubdir it is --outdir itself; a run with other options in there raises UserError. Otherwise it is the
    newest numbered folder of this description if that run has the same options (the number of GPUs aside) and is
    neither finished nor being worked on, else a new number: 1 + the largest one. A run taken up again without --seed
    keeps the seed it was started with: `options["seed"]` is set to it.
    """
    if flags.nosubdir:
        return flags.outdir, _continue_in(flags, options)
    runs = numbered_runs(flags.outdir)
    same = re.compile(r"\d+-" + re.escape(run_description(flags, "GPUS")).replace("gpusGPUS", r"gpus\d+"))
    newest = next((name for _, name in reversed(runs) if same.fullmatch(name)), None)
    if newest is not None:
        folder = os.path.join(flags.outdir, newest)
        former = read_options(folder)
        if (former is not None and (Path(folder) / LOCK).exists() and not is_finished(folder)
                and not differences(former, options, ignore_seed=flags.seed is None) and not in_use(folder)):
            options["seed"] = former["seed"]
            return folder, f"Continuing the unfinished run {folder}"
    number = runs[-1][0] + 1 if runs else 0
    return os.path.join(flags.outdir, f"{number:05d}-{run_description(flags, world_size)}"), None


def _continue_in(flags: SimpleNamespace, options: dict[str, Any]) -> str | None:
    folder = Path(flags.outdir)
    former = read_options(folder)
    if former is None:
        return None
    changed = differences(former, options, ignore_seed=flags.seed is None)
    if changed:
        if not any(folder.glob("checkpoint.pt*")) and not any(folder.glob("network-snapshot-*")):
            return None  # it ended before its first step
        raise UserError(f"{folder} holds a run with other options ({'; '.join(changed[:3])}); give the options it was "
                        "started with, or another --outdir")
    if in_use(folder):
        raise UserError(f"{folder} is being written to by a running process; wait for it, or choose another --outdir")
    options["seed"] = former["seed"]
    return f"Continuing the run in {folder}"


def read_options(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Return the option dictionary of the run in `folder`, None where there is none."""
    try:
        options = json.loads((Path(folder) / OPTIONS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise UserError(f"{folder}/{OPTIONS_FILE} is not JSON; remove it or choose another --outdir") from None
    return options if isinstance(options, dict) and "seed" in options else None


def write_options(folder: str | os.PathLike, options: Mapping[str, Any]) -> None:
    with atomic(Path(folder) / OPTIONS_FILE, "w") as file:
        file.write(json.dumps(options, indent=2))


def differences(former: Mapping[str, Any], options: Mapping[str, Any], ignore_seed: bool = False) -> list[str]:
    """Return, as "key: old there, new here", what makes `options` another run than `former`."""
    def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
        leaves = {}
        for key, value in tree.items():
            if key in FREE_KEYS or (key == "seed" and ignore_seed):
                continue
            leaves.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
        return leaves

    old, new = flat(former), flat(json.loads(json.dumps(options)))
    return [f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in {**old, **new}
            if old.get(key) != new.get(key)]


def is_finished(folder: str | os.PathLike) -> bool:
    return (Path(folder) / RESULT_FILE).is_file()


# ------------------------------------------------------------------------------------------------------- arithmetic

def batch_rounds(batch: int, batch_gpu: int | None, world_size: int) -> tuple[int, int]:
    """Return (images per forward of one process, accumulation rounds) such that their product is its share of `batch`.

    Raises UserError when `batch` cannot be divided evenly.
    """
    per_rank, rest = divmod(batch, world_size)
    if rest or not per_rank:
        raise UserError(f"--batch={batch} cannot be shared evenly by {world_size} processes; "
                        f"choose a multiple of {world_size}")
    at_once = min(batch_gpu or per_rank, per_rank)
    if per_rank % at_once:
        raise UserError(f"--batch-gpu={batch_gpu} does not divide the {per_rank} images of each of the {world_size} "
                        "process(es); choose a divisor of it")
    return at_once, per_rank // at_once
