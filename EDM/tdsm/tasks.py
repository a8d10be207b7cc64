"""The methods of train_noise.py and train_classifier.py ("Label-Noise Robust Diffusion Models", Na et al., ICLR 2024),
and the accuracy of a classifier at every noise level.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from EDM.tdsm import noise, transition
from EDM.tdsm.classifiers import CLASSIFIERS, class_logits, volmin_transition
from EDM.tdsm.loss import ClassifierLoss, TDSMLoss, VolMinLoss, log_matrix, noisy_log_posterior
from EDM.tdsm.noise import Noise
from EDM.training.dataset import TrainingSet
from EDM.training.snapshots import Snapshot, read_snapshot
from EDM.training.training_loop import Denoising
from shared.cli import UserError
from shared.distributed import World, sync_batchnorm
from shared.report.plots import Panel, curves
from shared.training.files import write_json
from shared.training.randomness import numpy_rng, torch_rng
from shared.training.run import Run

VM_SCHEDULE = (1500, 3000, 7500)  # thousand images


# ------------------------------------------------------------------------------------------------------ the denoiser

class TDSM(Denoising):
    """A denoiser of clean classes, from noisy labels and, unless they are clean, the snapshot of a classifier."""

    same_shapes = False  # an image goes through the network once for each label that it may have

    def __init__(self, options: Mapping[str, Any], dataset: TrainingSet, world: World, label_noise: Noise,
                 snapshot: Snapshot | None) -> None:
        super().__init__(options, dataset, world)
        classifier, loss = None, options["loss_kwargs"]
        if snapshot is not None and not np.array_equal(label_noise.matrix, np.eye(dataset.label_dim)):
            classifier = snapshot.build(CLASSIFIERS).to(world.device, memory_format=torch.channels_last)
        settings = {name: loss[name] for name in ("tau", "temp", "relative_tau", "renormalise", "full_gradient",
                                                  "label_dropout") if name in loss}
        self.loss_fn = TDSMLoss(self.loss_fn, label_noise.matrix, classifier, **settings,
                                pair_batch=options.get("pairs_gpu"), device=world.device)
        self.loss_kwargs = {**loss, **label_noise.record()}


def classifier_snapshot(path: str | None, dataset: TrainingSet) -> Snapshot | None:
    """Read the classifier's snapshot; raise UserError unless it is one, for images and classes of the data set."""
    if path is None:
        return None
    snapshot = read_snapshot(path).expect(CLASSIFIERS, "a classifier of noisy images")
    names = snapshot.dataset_kwargs.get("class_names") or list(dataset.classes)
    if dataset.classes and names != list(dataset.classes):
        raise UserError(f"--cls: {path} is a classifier of the classes {', '.join(map(str, names[:10]))}, but those of "
                        f"the data are {', '.join(dataset.classes[:10])}; train one on this data with "
                        "train_classifier.py")
    for name, value, unit in (("label_dim", dataset.label_dim, "classes"),
                              ("img_channels", dataset.num_channels, "image channels"),
                              ("img_resolution", dataset.resolution, "pixels a side")):
        found = snapshot.init_kwargs.get(name, 0)
        if found != value:
            raise UserError(f"--cls: {path} is a classifier for {found} {unit}, but the data has {value}; train one on "
                            "this data with train_classifier.py")
    return snapshot


# ---------------------------------------------------------------------------------------------------- the classifier

class NoisyClassification(Denoising):
    """A classifier of noisy images, by forward correction with a known transition matrix, or by VolMinNet.

    data: path of the training set. test: clean-labelled images to measure the accuracy on, in place of its own.
    """

    networks, ema_buffers, same_shapes = CLASSIFIERS, "copy", False

    def __init__(self, options: Mapping[str, Any], dataset: TrainingSet, world: World, label_noise: Noise, data: str,
                 test: TrainingSet | None) -> None:
        super().__init__(options, dataset, world)
        # The statistics of the global batch: ranks agree on the network.
        self.net = sync_batchnorm(self.net, world).to(memory_format=torch.channels_last)
        self.data, self.learned, self.values_per_image = data, label_noise.matrix is None, 1
        if self.learned:
            self.loss_fn = VolMinLoss(self.loss_fn)
        else:
            self.loss_fn = ClassifierLoss(self.loss_fn, label_noise.matrix, world.device)
        self.loss_kwargs = {**options["loss_kwargs"], **label_noise.record()}
        count, seed = options.get("accuracy_images", 500), options["seed"]
        if test is None:
            self.accuracy = accuracy_of(dataset, noise.clean_labels(data), count, label_noise.matrix, seed,
                                        world.device, "training images")
        else:
            self.accuracy = accuracy_of(test, None, count, label_noise.matrix, seed, world.device,
                                        "images of --eval-data", observed=False)

    def learning_rate(self, nimg: int) -> float:
        """As of a denoiser; that of VolMinNet falls twice to a tenth and, once the matrix is fixed, starts anew."""
        if not self.learned:
            return super().learning_rate(nimg)
        base, kimg = self.options["optimizer_kwargs"]["lr"], nimg / 1000
        first, second, third = self.options.get("vm_schedule_kimg", VM_SCHEDULE)
        return base * (1 if kimg < first or kimg >= third else 0.1 if kimg < second else 0.01)

    def ema_beta(self, nimg: int) -> float:
        return super().ema_beta(nimg) if self.options.get("averaged") else 0.0  # 0 copies, as published

    def frozen(self, nimg: int) -> Sequence[torch.nn.Parameter]:
        fixed = self.learned and nimg >= 1000 * self.options.get("vm_schedule_kimg", VM_SCHEDULE)[2]
        return (self.net.transition_matrix,) if fixed else ()

    def report(self, net: torch.nn.Module, nimg: int, run: Run) -> dict[str, float]:
        found = self.accuracy.report(net, nimg, run)
        name = list(self.accuracy.labels)[-1]
        run.log.print(f"accuracy ({name} labels): " + "  ".join(
            f"{value:.3f} at {key.rpartition('=')[2]}" for key, value in list(found.items())[-9::2]))
        if self.learned:
            matrix = volmin_transition(net.transition_matrix).double().cpu().numpy()
            run.log.print(f"transition matrix: {transition.describe(matrix)}")
            error = noise.transition_error(matrix, self.data)
            if error is not None:
                found["Transition/error"] = error
        return found

    def outcome(self, run: Run) -> dict[str, Any]:
        return self.accuracy.outcome(run)


# ------------------------------------------------------------------------------------- its accuracy by noise level

LEVELS = tuple(float(f"{level:.3g}") for level in np.geomspace(0.01, 80, 9))  # σ
BATCH = 250  # images of a forward
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
        """Return name of the labels -> fraction of right answers at every σ. net: in eval mode."""
        right = {name: [0] * len(LEVELS) for name in self.labels}
        for index, sigma in enumerate(LEVELS):
            generator = torch_rng(self.seed, index, "accuracy", self.images.device)
            for start in range(0, len(self.images), BATCH):
                here = slice(start, start + BATCH)
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
        write_json(run.outdir / "accuracy.json", content)
        now = f"After {history[-1]['nimg'] / 1000:.3g} thousand images"
        panels = {now: Panel({f"{name} labels": (LEVELS, history[-1][name]) for name in self.labels}, "noise level σ",
                             "accuracy, %", percent=True, log_x=True)}
        trained = [entry["nimg"] / 1000 for entry in history]
        for name in self.labels:
            lines = {f"σ = {LEVELS[level]:g}": (trained, [entry[name][level] for entry in history]) for level in SHOWN}
            panels[f"{name.capitalize()} labels"] = Panel(lines, "thousand images", "accuracy, %", percent=True)
        curves(panels, run.outdir / "accuracy.png")


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
