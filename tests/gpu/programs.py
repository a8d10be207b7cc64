"""The training programs that are measured on the null GPU: small data, networks of the published depth or less."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.ddae import tiny as ddae
from tests.edm import latent_runs
from tests.edm import training_runs as edm
from tests.metasemi import photographs

ROOT = Path(__file__).resolve().parents[2]
EDM = ("--cond=1", "--cbase=8", "--cres=1,1", "--num-blocks=1", "--attn-resolutions=4", "--batch=16", "--tick=1000",
       "--dump=1000", "--snap=1000", "--seed=3", "--nosubdir", "--outdir=run", "--data=tiny.zip")

EPOCHS = 8  # of 3 steps, or of 2 with two ranks


@dataclass(frozen=True)
class Program:
    """script: in the project. args: (its working folder, number of steps) -> arguments. slow: left to the slow tests.

    Nothing is logged, saved or evaluated between the first and the last step. waits: that the method itself needs.
    """

    script: str
    args: Callable[[Path, int], list[str]]
    slow: bool = False
    waits: int = 0
    compiled: bool = False


def torchssl(name: str, *flags: str, slow: bool = True, compiled: bool = False) -> Program:
    config = ROOT / "TorchSSL" / "config" / name / f"{name}_digits_40_0.yaml"
    return Program(f"TorchSSL/{name}.py", lambda folder, steps: [
        f"--c={config}", f"--num_train_iter={steps}", "--num_eval_iter=1000", "--num_save_iter=1000",
        f"--compile={compiled}", f"--save_dir={folder}", *flags], slow, compiled=compiled)


def train_edm(*flags: str, slow: bool = True, compiled: bool = False) -> Program:
    def args(folder: Path, steps: int) -> list[str]:
        edm.write_set(folder / "tiny.zip")
        return [*EDM, f"--duration={16 * steps / 1e6}", f"--compile={compiled}", *flags]
    return Program("EDM/train.py", args, slow, compiled=compiled)


def train_ddae(*flags: str, slow: bool = True, compiled: bool = False, **changes: object) -> Program:
    def args(folder: Path, steps: int) -> list[str]:
        ddae.write_config(folder, n_epoch=steps, n_sample=2, **changes)
        return ["--config=tiny.yaml", f"--steps={steps}", f"--compile={compiled}", *flags]
    return Program("DDAE/train.py", args, slow, compiled=compiled)


def evaluate_ddae(script: str, *flags: str) -> Program:
    """A program that trains on the features of a DDAE, or from its weights, for more epochs than there are steps."""
    def args(folder: Path, steps: int) -> list[str]:
        ddae.make_folder(folder, epochs=(1,), linear={**ddae.LINEAR, "n_epoch": EPOCHS})
        own = [flag.format(steps=steps) for flag in flags]
        return own if script == "noisy_classifier_WRN" else ["--config=tiny.yaml", "--epoch=1", *own]
    return Program(f"DDAE/{script}.py", args, slow=True)


def tdsm(script: str, *flags: str, waits: int = 0) -> Program:
    def args(folder: Path, steps: int) -> list[str]:
        edm.write_set(folder / "tiny.zip")
        return ["--cond=1", "--batch=16", "--tick=1000", "--dump=1000", "--snap=1000", "--seed=3", "--nosubdir",
                "--outdir=run", "--data=tiny.zip", f"--duration={16 * steps / 1e6}", *flags]
    return Program(f"EDM/{script}.py", args, slow=True, waits=waits)


def train_ldm(script: str, config: str, slow: bool = True, compiled: bool = False) -> Program:
    """Four blocks, computed again in the backward pass, as the published sizes are."""
    def args(folder: Path, steps: int) -> list[str]:
        latent_runs.write_latents(folder / "latents")
        seldom = (f"--config.train.{key}_interval=1000" for key in ("log", "eval", "save"))
        return [config, *latent_runs.TINY, *seldom, f"--config.train.n_steps={steps}", "--config.nnet.depth=4",
                "--dataset_path=latents", "--workdir=run", f"--compile={compiled}"]
    return Program(f"EDM/imagenet/{script}.py", args, slow, compiled=compiled)


def daso(name: str, *pairs: str, slow: bool = True, compiled: bool = False) -> Program:
    config = ROOT / "DASO" / "configs" / "digits" / f"{name}.yaml"
    return Program("DASO/main.py", lambda folder, steps: [
        "--config-file", str(config), "SOLVER.MAX_ITER", str(steps), "PERIODS.LOG", "1000", "PERIODS.EVAL", "1000",
        "PERIODS.CHECKPOINT", "1000", "OUTPUT_DIR", str(folder / "out"), "COMPILE", str(compiled), *pairs],
                   slow, compiled=compiled)


def metasemi(script: str, *flags: str, slow: bool = True, compiled: bool = False) -> Program:
    return Program(f"MetaSemi/{script}.py", lambda folder, steps: [
        "--dataset=digits", "-a=small", "--num-label=20", "--batch-size=8", f"--total-steps={steps}", "--warmup=2",
        "--milestones=[4, 5]", "--test-freq=1000", "--print-freq=1000", "--save-path=run", "--gpu",
        f"--compile={compiled}", *flags], slow, compiled=compiled)


def metasemi_imagenet(script: str) -> Program:
    def args(folder: Path, steps: int) -> list[str]:
        photographs.pack(photographs.make_tree(folder, 40), 20)
        return [*photographs.TINY[:-4], "--batch-size=2", "--epochs=100", "--data=.", "--save-path=run",
                "--print-freq=1000", "--decoder=torchvision", f"--iterations={steps}", "--compile=False"]
    return Program(f"MetaSemi/{script}.py", args, slow=True)


def train_msn() -> Program:
    return Program("TorchSSL/train_msn.py", lambda folder, steps: [
        "--dataset=digits", "--model=deit_tiny", "--img_size=16", "--patch_size=8", "--embed_dim=16", "--depth=2",
        "--num_heads=2", "--hidden=32", "--output_dim=8", "--prototypes=20", "--focal_views=2", "--focal_size=8",
        "--batch_size=600", f"--epochs={EPOCHS}", "--warmup=1", "--log_every=1000", f"--outdir={folder}"], slow=True)


def with_wait(program: Program) -> Program:
    """Return the program with one `.item()` more in each step."""
    return Program("tests/gpu/one_wait.py", lambda folder, steps: [str(ROOT / program.script),
                                                                  *program.args(folder, steps)], program.slow)


PROGRAMS = {
    "freematch": torchssl("freematch", slow=False),
    "freematch, compiled": torchssl("freematch", compiled=True),
    "vat": torchssl("vat", slow=False),
    "remixmatch": torchssl("remixmatch", slow=False),
    **{name: torchssl(name) for name in (
        "fixmatch", "flexmatch", "softmatch", "uda", "uda_flex", "defixmatch", "sequencematch", "freematch_entropy",
        "fullysupervised", "meanteacher", "mixmatch", "pimodel", "pseudolabel", "pseudolabel_flex")},
    "msn": train_msn(),
    "edm": train_edm("--augment=0.12", slow=False),
    "edm in rounds": train_edm("--augment=0.12", "--batch-gpu=4"),
    "edm, ncsnpp": train_edm("--arch=ncsnpp"),
    "latent diffusion": train_ldm("train_ldm", latent_runs.LARGE, slow=False),
    "latent diffusion, discrete": train_ldm("train_ldm_discrete", latent_runs.HUGE),
    "latent diffusion, compiled": train_ldm("train_ldm", latent_runs.LARGE, compiled=True),
    "ddae": train_ddae(slow=False),
    "ddae, ddpm": train_ddae(**ddae.DDPM),
    "ddae, mixed precision": train_ddae("--use_amp", **ddae.DDPM),
    "linear": evaluate_ddae("linear", "--steps={steps}"),
    "noisy classifier": evaluate_ddae("noisy_classifier_DDAE"),
    "noisy classifier, WRN": evaluate_ddae("noisy_classifier_WRN", "--dataset=digits", "--batch_size=20", "--epoch=1",
                                           "--blocks_per_group=1", "--channel_multiplier=1"),
    "finetune": evaluate_ddae("finetune", f"--epochs={EPOCHS}", "--batch_size=20", "--eval_every=1000", "--randaugment",
                              "--mixup=0.5"),
    "noise classifier of TDSM": tdsm("train_classifier", "--classifier=cnn", "--cbase=8", "--accuracy-images=20",
                                     "--noise_type=sym", "--noise_rate=0.4"),
    # How many labels an image may have is a number that the host must know.
    "tdsm": tdsm("train_noise", "--cbase=8", "--cres=1,1", "--num-blocks=1", "--attn-resolutions=4",
                 "--noise_type=clean", "--augment=0", waits=1),
    "daso": daso("fixmatch_daso", slow=False),
    **{f"daso, {name}": daso(name) for name in (
        "supervised", "pseudolabel", "meanteacher", "mixmatch", "usadtm", "acr", "simpro")},
    "daso, abc": daso("fixmatch_abc", "ALGORITHM.ABC.SCHEDULE", "max_iter"),
    "daso, remixmatch": daso("remixmatch_daso"),
    "metasemi": metasemi("train_meta", "--mix-up", slow=False),
    "metasemi, compiled": metasemi("train_meta", "--mix-up", compiled=True),
    "metasemi baseline": metasemi("train_baseline"),
    "metasemi, ImageNet": metasemi_imagenet("train_meta_imagenet"),
    "metasemi baseline, ImageNet": metasemi_imagenet("train_imagenet"),
}
