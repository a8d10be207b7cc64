"""Fréchet Inception distance and its relatives, of images or straight from a network snapshot.

    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=fid-refs/cifar10-32x32.npz
    python fid.py calc --images=out --ref=fid-refs/cifar10-32x32.npz
    torchrun --standalone --nproc_per_node=4 fid.py calc --network=network-snapshot-200000.pkl --seeds=0-49999 --ref=...
"""
from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from EDM import generate
from EDM.metrics import metrics
from EDM.metrics.detectors import Detector, load_detector
from EDM.metrics.extraction import Extraction, extract
from EDM.metrics.frechet import frechet_distance
from EDM.metrics.metrics import check_neighbours, check_subset_size
from EDM.metrics.reference import Reference, from_extraction, read_reference, write_reference
from EDM.metrics.sources import FileImages, GeneratedImages
from shared.cli import Flag, Int, Option, UserError, nearest, parse, run_main
from shared.distributed import World, start, stop
from shared.training.files import atomic, make_dir

METRICS = {
    "fid": "Fréchet distance",
    "kid": "kernel distance over subsets",
    "prdc": "precision, recall, density, coverage",
    "isc": "inception score over splits",
    "cwfid": "mean Fréchet distance of the classes",
}
SETTINGS = ("kid_subsets", "kid_subset_size", "pr_k", "dc_k", "isc_splits")
NEED_FEATURES = {"kid", "prdc", "cwfid"}

COUNT = Int(1)
FEATURES = (
    generate.BATCH,
    Option("--detector", default="inception", metavar="inception|dinov2|FILE", help="network of the features: "
           "Inception or DINOv2 weights from assets/, or a file of either, or a TorchSSL checkpoint"),
    Option("--download", Flag, False, "fetch Inception's weights if they are not there"),
    generate.DEVICE,
)
CALC_FLAGS = {
    "what is scored": (
        Option("--images", metavar="PATH|ZIP|NPZ", help="images to score"),
        Option("--network", metavar="PATH|URL", help="snapshot to make the images with, instead of --images"),
        Option("--seeds", generate.SEEDS, None, "seeds of --network", default_help="0 to num - 1"),
        Option("--ref", required=True, metavar="NPZ|URL|PATH",
               help="statistics made by `ref`, or a folder or ZIP of images"),
        Option("--num --num-images", Int(2, 10_000_000), 50000, "number of images to score (torchrun takes --num for "
               "an abbreviation of its own, but not --num-images)"),
        Option("--seed", Int(0), 0, "seed of the choice among more images than --num"),
    ),
    "metrics": (
        Option("--metrics", default="fid", metavar="LIST",
               help="comma-separated: " + ", ".join(f"{name} ({text})" for name, text in METRICS.items())),
        Option("--kid-subsets", COUNT, 100, "subsets of the kernel distance"),
        Option("--kid-subset-size", Int(2), 1000, "images of each"),
        Option("--pr-k", COUNT, 3, "neighbours of precision and recall"),
        Option("--dc-k", COUNT, 5, "neighbours of density and coverage"),
        Option("--isc-splits", COUNT, 10, "splits of the inception score"),
        Option("--json", metavar="FILE", help="also write the values and all they depend on", key="json_file"),
    ),
    "features": FEATURES,
    "sampling, with --network": generate.SAMPLING,
}
REF_FLAGS = (
    Option("--data", required=True, metavar="PATH|ZIP|NPZ", help="reference images"),
    Option("--dest", required=True, metavar="NPZ", help="where to write the statistics"),
    Option("--features", Flag, False, "also keep every feature and class: for kid, prdc and cwfid"),
    *FEATURES,
)


def main(argv: Sequence[str] | None = None) -> None:
    command, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "calc":
        flags = parse("Score images against a reference.", CALC_FLAGS, words)
        flags.metrics = read_metrics(flags.metrics)
        check(flags)
        score(flags)
    elif command == "ref":
        make_reference(parse("Compute the statistics of reference images.", REF_FLAGS, words))
    elif command in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nfid.py calc --help and fid.py ref --help list the flags of either.")
    else:
        raise UserError(f"{command}: expected calc or ref; see --help")


def read_metrics(text: str) -> list[str]:
    """Return the names in a comma-separated list; UserError for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.lower().split(",")))
    for name in names:
        if name not in METRICS:
            raise UserError(f'--metrics: unknown metric "{name}"{nearest(name, METRICS)}; known: {", ".join(METRICS)}')
    return names


def check(flags: SimpleNamespace) -> None:
    """Settle where the images come from; raise UserError for flags that contradict each other."""
    if (flags.images is None) == (flags.network is None):
        raise UserError("give either --images or --network")
    if flags.images is not None:
        foreign = [name for name, key in (("--seeds", "seeds"), *((o.name, o.key) for o in generate.SAMPLING))
                   if key in flags.given]
        if foreign:
            raise UserError(f"{foreign[0]} says how --network makes images; those of --images are there already")
        return
    if "seed" in flags.given:
        raise UserError("--seed chooses among --images; give the seeds of --network with --seeds")
    if flags.seeds is not None and "num" in flags.given:
        raise UserError("--num and --seeds cannot be specified at the same time")
    flags.seeds = list(range(flags.num)) if flags.seeds is None else generate.distinct(flags.seeds)
    generate.check(flags)


def score(flags: SimpleNamespace) -> None:
    """Compute and print the metrics of checked flags, on all processes of the world."""
    world = start(flags.device)
    full_precision()
    detector = load_detector(flags.detector, world.device, flags.download, world)
    reference = open_reference(flags, detector, world)
    images = open_images(flags, detector, world)
    if world.main:
        check_possible(flags, detector, images, reference)
        print(f"Calculating statistics for {len(images)} images...", flush=True)
    extraction = extract(images, detector, flags.batch, world, keep_features=bool(NEED_FEATURES & set(flags.metrics)),
                         keep_logits="isc" in flags.metrics)
    stop()
    if world.main:
        values = compute(flags, extraction, reference, detector)
        report(flags, values, about(flags, images, reference, detector, world))


def open_reference(flags: SimpleNamespace, detector: Detector, world: World) -> Reference | None:
    """Read the statistics of --ref (rank 0 alone), or compute them where it names images."""
    if Path(flags.ref).is_dir() or flags.ref.lower().endswith(".zip"):
        features = bool(NEED_FEATURES & set(flags.metrics))
        source = FileImages(flags.ref, detector.channels, labelled="cwfid" in flags.metrics)
        return from_extraction(extract(source, detector, flags.batch, world, keep_features=features), flags.ref)
    if not world.main:
        return None
    print(f"Loading dataset reference statistics from \"{flags.ref}\"...", flush=True)
    return read_reference(flags.ref, detector)


def open_images(flags: SimpleNamespace, detector: Detector, world: World) -> FileImages | GeneratedImages:
    """Return the source of the images to score."""
    if flags.network is not None:
        return GeneratedImages(flags, world, detector.channels)
    return FileImages(flags.images, detector.channels, flags.num, flags.seed, labelled="cwfid" in flags.metrics)


def check_possible(flags: SimpleNamespace, detector: Detector, images: FileImages | GeneratedImages,
                   reference: Reference) -> None:
    """Raise UserError now, not after hours of sampling, where a metric lacks what it needs."""
    asked = set(flags.metrics)
    if len(images) < 2:
        raise UserError(f"Found {len(images)} images, but need at least 2 to compute statistics")
    if "isc" in asked and not detector.num_logits:
        raise UserError(f"--metrics: isc needs the classes of a classifier, which {detector.name} is not")
    if NEED_FEATURES & asked and reference.features is None:
        first = min(NEED_FEATURES & asked)
        raise UserError(f"--metrics: {first} needs every feature of the reference; {flags.ref} has "
                        "none: make it with `fid.py ref --features`, or give a folder or ZIP of images as --ref")
    if "kid" in asked:
        check_subset_size(flags.kid_subset_size, len(images), len(reference.features))
    if "prdc" in asked:
        check_neighbours(flags.pr_k, flags.dc_k, len(images), len(reference.features))
    if "cwfid" in asked:
        for source, unknown in ((flags.images or flags.network, not images.all_labelled),
                                (flags.ref, bool((reference.labels < 0).any()))):
            if unknown:
                raise UserError(f"--metrics: cwfid needs the class of every image, which {source} does not give "
                                "(expected dataset.json, class folders, or a class-conditional network)")


def compute(flags: SimpleNamespace, extraction: Extraction, reference: Reference, detector: Detector) -> dict[str, Any]:
    """Return the values by name, in the order of --metrics."""
    values: dict[str, Any] = {}
    device = extraction.moments.sums.device
    distance = distance_name(detector)
    if NEED_FEATURES & set(flags.metrics):
        generated, real = extraction.features.to(device), reference.features.to(device)
    for name in flags.metrics:
        if name == "fid":
            mu, sigma = extraction.moments.mean_and_covariance()
            values[distance] = frechet_distance(mu, sigma, reference.mu.to(device), reference.sigma.to(device))
        elif name == "kid":
            values["kid"], values["kid_std"] = metrics.kernel_distance(generated, real, flags.kid_subsets,
                                                                       flags.kid_subset_size)
        elif name == "prdc":
            values |= vars(metrics.manifold_metrics(generated, real, flags.pr_k, flags.dc_k))
        elif name == "isc":
            values["isc"], values["isc_std"] = metrics.inception_score(extraction.logits, flags.isc_splits)
        elif name == "cwfid":
            each = metrics.classwise_frechet_distance(generated, extraction.labels.to(device), real,
                                                      reference.labels.to(device))
            values[f"class_wise_{distance}"] = each.mean().item()
            values[f"class_wise_{distance}_by_class"] = each.tolist()
    return values


def distance_name(detector: Detector) -> str:
    """Return "fid" for Inception's features and what says otherwise for others."""
    return "fid" if detector.kind == "inception" else f"fd_{detector.kind}"


def about(flags: SimpleNamespace, images: FileImages | GeneratedImages, reference: Reference, detector: Detector,
          world: World) -> dict[str, Any]:
    """Return all that the values depend on."""
    if flags.network is not None:
        source = {"network": flags.network, "images": len(images), "seeds": images.seeds,
                  "sampling": {**images.settings, "class": flags.class_index, "classes": flags.classes}}
    else:
        source = {"path": flags.images, "images": len(images), "of": images.total, "choice_seed": flags.seed,
                  "seeds": images.seeds, "sampling": images.settings}
    return {
        "reference": {"path": flags.ref, "images": reference.count},
        "source": source,
        "detector": {"kind": detector.kind, "name": detector.name, "file": detector.file, "sha256": detector.sha256,
                     "resize": detector.resize, "precision": "fp32", "device": world.device.type},
        "settings": {name: getattr(flags, name) for name in SETTINGS},
    }


def report(flags: SimpleNamespace, values: dict[str, Any], facts: dict[str, Any]) -> None:
    """Print the values and what they depend on; a distance asked for alone ends the output as a bare number."""
    source, detector, count = facts["source"], facts["detector"], facts["reference"]["images"]
    print(f"reference: {flags.ref}, {'an unknown number of' if count is None else count} images")
    print(f"images: {flags.images or flags.network}, {source['images']} images, "
          f"{'seeds ' + source['seeds'] if source['seeds'] else 'seeds unknown'}")
    print(f"detector: {detector['name']}, SHA-256 {detector['sha256']}, resize {detector['resize']}")
    numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
    if flags.json_file:
        make_dir(Path(flags.json_file).absolute().parent)
        with atomic(flags.json_file, "w") as file:
            file.write(json.dumps({**values, **facts}, indent=2) + "\n")
    for name, value in numbers.items():
        print(f"{value:g}" if list(numbers) == ["fid"] else f"{name} {value:g}", flush=True)


def make_reference(flags: SimpleNamespace) -> None:
    """Write the statistics of checked flags, on all processes of the world."""
    world = start(flags.device)
    full_precision()
    if os.path.isdir(flags.dest):
        raise UserError(f"--dest: {flags.dest} is a folder; expected the name of an .npz file")
    make_dir(Path(flags.dest).absolute().parent)
    detector = load_detector(flags.detector, world.device, flags.download, world)
    source = FileImages(flags.data, detector.channels, labelled=flags.features)
    if len(source) < 2:
        raise UserError(f"{flags.data}: Found {len(source)} image, but need at least 2 to compute statistics")
    extraction = extract(source, detector, flags.batch, world, keep_features=flags.features)
    stop()
    if world.main:
        write_reference(flags.dest, from_extraction(extraction, flags.data), detector)
        print(f"Saved the statistics of {len(source)} images to \"{flags.dest}\" ({detector.name}, SHA-256 "
              f"{detector.sha256}, resize {detector.resize})")


def full_precision() -> None:
    """Compute features in fp32 proper: tensor cores' TF32 moves distances in the third digit."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


if __name__ == "__main__":
    run_main(main)
