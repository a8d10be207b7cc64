"""Generate images with a diffusion model of EDM: one image per seed.

    python generate.py --outdir=out --seeds=0-63 --batch=64 --network=network-snapshot-200000.pkl
    torchrun --standalone --nproc_per_node=4 generate.py --outdir=out --seeds=0-49999 --subdirs --network=...

The same command again makes only the missing images.
"""
from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from EDM.sampling import files
from EDM.sampling.seeds import ABLATION_FLAGS, SAMPLERS, SeedSampler, chosen_classes, load_sampler
from shared.cli import Choice, Flag, Float, Int, IntList, Option, UserError, less_memory, parse, run_main
from shared.data.images import ImageSet
from shared.data.writers import PngWriter
from shared.distributed import barrier, on_main, start, stop
from shared.training.files import check_writable, taken
from shared.training.progress import Progress
from shared.training.randomness import split_batches

COUNT, POSITIVE, NOT_NEGATIVE, SEEDS = Int(1), Float(0, open=True), Float(0), IntList()

# How images are made from a snapshot.
SAMPLING = (
    Option("--class", Int(0), None, "class label", default_help="random, as often as in training", key="class_index"),
    Option("--classes", metavar="all|LIST", help="every seed once per class, in OUTDIR/CLASS/"),
    Option("--steps", COUNT, 18, "number of sampling steps"),
    Option("--sigma_min", POSITIVE, None, "lowest noise level", default_help="varies"),
    Option("--sigma_max", POSITIVE, None, "highest noise level", default_help="varies"),
    Option("--rho", POSITIVE, 7.0, "time step exponent"),
    Option("--S_churn", NOT_NEGATIVE, 0.0, "stochasticity strength"),
    Option("--S_min", NOT_NEGATIVE, 0.0, "stochasticity min noise level"),
    Option("--S_max", Float(0, non_finite=True), math.inf, "stochasticity max noise level"),
    Option("--S_noise", Float(), 1.0, "stochasticity noise inflation"),
    Option("--solver", Choice("euler", "heun"), None, "ablate the ODE solver"),
    Option("--disc", Choice("vp", "ve", "iddpm", "edm"), None, "ablate the time steps"),
    Option("--schedule", Choice("vp", "ve", "linear"), None, "ablate the noise schedule sigma(t)"),
    Option("--scaling", Choice("vp", "none"), None, "ablate the signal scaling s(t)"),
    Option("--network_2", metavar="PATH|URL", help="second network of the affine score, of noisy labels (TDSM)"),
    Option("--affine_weight", NOT_NEGATIVE, 0.0, "weight a of the affine score: (1 + a) network - a network_2"),
    # Beyond the published command line.
    Option("--sampler", Choice(*SAMPLERS), None, "sampler", default_help="edm; ablation with any of the four above"),
    Option("--guidance", NOT_NEGATIVE, None, "guidance scale w: guide + w (network - guide)", default_help="1, none"),
    Option("--guide-network", metavar="PATH|URL", help="guide of --guidance",
           default_help="the network itself without class"),
    Option("--precision", Choice("fp32", "bf16", "fp16"), None, "arithmetic of the network",
           default_help="bf16 on a GPU that has it, else fp32"),
    Option("--strict", Flag, False, "the published arithmetic: fp32 and no fast path"),
    Option("--compile", Flag, False, "compile the network: slow to start, then faster"),
)
BATCH = Option("--batch", COUNT, 64, "largest batch of a process", unit="images")
DEVICE = Option("--device", metavar="NAME", help="cpu, cuda or cuda:N", default_help="a GPU if available")
FLAGS = {
    "main options": (
        Option("--network", required=True, metavar="PATH|URL", help="network snapshot"),
        Option("--outdir", required=True, metavar="DIR|ZIP|NPZ", help="where to save: folder, .zip or .npz"),
        Option("--seeds", SEEDS, list(range(64)), "random seeds (e.g. 1,2,5-10)", default_help="0-63"),
        Option("--subdirs", Flag, False, "create a sub-folder for every 1000 seeds"),
        BATCH,
        Option("--save_each_sample", Flag, False, "no grid-*.png beside the images of a TDSM network"),
        DEVICE,
        Option("--overwrite", Flag, False, "replace existing images"),
        Option("--grid", metavar="PNG", help="also write a contact sheet, one row per class"),
    ),
    "sampling": SAMPLING,
}


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(__doc__, FLAGS, argv)
    flags.seeds = distinct(flags.seeds)
    check(flags)
    if flags.grid is not None:
        check_writable(flags.grid, "--grid")
    generate(flags)


def distinct(seeds: list[int]) -> list[int]:
    """Return each of --seeds once; warn about repeated ones."""
    if len(set(seeds)) < len(seeds):
        warnings.warn(f"--seeds: {len(seeds) - len(set(seeds))} seeds are given more than once; each makes one image",
                      stacklevel=1)
    return list(dict.fromkeys(seeds))


def check(flags: SimpleNamespace) -> None:
    """Set the sampler; raise UserError for contradicting flags."""
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
    if flags.network_2 == "None":  # the published default
        flags.network_2 = None
    if flags.affine_weight and flags.network_2 is None:
        raise UserError("--affine_weight needs --network_2, a network trained on the noisy labels")
    if flags.affine_weight and flags.guidance is not None:
        raise UserError("--affine_weight and --guidance cannot be specified at the same time")
    if flags.strict and (flags.compile or flags.precision not in (None, "fp32")):
        raise UserError("--strict means fp32 and no compilation; leave out --precision and --compile")
    if flags.strict:
        flags.precision = "fp32"


def foresee(flags: SimpleNamespace, images: ImageSet, processes: int) -> int:
    """Return the bytes of generated images like `images`, one of every class a seed; UserError for contradicting
    flags and missing networks."""
    check(flags)
    for name, path in (("--guide-network", flags.guide_network), ("--network_2", flags.network_2)):
        if path is not None and "://" not in path and not os.path.isfile(path):
            raise UserError(f"{name}: no such file: {path}")
    return len(flags.seeds) * max(1, images.num_classes) * images.images[0].nbytes // 2  # as PNGs are compressed


@less_memory("--batch")
def generate(flags: SimpleNamespace) -> None:
    """Make the images of checked flags, on all processes of the world."""
    with ExitStack() as held:
        make_images(flags, held)


def make_images(flags: SimpleNamespace, held: ExitStack) -> None:
    """See `generate`. held: keeps the lock of the folder."""
    world = start(flags.device)
    sampler, settings = load_sampler(flags, world)
    outdir, label_dim = Path(flags.outdir), sampler.net.label_dim
    is_archive = outdir.suffix.lower() in files.ARCHIVES
    root = files.work_folder(outdir) if is_archive else outdir
    classes = chosen_classes(flags, label_dim, sampler.trained)
    folders = {index: root if flags.classes is None else root / files.class_folder(index, label_dim)
               for index in classes}
    planned = {index: files.plan_samples(folder, flags.seeds, index, flags.subdirs)
               for index, folder in folders.items()}
    samples = [sample for members in planned.values() for sample in members]

    everything = {**settings, "classes": classes, "seeds": flags.seeds}
    sheet = published_sheet(flags, sampler, samples, is_archive)
    pictures = [Path(flags.grid)] if flags.grid else []
    pictures += [root / sheet] if sheet else []

    def prepare() -> bool:
        """Prepare the folders; return whether all images exist."""
        if is_archive and files.is_complete(outdir, everything, flags.overwrite):
            return True
        held.enter_context(taken(root))
        for index, folder in folders.items():
            images = [sample.path for sample in planned[index]]
            files.prepare_folder(folder, {**settings, "class": index}, images, flags.overwrite)
        return not is_archive and all(path.exists() for path in [*pictures, *(s.path for s in samples)])

    if on_main(prepare, world):
        if world.main:
            print(f"complete: {outdir}")
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
            if any(missing):  # made as a whole: a repeated command computes the same batch
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
        if sheet:
            files.write_sheet(root / sheet, samples)
        if is_archive:
            files.pack(outdir, samples, labels, sampler.trained, everything)
        print("Done.")
    return stop()


def published_sheet(flags: SimpleNamespace, sampler: SeedSampler, samples: list, is_archive: bool) -> str | None:
    """Return the name of the square sheet that goes beside the images of a TDSM network; None if there is none.

    As published it holds a single batch; unlike there, the images are also written one by one.
    """
    label_noise = flags.network_2 is not None or "noise_type" in sampler.loss_kwargs
    if not label_noise or flags.save_each_sample or flags.classes or is_archive or len(samples) > flags.batch:
        return None
    return f"grid-{flags.class_index}-{samples[0].seed:06d}-{samples[-1].seed:06d}.png"


if __name__ == "__main__":
    run_main(main)
