"""Find probably wrong labels of a data set, with suggestions, and duplicates and outliers among its images.

    python ../EDM/dataset_tool.py --source=digits --dest=digits_sym_20.zip --noise_type=sym --noise_rate=0.2
    python audit_labels.py --dataset digits_sym_20.zip --save_path label_audit --apply corrected.csv

A classifier that was not trained on an image judges it: one of --folds networks, or a linear classifier on --features
or those of an --encoder. --pred_probs gives the probabilities instead. Confident learning (Northcutt et al. 2021, by
cleanlab) decides which labels are issues. --diffusion SNAPSHOT, a conditional model of EDM trained on the same labels,
adds a second opinion, and both are combined.

Writes issues.csv (worst first), audit.html, audit.json, probabilities.npz and transition.json, the input of
`--transition` of EDM's converter and of TDSM. --apply writes all labels, corrected, into another file, never in place.
"""
from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from EDM.tdsm.noise import clean_labels
from shared import distributed
from shared.cli import Bool, Choice, Flag, Float, Int, Option, Text, UserError, parse, run_main
from shared.data.datasets import has_split
from shared.data.images import ImageSet
from shared.data.writers import labels_json
from shared.distributed import World
from shared.training.files import atomic, check_writable, make_dir, write_array, write_csv, write_json, write_text
from shared.training.record import Record
from TorchSSL.audit import diffusion, findings
from TorchSSL.audit.findings import LabelIssues, Neighbours
from TorchSSL.audit.folds import linear_judge, network_judge, out_of_sample
from TorchSSL.audit.gallery import Picture, Section, picture, write_page
from TorchSSL.core.data import load_split
from TorchSSL.core.labels import compared_with_truth
from TorchSSL.encoders.images import Images, training_images
from TorchSSL.suggest_labels import MOST_PIXELS, features

FLAGS = {
    "images": (
        Option("--dataset -ds", Text, required=True, help="path of your own labelled images, or digits, cifar10, ..."),
        Option("--data_dir", Text, "./data", "folder of the data sets"),
        Option("--download", Flag, False, "fetch a published data set missing in --data_dir"),
    ),
    "probabilities": (
        Option("--folds", Int(2), 5, "parts, each judged by a classifier of the others"),
        Option("--pred_probs", Text, None, "out-of-sample probabilities: .npy or .npz [N, K], or .csv (file, then a "
               "column a class), in place of training", metavar="FILE"),
        Option("--features", Text, None, "linear classifiers on this file of features, .npy, .npz or an encoder's",
               metavar="FILE"),
        Option("--encoder", Text, None, "linear classifiers on the features of a frozen encoder: a file, or timm:NAME",
               metavar="NAME"),
        Option("--net", Text, "WideResNet", "network of a fold, as in the learners"),
        Option("--depth", Int(10), 10, "layers of a wide residual network"),
        Option("--widen_factor", Int(1), 1, "its width"),
        Option("--num_train_iter", Int(1), 300, "length of a training", unit="iterations"),
        Option("--batch_size", Int(1), 64, "images in a batch"),
        Option("--lr", Float(0), 0.03, "learning rate at the start of the cosine"),
        Option("--weak_flip", Bool, False, "also mirror the images of a training"),
        Option("--seed", Int(0, 2 ** 32 - 1), 1, "seed of folds, weights and draws"),
    ),
    "second opinion": (
        Option("--diffusion", Text, None, "class-conditional snapshot of EDM, trained on the same labels",
               metavar="SNAPSHOT"),
        Option("--num-draws", Int(1), 16, "noise levels at which an image is denoised under every class"),
    ),
    "output": (
        Option("--save_path", Text, required=True, help="folder of the results", metavar="DIR"),
        Option("--rank", Choice("self_confidence", "normalized_margin"), "self_confidence", "order of issues"),
        Option("--apply", Text, None, "also write all labels, corrected: a .csv (file,label), or a dataset.json",
               metavar="FILE"),
        Option("--thumbnails", Int(1), 12, "images of a kind on the page", unit="images"),
        Option("--overwrite", Flag, False, "replace the results of other settings or images"),
        Option("--device", Text, None, "cpu, cuda or cuda:1", default_help="a GPU if available"),
    ),
}
PAGE, ISSUES, PROBABILITIES, TRANSITION, SUMMARY = ("audit.html", "issues.csv", "probabilities.npz", "transition.json",
                                                    "audit.json")
COLUMNS = ("file", "issue", "given", "suggested", "score", "other")
DECIDES = ("folds", "net", "depth", "widen_factor", "num_train_iter", "batch_size", "lr", "weak_flip", "seed")


@dataclass(frozen=True)
class Audit:
    """The results of an audit. truth: int64 [N] if the set keeps its clean labels, else None. near: None without
    features of the images. leaked: (position, test image, distance)."""

    images: Images
    test: ImageSet | None
    truth: np.ndarray | None
    opinions: dict[str, np.ndarray]
    issues: dict[str, LabelIssues]
    near: Neighbours | None
    leaked: list[tuple[int, int, float]]

    @property
    def best(self) -> str:
        """The final opinion: the combined one if there are several."""
        return list(self.opinions)[-1]


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    options.load_path = None  # features of a classifier would come from these very labels
    check_flags(options)
    images = training_images(options.dataset, options.data_dir, options.download)
    check_labels(images, options)
    folder = make_dir(options.save_path)
    record = Record(folder / PAGE, {name: getattr(options, name) for name in (*DECIDES, "num_draws", "rank",
                                                                              "thumbnails")},
                    {"--dataset": images.fingerprint, **own_inputs(options), "--diffusion": options.diffusion})
    if not record.is_complete(options.overwrite):
        audit = examine(images, folder, options)
        write(audit, folder, options)
        record.write()
    if options.apply is not None:
        apply_to(images, folder, options)


def check_flags(options: SimpleNamespace) -> None:
    """Raise UserError for contradicting sources of probabilities and a wrong place for corrected labels."""
    sources = [name for name in ("features", "encoder") if getattr(options, name) is not None]
    if len(sources) > 1:
        raise UserError("--features and --encoder: give one of them")
    for name in ("pred_probs", "diffusion"):
        file = getattr(options, name)
        if file is not None and not Path(file).is_file():
            raise UserError(f"--{name}: there is no file {file}")
    if options.apply is None:
        return
    target, source = Path(options.apply), Path(options.dataset)
    if target.suffix not in (".json", ".csv"):
        raise UserError(f"--apply {target}: expected a name ending in .csv or .json")
    if source.exists() and target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--apply {target} lies inside --dataset {source}, which stays as it is; choose another "
                        "place")
    if target.exists() and not Record(target, {}, {}).path.exists():
        raise UserError(f"--apply {target} exists and was not written by this program; choose another name")
    check_writable(target, "--apply")


def check_labels(images: Images, options: SimpleNamespace) -> None:
    """Raise UserError for a set without labels, or with fewer labels than folds."""
    known = images.labels[images.labels >= 0]
    if len(np.unique(known)) < 2:
        raise UserError(f"--dataset: {options.dataset} has labels of fewer than two classes; there is nothing to audit")
    if options.pred_probs is None and np.bincount(known).max() < options.folds:
        raise UserError(f"--folds {options.folds}: every class of {options.dataset} has fewer labels; give fewer folds")


def own_inputs(options: SimpleNamespace) -> dict[str, Any]:
    encoder = options.encoder if options.encoder is not None and Path(options.encoder).exists() else None
    return {"--pred_probs": options.pred_probs, "--features": options.features, "--encoder": encoder}


# ----------------------------------------------------------------------------------------------------- the examination

def examine(images: Images, folder: Path, options: SimpleNamespace) -> Audit:
    """Judge every image and return the findings."""
    world = distributed.start(options.device)
    is_small = images.array is not None and images.array[0].size <= MOST_PIXELS
    has_features = options.features is not None or options.encoder is not None or is_small
    rows = features(images, options) if has_features or options.pred_probs is None else None
    opinions = {"classifier": classifier_opinion(images, rows, folder, options, world)}
    if options.diffusion is not None:
        opinions["diffusion"] = diffusion_opinion(images, folder, options, world)
        opinions["combined"] = diffusion.combined(opinions["classifier"], opinions["diffusion"])
    issues = {name: findings.label_issues(images.labels, found, options.rank) for name, found in opinions.items()}
    near = None if rows is None else findings.neighbours(rows)
    test, leaked = None, []
    if near is not None and is_small and options.features is None and options.encoder is None and has_split(
            options.dataset, "test"):
        test = load_split(options.dataset, "test", options.data_dir, options.download)
        if test.images.shape[1:] == images.array.shape[1:]:
            pixels = test.images.reshape(len(test), -1).astype(np.float32) / 255
            leaked = findings.across(rows, pixels, near.radius)
    return Audit(images, test, clean(images), opinions, issues, near, leaked)


def classifier_opinion(images: Images, rows: np.ndarray | None, folder: Path, options: SimpleNamespace,
                       world: World) -> np.ndarray:
    """Return out-of-sample probabilities: given, of linear classifiers on features, or of networks."""
    if options.pred_probs is not None:
        return findings.given_probabilities(options.pred_probs, images.names, images.classes)
    if options.features is not None or options.encoder is not None:
        judge, settings = linear_judge(rows, images.labels, len(images.classes)), {"judge": "linear"}
    else:
        judge = network_judge(images.as_set(), options.dataset, options, world)
        settings = {"judge": "network", **{name: getattr(options, name) for name in DECIDES}}
    return out_of_sample(images.labels, len(images.classes), judge, options, folder, settings,
                         {"--dataset": images.fingerprint, **own_inputs(options)})


def diffusion_opinion(images: Images, folder: Path, options: SimpleNamespace, world: World) -> np.ndarray:
    """Return the probabilities of the diffusion classifier; its errors stay in the folder."""
    if images.array is None:
        raise UserError(f"--diffusion needs images of one size, of at most 64 pixels; {options.dataset} has others")
    net, numbers = diffusion.open_denoiser(options.diffusion, images.classes, images.array.shape[1:])
    file = folder / "denoising_errors.npy"
    record = Record(file, {"num_draws": options.num_draws, "seed": options.seed},
                    {"--dataset": images.fingerprint, "--diffusion": options.diffusion})
    if not record.is_complete(options.overwrite):
        found = diffusion.denoising_errors(net, images.array, numbers, options.num_draws, options.seed, world.device)
        write_array(file, found)
        record.write()
    return diffusion.class_probabilities(np.load(file), images.labels)


def clean(images: Images) -> np.ndarray | None:
    """Return the true labels int64 [N] of dataset.json beside noisy ones; None without them."""
    if images.files is None or not (images.path.is_dir() or images.path.suffix.lower() == ".zip"):
        return None
    found = clean_labels(images.path)
    return found if found is not None and len(found) == len(images) else None


# ---------------------------------------------------------------------------------------------------------- the results

def write(audit: Audit, folder: Path, options: SimpleNamespace) -> None:
    """Write all files except the page's record, and print the summary."""
    images, labels = audit.images, audit.images.labels
    matrix = findings.transition_matrix(labels, audit.opinions[audit.best])
    facts: dict[str, Any] = {"method": "confident joint", "opinion": audit.best}
    if audit.truth is not None:
        facts |= compared_with_truth(matrix, audit.truth, labels)
    write_json(folder / TRANSITION, {"transition_matrix": matrix.tolist(), "classes": list(images.classes), **facts},
               indent=None)
    with atomic(folder / PROBABILITIES) as file:
        np.savez_compressed(file, **{"probabilities": audit.opinions[audit.best], **{
            name: found for name, found in audit.opinions.items() if len(audit.opinions) > 1 and name != audit.best}})
    write_csv(folder / ISSUES, COLUMNS, issue_rows(audit))
    summary = summarise(audit, facts)
    write_json(folder / SUMMARY, summary)
    lines = sentences(audit, summary)
    write_html(audit, folder, lines, options)
    print("\n".join([*lines, f"page: {folder / PAGE}"]))


def issue_rows(audit: Audit) -> Iterator[tuple]:
    """Yield the rows of issues.csv: label issues, worst first, then duplicates and outliers."""
    images, found, labels = audit.images, audit.issues[audit.best], audit.images.labels

    def name_of(position: int) -> str:
        return images.classes[labels[position]] if labels[position] >= 0 else ""

    for i in found.positions:
        yield (images.names[i], "label", name_of(i), images.classes[found.suggested[i]], f"{found.quality[i]:.6f}", "")
    for i, j, distance in audit.near.duplicates if audit.near else ():
        yield images.names[i], kind_of(distance), name_of(i), "", f"{distance:.6g}", images.names[j]
    for i, j, distance in audit.leaked:
        yield images.names[i], f"{kind_of(distance)} of test", name_of(i), "", f"{distance:.6g}", f"test image {j}"
    for i, distance in audit.near.outliers if audit.near else ():
        yield images.names[i], "outlier", name_of(i), "", f"{distance:.6g}", ""


def kind_of(distance: float) -> str:
    return "duplicate" if distance == 0 else "near-duplicate"


def summarise(audit: Audit, facts: dict[str, Any]) -> dict[str, Any]:
    """Return counts and, with known true labels, the accuracy of each opinion."""
    labels, truth = audit.images.labels, audit.truth
    summary: dict[str, Any] = {
        "images": len(labels), "labels": int((labels >= 0).sum()), "classes": list(audit.images.classes),
        "opinion": audit.best, "label_issues": {name: len(found.positions) for name, found in audit.issues.items()},
        "duplicates": len(audit.near.duplicates) if audit.near else None,
        "test_duplicates": len(audit.leaked), "outliers": len(audit.near.outliers) if audit.near else None,
        "overlapping_classes": findings.overlapping(labels, audit.opinions[audit.best], audit.images.classes)}
    if truth is not None:
        wrong = (labels >= 0) & (labels != truth)
        summary |= {"wrong_labels": int(wrong.sum()), "transition_error": facts["error"], "known_truth": {
            name: rightness(found, wrong, truth) for name, found in audit.issues.items()}}
    return summary


def rightness(found: LabelIssues, wrong: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return precision and recall of the issues among wrong labels bool [N], and the fraction of true suggestions."""
    hits, number = int(wrong[found.positions].sum()), len(found.positions)
    true = int((found.suggested[found.positions] == truth[found.positions]).sum())
    return {"precision": hits / max(1, number), "recall": hits / max(1, int(wrong.sum())),
            "suggestions_true": true / max(1, number)}


def sentences(audit: Audit, summary: dict[str, Any]) -> list[str]:
    """Return the summary for the console and the page."""
    count = summary["label_issues"][audit.best]
    lines = [f"{count} of {summary['labels']} labels look wrong ({100 * count / summary['labels']:.1f} %)."]
    if audit.near is not None:
        lines.append(f"{summary['duplicates']} pairs of duplicates or near-duplicates, {summary['test_duplicates']} "
                     f"images nearly in the test set, {summary['outliers']} outliers.")
    if pairs := summary["overlapping_classes"][:3]:
        lines.append("Classes that overlap most: " + ", ".join(
            f"{pair['one']} and {pair['other']} ({pair['images']} images)" for pair in pairs) + ".")
    for name, found in summary.get("known_truth", {}).items():
        lines.append(f"Of {summary['wrong_labels']} wrong labels, by the truth that the set keeps: {name} finds "
                     f"{100 * found['recall']:.1f} % at a precision of {100 * found['precision']:.1f} %; "
                     f"{100 * found['suggestions_true']:.1f} % of its suggestions are true.")
    return lines


# --------------------------------------------------------------------------------------------------------------- page

def write_html(audit: Audit, folder: Path, lines: Sequence[str], options: SimpleNamespace) -> None:
    """Write the page: pairs of given and suggested label, worst first, then duplicates and outliers."""
    images, found, most = audit.images, audit.issues[audit.best], options.thumbnails
    pairs: dict[tuple[int, int], list[int]] = {}
    for i in found.positions:
        pairs.setdefault((int(images.labels[i]), int(found.suggested[i])), []).append(int(i))

    def shown(members: Sequence[int]) -> list[Picture]:
        return [thumbnail(images, i, f"{images.classes[images.labels[i]]} → {images.classes[found.suggested[i]]}",
                          f"score {found.quality[i]:.3f}") for i in members[:most]]

    rows = [("Worst of all", shown(found.positions))] if len(found.positions) else []
    rows += [(f"Given {images.classes[given]}, suggested {images.classes[suggested]}: {len(members)}", shown(members))
             for (given, suggested), members in pairs.items()]
    sections = [Section(f"Labels that look wrong: {len(found.positions)}", rows)]
    if audit.near is not None and audit.near.duplicates:
        both = [("", [thumbnail(images, i, f"distance {distance:.3g}"), thumbnail(images, j)])
                for i, j, distance in audit.near.duplicates[:most]]
        sections.append(Section(f"Duplicates and near-duplicates: {len(audit.near.duplicates)} pairs", both))
    if audit.leaked:
        both = [("", [thumbnail(images, i, f"distance {distance:.3g}"), test_thumbnail(audit.test, j)])
                for i, j, distance in audit.leaked[:most]]
        sections.append(Section(f"Nearly in the test set: {len(audit.leaked)}", both))
    if audit.near is not None and audit.near.outliers:
        far = [thumbnail(images, i, f"mean distance {distance:.3g}") for i, distance in audit.near.outliers[:most]]
        sections.append(Section(f"Outliers: {len(audit.near.outliers)}", [("", far)]))
    write_page(folder / PAGE, "Label audit", [f"{len(images)} images of {images.path.name}.", *lines], sections)


def thumbnail(images: Images, position: int, *caption: str) -> Picture:
    content = next(images.read([position]))
    return picture(images.decode(content, position), images.names[position], *caption)


def test_thumbnail(test: ImageSet, position: int) -> Picture:
    pixels = Images(test.name, test.labels, test.classes, array=test.images)
    return picture(pixels.decode(test.images[position], position), f"test image {position}")


# --------------------------------------------------------------------------------------------------- corrected labels

def apply_to(images: Images, folder: Path, options: SimpleNamespace) -> None:
    """Write all labels to --apply, those of label issues replaced by the suggestion."""
    target = Path(options.apply)
    record = Record(target, {}, {ISSUES: folder / ISSUES, "--dataset": images.fingerprint})
    if record.is_complete(options.overwrite):
        return
    with open(folder / ISSUES, newline="", encoding="utf-8") as file:
        better = {row["file"]: row["suggested"] for row in csv.DictReader(file) if row["issue"] == "label"}
    given = [images.classes[label] if label >= 0 else None for label in images.labels]
    corrected = [better.get(name, label) for name, label in zip(images.names, given, strict=True)]
    make_dir(target.absolute().parent)
    if target.suffix == ".json":
        numbers = {None: None, **{name: number for number, name in enumerate(images.classes)}}
        write_text(target, labels_json([(name, numbers[label]) for name, label in zip(
            images.names, corrected, strict=True)], images.classes))
    else:
        write_csv(target, ("file", "label"), ((name, label or "") for name, label in zip(
            images.names, corrected, strict=True)))
    record.write()
    print(f"{len(better)} labels corrected: {target}")


if __name__ == "__main__":
    run_main(main)
