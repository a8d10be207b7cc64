"""The published training commands at their published sizes, on random pictures, for `measure.py --published`.

Data sets have the published number of images where they lie on the GPU. Networks are not compiled.
"""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from EDM.latent.vae import autoencoder
from tests.daso import layouts
from tests.edm import latent_runs
from tests.gpu.programs import ROOT, Program

EDM = ("--outdir=run", "--nosubdir", "--tick=1000000", "--snap=1000", "--dump=1000", "--data=set.npz",
       "--compile=False")
FFHQ = ("--arch=ddpmpp", "--batch=256", "--cres=1,2,2,2", "--lr=2e-4", "--dropout=0.05", "--augment=0.15")
ADM = ("--cond=1", "--arch=adm", "--batch=4096", "--lr=1e-4", "--ema=50", "--dropout=0.10", "--augment=0", "--fp16=1",
       "--ls=100")


def cifar(folder: Path, name: str = "cifar10") -> Path:
    """Return the place of 60,000 pictures in the form of CIFAR, which the programs share."""
    place = folder.parent / name
    if not place.exists():
        layouts.write_cifar(place, name, *((5000, 1000) if name == "cifar10" else (500, 100)))
    return place


def torchssl(script: str, config: str, *flags: str) -> Program:
    name = "cifar100" if "cifar100" in config else "cifar10"
    return Program(f"TorchSSL/{script}.py", lambda folder, steps: [
        f"--c={ROOT / 'TorchSSL' / 'config' / config}", f"--num_train_iter={steps}", "--num_eval_iter=1000",
        f"--data_dir={cifar(folder, name)}", "--compile=False", f"--save_dir={folder}", *flags])


def edm(script: str, *flags: str, side: int = 32, classes: int = 10) -> Program:
    def args(folder: Path, steps: int) -> list[str]:
        rng = np.random.default_rng(0)
        np.savez(folder / "set.npz", images=rng.integers(0, 256, (classes * 2, 3, side, side), np.uint8),
                 labels=np.arange(classes * 2) % classes)
        batch = next((int(flag.split("=")[1]) for flag in flags if flag.startswith("--batch=")), 512)
        return [*(flag for flag in EDM if script == "train" or "compile" not in flag), *flags,
                f"--duration={math.ceil(steps * batch / 1000) / 1000}"]
    return Program(f"EDM/{script}.py", args)


def ddae(config: str, *flags: str) -> Program:
    return Program("DDAE/train.py", lambda folder, steps: [
        f"--config={ROOT / 'DDAE' / 'config' / config}", f"--data_dir={cifar(folder)}", f"--steps={steps}",
        "--compile=False", "--log_every=1000", "--set", f"save_dir={folder}", "--set", "n_sample=2", *flags])


def daso(config: str, *pairs: str) -> Program:
    name = config.split("/")[0]
    return Program("DASO/main.py", lambda folder, steps: [
        "--config-file", str(ROOT / "DASO" / "configs" / config), "DATASET.ROOT", str(cifar(folder, name)),
        "SOLVER.MAX_ITER", str(steps), "PERIODS.LOG", "1000", "PERIODS.EVAL", "1000", "PERIODS.CHECKPOINT", "1000",
        "OUTPUT_DIR", str(folder / "out"), "COMPILE", "False", *pairs])


def metasemi(script: str, name: str, labels: int, *flags: str) -> Program:
    return Program(f"MetaSemi/{script}.py", lambda folder, steps: [
        f"--dataset={name}", f"--data-path={cifar(folder, name)}", f"--num-label={labels}", "-a=convlarge",
        f"--total-steps={steps}", "--warmup=2", "--milestones=[4, 5]", "--test-freq=1000", "--print-freq=1000",
        "--save-path=run", "--compile=False", "--gpu", *flags])


def latent(script: str, config: str) -> Program:
    """With a random VAE of Stable Diffusion's size."""
    def args(folder: Path, steps: int) -> list[str]:
        latent_runs.write_latents(folder / "latents", (4, 32, 32), 2048, 1000)
        about = folder / "latents" / "latents.json"
        about.write_text(about.read_text().replace('"coder": "', '"coder": "", "made by": "'))
        autoencoder()(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                      up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4
                      ).save_pretrained(folder / "vae")
        seldom = (f"--config.train.{key}_interval=1000" for key in ("log", "eval", "save"))
        return [config, *seldom, f"--config.train.n_steps={steps}", "--config.autoencoder.pretrained_path=vae",
                "--dataset_path=latents", "--workdir=run", "--compile=False"]
    return Program(f"EDM/imagenet/{script}.py", args)


# Name -> (the command, on how many GPUs).
PUBLISHED: dict[str, tuple[Program, int]] = {
    "freematch, CIFAR-10": (torchssl("freematch", "freematch_cifar10_40_1.yaml"), 1),
    "freematch, CIFAR-10, bf16": (torchssl("freematch", "freematch_cifar10_40_1.yaml", "--precision=bf16"), 1),
    "flexmatch, CIFAR-100": (torchssl("flexmatch", "flexmatch/flexmatch_cifar100_400_0.yaml"), 1),
    "edm of DPT, CIFAR-10": (edm("train", "--cond=1", "--arch=ddpmpp", "--batch-gpu=32"), 4),
    "edm, CIFAR-10, ddpmpp": (edm("train", "--cond=1", "--arch=ddpmpp"), 8),
    "edm, CIFAR-10, one GPU": (edm("train", "--cond=1", "--arch=ddpmpp"), 1),
    "edm, CIFAR-10, ncsnpp": (edm("train", "--cond=1", "--arch=ncsnpp"), 8),
    "edm, FFHQ": (edm("train", *FFHQ, side=64, classes=1), 8),
    "edm, ImageNet": (edm("train", *ADM, side=64, classes=1000), 32),
    "noise classifier of TDSM": (edm("train_classifier", "--cond=1", "--arch=ddpmpp", "--batch=1024",
                                     "--noise_type=sym", "--noise_rate=0.4"), 1),
    "ddae, DDPM_ddpm": (ddae("DDPM_ddpm.yaml", "--use_amp"), 4),
    "ddae, EDM_ddpmpp": (ddae("EDM_ddpmpp.yaml", "--use_amp"), 4),
    "ddae, EDM_ddpmpp_aug": (ddae("EDM_ddpmpp_aug.yaml", "--use_amp"), 8),
    "daso, CIFAR-10": (daso("cifar10/fixmatch_daso.yaml", "DATASET.CIFAR10.NUM_LABELED_HEAD", "500",
                            "DATASET.CIFAR10.NUM_UNLABELED_HEAD", "4000"), 1),
    "daso with ReMixMatch, CIFAR-10": (daso("cifar10/remixmatch_daso.yaml"), 1),
    "daso, CIFAR-100": (daso("cifar100/fixmatch_daso.yaml", "DATASET.CIFAR100.IMB_FACTOR_L", "20",
                             "DATASET.CIFAR100.IMB_FACTOR_UL", "20"), 1),
    "metasemi, CIFAR-10": (metasemi("train_meta", "cifar10", 4000, "--mix-up"), 1),
    "metasemi, CIFAR-100": (metasemi("train_meta", "cifar100", 10000, "--mix-up"), 1),
    "metasemi baseline, CIFAR-10": (metasemi("train_baseline", "cifar10", 4000, "--mix-up"), 1),
    "U-ViT large": (latent("train_ldm", latent_runs.LARGE), 8),
    "U-ViT huge": (latent("train_ldm_discrete", latent_runs.HUGE), 8),
}
