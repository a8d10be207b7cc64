"""DiT: a transformer on latent patches (Peebles and Xie 2023, arXiv 2212.09748), with the published parameter names."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from DDAE.ddae.model import check_names
from DDAE.DiT.gaussian import SpacedDiffusion
from EDM.latent.layers import Attention, Mlp, PatchEmbed, sinusoid, unpatchify
from shared.cli import UserError, nearest
from shared.training.checkpoint import check_finite, read_checkpoint

# name -> depth, width, heads
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}
PATCHES = (2, 4, 8)
FREQUENCIES = 256
GUIDED_CHANNELS = 3


def position_table(width: int, side: int) -> Tensor:
    """Return the fixed position embedding of a square grid: float32 [side * side, width].

    The first half of a row encodes the patch's column, the second its row, each as [sin | cos].
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    column, row = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, FREQUENCIES).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class embedding; the row after the last class is "no class" where the network was trained with class dropout."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class DiTBlock(nn.Module):
    """Transformer block whose normalisations are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio), gelu="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer: (x [N, C, S, S], t [N], y int64 [N]) -> [N, C or 2C, S, S].

    With learn_sigma the second half of the output channels is the variance. y = num_classes means no class, where
    class_dropout_prob > 0. t: index of the noise level, 0..999, not scaled.
    """

    def __init__(self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152,
                 depth: int = 28, num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1,
                 num_classes: int = 1000, learn_sigma: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A frozen parameter: part of the state, as published.
        self.pos_embed = nn.Parameter(position_table(hidden_size, input_size // patch_size)[None],
                                      requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # Blocks begin as the identity and the network as zero (adaLN-Zero).
        modulations = [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1]]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def block_names(self) -> list[str]:
        """Names under which `features` offers block outputs: layer-0 (the first block) to layer-27 for DiT-XL/2."""
        return [f"layer-{k}" for k in range(len(self.blocks))]

    @property
    def width(self) -> int:
        """Number of features of a token."""
        return self.pos_embed.shape[2]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x, c = self._embed(x, t, y)
        for block in self.blocks:
            x = block(x, c)
        return unpatchify(self.final_layer(x, c), self.out_channels)

    def features(self, x: Tensor, t: Tensor, y: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the outputs [N, tokens, width] of the named blocks; later blocks do not run."""
        check_names(names, self.block_names)
        found: dict[str, Tensor] = {}
        x, c = self._embed(x, t, y)
        for name, block in zip(self.block_names, self.blocks, strict=True):
            x = block(x, c)
            if name in names:
                found[name] = x
            if len(found) == len(set(names)):
                break
        return found

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Return the guided output: classes in the first half of y, "no class" in the second; x's first half counts.

        As published, only the first three channels are guided, and both halves of the result carry them.
        """
        half = x[:len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        guided, rest = out[:, :GUIDED_CHANNELS], out[:, GUIDED_CHANNELS:]
        conditional, unconditional = guided.chunk(2)
        both = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([both, both]), rest], dim=1)

    def _embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)


def make_dit(name: str, input_size: int = 32) -> DiT:
    """Return e.g. DiT-XL/2 (675M parameters) with initial weights; UserError for an unknown name."""
    known = [f"DiT-{size}/{patch}" for size in SIZES for patch in PATCHES]
    if name not in known:
        raise UserError(f"no network {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    size, _, patch = name.removeprefix("DiT-").partition("/")
    depth, width, heads = SIZES[size]
    return DiT(input_size=input_size, patch_size=int(patch), hidden_size=width, depth=depth, num_heads=heads)


def load_dit(path: str, name: str, input_size: int, device: torch.device) -> DiT:
    """Return the network with the weights of `path`, without gradients; UserError unless they are its weights."""
    if not Path(path).is_file():
        raise UserError(f"--ckpt {path}: no such file; put the published DiT-XL-2-256x256.pt there, or name yours")
    state = read_checkpoint(path)
    state = state["ema"] if isinstance(state.get("ema"), dict) else state
    with torch.device("meta"):  # 2.7 GB of initial weights would only be replaced
        net = make_dit(name, input_size)
    own = net.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"--ckpt {path}: not the weights of {name} for latents of {input_size} x {input_size}: "
                        f"{wrong[0]} is missing, superfluous or of another shape ({len(wrong)} such tensors)")
    check_finite(state, f"--ckpt {path}")
    net.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return net.to(device).eval().requires_grad_(False)


def latent_features(net: DiT, codes: Tensor, level: int, names: Sequence[str], noise: Tensor) -> dict[str, Tensor]:
    """Return block name -> float32 [N, width], the mean over tokens, of latents [N, C, S, S] noised to step `level`
    (0..999), without class.

    noise: standard normal, of the shape of `codes`. Blocks after the last named one do not run.
    """
    t = torch.full((len(codes),), level, device=codes.device)
    noisy = SpacedDiffusion().q_sample(codes, t, noise)
    no_class = torch.full_like(t, net.num_classes)
    return {name: tokens.float().mean(1) for name, tokens in net.features(noisy, t, no_class, names).items()}
