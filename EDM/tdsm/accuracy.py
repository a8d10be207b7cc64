"""How often a classifier of noisy images is right, noise level by noise level."""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from EDM.tdsm.classifiers import class_logits
from EDM.tdsm.loss import log_matrix, noisy_log_posterior
from EDM.training.dataset import TrainingSet
from shared.report.plots import curves
from shared.training.files import atomic
from shared.training.randomness import numpy_rng, torch_rng
from shared.training.run import Run

LEVELS = tuple(float(f"{level:.3g}") for level in np.geomspace(0.01, 80, 9))  # σ
AT_ONCE = 250  # images of a forward
SHOWN = (0, 4, 6)  # levels whose course over training is drawn


@dataclass
class Accuracy:
    """Measures the accuracy of a classifier at every σ of LEVELS, on fixed images with fixed noise.

    images: uint8 [N, C, R, R]. labels: name -> int64 [N]; "observed" labels are compared with the most probable noisy
    class, Tᵀ c, and others with the most probable clean class, c. matrix: T, float64 [K, K], None where the network
    knows it. what: what the images are.
    """

    images: torch.Tensor
    labels: dict[str, torch.Tensor]
    matrix: np.ndarray | None
    seed: int
    what: str

    @torch.no_grad()
    def measure(self, net: torch.nn.Module) -> dict[str, list[float]]:
        """Return name of the labels -> share of right answers at every σ. net: in eval mode."""
        right = {name: [0] * len(LEVELS) for name in self.labels}
        for index, sigma in enumerate(LEVELS):
            generator = torch_rng(self.seed, index, "accuracy", self.images.device)
            for start in range(0, len(self.images), AT_ONCE):
                here = slice(start, start + AT_ONCE)
                images = self.images[here].to(torch.float32) / 127.5 - 1
                noise = torch.randn(images.shape, generator=generator, device=images.device)
                output = net(images + sigma * noise, torch.full([len(images)], sigma, device=images.device))
                logits = class_logits(output)
                matrix = output[1].log() if isinstance(output, tuple) else log_matrix(self.matrix, images.device)
                for name, labels in self.labels.items():
                    scores = noisy_log_posterior(logits, matrix) if name == "observed" else logits
                    right[name][index] += int((scores.argmax(1) == labels[here]).sum())
        return {name: [count / len(self.images) for count in counts] for name, counts in right.items()}

    def report(self, net: torch.nn.Module, nimg: int, run: Run) -> dict[str, float]:
        """Measure, write accuracy.json and accuracy.png into the run's folder, and return the numbers by name."""
        found = self.measure(net)
        history = [entry for entry in run.state.get("accuracy", []) if entry["nimg"] < nimg]
        run.state["accuracy"] = [*history, dict(nimg=nimg, **found)]
        self._write(run)
        return {f"Accuracy/{name}@sigma={sigma:g}": value for name, values in found.items()
                for sigma, value in zip(LEVELS, values, strict=True)}

    def outcome(self, run: Run) -> dict[str, Any]:
        """Return the entry of result.json: the accuracy at the lowest σ."""
        history = run.state.get("accuracy")
        if not history:
            return {}
        name = "clean" if "clean" in self.labels else "observed"
        values = [entry[name][0] for entry in history]
        return dict(accuracy=dict(last=values[-1], median_of_last_20=float(np.median(values[-20:]))),
                    accuracy_of=f"{name} labels at sigma {LEVELS[0]:g}, {self.what}")

    def _write(self, run: Run) -> None:
        history = run.state["accuracy"]
        content = dict(sigma=LEVELS, images=self.what, history=history)
        with atomic(run.outdir / "accuracy.json", "w") as file:
            file.write(json.dumps(content, indent=1))
        now, trained = f"accuracy after {history[-1]['nimg'] / 1000:.3g} thousand images", "thousand images"
        panels: dict[str, Any] = {now: {f"{name} labels": (LEVELS, history[-1][name]) for name in self.labels}}
        for name in self.labels:
            panels[f"accuracy, {name} labels"] = {f"σ = {LEVELS[level]:g}": (
                [entry["nimg"] / 1000 for entry in history], [entry[name][level] for entry in history])
                for level in SHOWN}
        curves(panels, run.outdir / "accuracy.png", dict.fromkeys(panels, trained) | {now: "noise level σ"},
               shares=True, log_x={now})


def accuracy_of(dataset: TrainingSet, clean: np.ndarray | None, count: int, matrix: np.ndarray | None, seed: int,
                device: torch.device, what: str, observed: bool = True) -> Accuracy:
    """Return the measurement on `count` images of a set, drawn by `seed`.

    clean: the clean labels int64 [N] of its images, if known. observed: whether the set's own labels are noisy ones;
    otherwise they are the clean ones.
    """
    chosen = np.sort(numpy_rng(seed, 0, "accuracy").permutation(len(dataset.images))[:count])
    own = torch.from_numpy(dataset.raw_labels[chosen]).to(device)
    labels = {"observed" if observed else "clean": own}
    if clean is not None:
        labels["clean"] = torch.from_numpy(clean[chosen]).to(device)
    images = torch.from_numpy(np.array(dataset.images[chosen])).to(device)
    return Accuracy(images, labels, matrix, seed, f"{len(chosen)} {what}")
