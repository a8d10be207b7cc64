"""Any trained classifier of this project as one object: its network, classes, and the form of its images.

`open_classifier` recognises the file: a checkpoint of a TorchSSL learner, of DASO, of MetaSemi (small
images or ImageNet), or a snapshot of EDM/train_classifier.py. Checkpoints record class names, mean, std, size and
resize; those of the original code do not, and then the name of the data set says it.
"""
from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from DASO.lib.models.ema import as_counters
from DASO.lib.models.semi import SemiModel
from DASO.lib.models.wrn import WRN, ResNet34
from EDM.dataset_tool import transformed
from EDM.tdsm.classifiers import CLASSIFIERS, CAS_class, class_logits
from EDM.training.snapshots import read_snapshot
from MetaSemi.core.model import ConvLarge, SmallNet, shakeshake26
from MetaSemi.imagenet.views import CentreCrop
from shared.augment.views import normalise
from shared.cli import UserError, nearest
from shared.data.images import to_chw
from shared.data.photographs import MEAN, STD
from shared.data.pool import resize
from shared.networks import ROTATION_HEAD, TIMM, TimmNetwork, is_timm
from shared.training.checkpoint import read_checkpoint, weights_in
from TorchSSL.core.algorithm import BLOCK, classify
from TorchSSL.core.data import CONVERTED, NORMALISATION
from TorchSSL.core.networks import AS_TRAINED, OPTIONS, load_weights, make_network, strip_prefix, trained_options

# The entries of a checkpoint that hold weights: ours and the published ones first, then those of older trainers.
AVERAGED, TRAINED = ("ema_model", "eval_model"), ("model", "train_model")
# USB, the successor of TorchSSL, has ImageNet's numbers on CIFAR-10, and its wide networks call `fc` `classifier`.
USB_HEAD = "classifier."
EXPORTED = "fewlabel classifier"  # in the header of a file that export.py wrote
SIGMA = 0.01  # noise level at which a classifier of noisy images sees an image as it is

# Of checkpoints that do not say how their images were normalised, by the program that made them.
CIFAR10, CIFAR100 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)), ((0.5071, 0.4865, 0.4409),
                                                                          (0.2673, 0.2564, 0.2762))
PUBLISHED = {
    "TorchSSL": NORMALISATION, "USB": {**NORMALISATION, "cifar10": NORMALISATION["imagenet"]},
    "DASO": {"cifar10": CIFAR10, "stl10": CIFAR10, "cifar100": CIFAR100, "digits": NORMALISATION["digits"],
             "semi_aves": NORMALISATION["imagenet"]},
    "MetaSemi": {"cifar10": ((0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
                 "cifar100": ((0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047)),
                 "svhn": ((0.4376821, 0.4437697, 0.47280442), (0.19803012, 0.20101562, 0.19703614)),
                 "digits": NORMALISATION["digits"]},
}
SIDES = {"digits": 8, "cifar10": 32, "cifar100": 32, "svhn": 32, "mnist": 32, "stl10": 96, "imagenet": 224}


@dataclass(frozen=True)
class Classifier:
    """A trained classifier in eval mode.

    net: normalised float32 [n, C, H, W] -> logits [n, K] (float32). network: the same under its published parameter
    names, which may return more than logits. head: its last linear layer, None if it has none. kind: the program that
    trained it. classes: K names, in label order. channels: 1 or 3. size: (height, width), None if not known: then any.
    mean, std: per channel, unit scale. resize: what becomes of an image of another size; None: it is refused. "square":
    it is squeezed; "centre": its shorter side becomes `side` pixels, then the middle is cut out; "centre-edge": so, as
    NVIDIA DALI does it; "converted square", "converted centre": as dataset_tool.py made the training images. path: of
    the file.
    """

    net: nn.Module
    network: nn.Module
    head: nn.Linear | None
    kind: str
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str | None
    side: int | None
    path: Path
    device: torch.device

    def prepare(self, image: Image.Image, name: str, how: str | None = None, flag: str = "") -> np.ndarray:
        """Return uint8 [C, H, W] of a decoded image, resized as in the evaluation of its training; UserError.

        how: in place of the recorded resize that of dataset_tool.py: "square" without, or "centre" with
        --transform=center-crop. flag: the script's own for `how`, if it has one.
        """
        fits = self.size is None or image.size == self.size[::-1]
        if how is None and not fits and (self.resize or "").startswith(CONVERTED):
            how = self.resize.removeprefix(CONVERTED)
        if self.size is not None and how is not None:
            image = transformed(image, "center-crop" if how == "centre" else None, self.size[::-1])
            return to_chw(image, self.channels)
        how = self.resize
        if fits and (how in (None, "square") or how.startswith(CONVERTED)):
            return to_chw(image, self.channels)
        height, width = self.size
        if how is None or height != width:
            remedy = f"give {flag} square or {flag} centre" if flag else \
                f"resize it with dataset_tool.py --resolution={width}x{height}"
            raise UserError(f"{name} is {image.width}x{image.height}, {self.path} classifies images of "
                            f"{width}x{height}; {remedy}")
        if how == "square":
            return resize(torch.from_numpy(to_chw(image, self.channels).copy())[None], width)[0].numpy()
        if how == "centre-edge":
            return CentreCrop(width, self.side or width)(image.convert("RGB")).transpose(2, 0, 1)
        image = image.convert("RGB" if self.channels == 3 else "L")
        scale = (self.side or width) / min(image.size)
        image = image.resize([max(width, round(length * scale)) for length in image.size], Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return to_chw(image.crop((left, top, left + width, top + height)), self.channels)

    def logits(self, images: np.ndarray | Tensor) -> Tensor:
        """Return float32 logits [n, K], on the CPU, of uint8 images [n, C, H, W]; UserError if one is not finite.

        An image's logits do not depend on n, as long as its place in the set is the same modulo BLOCK.
        """
        return self.features(images)[0]

    @torch.no_grad()
    def features(self, images: np.ndarray | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (logits [n, K], input of the last layer [n, D] or None), float32 on the CPU."""
        seen: list[Tensor] = []
        watch = self.head and self.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].float()))
        try:
            found = [self.net(block) for block in self._blocks(torch.as_tensor(images))]
        finally:
            if watch is not None:
                watch.remove()
        logits = torch.cat(found)[:len(images)].cpu() if found else torch.zeros(0, len(self.classes))
        if not logits.isfinite().all():
            raise UserError(f"{self.path}: its logits are not finite")
        return logits, torch.cat(seen)[:len(images)].cpu() if seen else None

    def _blocks(self, images: Tensor) -> Any:
        for start in range(0, len(images), BLOCK):
            block = images[start:start + BLOCK]
            if len(block) < BLOCK:
                block = torch.cat((block, block.new_zeros(BLOCK - len(block), *block.shape[1:])))
            yield normalise(block.to(self.device), self.mean, self.std)


class LogitsOf(nn.Module):
    """A network whose forward returns logits alone. call: (network, images) -> float [n, K]."""

    def __init__(self, network: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, images: Tensor) -> Tensor:
        return self.call(self.network, images)


def open_classifier(path: str | Path, device: str | torch.device = "cpu", dataset: str | None = None,
                    use_train_model: bool = False, given: Mapping[str, Any] | None = None) -> Classifier:
    """Return the classifier of a file, with its averaged weights, or as trained.

    given: network options of TorchSSL's command line, which overrule those of the file and what its weights tell.
    dataset: for files that do not record how their images were normalised: the benchmark that they were trained on.
    Raises UserError for anything but a classifier, and for weights that are not finite.
    """
    path = Path(path)
    content = read_exported(path) or ({} if path.suffix in (".pkl", ".safetensors") else read_checkpoint(path))
    if not content or "class_name" in content:
        found = _snapshot(path)
    elif "state_dict" in content:
        found = _metasemi_imagenet(content, path)
    else:
        key = next((name for name in (TRAINED if use_train_model else AVERAGED) if content.get(name)), None)
        key = key or next((name for name in TRAINED if content.get(name)), None)
        if key is None:
            raise UserError(f"{path}: holds no classifier; expected a checkpoint of TorchSSL, DASO or MetaSemi, or a "
                            "snapshot of train_classifier.py")
        state = as_counters(strip_prefix(weights_in(content, key, path)))
        content |= {"options": {**trained_options(content), **(given or {})}, "advice": AS_TRAINED if given else ""}
        make = (_torchssl if content["options"] else _daso if any(name.startswith("encoder.") for name in state) else
                _metasemi if {"classifier.0.weight", "layer1.0.conv_a1.weight"} & set(state) else _torchssl)
        found = make(content, state, path, dataset)
    return _finished(found, content, path, torch.device(device), dataset)


def read_exported(path: Path) -> dict[str, Any] | None:
    """Return a .safetensors file of export.py in the form of a checkpoint; None for other files."""
    if path.suffix != ".safetensors":
        return None
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != EXPORTED:
                return None
            build = json.loads(header["build"])
            state = {name: file.get_tensor(name) for name in build.pop("names")}
            facts = {name: json.loads(header[name]) for name in ("classes", "mean", "std", "size", "side")
                     if name in header}
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged, not a classifier that export.py wrote ({error})") from None
    return {**build, **facts, "resize": header.get("resize"), build["entry"]: state}


def is_snapshot(path: str | Path) -> bool:
    """Return whether a file is a snapshot of EDM, of a classifier or a denoiser. Raises UserError."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_exported(path) is None
    return path.suffix == ".pkl" or "class_name" in read_checkpoint(path)


# ---------------------------------------------------------------- one function for each program

def _torchssl(content: Mapping[str, Any], state: dict[str, Tensor], path: Path, dataset: str | None) -> dict[str, Any]:
    options = {**_network_options(state), "dataset": dataset or "", **content["options"]}
    is_usb = USB_HEAD + "weight" in state and not options["net_from_name"] and not is_timm(options["net"])
    if is_usb:
        state = {re.sub(f"^{re.escape(USB_HEAD)}", "fc.", name): value for name, value in state.items()}
        if dataset != "cifar10":
            warnings.warn(f"{path} is a checkpoint of USB; its images of {dataset} are taken to be normalised as "
                          "TorchSSL does", stacklevel=3)
    if is_timm(options["net"]) and not any(name.startswith("body.") for name in state):  # timm's own names
        state = {name if name.startswith(ROTATION_HEAD) else f"body.{name}": value for name, value in state.items()}
    heads = [value for name, value in state.items() if value.ndim == 2 and not name.startswith(ROTATION_HEAD)]
    classes = options.get("num_classes") or (len(heads[-1]) if heads else 0)
    net = make_network(options, classes, _channels(state), rotation_head="rot_classifier.weight" in state,
                       size=content.get("size"))
    load_weights(net, state, path, content["advice"])
    has_more = getattr(net, "rot_classifier", None) is not None
    return {"net": LogitsOf(net, classify) if has_more else net, "network": net, "num_classes": classes,
            "kind": "USB" if is_usb else "TorchSSL", "dataset": options["dataset"]}


def _daso(content: Mapping[str, Any], state: dict[str, Tensor], path: Path, dataset: str | None) -> dict[str, Any]:
    if "encoder.init_conv.weight" in state:
        units = {name.split(".")[2] for name in state if name.startswith("encoder.unit1.")}
        width = len(state["encoder.unit1.0.layer.0.weight"]) // 16
        encoder: nn.Module = WRN(width, _channels(state), 6 * len(units) + 4)
    elif is_timm(name := str(content.get("encoder"))):
        encoder = TimmNetwork(name.removeprefix(TIMM), 0, _channels(state), tuple(content.get("size") or (224, 224)))
    else:
        encoder = ResNet34()
    classes = len(state["classifier.classifier.weight"]) if "classifier.classifier.weight" in state else 0
    net = SemiModel(encoder, classes, any(name.startswith("abc_classifier.") for name in state),
                    any(name.startswith("projection.") for name in state))
    load_weights(net, state, path)
    return {"net": LogitsOf(net, SemiModel.evaluate), "network": net, "kind": "DASO", "num_classes": classes,
            "dataset": content.get("config", {}).get("DATASET.NAME")}


def _metasemi(content: Mapping[str, Any], state: dict[str, Tensor], path: Path, dataset: str | None) -> dict[str, Any]:
    if "fc.weight" in state:
        net: nn.Module = shakeshake26(len(state["fc.weight"]))
    elif "block9.0.weight" in state:
        net = ConvLarge(_channels(state), len(state["classifier.0.weight"]), top_bn="classifier.1.weight" in state)
    else:
        net = SmallNet(_channels(state), len(state["classifier.0.weight"]), len(state["block1.0.weight"]))
    load_weights(net, state, path)
    classes = len(state["fc.weight" if "fc.weight" in state else "classifier.0.weight"])
    return {"net": net, "network": net, "kind": "MetaSemi", "num_classes": classes,
            "dataset": content.get("config", {}).get("dataset")}


def _metasemi_imagenet(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Photographs of ImageNet; the original code records no architecture, but a residual network shows its own."""
    state, config = strip_prefix(weights_in(content, "state_dict", path)), content.get("config", {})
    arch = content.get("arch") or config.get("arch")
    size = tuple(content.get("size") or (config.get("imcrop", 224),) * 2)
    last = [value for name, value in state.items() if name.endswith("weight") and value.ndim in (2, 4)]
    classes = len(last[-1]) if last else 0
    sized: dict[str, Any] = {"weights": None, "num_classes": classes}
    if str(arch).startswith("vit_"):
        sized["image_size"] = size[0]
    elif arch == "maxvit_t":
        sized["input_size"] = size
    elif arch in ("googlenet", "inception_v3"):
        sized |= {"aux_logits": False, "init_weights": True}
    shapes = {name: value.shape for name, value in state.items()}
    for name in (arch,) if arch else ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        with torch.device("meta"):
            ours = torchvision.models.get_model(name, **sized).state_dict()
        if {key: value.shape for key, value in ours.items()} == shapes:
            net = torchvision.models.get_model(name, **sized)
            net.load_state_dict(state)
            return {"net": net, "network": net, "kind": "MetaSemi", "num_classes": classes, "mean": MEAN, "std": STD,
                    "size": size, "resize": "centre-edge", "side": config.get("imsize", 256)}
    raise UserError(f"{path}: its weights are not those of torchvision's {arch or 'residual networks'}")


def _snapshot(path: Path) -> dict[str, Any]:
    """A classifier of noisy images, at its lowest noise level, or one of clean images; both see them in -1..1."""
    snapshot = read_snapshot(path)
    net = snapshot.build({**CLASSIFIERS, "CAS_class": CAS_class}, "a classifier")
    call = (lambda network, images: network(images)) if isinstance(net, CAS_class) else _at_low_noise
    half, arguments = (0.5,) * net.img_channels, snapshot.init_kwargs
    return {"net": LogitsOf(net, call), "network": net, "kind": "EDM", "num_classes": net.label_dim, "mean": half,
            "std": half, "channels": net.img_channels, "size": (arguments["img_resolution"],) * 2,
            "classes": snapshot.dataset_kwargs.get("class_names")}


def _at_low_noise(network: nn.Module, images: Tensor) -> Tensor:
    return class_logits(network(images, torch.full((images.shape[0],), SIGMA, device=images.device)))


# ---------------------------------------------------------------- what they have in common

def _finished(found: Mapping[str, Any], content: Mapping[str, Any], path: Path, device: torch.device,
              dataset: str | None) -> Classifier:
    """Return the classifier: what the file records first, then what its kind or the data set says."""
    known = {**found, **{name: content[name] for name in ("classes", "mean", "std", "size", "resize", "side")
                         if content.get(name) is not None}}
    network, dataset = known["network"], dataset or known.get("dataset")
    bad = next((name for name, value in network.state_dict().items() if not value.isfinite().all()), None)
    if bad is not None:
        raise UserError(f"{path}: its weights are not finite ({bad}); a run that diverged cannot be used")
    if known.get("mean") is None or known.get("std") is None:
        published = PUBLISHED[known["kind"]]
        if dataset not in published:
            raise UserError(f"{path} does not say how its images were normalised; name the data set it was trained on: "
                            f"--dataset {', '.join(published)}{nearest(dataset, published) if dataset else ''}")
        known["mean"], known["std"] = published[dataset]
    classes = tuple(known.get("classes") or map(str, range(known["num_classes"])))
    if len(classes) < known["num_classes"]:
        classes += tuple(map(str, range(len(classes), known["num_classes"])))
    size = known.get("size") or ((SIDES[dataset],) * 2 if dataset in SIDES else None)
    resize_by = known.get("resize") or ("square" if dataset == "imagenet" else None)
    channels = known.get("channels") or _channels(network.state_dict())
    if len(known["mean"]) != channels:
        raise UserError(f"{path}: classifies images of {channels} channel(s), those of {dataset} have "
                        f"{len(known['mean'])}")
    head = [layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)
            and layer.out_features == known["num_classes"] and not name.startswith(("rot_classifier", "projection"))]
    return Classifier(known["net"].to(device).eval(), network.to(device).eval(), head[-1] if head else None,
                      known["kind"], classes, channels, size and tuple(size), tuple(known["mean"]),
                      tuple(known["std"]), resize_by, known.get("side"), path, device)


def _channels(state: Mapping[str, Tensor]) -> int:
    """Return the channels of the images: those of the first convolution."""
    return next((value.shape[1] for value in state.values() if value.ndim == 4), 3)


def _network_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the network options of TorchSSL that follow from the names and shapes of its weights."""
    options: dict[str, Any] = {**dict.fromkeys(OPTIONS), "net_from_name": False, "leaky_slope": 0.1,
                               "dropout": 0.0, "depth": 28, "widen_factor": 2, "net": "ResNet50"}
    if "block1.layer.0.conv1.weight" in state:
        blocks = {name.split(".")[2] for name in state if name.startswith("block1.layer.")}
        options |= {"net": "WideResNetVar" if "block4.layer.0.conv1.weight" in state else "WideResNet",
                    "depth": 6 * len(blocks) + 4, "widen_factor": len(state["block1.layer.0.conv1.weight"]) // 16}
    return options
