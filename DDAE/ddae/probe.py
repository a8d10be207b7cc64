"""Linear probes: a frozen network whose blocks are features, heads trained on them all at once, and their accuracy."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from DDAE.ddae.checkpoints import find_checkpoint, load_model, load_snapshot
from DDAE.ddae.config import COMMON, GPUS, Config, choose_precision, make_diffusion, make_network, read_config
from DDAE.ddae.data import check_fits, load_images
from DDAE.ddae.model import TimeEmbedding, use_channels_last
from shared import distributed
from shared.cli import Int, Option, Text, UserError
from shared.cpu.allocator import keep_freed_memory
from shared.data.images import ImageSet
from shared.distributed import World
from shared.training.checkpoint import write_checkpoint
from shared.training.files import write_json
from shared.training.fingerprint import fingerprint, fingerprints
from shared.training.precision import autocast, computed_on, set_arithmetic
from shared.training.randomness import torch_rng
from shared.training.run import Run

PIXELS = "pixels"
ENCODER = (
    *COMMON, GPUS,
    Option("--epoch", Int(-1), -1, "checkpoint model_{epoch}.pth; -1: the last"),
    Option("--network", Text, None, "a network-snapshot-*.pkl of EDM/train.py in place of a checkpoint; --config then "
           "has the settings of the probe", metavar="SNAPSHOT"),
)


# ---------------------------------------------------------------- the frozen network

@dataclass(frozen=True)
class Encoder:
    """A network in eval mode without gradients, its diffusion model, and the config of the probe.

    net: None if the "features" are the pixels themselves, to compare with. name: in folders of results, such as ep400.
    widths: block name -> number of features. weights: fingerprint of the network's file, "" for fresh weights.
    precision: fp32, bf16 or fp16.
    """

    net: Any
    diffusion: Any
    config: Config
    name: str
    widths: dict[str, int]
    weights: str
    precision: str

    @property
    def probe(self) -> SimpleNamespace:
        return self.config.probe()

    def inputs(self, images: ImageSet, world: World) -> dict[str, str]:
        """Return the fingerprints of the inputs of a run on features of these images."""
        digests = distributed.on_main(lambda: fingerprints({"dataset": images}), world)
        return {**digests, "network": self.weights} if self.weights else digests

    def check_levels(self, levels: Sequence[int]) -> None:
        """Raise UserError for a noise level without features."""
        known = self.diffusion.levels()
        for level in levels:
            if level not in known:
                raise UserError(f"noise level {level}: {self.config.model_type} features are taken at {known[0]} to "
                                f"{known[-1]}")

    def features(self, x01: Tensor, level: int | Tensor, noise: Tensor, names: Sequence[str], norm: bool = False
                 ) -> dict[str, Tensor]:
        """Return float32 [N, width] for each named block; images in [0, 1]. The pass ends with the last of them."""
        if self.net is None:
            return {PIXELS: (2 * x01 - 1).flatten(1)}  # without noise, which could only make them worse
        with torch.no_grad(), autocast(x01.device, self.precision):
            return self.diffusion.features(self.net, x01, level, noise, names, norm)


def load_encoder(options: SimpleNamespace, device: torch.device, epoch: int | None = None) -> Encoder:
    """Return the encoder that --config, --epoch, --network and, if a script has it, --encoder name. UserError."""
    config = read_config(options.config, options.set)
    config.probe()
    precision = choose_precision(options, device)
    set_arithmetic(strict=False, tf32=precision != "fp32")
    if device.type == "cpu":
        keep_freed_memory()
    kind, snapshot = getattr(options, "encoder", "trained"), getattr(options, "network", None)
    if snapshot is not None and kind != "trained":
        raise UserError(f"--network and --encoder {kind} contradict each other; give one of them")
    if snapshot is not None:
        net, diffusion = load_snapshot(snapshot, device)
        weights = fingerprint(snapshot) if Path(snapshot).is_file() else snapshot  # or a URL
        return Encoder(net, diffusion, config, Path(snapshot).stem, net.widths, weights, precision)
    if kind == "pixels":
        # The meta device: only the shape of the images is needed.
        with torch.device("meta"):
            widths = {PIXELS: math.prod(make_network(config).image_shape)}
        return Encoder(None, make_diffusion(config), config, kind, widths, "", "fp32")
    if kind == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            net, diffusion = make_network(config).to(device), make_diffusion(config)
        name, weights = f"untrained{options.seed}", ""
    else:
        path, epoch = find_checkpoint(config, options.epoch if epoch is None else epoch)
        net, diffusion = load_model(config, epoch, device)
        name, weights = f"ep{epoch}", fingerprint(path)
    use_channels_last(net)
    return Encoder(net.eval().requires_grad_(False), diffusion, config, name, net.widths, weights, precision)


def load_split(encoder: Encoder, split: str, options: SimpleNamespace) -> ImageSet:
    """Return the images of the config's data set; UserError if they do not fit the network."""
    images = load_images(encoder.config.dataset, split, options.data_dir)
    shape = encoder.config.network["image_shape"] if encoder.net is None else encoder.net.image_shape
    check_fits(images, shape, encoder.config.classes)
    return images


# ---------------------------------------------------------------- heads

class LinearHeads(nn.Module):
    """Independent linear classifiers, one per key, trained as few batched matrix products.

    dims: key -> feature dimension. Heads of equal dimension lie in one tensor. A head's initial weights depend on
    (seed, key) alone, not on the other heads; they are distributed as PyTorch's Linear.
    """

    def __init__(self, dims: Mapping[str, int], classes: int, seed: int = 0) -> None:
        super().__init__()
        self.groups: dict[int, list[str]] = {}
        for key, dim in dims.items():
            self.groups.setdefault(dim, []).append(key)
        self.keys = [key for group in self.groups.values() for key in group]
        self.weight, self.bias = nn.ParameterDict(), nn.ParameterDict()
        for dim, keys in self.groups.items():
            weight, bias = torch.empty(len(keys), classes, dim), torch.empty(len(keys), 1, classes)
            for place, key in enumerate(keys):
                rng, bound = torch_rng(seed, 0, f"linear head {key}"), 1 / math.sqrt(dim)
                weight[place].uniform_(-bound, bound, generator=rng)
                bias[place].uniform_(-bound, bound, generator=rng)
            self.weight[str(dim)], self.bias[str(dim)] = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of all heads, [heads, N, classes], in the order of `keys`; features: key -> [N, dim]."""
        return torch.cat([
            torch.baddbmm(self.bias[str(dim)], torch.stack([features[key].float() for key in keys]),
                          self.weight[str(dim)].mT)
            for dim, keys in self.groups.items()])

    def head(self, key: str) -> tuple[Tensor, Tensor]:
        """Return (weight [classes, dim], bias [classes]) of one head: views, which may be written to."""
        for dim, keys in self.groups.items():
            if key in keys:
                place = keys.index(key)
                return self.weight[str(dim)].data[place], self.bias[str(dim)].data[place, 0]
        raise KeyError(key)


class NoiseHead(nn.Module):
    """Two layers on features of a noisy image, told its noise level: ([N, dim], t [N]) -> logits [N, num_classes].

    t: index of the level as an integer, not scaled; its embedding is added to the features. dim: a multiple of 8, at
    least 16.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.time_emb = TimeEmbedding(dim)
        self.cls = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, num_classes))

    def forward(self, features: Tensor, t: Tensor) -> Tensor:
        return self.cls(features + self.time_emb(t))


# ---------------------------------------------------------------- training and test, of a U-Net's blocks and a DiT's

# step -> (features by key [n, dim], labels int64 [n], this rank's fraction of the global batch)
Examples = Callable[[int], tuple[Mapping[str, Tensor], Tensor, float]]


def heads_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over heads: each gets the gradient of its own mean over N.

    logits: [heads, N, classes]; labels: int64 [N].
    """
    heads, count, classes = logits.shape
    losses = F.cross_entropy(logits.reshape(-1, classes), labels.repeat(heads), reduction="none")
    return losses.view(heads, count).mean(1).sum()


def cosine_rate(epoch: int, lr: float, epochs: int) -> float:
    """Return the learning rate of an epoch (from 0): lr (1 + cos(pi epoch / epochs)) / 2."""
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


def train_heads(run: Run, heads: LinearHeads, optimizer: torch.optim.Optimizer, examples: Examples, epochs: int,
                per_epoch: int, lr: float, steps: int | None = None) -> None:
    """Train all heads at once, each as if it were alone: Adam on its own cross-entropy, a cosine step per epoch.

    steps: number of steps; None: all epochs.
    """
    world = run.world
    model = distributed.data_parallel(heads, world)
    for step in run.steps(min(epochs * per_epoch, steps or epochs * per_epoch)):
        optimizer.param_groups[0]["lr"] = cosine_rate(step // per_epoch, lr, epochs)
        features, labels, fraction = examples(step)
        loss = heads_loss(model(features), labels)
        optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over ranks, whose parts of the batch may differ in size.
        (loss * (fraction * world.size)).backward()
        optimizer.step()
        run.log.add(loss=loss.detach() / len(heads.keys))


@torch.no_grad()
def test_heads(heads: LinearHeads, examples: Iterable[tuple[Mapping[str, Tensor], Tensor]], world: World
               ) -> dict[str, float]:
    """Return the fraction that each head classifies correctly of the items of all ranks, each counted once.

    examples: (features by key [n, dim] or, for several draws of the noise whose logits are averaged, [draws, n, dim];
    labels int64 [n]).
    """
    counts = torch.zeros(len(heads.keys) + 1, dtype=torch.int64, device=world.device)
    for features, labels in examples:
        draws = next(iter(features.values())).ndim == 3
        flat = {key: value.flatten(0, 1) for key, value in features.items()} if draws else features
        logits = heads(flat).unflatten(1, (-1, len(labels))).mean(1)
        counts[:-1] += (logits.argmax(2) == labels).sum(1)
        counts[-1] += len(labels)
    *correct, total = distributed.all_sum(counts, world).tolist()
    return {key: number / total for key, number in zip(heads.keys, correct, strict=True)}


test_heads.__test__ = False  # no test


def write_probes(run: Run, heads: LinearHeads, accuracies: Mapping[str, float], main_key: str, **facts: Any) -> None:
    """Write result.json and heads.pth: accuracies as fractions by key, `main_key` being the one that was asked for."""
    best = max(accuracies, key=accuracies.get)
    write_result(run, {"last": accuracies[main_key], "best_on_test": accuracies[best]}, probe=main_key, best=best,
                 probes=dict(accuracies), **facts)
    write_checkpoint(run.outdir / "heads.pth", {
        key: {name: part.cpu().clone() for name, part in zip(("weight", "bias"), heads.head(key), strict=True)}
        for key in heads.keys})


def write_result(run: Run, accuracy: Mapping[str, float], **facts: Any) -> None:
    """Write result.json of an evaluation: accuracies as fractions, `facts`, class names, and the settings."""
    write_json(run.outdir / "result.json", {
        "accuracy": accuracy, **facts, **run.extra(), "seed": run.config["seed"], "iterations": run.step,
        "precision": run.config["precision"], "seconds": round(run.seconds, 1), **computed_on(run.world.device),
        "config": run.config})
