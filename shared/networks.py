"""Classifiers of timm under one interface, and the weights that a network starts from: a file or timm's own."""
from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.cli import UserError, nearest
from shared.training.checkpoint import read_checkpoint, weights_in
from shared.training.fingerprint import fingerprint_arrays

TIMM = "timm:"
ROTATION_HEAD = "rot_classifier"
# Entries of a checkpoint that hold a network, in the order of preference: averages first.
WEIGHT_ENTRIES = ("ema_model", "eval_model", "ema", "model", "train_model", "state_dict", "net")
# Errors of timm and its hub for impossible networks and unavailable weights.
TIMM_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, OSError, ImportError)


# ------------------------------------------------------------------------------------------------------ timm's networks

class TimmNetwork(nn.Module):
    """A classifier of timm: normalised float images [N, C, H, W] -> logits [N, num_classes]; features for 0 classes.

    body: timm's network, with random weights. feature_size: D of the pooled feature. rotation_head: add
    `rot_classifier`, 4 more logits on the same feature; forward then returns both. size: (H, W), needed by networks
    whose parameters depend on it. Raises UserError for an unknown name and for images that the network cannot take.
    """

    def __init__(self, name: str, num_classes: int, in_channels: int = 3, size: tuple[int, int] = (224, 224),
                 rotation_head: bool = False) -> None:
        super().__init__()
        self.name, self.size = name, size
        self.body = build_body(name, num_classes, in_channels, size)
        self.check(in_channels, num_classes)
        self.feature_size = self.body.head_hidden_size
        self.rot_classifier = nn.Linear(self.feature_size, 4) if rotation_head else None

    def feature(self, x: Tensor) -> Tensor:
        """Return the pooled feature [N, D] of images [N, C, H, W]."""
        return self.body.forward_head(self.body.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor, return_feature: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [N, num_classes]; with return_feature (logits, feature); with a rotation head (logits,
        rotation logits [N, 4])."""
        if not return_feature and self.rot_classifier is None:
            return self.body(x)
        hidden = self.body.forward_features(x)
        logits, feature = self.body.forward_head(hidden), self.body.forward_head(hidden, pre_logits=True)
        return (logits, feature) if return_feature else (logits, self.rot_classifier(feature))

    @torch.no_grad()
    def check(self, in_channels: int, num_classes: int) -> None:
        """Raise UserError unless images of the size give logits."""
        shape = f"{in_channels}x{self.size[0]}x{self.size[1]}"
        try:
            logits = self.body.eval()(torch.zeros(2, in_channels, *self.size))
        except TIMM_ERRORS as error:
            raise UserError(f"net: timm's {self.name} takes no images of {shape} ({one_line(error)}); choose another "
                            "network") from None
        finally:
            self.body.train()
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes or self.body.head_hidden_size):
            raise UserError(f"net: timm's {self.name} is no classifier of images of {shape}; choose another network")


def is_timm(name: str) -> bool:
    return name.startswith(TIMM)


def build_body(name: str, num_classes: int, in_channels: int, size: tuple[int, int],
               pretrained: bool = False) -> nn.Module:
    """Return timm's network `name` (with or without a tag of weights); num_classes 0: without label layer.

    pretrained: with the weights that timm fetches, else random ones. Raises UserError.
    """
    import timm  # takes a while to import, and only networks of timm need it

    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UserError(f'net: timm has no network "{architecture}"{nearest(architecture, timm.list_models())}; '
                        "timm.list_models() names all of them")
    settings = timm.get_pretrained_cfg(architecture)
    options = {"img_size": size} if settings is not None and settings.fixed_input_size else {}
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries: the error below says it
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **options)
    except TIMM_ERRORS as error:
        if pretrained:
            raise UserError(f"--pretrained {TIMM}{name}: timm could not fetch these weights ({one_line(error)}); "
                            "without network access give a file") from None
        raise UserError(f"net: timm's {name} cannot be built for images of {in_channels}x{size[0]}x{size[1]} "
                        f"({one_line(error)}); choose another network") from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# ------------------------------------------------------------------------------------------------ weights to start from

@dataclass(frozen=True)
class Start:
    """The initial weights of a network. note: for the log. mean, std: per channel, as the weights expect; None if the
    source does not say."""

    note: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def start_from(net: nn.Module, source: str, classes: Sequence[str], in_channels: int) -> Start:
    """Copy the weights of a file or of "timm:NAME" into `net`; its label layer stays as it is for other classes.

    All other tensors must be there. classes: names of the network's classes. Raises UserError, naming --pretrained;
    `net` is then unchanged.
    """
    if is_timm(source):
        return start_from_timm(net, source, len(classes), in_channels)
    content = read_weights(source)
    heads = label_layers(net, len(classes))
    state = named_as(net, find_state(content, source), source)
    ours, known = net.state_dict(), content.get("classes")
    other_classes = bool(known) and list(known) != list(classes)
    fresh = [name for name in ours if name.rpartition(".")[0] in heads
             and (other_classes or name not in state or state[name].shape != ours[name].shape)]
    needless = [name for name in ours if name not in state and name.startswith(ROTATION_HEAD)
                or name.endswith("num_batches_tracked")]
    taken = {name: state[name] for name in ours if name in state and name not in fresh}
    check_fits({name: tensor for name, tensor in ours.items() if name not in (*fresh, *needless)}, taken, source)
    if any(tensor.is_floating_point() and not tensor.isfinite().all() for tensor in taken.values()):
        raise UserError(f"--pretrained {source}: holds numbers that are not finite")
    net.load_state_dict(taken, strict=False)
    mean, std = (recorded(content.get(name), in_channels) for name in ("mean", "std"))
    if (mean is None or std is None) and isinstance(net, TimmNetwork):
        mean, std = normalisation_of(net, in_channels)
    return Start(note_of(source, len(taken), ours, fresh), mean, std)


def check_fits(needed: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError, naming the first difference, unless `given` has every needed tensor in its shape."""
    for name, tensor in needed.items():
        reason = f"they lack {name}" if name not in given else (
            f"{name} is {list(given[name].shape)} there, {list(tensor.shape)} here")
        if name not in given or given[name].shape != tensor.shape:
            raise UserError(f"--pretrained {source}: the weights of another network, {reason}; give --net and its "
                            "options as in their training")


def start_from_timm(net: nn.Module, source: str, num_classes: int, in_channels: int) -> Start:
    """Copy the weights that timm fetches for "timm:NAME" into its network; see `start_from`."""
    name = source.removeprefix(TIMM)
    if not isinstance(net, TimmNetwork) or name.split(".")[0] != net.name.split(".")[0]:
        raise UserError(f"--pretrained {source} needs --net {TIMM}{name.split('.')[0]}")
    body = build_body(name, num_classes, in_channels, net.size, pretrained=True)
    net.body.load_state_dict(body.state_dict())
    net.body.pretrained_cfg = body.pretrained_cfg
    fresh = [] if body.pretrained_cfg.get("num_classes") == num_classes else [
        key for key in net.state_dict() if key.rpartition(".")[0] in label_layers(net, num_classes)]
    ours = net.state_dict()
    mean, std = normalisation_of(net, in_channels)
    return Start(note_of(source, len(ours) - len(fresh), ours, fresh), mean, std)


def source_of(source: str | None) -> str | None:
    """Return the input of the fingerprint: a file, or the digest of timm's name."""
    return fingerprint_arrays([source]) if source and is_timm(source) else source or None


def note_of(source: str, taken: int, ours: Mapping[str, Tensor], fresh: Sequence[str]) -> str:
    anew = f"; a fresh label layer ({', '.join(fresh)})" if fresh else ""
    return f"--pretrained {source}: {taken} of {len(ours)} tensors taken{anew}"


def recorded(values: object, count: int) -> tuple[float, ...] | None:
    """Return a recorded statistic of the images, a number per channel; None if absent."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    return tuple(map(float, values)) if all(isinstance(value, (int, float)) for value in values) else None


def normalisation_of(net: TimmNetwork, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) per channel that timm's weights expect; for other than three channels their averages."""
    mean, std = net.body.pretrained_cfg["mean"], net.body.pretrained_cfg["std"]
    if in_channels == len(mean):
        return tuple(mean), tuple(std)
    return (sum(mean) / len(mean),) * in_channels, (sum(std) / len(std),) * in_channels


def read_weights(path: str) -> dict:
    """Return the content of a .safetensors or torch.save file; UserError, naming --pretrained."""
    if not Path(path).is_file():
        raise UserError(f"--pretrained: there is no file {path}; give one, or timm:NAME")
    if Path(path).suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {"state_dict": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--pretrained {path}: not a readable .safetensors file ({one_line(error)})") from None


def find_state(content: Mapping, source: str) -> dict[str, Tensor]:
    """Return the weights in a checkpoint: under one of the usual names, or the whole of it."""
    for entry in WEIGHT_ENTRIES:
        if isinstance(content.get(entry), Mapping):
            return weights_in(content, entry, source)
    return weights_in({"weights": {name: value for name, value in content.items() if isinstance(value, Tensor)}},
                      "weights", source)


def named_as(net: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the weights under the names of `net`, without the prefix of wrappers, in the form of timm's networks."""
    wrapped = isinstance(net, TimmNetwork)
    ours = net.body.state_dict() if wrapped else net.state_dict()
    state = without_prefix(state, ours)
    if not set(state) & set(ours):
        raise UserError(f"--pretrained {source}: the weights of another network, no tensor of it has a name of this "
                        "one")
    if not wrapped:
        return state
    adapt = getattr(sys.modules[type(net.body).__module__], "checkpoint_filter_fn", None)
    try:
        state = adapt(state, net.body) if adapt is not None else state
    except TIMM_ERRORS as error:
        raise UserError(f"--pretrained {source}: no weights of timm's {net.name} ({one_line(error)})") from None
    from timm.models import adapt_input_conv  # as in build_body

    first = net.body.pretrained_cfg.get("first_conv")
    weight = f"{first}.weight"
    if isinstance(first, str) and weight in state and state[weight].ndim == 4 and state[weight].shape[1] == 3:
        state[weight] = adapt_input_conv(ours[weight].shape[1], state[weight])  # as timm does for other channels
    return {f"body.{name}": tensor for name, tensor in state.items()}


def without_prefix(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` without the prefix ("module.", "encoder_q.") that leaves most names equal to ours."""
    first = next(iter(ours))
    prefixes = sorted({name.removesuffix(first) for name in state if name.endswith(first)} | {""})
    best = max(prefixes, key=lambda prefix: sum(prefix + name in state for name in ours))
    return {name.removeprefix(best): value for name, value in state.items() if name.startswith(best)}


def label_layers(net: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Return the names of the layers that give the logits: of timm's networks by timm, else the last such layer."""
    if isinstance(net, TimmNetwork):
        found = net.body.get_classifier()
        layers = {id(layer) for layer in (found if isinstance(found, (tuple, list)) else (found,))}
        return tuple(name for name, layer in net.named_modules() if id(layer) in layers)
    names = [name for name, layer in net.named_modules() if name != ROTATION_HEAD and num_classes == getattr(
        layer, "out_features", getattr(layer, "out_channels", None))]
    return tuple(names[-1:])


# --------------------------------------------------------------------------------------------------------- frozen parts

def freeze(net: nn.Module, parts: str, num_classes: int) -> int:
    """Stop the learning of parts of a network, see `train_mode`; return the number of frozen parameters.

    parts: "backbone", all but the label layer and a rotation head, or names of modules ("conv1,block1"). Raises
    UserError for a name that the network lacks and where nothing would be left to learn.
    """
    heads = (*label_layers(net, num_classes), ROTATION_HEAD)
    wanted = [part.strip() for part in parts.split(",") if part.strip()]
    names = {name: name.removeprefix("body.") for name, _ in net.named_parameters()}
    for part in wanted:
        if part != "backbone" and not any(is_below(name, part) for name in names.values()):
            known = dict.fromkeys(name.split(".")[0] for name in names.values())
            raise UserError(f"--freeze: the network has no part {part!r}{nearest(part, known)}; its parts are "
                            f"{', '.join(known)}, or give backbone")
    frozen = [name for name, short in names.items() if any(is_below(short, part) for part in wanted)
              or ("backbone" in wanted and not any(is_below(name, head) for head in heads))]
    if len(frozen) == len(names):
        raise UserError(f"--freeze {parts}: nothing would be left to learn")
    parameters = dict(net.named_parameters())
    for name in frozen:
        parameters[name].requires_grad_(False)
    for module in net.modules():  # a mark that copies keep
        below = list(module.parameters())
        module.is_frozen = bool(below) and not any(parameter.requires_grad for parameter in below)
    return sum(parameters[name].numel() for name in frozen)


def is_below(name: str, part: str) -> bool:
    """Return whether a parameter belongs to the module or parameter `part`."""
    return name == part or name.startswith(f"{part}.")


def train_mode(net: nn.Module) -> nn.Module:
    """Put a network into train mode, but its frozen parts into eval mode: their batch statistics stay as they are."""
    net.train()
    for module in net.modules():
        if getattr(module, "is_frozen", False):
            module.eval()
    return net
