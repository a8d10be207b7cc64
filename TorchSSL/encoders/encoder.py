"""Frozen encoders: images in, one feature vector each out.

    encoder = open_encoder("pretrained/vitb4_300ep.pth.tar")     # MSN: a published checkpoint, one of train_msn.py, or
    encoder = open_encoder("vit-msn-base-4/")                    # a file or folder in Hugging Face's layout
    encoder = open_encoder("timm:vit_small_patch16_224")         # a network of timm with random weights
    encoder = open_encoder("timm:vit_small_patch16_224@FILE")    # with those of a file
    encoder = open_encoder("timm:vit_small_patch16_224@pretrained")  # with timm's, which it downloads
"""
from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from shared.cli import UserError, nearest
from shared.data.photographs import MEAN, STD
from shared.networks import one_line
from shared.training.fingerprint import fingerprint_arrays
from TorchSSL.encoders.checkpoints import read_msn
from TorchSSL.encoders.vit import VisionTransformer

TIMM = "timm:"
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class CentralView:
    """A photograph as an encoder sees it: the shorter side resized to `side` pixels, then the central square of `size`.

    interpolation: a key of FILTERS.
    """

    size: int = 224
    side: int = 256
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return uint8 [size, size, 3] of an RGB image, by Pillow."""
        width, height, left, top = self.window(*image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), FILTERS[self.interpolation])
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def of_tensor(self, image: Tensor) -> Tensor:
        """Return uint8 [3, size, size] of uint8 [3, H, W] on any device, within one grey level of Pillow's
        (a few where bicubic overshoots: it clips between the axes)."""
        width, height, left, top = self.window(image.shape[2], image.shape[1])
        if (height, width) != image.shape[1:]:
            resized = F.interpolate(image[None].float(), (height, width), mode=self.interpolation, antialias=True)
            image = resized[0].round().clamp(0, 255).to(torch.uint8)
        return image[:, top:top + self.size, left:left + self.size]

    def window(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return width and height after resizing, and where the square begins: left, top."""
        sides = [self.side * length // min(width, height) for length in (width, height)]
        return (*sides, *(round((length - self.size) / 2) for length in sides))


@dataclass(frozen=True, eq=False)
class Encoder:
    """A frozen network in evaluation mode, and how it wants to see images.

    name: in messages. view: for photographs. mean, std: per channel, on the scale 0..1. width: of a feature.
    blocks: MSN: number of last blocks whose class tokens count. mask: MSN: fraction of the patches left out.
    """

    name: str
    net: nn.Module
    view: CentralView
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    blocks: int = 1
    mask: float = 0.0

    @property
    def width(self) -> int:
        if isinstance(self.net, VisionTransformer):
            return self.net.embed_dim * self.blocks
        return int(getattr(self.net, "head_hidden_size", self.net.num_features))

    @property
    def fingerprint(self) -> str:
        """Digest of weights and settings, for any file format."""
        state = self.net.state_dict()
        facts = [*state, str(getattr(self.net, "architecture", type(self.net).__name__)), str(self.view),
                 str((self.mean, self.std, self.blocks, self.mask))]
        return fingerprint_arrays(facts, *(tensor.cpu().numpy() for tensor in state.values()))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 [N, width]. images: float32 [N, 3, size, size], normalised by ImageNet's mean and std."""
        images = self._normalised(images)
        if not isinstance(self.net, VisionTransformer):
            return self.net(images).float()
        patches = (images.shape[2] // self.net.patch_size) * (images.shape[3] // self.net.patch_size)
        kept = None
        if self.mask:
            # The same patches of every image, at every call.
            chosen = np.random.default_rng(0).permutation(patches)[:math.floor(patches * (1 - self.mask))]
            kept = torch.from_numpy(chosen).to(images.device)
        return self.net.features(images, self.blocks, kept)

    def _normalised(self, images: Tensor) -> Tensor:
        """Return images normalised by ImageNet's mean and std as the network wants them."""
        if (self.mean, self.std) == (MEAN, STD):
            return images
        ours, theirs = (torch.tensor([m, s], device=images.device).view(2, 1, 3, 1, 1)
                        for m, s in ((self.mean, self.std), (MEAN, STD)))
        return (images * theirs[1] + theirs[0] - ours[0]) / ours[1]

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """Return the tokens of the last block for each patch, row by row: float32 [N, L, D]. images: as above.

        Raises UserError for a network without tokens.
        """
        images = self._normalised(images)
        if isinstance(self.net, VisionTransformer):
            return self.net.tokens(images)[-1][:, 1:].float()
        tokens = self.net.forward_features(images)
        if tokens.ndim != 3:
            raise UserError(f"{self.name}: it has no patch tokens; choose a vision transformer")
        return tokens[:, getattr(self.net, "num_prefix_tokens", 0):].float()

    def of_pixels(self, images: Tensor) -> Tensor:
        """Return float32 [N, width] of uint8 [N, C, H, W], C = 1 or 3, resized to the encoder's size."""
        pixels, size = images.float(), (self.view.size, self.view.size)
        if images.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode=self.view.interpolation, antialias=True).clamp(0, 255)
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
        return self((pixels / 255 - mean) / std)  # a gray image becomes three equal channels


def open_encoder(name: str | Path, model_name: str | None = None, blocks: int = 1, mask: float = 0.0) -> Encoder:
    """Return an encoder by its file or by `timm:NAME[@pretrained|@FILE]`; the module says more.

    model_name, blocks, mask: MSN alone; the published name, see read_msn, and as in Encoder. Raises UserError.
    """
    if str(name).startswith(TIMM):
        return _open_timm(str(name).removeprefix(TIMM))
    if not Path(name).exists():
        raise UserError(f"{name}: no such encoder; expected the file of one, or timm:NAME such as "
                        "timm:vit_small_patch16_224")
    net = read_msn(name, model_name)
    if not 1 <= blocks <= len(net.blocks):
        raise UserError(f"blocks: expected 1 to {len(net.blocks)}, the blocks of {name}, got {blocks}")
    if not 0 <= mask < 1:
        raise UserError(f"mask: expected a share of patches from 0 to less than 1, got {mask}")
    size = net.architecture["img_size"]
    # Small images are seen whole: they have no margin to spare.
    view = CentralView(size, size * 256 // 224 if size >= 128 else size)
    return Encoder(str(name), net, view, blocks=blocks, mask=mask)


def _open_timm(text: str) -> Encoder:
    name, _, weights = text.partition("@")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries: the error below says it
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same at every start
            net = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0)
    except Exception as error:  # noqa: BLE001 (a download may fail in many ways)
        raise UserError(f"timm:{text}: cannot be made ({one_line(error)}); without network access give timm:{name}@FILE"
                        ) from None

    if not weights:
        warnings.warn(f"timm:{name} has random weights; give timm:{name}@pretrained, which downloads them, or "
                      f"timm:{name}@FILE", stacklevel=3)
    elif weights != "pretrained":
        _load_timm(net, weights)
    data = resolve_model_data_config(net)
    size = data["input_size"][-1]
    interpolation = data["interpolation"] if data["interpolation"] in FILTERS else "bicubic"
    view = CentralView(size, int(size / data["crop_pct"]), interpolation)
    return Encoder(TIMM + text, net.eval().requires_grad_(False), view, tuple(data["mean"]), tuple(data["std"]))


def _load_timm(net: nn.Module, file: str) -> None:
    try:
        state = load_state_dict(file, use_ema=False, weights_only=True)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{file}: no weights can be read from it ({' '.join(str(error).split())[:150]})") from None
    heads = net.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    lacking = [name for name in net.state_dict() if name not in state]
    further = [name for name in state if name not in net.state_dict() and not name.startswith(prefixes)]
    if lacking or further:
        raise UserError(f"{file}: does not hold this network: " + (f"it lacks {lacking[0]}" if lacking else
                                                                  f"it holds {further[0]} as well"))
    try:
        net.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{file}: does not fit: {' '.join(str(error).split())[:200]}") from None
