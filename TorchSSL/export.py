"""Export a trained network to one file that runs without this project.

    python export.py --load_path ./saved_models/freematch_digits_10_1/model_best.pth --to onnx --out digits.onnx \\
        --model-card

safetensors   weights under their published names; predict.py also opens the file, and timm its own networks
onnx          a graph for onnxruntime and others: images float32 [N, C, H, W], normalised -> logits [N, classes]
torch-export  the same graph by torch.export (.pt2), for torch alone

Class names, mean, std, size and resize are metadata. The checkpoint is one of any learner here, of DASO or MetaSemi, or
a snapshot of EDM: a classifier, or a denoiser D(x, sigma, class labels) for one step of a sampler. The written file is
run and must give the same numbers. --model-card writes a README beside it.
"""
from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from EDM.training.networks import PRECONDITIONERS
from EDM.training.snapshots import Snapshot, read_snapshot, write_snapshot
from shared.cli import Choice, Flag, Option, Text, UserError, parse, run_main
from shared.networks import TimmNetwork
from shared.report.history import read_json
from shared.training.checkpoint import read_checkpoint
from shared.training.files import atomic, make_dir, write_text
from shared.training.precision import commit
from shared.training.record import Record
from TorchSSL.core.classifier import EXPORTED, Classifier, is_snapshot, open_classifier, read_exported
from TorchSSL.core.networks import OPTIONS

# The resize of other images, for the model card.
MIDDLE = "shorter side, then the middle"
RESIZES = {"square": "squeezed", "converted square": "squeezed", "centre": MIDDLE, "centre-edge": MIDDLE,
           "converted centre": "the middle square"}
ENDINGS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
FLAGS = (
    Option("--load_path", Text, "./saved_models/fixmatch/model_best.pth", "checkpoint, or snapshot of EDM"),
    Option("--to", Choice(*ENDINGS), required=True, help="form of the file"),
    Option("--out", Text, required=True, help="file to write", metavar="FILE"),
    Option("--model-card", Flag, False, "also write a README for the file, FILE.md"),
    Option("--use_train_model", Flag, False, "the weights as trained, not their moving average"),
    Option("--dataset -ds", Text, None, "benchmark that a checkpoint of the original code was trained on"),
    Option("--overwrite", Flag, False, "replace the export of another checkpoint"),
)
SEVERAL = 3  # images of the example that is traced; any number may come later
TOLERANCE = 1e-4  # largest difference between file and network, as a fraction of the largest output


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(__doc__, FLAGS, argv)
    check_flags(options)
    network = open_denoiser(options) or opened(open_classifier(options.load_path, "cpu", options.dataset,
                                                               options.use_train_model), options)
    out = Path(options.out)
    record = Record(out, {name: getattr(options, name) for name in ("to", "use_train_model", "dataset")},
                    {"--load_path": options.load_path})
    make_dir(out.absolute().parent)
    if not record.is_complete(options.overwrite):
        partial = out.with_name(f".{out.stem}.part{out.suffix}")
        try:
            difference = WRITERS[options.to](network, partial)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
        record.write()
        print(f"{out}: {out.stat().st_size / 2 ** 20:.1f} MiB, {describe(network.about)}; largest difference to the "
              f"checkpoint {difference:.2g} (as a fraction of the largest output)")
    if options.model_card:
        card = out.with_name(f"{out.name}.md")
        write_text(card, model_card(network, options))
        print(f"model card: {card}")


def check_flags(options: SimpleNamespace) -> None:
    """Raise UserError for a wrong file ending, a missing file and missing packages."""
    if Path(options.out).suffix != ENDINGS[options.to]:
        raise UserError(f"--out {options.out}: a file of --to {options.to} ends in {ENDINGS[options.to]}")
    if not Path(options.load_path).is_file():
        raise UserError(f"--load_path: there is no file {options.load_path}")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if options.to == "onnx" and missing:
        raise UserError(f'--to onnx needs the package {missing[0]}; install the extra of this project: '
                        'pip install "fewlabel[export]"')


# ------------------------------------------------------------------------------------------------- what is exported

class Exported(SimpleNamespace):
    """net: the module to trace. inputs: name -> example with SEVERAL rows. output: its name. about: plain values, the
    metadata. save: writes the weights as safetensors. reopen: (file) -> module, of such a file."""

    net: nn.Module
    inputs: dict[str, Tensor]
    output: str
    about: dict[str, Any]
    save: Callable[[Path], None]
    reopen: Callable[[Path], nn.Module]


def opened(classifier: Classifier, options: SimpleNamespace) -> Exported:
    """Return a classifier as a function of normalised images."""
    if classifier.size is None:
        raise UserError(f"--load_path: {options.load_path} does not say the size of its images; name the data set it "
                        "was trained on with --dataset")
    pixels = np.random.default_rng(0).integers(0, 256, (SEVERAL, classifier.channels, *classifier.size))
    mean, std = (torch.tensor(values)[:, None, None] for values in (classifier.mean, classifier.std))
    about = {"kind": classifier.kind, **{name: getattr(classifier, name) for name in (
        "classes", "channels", "size", "mean", "std", "resize", "side")}}
    return Exported(net=classifier.net, inputs={"images": (torch.from_numpy(pixels) / 255 - mean) / std},
                    output="logits", about=about, save=lambda path: save_classifier(classifier, about, path, options),
                    reopen=lambda path: open_classifier(path).net)


class Denoiser(nn.Module):
    """One call of a denoiser with all inputs: x [N, C, R, R], sigma [N], class labels [N, classes]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.net(x, sigma, class_labels)


def open_denoiser(options: SimpleNamespace) -> Exported | None:
    """Return the denoiser of a snapshot of EDM; None for other files."""
    if not is_snapshot(options.load_path):
        return None
    snapshot = read_snapshot(options.load_path)
    if snapshot.class_name not in PRECONDITIONERS:
        return None
    net = snapshot.build()
    random = torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.05, 0.5, 5.0])
    shape = (SEVERAL, net.img_channels, net.img_resolution, net.img_resolution)
    inputs = {"x": torch.randn(shape, generator=random) * (0.25 + sigma[:, None, None, None] ** 2).sqrt(),
              "sigma": sigma}
    if net.label_dim:
        inputs["class_labels"] = torch.eye(net.label_dim)[torch.arange(SEVERAL) % net.label_dim]
    about = {"kind": "EDM denoiser", "network": snapshot.class_name, "classes": snapshot.dataset_kwargs.get("classes"),
             "channels": net.img_channels, "size": (net.img_resolution,) * 2, "pixels": "-1 to 1",
             "sigma_min": float(net.sigma_min), "sigma_max": float(net.sigma_max)}
    return Exported(net=Denoiser(net), inputs=inputs, output="denoised", about=about,
                    save=lambda path: write_snapshot(path, snapshot),
                    reopen=lambda path: Denoiser(read_snapshot(path).build()))


def describe(about: Mapping[str, Any]) -> str:
    size = about["size"] or ("any", "any")
    classes = about["classes"]
    return (f"{about['kind']}, {f'{len(classes)} classes' if classes else 'no class names'}, images "
            f"{about['channels']}x{size[0]}x{size[1]}")


# ------------------------------------------------------------------------------------------------ the forms of a file

def write_safetensors(network: Exported, path: Path) -> float:
    """Write weights and metadata; return the difference of the file's outputs."""
    network.save(path)
    return difference(network, network.reopen(path))


def save_classifier(classifier: Classifier, about: Mapping[str, Any], path: Path, options: SimpleNamespace) -> None:
    """Write the weights of a classifier and the metadata from which `open_classifier` builds it."""
    if classifier.kind == "EDM":
        snapshot = read_snapshot(options.load_path)
        write_snapshot(path, Snapshot(snapshot.class_name, snapshot.init_kwargs, snapshot.state_dict,
                                      {**snapshot.dataset_kwargs, "classes": list(classifier.classes)},
                                      str(path), snapshot.loss_kwargs))
        return
    content = content_of(Path(options.load_path))
    known = content.get("options") or {}
    build = {"options": {name: known[name] for name in (*OPTIONS, "dataset", "num_classes") if name in known},
             "arch": content.get("arch") or content.get("config", {}).get("arch"),
             "encoder": content.get("encoder"),
             "entry": "state_dict" if "state_dict" in content else "ema_model"}
    state = {name.removeprefix("body.") if isinstance(classifier.network, TimmNetwork) else name:
             tensor.detach().cpu().contiguous().clone() for name, tensor in classifier.network.state_dict().items()}
    build["names"] = list(state)  # in the network's order, which the format does not keep
    header = {"format": EXPORTED, "build": json.dumps(build), **as_text(about)}
    with atomic(path) as file:
        file.write(save(state, header))


def content_of(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, or of a file by this program."""
    return read_exported(path) or read_checkpoint(path)


def write_onnx(network: Exported, path: Path) -> float:
    """Write a graph with metadata; return the difference of its outputs, computed by onnxruntime on the CPU."""
    import onnxruntime  # an extra, as `check_flags` knows

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network.net, tuple(network.inputs.values()), dynamo=True, verbose=False,
                                    dynamic_shapes=any_number(network.inputs), input_names=list(network.inputs),
                                    output_names=[network.output])
    program.model.metadata_props.update(as_text(network.about))
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return difference(network, lambda *inputs: torch.from_numpy(session.run(None, {
        name: value.numpy() for name, value in zip(network.inputs, inputs, strict=True)})[0]))


def write_torch_export(network: Exported, path: Path) -> float:
    """Write a graph of torch with metadata (`fewlabel.json`); return the difference of its outputs."""
    with torch.no_grad():
        program = torch.export.export(network.net, tuple(network.inputs.values()),
                                      dynamic_shapes=any_number(network.inputs))
        torch.export.save(program, path, extra_files={"fewlabel.json": json.dumps(network.about)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return difference(network, torch.export.load(path).module())


WRITERS = {"safetensors": write_safetensors, "onnx": write_onnx, "torch-export": write_torch_export}


def any_number(inputs: Mapping[str, Tensor]) -> tuple[dict[int, Any], ...]:
    """Return the dynamic shapes: the first dimension of every input, the number of images, is free."""
    images = torch.export.Dim("images")
    return tuple({0: images} for _ in inputs)


def as_text(about: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()
            if value is not None}


@torch.no_grad()
def difference(network: Exported, other: Callable[..., Tensor]) -> float:
    """Return the largest difference of outputs as a fraction of the largest, for two numbers of images; UserError."""
    largest = 0.0
    for count in (SEVERAL, 2):
        inputs = [value[:count] for value in network.inputs.values()]
        expected, found = network.net(*inputs), other(*inputs)
        error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
        if not error <= TOLERANCE:
            raise UserError(f"the written file does not give the outputs of the checkpoint (they differ by {error:.2g} "
                            "of the largest); nothing was kept")
        largest = max(largest, error)
    return largest


# -------------------------------------------------------------------------------------------------------- model card

def model_card(network: Exported, options: SimpleNamespace) -> str:
    """Return a README in Markdown from the metadata, the checkpoint and the result.json beside it."""
    about, path = network.about, Path(options.load_path)
    result = read_json(path.with_name("result.json")) or {}
    trained = {} if is_snapshot(path) else content_of(path).get("options") or {}
    classes = about["classes"] or ()
    rows = {"Network": trained.get("net") or about.get("network") or about["kind"],
            "Images": f"{about['channels']} x {about['size'][0]} x {about['size'][1]}",
            "Normalisation": f"mean {about['mean']}, std {about['std']} of pixels from 0 to 1" if "mean" in about else
            f"pixels from {about['pixels']}, sigma from {about['sigma_min']:g} to {about['sigma_max']:g}",
            "Images of another size": RESIZES.get(about.get("resize")),
            "Data": result.get("dataset") or trained.get("dataset"),
            "Labels": labels_line(result), "Seed": result.get("seed", trained.get("seed"))}
    table = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    lines = [f"# {Path(options.out).name}", "", f"A {'denoiser' if 'denoiser' in about['kind'] else 'classifier'}, "
             f"exported from `{path.name}` as {options.to}.", "", "| | |", "|---|---|", *table, "", "## Accuracy", "",
             *accuracy_lines(result, classes), "", "## Made by", "", "```", command_line(trained, options), "```", "",
             f"Code: fewlabel, commit {commit()}, MIT licence. The licence of these weights is their owner's choice, "
             "within that of the data.", ""]
    return "\n".join(lines)


def labels_line(result: Mapping[str, Any]) -> str | None:
    if "labelled_counts" in result:
        return f"{sum(result['labelled_counts'])} labelled images, by class {result['labelled_counts']}"
    if "num_labels" in result:
        return f"{result['num_labels']} labelled of {result.get('unlabeled_images', 'unknown')} images"
    return None


def accuracy_lines(result: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Return the accuracies of result.json as Markdown, by class if known."""
    accuracy = result.get("accuracy")
    if not isinstance(accuracy, Mapping):
        return ["Not recorded beside the checkpoint."]
    lines = [f"- {name.replace('_', ' ')}: {value:.4f}" for name, value in accuracy.items() if isinstance(value, float)]
    by_class = result.get("accuracy_by_class") or []
    if by_class:
        names = [*classes, *map(str, range(len(classes), len(by_class)))]
        lines += ["", "| class | accuracy |", "|---|---|",
                  *(f"| {name} | {'–' if value is None else f'{value:.4f}'} |"
                    for name, value in zip(names, by_class, strict=False)
                    if isinstance(value, (int, float)))]
    return lines


def command_line(trained: Mapping[str, Any], options: SimpleNamespace) -> str:
    """Return the training command, if the checkpoint holds its flags, and that of the export."""
    export = (f"python export.py --load_path {options.load_path} --to {options.to} --out {options.out}")
    if "alg" not in trained:
        return export
    given = [f"--{name} {trained[name]}" for name in trained.get("given", ()) if name not in ("alg", "c")
             and trained.get(name) is not None]
    return f"python {trained['alg']}.py {' '.join(given)}\n{export}"


if __name__ == "__main__":
    run_main(main)
