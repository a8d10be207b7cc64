"""Detectors: the networks in whose features images are compared, from files of weights.

    inception   Inception-v3 of 2015-12-05 (2,048 features), as torch-fidelity implements it: the network, weights and
                TF1 bilinear resize of EDM's published FIDs
    dinov2      DINOv2 ViT (1,024 features with the large one), for FD-DINOv2
    classifier  a checkpoint of a TorchSSL run, for data that neither network knows; its distances compare with those
                of the same checkpoint only

The content of a file decides its kind. Files are read as tensors and plain values only.
"""
from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from EDM.training.snapshots import digest
from shared.cli import UserError
from shared.distributed import World, barrier
from shared.training.checkpoint import read_checkpoint
from shared.training.files import make_dir
from shared.training.precision import to_device
from TorchSSL.core.networks import build_network, first_stride_for

INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth",  # as torch-fidelity names it, then pytorch-fid
                   "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_HASH = "6726825d"  # how the SHA-256 of the file begins, by the naming rule of torch.hub
DINOV2_FILES = ("dinov2_vitl14_pretrain.pth",)
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
TF1_RESIZE = "TF1 bilinear to 299x299 (no half-pixel shift, no antialiasing)"
PIL_RESIZE = "bicubic, antialiased, to 224x224"
DINOV2_SIDE, DINOV2_PATCH, DINOV2_HEAD = 224, 14, 64  # pixels, pixels, channels of an attention head
DINOV2_MEAN, DINOV2_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Detector:
    """A feature extractor: uint8 [n, channels, H, W] on `device` -> (features float32 [n, F], class logits or None).

    kind: inception, dinov2 or classifier. resize: of its input. sha256: that of the file of weights.
    """

    kind: str
    name: str
    network: Network
    channels: int
    num_features: int
    num_logits: int  # 0: it is no classifier
    resize: str
    file: str
    sha256: str
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network(images)


def load_detector(name: str, device: torch.device, download: bool | None = None, world: World | None = None
                  ) -> Detector:
    """Return the detector `name`: "inception", "dinov2" or a file of weights for any of the three kinds.

    download: whether missing weights of Inception may be fetched; None for a script without --download. Raises
    UserError for a missing, damaged, hostile or other file.
    """
    file = _find(name, download, world or World())
    content = _read(file)
    if {"patch_embed.proj.weight", "blocks.0.ls1.gamma"} <= content.keys():
        build = _dinov2
    elif "Mixed_7c.branch_pool.conv.weight" in content:
        build = _inception
    elif "ema_model" in content:
        build = _classifier
    else:
        raise UserError(f"--detector: {file} holds neither Inception-v3 nor DINOv2 weights nor a TorchSSL checkpoint "
                        f"(it has {', '.join(map(str, list(content)[:3])) or 'nothing'})")
    return build(content, str(file), digest(file), device)


# ---------------------------------------------------------------- files

def asset_folders() -> list[Path]:
    """Return the search path of weights: $FEWLABEL_ASSETS, ./assets, the project's assets/, torch.hub's folder."""
    named = os.environ.get("FEWLABEL_ASSETS")
    return [*([Path(named)] if named else []), Path("assets"), Path(__file__).parents[2] / "assets",
            Path(torch.hub.get_dir()) / "checkpoints"]


def _find(name: str, download: bool | None, world: World) -> Path:
    known = {"inception": INCEPTION_FILES, "dinov2": DINOV2_FILES}
    if name not in known:
        if not Path(name).is_file():
            raise UserError(f"--detector: {name} is no file; expected inception, dinov2 or a file of weights")
        return Path(name)
    if download:
        _download(name, world)
    found = _first_of(known[name])
    if found is not None:
        return found
    how = "give --download to fetch them" if name == "inception" and download is not None else \
        f"fetch {url_of(name)}"
    raise UserError(f"--detector: no {name} weights here; {how}, or put {known[name][0]} into assets/ or "
                    "$FEWLABEL_ASSETS, or name the file with --detector FILE")


def _first_of(names: tuple[str, ...]) -> Path | None:
    return next((folder / name for folder in asset_folders() for name in names if (folder / name).is_file()), None)


def url_of(name: str) -> str:
    """Return where the weights of "inception" or "dinov2" come from."""
    if name == "dinov2":
        return DINOV2_URL
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return URL_INCEPTION_V3


def _download(name: str, world: World) -> None:
    """Fetch Inception's weights from where torch-fidelity has them, unless they are here; rank 0 does it for all."""
    if name != "inception":
        raise UserError(f"--download: no checksum of the {name} weights is published; fetch {DINOV2_URL} yourself and "
                        "name the file with --detector FILE")
    if world.main and _first_of(INCEPTION_FILES) is None:
        url = url_of(name)
        target = make_dir(asset_folders()[0]) / INCEPTION_FILES[0]
        try:
            torch.hub.download_url_to_file(url, str(target), hash_prefix=INCEPTION_HASH)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--download: cannot fetch {url} ({error}); fetch it yourself and name the file with "
                            "--detector FILE") from None
    barrier(world)


def _read(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        start = stream.read(4)
    if start[:1] == b"\x80" and file.suffix == ".pkl":
        raise UserError(f"--detector: {file} is a detector in the form of a program, which is not run; use the weights "
                        f"{INCEPTION_FILES[0]} of torch-fidelity")
    return read_checkpoint(file)


# ---------------------------------------------------------------- the three kinds

def _inception(state: Mapping[str, Tensor], file: str, sha256: str, device: torch.device) -> Detector:
    if not sha256.startswith(INCEPTION_HASH):
        warnings.warn(f"--detector: {file} is not the published Inception file (SHA-256 {INCEPTION_HASH}...): its "
                      "distances compare with those of the same file only", stacklevel=2)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # imports torchvision

    # torch-fidelity would load any pickle it is given a path to, so it gets a copy of what was read as tensors.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise UserError(f"--detector: {file} does not fit Inception-v3 ({_last_line(error)})") from None
    return Detector("inception", "inception-2015-12-05", extractor.to(device), 3, 2048, 1008, TF1_RESIZE, file, sha256,
                    device)


def _dinov2(state: Mapping[str, Tensor], file: str, sha256: str, device: torch.device) -> Detector:
    net = build_dinov2(state, f"--detector: {file}").to(device)
    return Detector("dinov2", f"dinov2-{net.embed_dim}", lambda images: (net(preprocess(images)), None), 3,
                    net.embed_dim, 0, PIL_RESIZE, file, sha256, device)


def build_dinov2(state: Mapping[str, Tensor], source: str) -> torch.nn.Module:
    """Return the vision transformer of published weights (dinov2_vits14, dinov2_vitb14 or dinov2_vitl14) in eval mode:
    normalised images float32 [N, 3, 224, 224] -> class token [N, F]. Raises UserError for another variant of it."""
    from timm.models.vision_transformer import VisionTransformer  # imports torchvision

    tensors = {name: tensor for name, tensor in state.items() if name != "mask_token"}  # of the training alone
    if "pos_embed" in state:
        tensors["pos_embed"] = _positions(state["pos_embed"])
    width, depth = len(state["blocks.0.ls1.gamma"]), sum(name.endswith(".ls1.gamma") for name in state)
    with torch.device("meta"):
        net = VisionTransformer(img_size=DINOV2_SIDE, patch_size=DINOV2_PATCH, embed_dim=width, depth=depth,
                                num_heads=max(width // DINOV2_HEAD, 1), init_values=1.0, num_classes=0,
                                global_pool="token", weight_init="skip")
    own = net.state_dict()
    wrong = sorted(name for name in own.keys() | tensors.keys()
                   if name not in own or name not in tensors or own[name].shape != tensors[name].shape)
    if wrong:
        raise UserError(f"{source}: a DINOv2 variant that is not served ({wrong[0]}); expected dinov2_vits14, "
                        "dinov2_vitb14 or dinov2_vitl14, without registers")
    net.load_state_dict(tensors, assign=True)
    return net.eval().requires_grad_(False)


def _positions(table: Tensor) -> Tensor:
    """Return position embeddings [1, 1 + 16 x 16, F], resampled from those [1, 1 + G x G, F] of the training."""
    grid = math.isqrt(table.shape[1] - 1)
    patches = table[:, 1:].transpose(1, 2).unflatten(2, (grid, -1))
    # The published code asks for a tenth of a patch more than there are; that shifts where it samples.
    factor = (DINOV2_SIDE // DINOV2_PATCH + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2)), 1)


def preprocess(images: Tensor) -> Tensor:
    """Resize uint8 [N, 3, H, W] to normalised float32 [N, 3, 224, 224].

    The resize is the bicubic, antialiased one of Pillow, with which FD-DINOv2 is published: first the width, then the
    height, each rounded to grey levels.
    """
    x = images.float()
    for size in ((x.shape[2], DINOV2_SIDE), (DINOV2_SIDE, DINOV2_SIDE)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    mean, std = (to_device(torch.tensor(v), x.device).reshape(1, 3, 1, 1) for v in (DINOV2_MEAN, DINOV2_STD))
    return (x / 255 - mean) / std


def _classifier(content: Mapping[str, Any], file: str, sha256: str, device: torch.device) -> Detector:
    try:
        options, state = content["options"], content["ema_model"]
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        channels = state["conv1.weight"].shape[1]
        net = build_network(options["net"], options["num_classes"], depth=options["depth"],
                            widen_factor=options["widen_factor"], leaky_slope=options["leaky_slope"],
                            first_stride=first_stride_for(options["dataset"]), in_channels=channels)
        net.load_state_dict(state)
        mean, std = (torch.tensor(content[key], device=device).reshape(1, channels, 1, 1) for key in ("mean", "std"))
    except (LookupError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"--detector: {file} is no checkpoint of a TorchSSL run with one of its own networks "
                        f"({type(error).__name__}: {_last_line(error)})") from None
    net = net.to(device).eval().requires_grad_(False)

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, features = net((images.float() / 255 - mean) / std, return_feature=True)
        return features, logits

    return Detector("classifier", f"classifier {options['net']}", network, channels, net.fc.in_features,
                    net.fc.out_features, "none", file, sha256, device)


def _last_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[-1].strip()
