"""The flags that the training scripts share, in the published form; neutral beyond it unless given."""
from __future__ import annotations

from collections.abc import Sequence

from shared.cli import Bool, Choice, Flag, Float, Int, IntList, Option

COUNT, POSITIVE, FRACTION = Int(1), Float(0, open=True), Float(0, 1)


def main_options(archs: Choice, preconds: Sequence[str], cond_help: str) -> tuple[Option, ...]:
    """Return the flags that every run names. archs, preconds: the script's choices; cond_help: what --cond does."""
    further = "".join(f", or {name}" for name in archs.further)
    return (
        Option("--outdir", required=True, metavar="DIR", help="where to save the runs"),
        Option("--data", required=True, metavar="ZIP|DIR", help="path to the training set"),
        Option("--cond", Bool, False, cond_help),
        Option("--arch", archs, "ddpmpp", f"network architecture{further}"),
        Option("--precond", Choice(*preconds), "edm", "preconditioning and loss"),
    )


HYPERPARAMETERS = (
    Option("--duration", Float(0, 1e9, open="low"), 200.0, "training duration", unit="million images"),
    Option("--batch", COUNT, 512, "total batch size", unit="images"),
    Option("--batch-gpu", COUNT, None, "most images per GPU at once; the rest is accumulated"),
    Option("--cbase", COUNT, None, "channel multiplier", default_help="varies"),
    Option("--cres", IntList(1), None, "channels per resolution", default_help="varies"),
    Option("--lr", POSITIVE, 1e-3, "learning rate"),
    Option("--ema", Float(0, 1e9), 0.5, "EMA half-life", unit="million images"),
    Option("--dropout", FRACTION, 0.13, "dropout probability"),
    Option("--augment", FRACTION, 0.12, "augmentation probability"),
    Option("--xflip", Bool, False, "double the set by mirrored copies"),
)

PERFORMANCE = (
    Option("--fp16", Bool, False, "run the network in fp16 (GPU)"),
    Option("--ls", POSITIVE, 1.0, "loss scaling"),
    Option("--bench", Bool, True, "let cuDNN benchmark its algorithms"),
    Option("--cache", Bool, True, "accepted; images are always decoded once and cached"),
    Option("--workers", COUNT, 1, "accepted; batches need no loading processes"),
)

FILES = (
    Option("--desc", metavar="STR", help="suffix of the run's folder"),
    Option("--nosubdir", Flag, False, "use --outdir itself as the run's folder"),
    Option("--overwrite", Flag, False, "with --nosubdir: move another run in --outdir aside and start anew"),
    Option("--tick", COUNT, 50, "status interval", unit="thousand images"),
    Option("--snap", COUNT, 50, "interval of network snapshots", unit="ticks"),
    Option("--dump", COUNT, 500, "interval of training states", unit="ticks"),
    Option("--seed", Int(0, 2**32 - 1), None, "random seed", default_help="random"),
    Option("--transfer", metavar="PKL|URL", help="start from the weights of a snapshot"),
    Option("--resume", metavar="PT", help="go on from a former run's training-state-*.pt"),
    Option("--resume_sub", hidden=True),  # published, and without effect there too
    Option("-n --dry-run", Flag, False, "print the options and exit"),
)

LABEL_NOISE = (
    Option("--noise_type", Choice("clean", "sym", "asym", "learn", "file"), None,
           "kind of label noise", default_help="see above"),
    Option("--noise_rate", Float(0, 1, open="high"), None, "fraction of wrong labels"),
    Option("--transition", metavar="FILE",
           help="transition matrix as .npy or .json, row = clean class (--noise_type=file)"),
    Option("--dataset", Choice("mnist", "cifar10", "cifar100", "digits"), None,
           "which set --data is", default_help="by its name"),
)

# Beyond the published command line.
RUNNING = (
    Option("--precision", Choice("fp32", "bf16", "fp16"), None,
           "arithmetic of the network", default_help="bf16 on a GPU that has it, else fp32; --fp16 overrules"),
    Option("--strict", Flag, False, "the published arithmetic: fp32 and no fast path"),
    Option("--compile", Bool, None, "compile the network", default_help="on a GPU, unless --strict"),
    Option("--device", metavar="NAME", help="cpu, cuda or cuda:N", default_help="a GPU if there is one"),
    Option("--checkpoint-seconds", POSITIVE, 600.0, "time between two checkpoints", unit="s"),
)

SCHEDULES = (
    Option("--lr-rampup --lr_rampup_kimg", Float(0), None,
           "warm-up of the learning rate", default_help="10000", unit="thousand images"),
    Option("--lr-decay", FRACTION, None,
           "fraction of the run over which the learning rate falls to 0 at its end", default_help="0"),
    Option("--ema-rampup", POSITIVE, None, "EMA half-life at most this fraction of the images seen",
           default_help="0.05"),
    Option("--ema-sigma-rel", Float(0, 0.2886, open="low"), None,
           "power-law EMA of this relative width instead of --ema, as in EDM2 (e.g. 0.1)"),
)

UNET = (
    Option("--num-blocks", COUNT, None, "residual blocks per resolution", default_help="4; adm 3"),
    Option("--attn-resolutions", IntList(1), None, "resolutions with attention", default_help="16; adm 32,16,8"),
    Option("--channel-mult-emb", COUNT, None, "width of the embedding, times --cbase", default_help="4"),
    Option("--label-dropout", FRACTION, None,
           "fraction of images trained without class, for generate.py --guidance", default_help="0"),
)

LEVELS = (
    Option("--sigma-data", POSITIVE, None, "standard deviation of the data (--precond=edm)", default_help="0.5"),
    Option("--p-mean", Float(), None, "mean of ln(sigma) in training (--precond=edm)", default_help="-1.2"),
    Option("--p-std", POSITIVE, None, "standard deviation of ln(sigma) in training (--precond=edm)",
           default_help="1.2"),
)
