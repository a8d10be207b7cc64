"""Fréchet Inception distance and its relatives, of images or straight from a network snapshot.

    python fid.py ref --data=datasets/cifar10-32x32.zip --dest=fid-refs/cifar10-32x32.npz
    python fid.py calc --images=out --ref=fid-refs/cifar10-32x32.npz
    torchrun --standalone --nproc_per_node=4 fid.py calc --network=network-snapshot-200000.pkl --seeds=0-49999 --ref=...
"""
from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from EDM import generate
from EDM.metrics.detectors import Detector, load_detector
from EDM.metrics.features import (
    NEED_FEATURES,
    MetricNames,
    Reference,
    extract,
    from_extraction,
    full_precision,
    read_reference,
    score,
    write_reference,
)
from EDM.metrics.metrics import check_neighbours, check_subset_size
from EDM.metrics.sources import FileImages, GeneratedImages
from EDM.training.published import local_file
from shared.cli import Flag, Int, Option, UserError, less_memory, parse, run_main
from shared.distributed import World, on_main, start, stop
from shared.training.files import check_writable, make_dir, write_json
from shared.training.record import Record

METRICS = MetricNames({
    "fid": "Fréchet distance",
    "kid": "kernel distance over subsets",
    "prdc": "precision, recall, density, coverage",
    "isc": "inception score over splits",
    "cwfid": "mean Fréchet distance of the classes",
})
SETTINGS = ("kid_subsets", "kid_subset_size", "pr_k", "dc_k", "isc_splits")

COUNT = Int(1)
FEATURES = (
    generate.BATCH,
    Option("--detector", default="inception", metavar="inception|dinov2|FILE", help="network of the features: "
           "Inception or DINOv2 weights from assets/, or a file of either, or a TorchSSL checkpoint"),
    Option("--download", Flag, False, "fetch Inception's weights if they are missing"),
    generate.DEVICE,
)
CALC_FLAGS = {
    "images to score": (
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
        Option("--metrics", METRICS, ["fid"], METRICS.help),
        Option("--kid-subsets", COUNT, 100, "subsets of the kernel distance"),
        Option("--kid-subset-size", Int(2), 1000, "images of a subset"),
        Option("--pr-k", COUNT, 3, "neighbours of precision and recall"),
        Option("--dc-k", COUNT, 5, "neighbours of density and coverage"),
        Option("--isc-splits", COUNT, 10, "splits of the inception score"),
        Option("--json", metavar="FILE", help="also write the values with settings and inputs", key="json_file"),
    ),
    "features": FEATURES,
    "sampling, with --network": generate.SAMPLING,
}
REF_FLAGS = (
    Option("--data", required=True, metavar="PATH|ZIP|NPZ", help="reference images"),
    Option("--dest", required=True, metavar="NPZ", help="file of the statistics, an .npz"),
    Option("--features", Flag, False, "also keep every feature and class: for kid, prdc and cwfid"),
    Option("--overwrite", Flag, False, "replace statistics of other images or of another detector"),
    *FEATURES,
)


@less_memory("--batch")
def main(argv: Sequence[str] | None = None) -> None:
    command, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "calc":
        flags = parse("Score images against a reference.", CALC_FLAGS, words)
        check(flags)
        calculate(flags)
    elif command == "ref":
        make_reference(parse("Compute the statistics of reference images.", REF_FLAGS, words))
    elif command in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nfid.py calc --help and fid.py ref --help list the flags of either.")
    else:
        raise UserError(f"{command}: expected calc or ref; see --help")


def check(flags: SimpleNamespace) -> None:
    """Set the source of the images; raise UserError for contradicting flags."""
    if flags.json_file is not None:
        check_writable(flags.json_file, "--json")
    if (flags.images is None) == (flags.network is None):
        raise UserError("give either --images or --network")
    if flags.images is not None:
        foreign = [name for name, key in (("--seeds", "seeds"), *((o.name, o.key) for o in generate.SAMPLING))
                   if key in flags.given]
        if foreign:
            raise UserError(f"{foreign[0]} belongs to --network; it has no effect on --images")
        return
    if "seed" in flags.given:
        raise UserError("--seed chooses among --images; give the seeds of --network with --seeds")
    if flags.seeds is not None and "num" in flags.given:
        raise UserError("--num and --seeds cannot be specified at the same time")
    flags.seeds = list(range(flags.num)) if flags.seeds is None else generate.distinct(flags.seeds)
    generate.check(flags)


def calculate(flags: SimpleNamespace) -> None:
    """Compute and print the metrics of checked flags, on all processes of the world."""
    world = start(flags.device)
    full_precision()
    detector = load_detector(flags.detector, world.device, flags.download, world)
    record = record_of(flags, detector) if flags.json_file else None
    if record is not None and on_main(lambda: record.is_complete(overwrite=True), world):
        if world.main:
            print_numbers(json.loads(Path(flags.json_file).read_text(encoding="utf-8")))
        return stop()
    reference = open_reference(flags, detector, world)
    images = open_images(flags, detector, world)
    if world.main:
        check_possible(flags, detector, images, reference)
        print(f"Calculating statistics for {len(images)} images...", flush=True)
    extraction = extract(images, detector, flags.batch, world, keep_features=bool(NEED_FEATURES & set(flags.metrics)),
                         keep_logits="isc" in flags.metrics)
    stop()
    if world.main:
        if None not in (extraction.size, reference.size) and extraction.size != reference.size:
            sizes = ["x".join(map(str, found[::-1])) for found in (extraction.size, reference.size)]
            warnings.warn(f"{flags.images or flags.network}: images of {sizes[0]} are compared with {sizes[1]} of "
                          f"{flags.ref}; make them equal with dataset_tool.py --resolution={sizes[1]}", stacklevel=2)
        values = score(flags.metrics, extraction, reference, detector, flags)
        report(flags, values, about(flags, images, reference, detector, world))
        if record is not None:
            record.write()


def record_of(flags: SimpleNamespace, detector: Detector) -> Record:
    """Return the record of --json."""
    files = {"--images": flags.images, "--network": flags.network, "--ref": flags.ref, "--network_2": flags.network_2,
             "--guide-network": flags.guide_network}
    given = {name: path if os.path.exists(path) else local_file(path)  # a URL is fetched
             for name, path in files.items() if path is not None}
    names = ("metrics", *SETTINGS, "num", "seed", "seeds", *(option.key for option in generate.SAMPLING))
    settings = {name: getattr(flags, name) for name in names if name not in ("network_2", "guide_network")}
    return Record(flags.json_file, {**settings, "detector": detector.sha256, "resize": detector.resize}, given)


def open_reference(flags: SimpleNamespace, detector: Detector, world: World) -> Reference | None:
    """Read the statistics of --ref (rank 0 alone), or compute them from images."""
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
    """Raise UserError before hours of sampling if a metric lacks its input."""
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


def about(flags: SimpleNamespace, images: FileImages | GeneratedImages, reference: Reference, detector: Detector,
          world: World) -> dict[str, Any]:
    """Return every setting and input of the values."""
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
    """Print the values, their settings and inputs."""
    source, detector, count = facts["source"], facts["detector"], facts["reference"]["images"]
    print(f"reference: {flags.ref}, {'an unknown number of' if count is None else count} images")
    print(f"images: {flags.images or flags.network}, {source['images']} images, "
          f"{'seeds ' + source['seeds'] if source['seeds'] else 'seeds unknown'}")
    print(f"detector: {detector['name']}, SHA-256 {detector['sha256']}, resize {detector['resize']}")
    if flags.json_file:
        make_dir(Path(flags.json_file).absolute().parent)
        write_json(flags.json_file, {**values, **facts}, indent=2)
    print_numbers(values)


def print_numbers(values: Mapping[str, Any]) -> None:
    """Print the metrics among the values; a distance asked for alone as a bare number."""
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
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
    record = Record(flags.dest, {"features": flags.features, "detector": detector.sha256, "resize": detector.resize},
                    {"--data": flags.data})
    if on_main(lambda: record.is_complete(flags.overwrite), world):
        return stop()
    source = FileImages(flags.data, detector.channels, labelled=flags.features)
    if len(source) < 2:
        raise UserError(f"{flags.data}: Found {len(source)} image, but need at least 2 to compute statistics")
    extraction = extract(source, detector, flags.batch, world, keep_features=flags.features)
    stop()
    if world.main:
        write_reference(flags.dest, from_extraction(extraction, flags.data), detector)
        record.write()
        print(f"Saved the statistics of {len(source)} images to \"{flags.dest}\" ({detector.name}, SHA-256 "
              f"{detector.sha256}, resize {detector.resize})")


if __name__ == "__main__":
    run_main(main)
