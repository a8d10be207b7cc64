"""Images from a latent diffusion model: batches of classes, previews, files by class, and the FID."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from EDM.latent.dpm_solver import ContinuousPath, DiscretePath, dpm_solver, dpm_solver_pp, guided
from EDM.latent.schedules import ContinuousSchedule, DiscreteSchedule, Schedule
from EDM.latent.uvit import UViT
from EDM.latent.vae import Coder, SpaceToDepth
from EDM.metrics.detectors import Detector
from EDM.metrics.features import extract, read_reference
from EDM.metrics.metrics import frechet_distance
from shared.cli import less_memory
from shared.data.writers import PngWriter
from shared.distributed import World
from shared.training.files import make_dir
from shared.training.precision import autocast
from shared.training.progress import Progress
from shared.training.randomness import numpy_rng, torch_rng

PREVIEW_CLASSES, PREVIEW_IMAGES, PREVIEW_STEPS = 5, 10, 50


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [0, 1] as uint8, rounded half up, as published PNGs are."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Sampler:
    """Draws images with a network, its schedule's solver and the decoder of latents.

    strict: the published arithmetic of the solver's schedule, float32. precision: of network and decoder.
    """

    net: UViT
    schedule: Schedule
    coder: Coder | SpaceToDepth
    z_shape: tuple[int, ...]
    precision: str = "fp32"
    strict: bool = False

    @property
    def device(self) -> torch.device:
        return self.net.pos_embed.device

    def predict(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """Return the noise in x at a network time."""
        with torch.no_grad(), autocast(x.device, self.precision):
            output = self.net(x, time, labels).to(x.dtype)
        if isinstance(self.schedule, ContinuousSchedule):
            return self.schedule.noise_prediction(output, x, time / self.schedule.time_scale)
        return output

    def latents(self, noise: Tensor, labels: Tensor | None, calls: int, scale: float = 0.0) -> Tensor:
        """Return latents [N, C, s, s] from standard normal noise by `calls` network calls. scale: of the guidance."""
        dtype = torch.float32 if self.strict else torch.float64
        model = guided(self.predict, labels, scale, self.net.none_label)
        if isinstance(self.schedule, DiscreteSchedule):
            return dpm_solver_pp(model, noise, calls, DiscretePath(self.schedule.betas, dtype))
        return dpm_solver(model, noise, calls, ContinuousPath(dtype))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images uint8 [N, 3, S, S]."""
        with autocast(latents.device, self.precision):
            return to_uint8(self.coder.decode(latents))

    def images(self, seed: int, purposes: Sequence[str], numbers: Sequence[int], labels: np.ndarray, calls: int,
               scale: float) -> Tensor:
        """Return images uint8 [n, 3, S, S] of these classes, the noise of each by (seed, number, purpose)."""
        noise = torch.stack([torch.randn(self.z_shape, generator=torch_rng(seed, number, purpose))
                             for number, purpose in zip(numbers, purposes, strict=True)]).to(self.device)
        chosen = torch.from_numpy(np.asarray(labels, np.int64)).to(self.device) if self.net.num_classes > 0 else None
        return self.decode(self.latents(noise, chosen, calls, scale))

    def previews(self, seed: int) -> dict[str, np.ndarray]:
        """Return a row of images for each of the first classes, uint8 [n, 3, S, S] by class number, without guidance.

        As published, those of the continuous schedule follow the ODE by Euler's method.
        """
        rows = max(1, min(PREVIEW_CLASSES, self.net.none_label))
        labels = torch.arange(rows, device=self.device).repeat_interleave(PREVIEW_IMAGES)
        noise = torch.randn([len(labels), *self.z_shape], generator=torch_rng(seed, 0, "preview")).to(self.device)
        labels = labels if self.net.num_classes > 0 else None
        if isinstance(self.schedule, ContinuousSchedule):
            def network(x: Tensor, time: Tensor) -> Tensor:
                with autocast(x.device, self.precision):
                    return self.net(x, time, labels).to(x.dtype)

            *_, latents = self.schedule.ode(network, noise, PREVIEW_STEPS)
        else:
            latents = self.latents(noise, labels, PREVIEW_STEPS)
        images = np.concatenate([self.decode(part).cpu().numpy() for part in latents.split(PREVIEW_IMAGES)])
        return {str(row): images[row * PREVIEW_IMAGES:][:PREVIEW_IMAGES] for row in range(rows)}


def chunks(items: Sequence, size: int) -> list[Sequence]:
    """Cut `items` into consecutive parts of `size`; the last may be shorter."""
    return [items[start:start + size] for start in range(0, len(items), size)]


@less_memory("--config.sample.mini_batch_size")
def write_classes(sampler: Sampler, folder: Path, classes: Sequence[str], per_class: int, seed: int, batch: int,
                  calls: int, scale: float, world: World) -> None:
    """Write folder/<class>/0.png ... of every class, each rank its part; existing files stay.

    An image depends on (seed, class number, its number) alone, up to the rounding of its batch.
    """
    wanted = [(label, number) for label in range(len(classes)) for number in range(per_class)]
    parts = chunks(wanted, batch)[world.rank::world.size]
    for name in classes:
        make_dir(folder / name)
    bar = Progress("generating", sum(map(len, parts)), "images", shown=world.main)
    with PngWriter() as writer:
        for part in parts:
            paths = [folder / classes[label] / f"{number}.png" for label, number in part]
            missing = [not path.exists() for path in paths]
            if any(missing):  # made as a whole: a repeated command computes the same batch
                labels, numbers = zip(*part, strict=True)
                images = sampler.images(seed, [f"class {label}" for label in labels], numbers, np.array(labels), calls,
                                        scale).cpu().numpy()
                writer.save((path, image) for path, image, new in zip(paths, images, missing, strict=True) if new)
            bar.advance(len(part))
    bar.close()


# ---------------------------------------------------------------- FID

class RandomImages:
    """Images of classes drawn uniformly, a source for EDM/metrics: made when they are asked for, never written."""

    classes: tuple[str, ...] = ()

    def __init__(self, sampler: Sampler, count: int, seed: int, calls: int, scale: float) -> None:
        self.sampler, self.seed, self.calls, self.scale = sampler, seed, calls, scale
        self.labels = numpy_rng(seed, 0, "classes for FID").integers(0, max(sampler.net.none_label, 1), count)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            labels = self.labels[np.asarray(part, np.int64)]
            if not len(part):
                yield torch.zeros(0, 3, 1, 1, dtype=torch.uint8), torch.from_numpy(labels)
                continue
            images = self.sampler.images(self.seed, ["image for FID"] * len(part), part, labels, self.calls, self.scale)
            yield images, torch.from_numpy(labels)


@less_memory("--config.sample.mini_batch_size")
def fid(sampler: Sampler, count: int, seed: int, calls: int, scale: float, batch: int, detector: Detector,
        statistics: Path, world: World) -> float:
    """Return the Fréchet distance of `count` images, labels drawn uniformly, to the statistics in an npz file."""
    reference = read_reference(str(statistics), detector)
    found = extract(RandomImages(sampler, count, seed, calls, scale), detector, batch, world)
    mu, sigma = found.moments.mean_and_covariance()
    return frechet_distance(mu, sigma, reference.mu.to(mu.device), reference.sigma.to(mu.device))

