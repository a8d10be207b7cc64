"""Generate images with a diffusion model of EDM: one image per seed.

    python generate.py --outdir=out --seeds=0-63 --batch=64 --network=network-snapshot-200000.pkl
    torchrun --standalone --nproc_per_node=4 generate.py --outdir=out --seeds=0-49999 --subdirs --network=...

The same command again makes only what is missing.
"""
from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from shared.cli import UserError, run_main

if TYPE_CHECKING:
    import torch

    from EDM.sampling.sampling import SeedSampler
    from shared.distributed import World

SAMPLERS = ("edm", "ablation", "dpmpp-2m", "deis-2", "deis-3")
ABLATION_FLAGS = {"solver": "solver", "disc": "discretization", "schedule": "schedule", "scaling": "scaling"}
CHURN_FLAGS = ("S_churn", "S_min", "S_max", "S_noise")


def option(*names: str, **settings: Any) -> Any:
    return click.option(*names, **{"show_default": settings.get("default") is not None, **settings})


POSITIVE = click.FloatRange(min=0, min_open=True)
NOT_NEGATIVE = click.FloatRange(min=0)
AT_LEAST_ONE = click.IntRange(min=1)


@click.command(help=__doc__.split("\n\n    python")[0].strip())
@option("--network", metavar="PATH|URL", type=str, required=True, help="Network snapshot")
@option("--outdir", metavar="DIR|ZIP|NPZ", type=str, required=True, help="Where to save: folder, .zip or .npz")
@option("--seeds", metavar="LIST", type=str, default="0-63", help="Random seeds (e.g. 1,2,5-10)")
@option("--subdirs", is_flag=True, help="Create a sub-folder for every 1000 seeds")
@option("--class", metavar="INT", type=click.IntRange(min=0), help="Class label  [default: random]")
@option("--batch", metavar="INT", type=AT_LEAST_ONE, default=64, help="Largest batch of a process")
@option("--steps", metavar="INT", type=AT_LEAST_ONE, default=18, help="Number of sampling steps")
@option("--sigma_min", metavar="FLOAT", type=POSITIVE, help="Lowest noise level  [default: varies]")
@option("--sigma_max", metavar="FLOAT", type=POSITIVE, help="Highest noise level  [default: varies]")
@option("--rho", metavar="FLOAT", type=POSITIVE, default=7.0, help="Time step exponent")
@option("--S_churn", "S_churn", metavar="FLOAT", type=NOT_NEGATIVE, default=0.0, help="Stochasticity strength")
@option("--S_min", "S_min", metavar="FLOAT", type=NOT_NEGATIVE, default=0.0, help="Stochasticity min noise level")
@option("--S_max", "S_max", metavar="FLOAT", type=NOT_NEGATIVE, default=math.inf, help="Stochasticity max noise level")
@option("--S_noise", "S_noise", metavar="FLOAT", type=float, default=1.0, help="Stochasticity noise inflation")
@option("--solver", type=click.Choice(["euler", "heun"]), help="Ablate the ODE solver")
@option("--disc", type=click.Choice(["vp", "ve", "iddpm", "edm"]), help="Ablate the time steps")
@option("--schedule", type=click.Choice(["vp", "ve", "linear"]), help="Ablate the noise schedule sigma(t)")
@option("--scaling", type=click.Choice(["vp", "none"]), help="Ablate the signal scaling s(t)")
@option("--network_2", metavar="PATH|URL", type=str, help="Second network of the affine score, of noisy labels (TDSM)")
@option("--affine_weight", metavar="FLOAT", type=NOT_NEGATIVE, default=0.0,
        help="Weight a of the affine score: (1 + a) network - a network_2")
@option("--save_each_sample", is_flag=True, help="No grid-*.png beside the images of a TDSM network")
# Beyond the published command line.
@option("--sampler", type=click.Choice(SAMPLERS), help="Sampler  [default: edm; ablation with any of the four above]")
@option("--classes", metavar="all|LIST", type=str, help="Every seed once per class, in OUTDIR/CLASS/")
@option("--guidance", metavar="FLOAT", type=NOT_NEGATIVE,
        help="Guidance scale w: guide + w (network - guide)  [default: 1, none]")
@option("--guide-network", metavar="PATH|URL", type=str,
        help="Guide of --guidance  [default: the network itself without class]")
@option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]),
        help="Arithmetic of the network  [default: bf16 on a GPU that has it, else fp32]")
@option("--strict", is_flag=True, help="The published arithmetic: fp32 and no fast path")
@option("--compile", is_flag=True, help="Compile the network: slow to start, then faster")
@option("--device", metavar="NAME", type=str, help="cpu, cuda, cuda:N or mps  [default: a GPU if there is one]")
@option("--overwrite", is_flag=True, help="Make images anew that are there already")
@option("--grid", metavar="PNG", type=str, help="Also write a contact sheet, one row per class")
def main(**given: Any) -> None:
    flags = SimpleNamespace(**given)
    flags.class_index = vars(flags).pop("class")
    flags.seeds = read_seeds(flags.seeds)
    check(flags)
    generate(flags)


def read_seeds(text: str) -> list[int]:
    """Read --seeds; warn about seeds that are given twice, raise UserError for none at all."""
    import warnings

    from EDM.training.config import parse_int_list

    try:
        seeds = parse_int_list(text)
    except ValueError:
        raise UserError(f"--seeds: {text!r} is not a list like 1,2,5-10") from None
    if not seeds:
        raise UserError(f"--seeds: {text!r} is empty; a range goes from the smaller to the larger number")
    if len(set(seeds)) < len(seeds):
        warnings.warn(f"--seeds: {len(seeds) - len(set(seeds))} seeds are given more than once; each makes one image",
                      stacklevel=1)
    return list(dict.fromkeys(seeds))


def check(flags: SimpleNamespace) -> None:
    """Settle the sampler; raise UserError for flags that contradict each other."""
    pieces = [name for name in ABLATION_FLAGS if getattr(flags, name) is not None]
    flags.sampler = flags.sampler or ("ablation" if pieces else "edm")
    if pieces and flags.sampler != "ablation":
        raise UserError(f"--{pieces[0]} belongs to the ablation sampler, not to --sampler={flags.sampler}")
    if flags.S_churn and flags.sampler not in ("edm", "ablation"):
        raise UserError(f"--S_churn needs --sampler=edm or ablation; {flags.sampler} is deterministic")
    if flags.classes is not None and flags.class_index is not None:
        raise UserError("--class and --classes cannot be specified at the same time")
    if flags.guide_network is not None and flags.guidance is None:
        raise UserError("--guide-network needs --guidance, for instance --guidance=2")
    if flags.network_2 == "None":  # the published default, in so many words
        flags.network_2 = None
    if flags.affine_weight and flags.network_2 is None:
        raise UserError("--affine_weight needs --network_2, a network trained on the noisy labels")
    if flags.affine_weight and flags.guidance is not None:
        raise UserError("--affine_weight and --guidance cannot be specified at the same time")
    if flags.strict and (flags.compile or flags.precision not in (None, "fp32")):
        raise UserError("--strict means fp32 and no compilation; leave out --precision and --compile")
    if flags.strict:
        flags.precision = "fp32"


def generate(flags: SimpleNamespace) -> None:
    """Make the images of checked flags, on all processes of the world."""
    from EDM.sampling import files
    from shared.data.pngs import PngWriter
    from shared.distributed import barrier, on_main, start, stop
    from shared.training.progress import Progress
    from shared.training.seeds import split_batches

    world = start(flags.device)
    sampler, settings = load(flags, world)
    outdir, label_dim = Path(flags.outdir), sampler.net.label_dim
    is_archive = outdir.suffix.lower() in files.ARCHIVES
    root = files.work_folder(outdir) if is_archive else outdir
    classes = chosen_classes(flags, label_dim)
    folders = {index: root if flags.classes is None else root / files.class_folder(index, label_dim)
               for index in classes}
    planned = {index: files.plan_samples(folder, flags.seeds, index, flags.subdirs)
               for index, folder in folders.items()}
    samples = [sample for members in planned.values() for sample in members]

    everything = {**settings, "classes": classes, "seeds": flags.seeds}

    def claim() -> bool:
        if is_archive and files.claim_archive(outdir, everything, flags.overwrite):
            return True
        for index, folder in folders.items():
            files.claim_folder(folder, {**settings, "class": index}, [s.path for s in planned[index]], flags.overwrite)
        return False

    if on_main(claim, world):
        if world.main:
            print(f"{outdir} is already complete.")
        return stop()
    if world.main:
        print(f"Generating {len(samples)} images to \"{outdir}\" ({flags.sampler} sampler, {flags.steps} steps, "
              f"{sampler.precision} on {world.device.type}, {world.size} process(es))...")

    batches = split_batches(samples, flags.batch, world.size)
    own, rows = batches[world.rank::world.size], sampler.batch_rows(batches)
    counter = Progress("generating", sum(map(len, own)), "img", shown=world.main)
    with PngWriter() as writer:
        for batch in own:
            missing = [not sample.path.exists() for sample in batch]
            if any(missing):  # made as a whole, so that a repeated command computes the very same batch
                images = sampler.images([s.seed for s in batch], [s.class_index for s in batch], rows).cpu().numpy()
                writer.save((s.path, image) for s, image, new in zip(batch, images, missing, strict=True) if new)
            counter.advance(len(batch))
    counter.close()
    barrier(world)
    if world.main:
        labels = None
        if is_archive or flags.grid:
            labels = sampler.classes([s.seed for s in samples]) if classes == [None] else \
                [s.class_index for s in samples]
        if flags.grid:
            files.write_grid(Path(flags.grid), samples, labels)
        if sheet := published_sheet(flags, sampler, samples, is_archive):
            files.write_sheet(root / sheet, samples)
        if is_archive:
            files.pack(outdir, samples, labels, label_dim, everything)
        print("Done.")
    return stop()


def load(flags: SimpleNamespace, world: World) -> tuple[SeedSampler, dict[str, Any]]:
    """Load the networks; return the sampler of the flags and the settings that a folder of images records."""
    from EDM.sampling.sampling import STOCHASTIC, SeedSampler
    from EDM.training.snapshots import digest, load_network
    from shared.distributed import on_main

    def network(path: str) -> torch.nn.Module:
        if world.main:
            print(f"Loading network from \"{path}\"...")
        own = []  # the main process goes first: it fetches a URL, and it alone reports a file that is no snapshot
        on_main(lambda: own.append(load_network(path, world.device)), world)
        return own[0] if own else load_network(path, world.device)

    net = network(flags.network)
    guide = network(flags.guide_network) if flags.guide_network else None
    second = network(flags.network_2) if flags.affine_weight else None  # without weight it would change nothing
    if net.img_channels not in (1, 3):
        raise UserError(f"{flags.network} makes images of {net.img_channels} channels; a PNG holds 1 or 3")

    arguments: dict[str, Any] = dict(num_steps=flags.steps, rho=flags.rho)
    if flags.sampler in STOCHASTIC:
        arguments.update({name: getattr(flags, name) for name in CHURN_FLAGS})
    varying = {"sigma_min": "sigma_min", "sigma_max": "sigma_max", **ABLATION_FLAGS}
    arguments.update({argument: value for name, argument in varying.items()
                      if (value := getattr(flags, name)) is not None})
    guidance = 1.0 if flags.guidance is None else flags.guidance
    sampler = SeedSampler(net, sampler=flags.sampler, guide=guide, guidance=guidance, second=second,
                          affine_weight=flags.affine_weight, precision=flags.precision, fast=not flags.strict,
                          compile=flags.compile, **arguments)
    settings = dict(network=digest(flags.network), guide_network=digest(flags.guide_network) if guide else None,
                    guidance=guidance, sampler=flags.sampler,
                    **{name: "inf" if value == math.inf else value for name, value in arguments.items()},
                    precision=sampler.precision, device=world.device.type)
    if second is not None:
        settings.update(network_2=digest(flags.network_2), affine_weight=flags.affine_weight)
    return sampler, settings


def published_sheet(flags: SimpleNamespace, sampler: SeedSampler, samples: list, is_archive: bool) -> str | None:
    """Return the name of the square sheet that goes beside the images of a TDSM network; None where none does.

    As published it holds a single batch; unlike there, the images are also written one by one.
    """
    label_noise = flags.network_2 is not None or "noise_type" in sampler.loss_kwargs
    if not label_noise or flags.save_each_sample or flags.classes or is_archive or len(samples) > flags.batch:
        return None
    return f"grid-{flags.class_index}-{samples[0].seed:06d}-{samples[-1].seed:06d}.png"


def chosen_classes(flags: SimpleNamespace, label_dim: int) -> list[int | None]:
    """Return the classes to generate; [None] where each seed draws its own. Raises UserError for those not there."""
    from EDM.training.config import parse_int_list

    name = "class" if flags.classes is None else "classes"
    if flags.class_index is None and flags.classes is None:
        return [None]
    if not label_dim:
        raise UserError(f"--{name} was given, but {flags.network} is not class-conditional")
    try:
        classes = list(range(label_dim)) if flags.classes == "all" else \
            [flags.class_index] if flags.classes is None else list(dict.fromkeys(parse_int_list(flags.classes)))
    except ValueError:
        raise UserError(f"--classes: {flags.classes!r} is neither all nor a list like 0,2,5-9") from None
    wrong = [index for index in classes if not 0 <= index < label_dim]
    if wrong or not classes:
        raise UserError(f"--{name}={wrong[0] if wrong else flags.classes}: {flags.network} has the classes 0 to "
                        f"{label_dim - 1}")
    return classes


if __name__ == "__main__":
    run_main(main)
