"""Files of MSN encoders: published checkpoints, those of train_msn.py, and the layout of Hugging Face's ViTMSNModel.

The published weights are CC BY-NC 4.0; users download them themselves. No code in a file is run.
"""
from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.cli import UserError, nearest
from shared.training.checkpoint import read_checkpoint, weights_in
from TorchSSL.encoders.vit import SIZES, VisionTransformer

State = dict[str, Tensor]
ENTRY = "target_encoder"  # the one of a checkpoint whose features are used
ARCHITECTURE = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
# Hugging Face's names -> the published ones; queries, keys and values are joined.
RENAMED = (("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
           ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("encoder.layer.", "blocks."),
           (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."),
           (".attention.output.dense.", ".attn.proj."), (".intermediate.dense.", ".mlp.fc1."),
           (".output.dense.", ".mlp.fc2."), ("layernorm.", "norm."))
JOINED = re.compile(r"(blocks\.\d+)\.attention\.attention\.query\.(weight|bias)")


def read_msn(path: str | Path, model_name: str | None = None) -> VisionTransformer:
    """Return the encoder in a checkpoint, or in a file or folder of Hugging Face's layout, in evaluation mode.

    model_name: the published name, such as deit_base_p4; None: by the file's own record, else by its tensors. Raises
    UserError for a file of another model, with missing, misshapen or further tensors, or with numbers that are not
    finite.
    """
    path = Path(path)
    if model_name is not None and model_name not in SIZES:
        raise UserError(f"unknown encoder {model_name!r}{nearest(model_name, SIZES)}; expected one of "
                        f"{', '.join(SIZES)}")
    state, said = _read(path)
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise UserError(f"{path}: holds no vision transformer of MSN (no patch_embed.proj.weight and pos_embed, or "
                        "embeddings.* of Hugging Face)")
    found = {**_architecture(state), **said}
    if model_name is not None:
        size = SIZES[model_name]._asdict()
        if any(found[key] != size[key] for key in ("embed_dim", "depth", "patch_size")):
            raise UserError(f"{path}: holds an encoder of width {found['embed_dim']} with {found['depth']} blocks and "
                            f"patches of {found['patch_size']}{_name_of(found)}, not {model_name}, which has width "
                            f"{size['embed_dim']}, {size['depth']} blocks and patches of {size['patch_size']}")
        found |= size
    if found["embed_dim"] % found["num_heads"]:
        raise UserError(f"{path}: a width of {found['embed_dim']} cannot be shared by {found['num_heads']} heads")
    net = VisionTransformer(**found)
    expected = net.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{path}: the tensor {name} is missing; the file is damaged or not that of an encoder")
        if state[name].shape != tensor.shape:
            raise UserError(f"{path}: {name} has the shape {list(state[name].shape)}, expected {list(tensor.shape)}")
        if not torch.isfinite(state[name]).all():
            raise UserError(f"{path}: {name} holds numbers that are not finite")
    if further := [name for name in state if name not in expected]:
        raise UserError(f"{path}: holds {further[0]}, which is not part of the encoder")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def _name_of(found: Mapping[str, Any]) -> str:
    """Return the published name of an architecture in brackets, or ''."""
    names = [name for name, size in SIZES.items()
             if all(found[key] == value for key, value in size._asdict().items() if key != "num_heads")]
    return f" ({names[0]})" if names else ""


def _architecture(state: State) -> dict[str, Any]:
    """Return the constructor's arguments that shapes tell; heads as published, else of 64 channels."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    heads = {size.embed_dim: size.num_heads for size in SIZES.values()}
    depth = 1 + max((int(name.split(".")[1]) for name in state if re.match(r"blocks\.\d+\.", name)), default=-1)
    hidden = state["blocks.0.mlp.fc1.bias"].numel() if "blocks.0.mlp.fc1.bias" in state else 4 * width
    return dict(img_size=math.isqrt(state["pos_embed"].shape[1] - 1) * patch, patch_size=patch, embed_dim=width,
                depth=depth, num_heads=heads.get(width, max(1, width // 64)), mlp_ratio=hidden / width)


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    """Return tensors by their published names, without the head, and the file's record of its architecture."""
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: holds neither model.safetensors nor pytorch_model.bin")
        path = found[0]
    if path.suffix == ".safetensors":
        try:
            return _from_hugging_face(load_file(path), path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None
    content = read_checkpoint(path)
    if ENTRY not in content:
        if any("embeddings.cls_token" in name for name in content):
            return _from_hugging_face(content, path)
        raise UserError(f"{path}: has no entry {ENTRY}; expected a checkpoint of MSN")
    state = {name.removeprefix("module."): tensor for name, tensor in weights_in(content, ENTRY, path).items()}
    said = content.get("architecture", {})
    if not isinstance(said, Mapping) or not all(key in ARCHITECTURE and isinstance(value, (int, float))
                                                for key, value in said.items()):
        raise UserError(f"{path}: its entry architecture is none of an encoder")
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, dict(said)


def _from_hugging_face(tensors: State, path: Path) -> tuple[State, dict[str, Any]]:
    state: State = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("vit.")
        if name.startswith("classifier.") or name == "embeddings.mask_token":
            continue
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours, 1)
        state[name] = tensor
    for name in list(state):
        if (query := JOINED.fullmatch(name)) is None:
            continue
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        if any(part not in state for part in parts):
            raise UserError(f"{path}: {name} has no {'key' if parts[1] not in state else 'value'} beside it")
        state[f"{query[1]}.attn.qkv.{query[2]}"] = torch.cat([state.pop(part) for part in parts])
    config = path.with_name("config.json")
    if not config.is_file():
        return state, {}
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        return state, dict(num_heads=int(found["num_attention_heads"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{config}: expected the configuration of a ViTMSNModel with num_attention_heads") from None
