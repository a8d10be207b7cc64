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

    from EDM.sample_files import Sample
    from EDM.samplers import Model
    from shared.distributed import World

SAMPLERS = ("edm", "ablation", "dpmpp-2m", "deis-2", "deis-3")
STOCHASTIC = ("edm", "ablation")
ABLATION_FLAGS = {"solver": "solver", "disc": "discretization", "schedule": "schedule", "scaling": "scaling"}
CHURN_FLAGS = ("S_churn", "S_min", "S_max", "S_noise")

# On a CPU, results differ in the last bit between batches of a few images (other matrix kernels) but not from here on,
# so smaller batches are filled up. Then an image is the same bytes whatever the batch and the number of processes.
SMALLEST_CPU_BATCH = 16


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

    from EDM.options import parse_int_list

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
    if flags.S_churn and flags.sampler not in STOCHASTIC:
        raise UserError(f"--S_churn needs --sampler={' or '.join(STOCHASTIC)}; {flags.sampler} is deterministic")
    if flags.classes is not None and flags.class_index is not None:
        raise UserError("--class and --classes cannot be specified at the same time")
    if flags.guide_network is not None and flags.guidance is None:
        raise UserError("--guide-network needs --guidance, for instance --guidance=2")
    if flags.strict and (flags.compile or flags.precision not in (None, "fp32")):
        raise UserError("--strict means fp32 and no compilation; leave out --precision and --compile")
    if flags.strict:
        flags.precision = "fp32"


def generate(flags: SimpleNamespace) -> None:
    """Make the images of checked flags, on all processes of the world."""
    from EDM.sample_files import (
        ARCHIVES,
        PngWriter,
        claim_archive,
        claim_folder,
        class_folder,
        pack,
        plan_samples,
        work_folder,
        write_grid,
    )
    from EDM.seeds import split_batches
    from shared.distributed import barrier, start, stop
    from shared.progress import Progress

    world = start(flags.device)
    setup = load(flags, world)
    outdir, archive = Path(flags.outdir), Path(flags.outdir).suffix.lower() in ARCHIVES
    folder = work_folder(outdir) if archive else outdir
    classes = chosen_classes(flags, setup.net.label_dim)
    if flags.classes is None:
        groups = [(folder, classes[0])]
    else:
        groups = [(folder / class_folder(index, setup.net.label_dim), index) for index in classes]
    planned = {place: plan_samples(place, flags.seeds, index, flags.subdirs) for place, index in groups}
    samples = [sample for members in planned.values() for sample in members]

    whole = {**setup.settings, "classes": classes, "seeds": flags.seeds}
    if world.main:
        complete = archive and claim_archive(outdir, whole, flags.overwrite)
        for place, index in [] if complete else groups:
            claim_folder(place, {**setup.settings, "class": index}, [sample.path for sample in planned[place]],
                         flags.overwrite)
        print(f"Generating {len(samples)} images to \"{outdir}\" ({setup.description}, {world.size} process(es))...")
    barrier(world)
    if archive and outdir.exists():
        if world.main:
            print(f"{outdir} is already complete.")
        return stop()

    batches = split_batches(samples, flags.batch, world.size)
    rows = max(map(len, batches))
    if world.device.type == "cpu" and len(samples) > 1:
        rows = max(rows, SMALLEST_CPU_BATCH)
    own = batches[world.rank::world.size]
    counter = Progress("generating", sum(map(len, own)), "img", shown=world.main)
    with PngWriter() as writer:
        for batch in own:
            missing = [not sample.path.exists() for sample in batch]
            if any(missing):  # made as a whole, so that a repeated command computes the very same batch
                pixels = sample_batch(setup, batch, rows)
                writer.save((s.path, image) for s, image, new in zip(batch, pixels, missing, strict=True) if new)
            counter.advance(len(batch))
    counter.close()
    barrier(world)
    if world.main and (archive or flags.grid):
        labels = labels_of(setup, samples)
        if flags.grid:
            write_grid(Path(flags.grid), samples, labels)
        if archive:
            pack(outdir, samples, labels, setup.net.label_dim, whole)
    if world.main:
        print("Done.")
    return stop()


def load(flags: SimpleNamespace, world: World) -> SimpleNamespace:
    """Load the networks; return them with the arithmetic, the sampler's arguments and the settings to record."""
    from EDM.snapshots import digest, load_network
    from shared.distributed import barrier

    def network(path: str) -> torch.nn.Module:
        if world.main:
            print(f"Loading network from \"{path}\"...")
        if not world.main:
            barrier(world)  # the main process fetches it first
        net = load_network(path, world.device)
        if world.main:
            barrier(world)
        return net

    net = network(flags.network)
    guide = network(flags.guide_network) if flags.guide_network else net
    guidance = 1.0 if flags.guidance is None else flags.guidance
    if net.img_channels not in (1, 3):
        raise UserError(f"{flags.network} makes images of {net.img_channels} channels; a PNG holds 1 or 3")
    if guidance != 1 and guide is net and not net.label_dim:
        raise UserError("--guidance without --guide-network needs a class-conditional network")
    if (guide.img_channels, guide.img_resolution) != (net.img_channels, net.img_resolution) \
            or guide.label_dim not in (0, net.label_dim):
        raise UserError(f"{flags.guide_network} does not fit {flags.network}: other image size, channels or classes")

    arguments: dict[str, Any] = dict(num_steps=flags.steps, rho=flags.rho)
    arguments.update({name: value for name in ("sigma_min", "sigma_max") if (value := getattr(flags, name)) is not None})
    if flags.sampler in STOCHASTIC:
        arguments.update({name: getattr(flags, name) for name in CHURN_FLAGS})
    arguments.update({argument: value for name, argument in ABLATION_FLAGS.items()
                      if (value := getattr(flags, name)) is not None})

    precision = precision_of(net, flags.precision, world.device)
    settings = dict(network=digest(flags.network), sampler=flags.sampler,
                    **{name: "inf" if value == math.inf else value for name, value in arguments.items()},
                    guidance=guidance, guide_network=digest(flags.guide_network) if flags.guide_network else None,
                    precision=precision, device=world.device.type)
    return SimpleNamespace(
        net=net, guide=guide, guidance=guidance, precision=precision, device=world.device, sampler=flags.sampler,
        arguments=arguments, fast=not flags.strict, compile=flags.compile, settings=settings, models={},
        description=f"{flags.sampler} sampler, {flags.steps} steps, {precision} on {world.device.type}")


def precision_of(net: torch.nn.Module, asked: str | None, device: torch.device) -> str:
    """Return fp32, bf16 or fp16: what was asked for, what the snapshot says, or the fastest that is safe."""
    import torch

    if asked is not None:
        return asked
    if device.type == "cuda" and net.use_fp16:
        return "fp16"
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def chosen_classes(flags: SimpleNamespace, label_dim: int) -> list[int | None]:
    """Return the classes to generate; [None] where each seed draws its own. Raises UserError for those not there."""
    from EDM.options import parse_int_list

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


def sample_batch(setup: SimpleNamespace, batch: list[Sample], rows: int) -> Any:
    """Sample one image per entry of `batch`; return them as uint8 [len(batch), C, R, R] on the host.

    The network always sees `rows` images. Raises UserError when a result is not finite.
    """
    import torch

    from EDM import samplers
    from EDM.seeds import SeedGenerators

    net, device = setup.net, setup.device
    generators = SeedGenerators([sample.seed for sample in batch], device)
    state_dtype = torch.float32 if device.type == "mps" else torch.float64

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])

    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    latents = filled(generators.normal(shape))
    labels = None
    if net.label_dim:
        drawn = generators.integers(net.label_dim).tolist()  # drawn even where the class is given, as published
        chosen = [index if sample.class_index is None else sample.class_index
                  for sample, index in zip(batch, drawn, strict=True)]
        labels = filled(torch.eye(net.label_dim, device=device)[chosen])

    sampler = {"edm": samplers.edm_sampler, "ablation": samplers.ablation_sampler,
               "dpmpp-2m": samplers.dpm_solver_pp_2m, "deis-2": samplers.deis_sampler,
               "deis-3": samplers.deis_sampler}[setup.sampler]
    arguments = dict(setup.arguments)
    if setup.sampler in STOCHASTIC:
        arguments["noise"] = lambda step: filled(generators.normal(shape, state_dtype))
    elif setup.sampler.startswith("deis"):
        arguments["order"] = int(setup.sampler[-1])
    with torch.inference_mode():
        images = sampler(model_of(setup, labels), latents, limits=(net.sigma_min, net.sigma_max),
                         round_sigma=lambda sigmas: net.round_sigma(sigmas.to(device, state_dtype)).cpu().double(),
                         dtype=state_dtype, **arguments)[:len(batch)]
        if not torch.isfinite(images).all():
            bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero()[0].item()
            raise UserError(f"the image of seed {batch[bad].seed} is not finite; try --precision=fp32, other sampler "
                            "settings or another snapshot")
        return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu().numpy()  # truncated, as published


def model_of(setup: SimpleNamespace, labels: torch.Tensor | None) -> Model:
    """Return the denoiser for these labels, with guidance and in the arithmetic of the setup."""
    import torch

    from EDM.samplers import denoiser, guided

    def prepared(net: torch.nn.Module) -> torch.nn.Module:
        if net not in setup.models:
            net.use_fp16 = setup.precision == "fp16" and setup.device.type == "cuda"
            if setup.precision == "fp32":
                torch.backends.cudnn.allow_tf32 = False
            fast = net.to(memory_format=torch.channels_last) if setup.fast else net
            setup.models[net] = torch.compile(fast) if setup.compile else fast
        return setup.models[net]

    model = denoiser(prepared(setup.net), labels)
    if setup.guidance != 1:
        guide_labels = labels if setup.guide is not setup.net and setup.guide.label_dim else None
        model = guided(model, denoiser(prepared(setup.guide), guide_labels), setup.guidance)
    if setup.precision != "bf16" and not (setup.precision == "fp16" and setup.device.type != "cuda"):
        return model

    def autocast(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        with torch.autocast(setup.device.type, torch.bfloat16 if setup.precision == "bf16" else torch.float16):
            return model(x, sigma)

    return autocast


def labels_of(setup: SimpleNamespace, samples: list[Sample]) -> list[int]:
    """Return the class of each sample as it was given or drawn, -1 for an unconditional network."""
    from EDM.seeds import SeedGenerators

    net, labels = setup.net, []
    for sample in samples:
        if sample.class_index is not None or not net.label_dim:
            labels.append(-1 if sample.class_index is None else sample.class_index)
        else:
            generators = SeedGenerators([sample.seed], setup.device)
            generators.normal((net.img_channels, net.img_resolution, net.img_resolution))
            labels.append(generators.integers(net.label_dim).item())
    return labels


if __name__ == "__main__":
    run_main(main)
