"""The autoencoder of latent diffusion: Stable Diffusion's VAE (Rombach et al. 2022, arXiv 2112.10752), by diffusers,
from a file in either published layout or a folder; or rearranged pixels, to try the rest without a VAE.

    coder = load_coder("assets/stable-diffusion/autoencoder_kl.pth", factor=8)
    moments = coder.moments(images)                 # images in [-1, 1] -> mean and log-variance
    latents = sample(moments, noise, coder.scale)
    images = coder.decode(latents)                  # in [0, 1]
"""
from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from EDM.training.snapshots import load_weights
from shared.cli import UserError
from shared.training.checkpoint import check_finite, read_checkpoint
from shared.training.fingerprint import fingerprint_arrays

SCALE = 0.18215  # of Stable Diffusion's latents, whose standard deviation it brings to about 1
SPACE_TO_DEPTH = "space-to-depth"
FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def sample(moments: Tensor, noise: Tensor, scale: float = SCALE) -> Tensor:
    """Return latents [N, C, s, s] from moments [N, 2C, s, s], mean and log-variance, and standard normal noise."""
    mean, log_variance = moments.chunk(2, dim=1)
    return scale * (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise)


def to_unit(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as images in [0, 1], clipped."""
    return (0.5 * (images + 1)).clamp(0, 1)


class Coder:
    """A VAE with the functions that latent diffusion needs. factor: an image's side over its latent's."""

    scale = SCALE

    def __init__(self, vae: nn.Module) -> None:
        self.vae = vae
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    def to(self, device: torch.device) -> Coder:
        self.vae.to(device)
        return self

    @property
    def fingerprint(self) -> str:
        """A digest of the encoder: two VAEs that share it have the same latents."""
        return fingerprint_arrays(*(tensor.cpu().numpy() for name, tensor in self.vae.state_dict().items()
                                    if name.startswith(("encoder.", "quant_conv."))))

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return mean and log-variance float32 [N, 2C, s, s] of images [N, 3, S, S] in [-1, 1]."""
        return self.vae.encode(images).latent_dist.parameters.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images float32 [N, 3, S, S] in [0, 1]."""
        return to_unit(self.vae.decode(latents / self.scale).sample.float())


class SpaceToDepth:
    """Squares of factor x factor pixels as channels: a lossless stand-in for a VAE."""

    scale = 1.0

    def __init__(self, factor: int) -> None:
        self.factor, self.channels = factor, 3 * factor**2

    def to(self, device: torch.device) -> SpaceToDepth:
        return self

    @property
    def fingerprint(self) -> str:
        return fingerprint_arrays([SPACE_TO_DEPTH, str(self.factor)])

    def moments(self, images: Tensor) -> Tensor:
        mean = F.pixel_unshuffle(images, self.factor)
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return to_unit(F.pixel_shuffle(latents, self.factor))


def load_coder(name: str, z_shape: tuple[int, ...], resolution: int, flag: str) -> Coder | SpaceToDepth:
    """Return the autoencoder `name` for latents of this shape (C, s, s) and images of this side.

    name: a file or folder of a VAE (see `load_vae`), or "space-to-depth". flag: names it in messages. Raises UserError
    if it cannot be had, or has latents of another shape.
    """
    factor = max(1, resolution // z_shape[1])
    coder = SpaceToDepth(factor) if name == SPACE_TO_DEPTH else Coder(load_vae(name, flag))
    shape = (coder.channels, resolution // coder.factor, resolution // coder.factor)
    if shape != tuple(z_shape) or resolution % coder.factor:
        raise UserError(f"{flag} {name}: images of side {resolution} have latents {shape}, the configuration "
                        f"has z_shape {tuple(z_shape)}; give --config.z_shape={','.join(map(str, shape))}, and "
                        "--config.nnet.img_size and in_chans to match")
    return coder


# ---------------------------------------------------------------- the VAE's files

def autoencoder() -> type:
    """Return diffusers' AutoencoderKL; UserError without the package, which is optional."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("the VAE needs the package diffusers: pip install 'fewlabel[dit]'") from None
    return AutoencoderKL


def load_vae(name: str, flag: str = "--vae") -> nn.Module:
    """Return an AutoencoderKL in eval mode; UserError if it cannot be loaded.

    name: a file of weights with CompVis' names (of the VAE alone or in a whole Stable Diffusion checkpoint) or those of
    diffusers, a folder that diffusers wrote, or a name on the Hugging Face hub.
    """
    vae = _vae_of_file(Path(name), flag) if name.endswith(FILES) else _vae_by_name(name, flag)
    check_finite(vae.state_dict(), name)
    return vae.eval().requires_grad_(False)


def _vae_by_name(name: str, flag: str) -> nn.Module:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt; one line follows
    try:
        return autoencoder().from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False,
                                             local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{flag} {name}: cannot be loaded ({reason}); without a network, give a folder with "
                        "config.json and diffusion_pytorch_model.safetensors") from None


def _vae_of_file(path: Path, flag: str) -> nn.Module:
    if not path.is_file():
        raise UserError(f"{flag}: there is no file {path}; put the VAE's weights there, or name a folder of diffusers' "
                        f"AutoencoderKL, or {SPACE_TO_DEPTH} to do without")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    except SafetensorError as error:
        raise UserError(f"{flag}: {path}: cut short or damaged ({error})") from None
    state = state["state_dict"] if isinstance(state.get("state_dict"), Mapping) else state
    try:
        state = diffusers_state(state)
        vae = vae_for(state)
    except (KeyError, IndexError, ValueError, AttributeError, ZeroDivisionError):
        raise UserError(f"{flag}: {path} holds no VAE of Stable Diffusion: expected tensors such as "
                        "encoder.down.0.block.0.conv1.weight") from None
    load_weights(vae, state, str(path))
    return vae


def vae_for(state: Mapping[str, Tensor]) -> nn.Module:
    """Return an AutoencoderKL, its weights not set, for a state dict with diffusers' names."""
    levels = 1 + max(int(match[1]) for name in state if (match := re.match(r"encoder\.down_blocks\.(\d+)", name)))
    blocks = 1 + max(int(match[1]) for name in state
                     if (match := re.match(r"encoder\.down_blocks\.0\.resnets\.(\d+)", name)))
    widths = [state[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"].shape[0] for level in range(levels)]
    return autoencoder()(
        in_channels=state["encoder.conv_in.weight"].shape[1], out_channels=state["decoder.conv_out.weight"].shape[0],
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths, layers_per_block=blocks, latent_channels=state["post_quant_conv.weight"].shape[0],
        norm_num_groups=math.gcd(32, *widths))


PREFIX = "first_stage_model."  # of the VAE in a checkpoint of Stable Diffusion
# CompVis' names and those of older diffusers, in the order in which they are replaced by today's.
RENAMED = (
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.(?:q|query)\.", ".attentions.0.to_q."),
    (r"\.attentions\.0\.(?:k|key)\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.(?:v|value)\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.(?:proj_out|proj_attn)\.", ".attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE's tensors under diffusers' names; raises ValueError if there are none."""
    if any(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    is_compvis = any(name.startswith("encoder.down.") for name in state)
    top = max((int(match[1]) for name in state if (match := re.match(r"decoder\.up\.(\d+)\.", name))), default=0)
    found = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(name)
        if is_compvis:  # its decoder counts levels from the image
            name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{top - int(match[1])}.", name)
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        is_matrix = re.search(r"\.attentions\.0\.to_\w+(\.0)?\.weight$", name) and value.ndim == 4
        found[name] = value[:, :, 0, 0] if is_matrix else value
    return found
