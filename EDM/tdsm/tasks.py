"""What train_classifier.py and train_noise.py train ("Label-Noise Robust Diffusion Models", Na et al., ICLR 2024)."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from EDM.tdsm import noisy_set, transition
from EDM.tdsm.accuracy import accuracy_of
from EDM.tdsm.classifiers import CLASSIFIERS, volmin_transition
from EDM.tdsm.loss import ClassifierLoss, TDSMLoss, VolMinLoss
from EDM.tdsm.noisy_set import Noise
from EDM.training.config import PRECONDITIONINGS
from EDM.training.dataset import TrainingSet
from EDM.training.loss import LOSSES
from EDM.training.networks import PRECONDITIONERS
from EDM.training.snapshots import Snapshot, expect_kind, read_snapshot
from EDM.training.training_loop import Task, averaging, build, image_shape, ramp
from shared.cli import UserError
from shared.distributed import World
from shared.training.batchnorm import sync_batchnorm
from shared.training.run import Run

VM_SCHEDULE = (1500, 3000, 7500)  # thousand images


# ---------------------------------------------------------------------------------------------------- the classifier

def classifying(options: Mapping[str, Any], dataset: TrainingSet, world: World, flags: SimpleNamespace,
                noise: Noise) -> Task:
    """Return the training of a classifier of noisy images, by forward correction or VolMinNet."""
    net, augment = build(options, dataset, world.device, CLASSIFIERS)
    # The statistics of the global batch, so that ranks agree on the network and need not wait for one another's.
    net = sync_batchnorm(net, world).to(memory_format=torch.channels_last)
    learned = noise.matrix is None
    levels = levels_of(options)
    if learned:
        loss_fn, rate = VolMinLoss(levels), volmin_rate(options)
    else:
        loss_fn, rate = ClassifierLoss(levels, noise.matrix, world.device), ramp(options)
    freeze_at = 1000 * options.get("vm_schedule_kimg", VM_SCHEDULE)[2]

    def frozen(nimg: int) -> tuple[torch.nn.Parameter, ...]:
        return (net.transition_matrix,) if learned and nimg >= freeze_at else ()

    accuracy = measurement(options, dataset, world, flags, noise)

    def report(average: torch.nn.Module, nimg: int, run: Run) -> dict[str, float]:
        found = accuracy.report(average, nimg, run)
        name = list(accuracy.labels)[-1]
        run.log.print(f"accuracy ({name} labels): " + "  ".join(
            f"{value:.3f} at {key.rpartition('=')[2]}" for key, value in list(found.items())[-9::2]))
        if learned:
            matrix = volmin_transition(average.transition_matrix).double().cpu().numpy()
            run.log.print(f"transition matrix: {transition.describe(matrix)}")
            error = noisy_set.transition_error(matrix, flags.data)
            if error is not None:
                found["Transition/error"] = error
        return found

    def beta(nimg: int) -> float:
        return averaging(options, nimg) if options.get("averaged") else 0.0  # 0 copies, as published

    return Task(net, loss_fn, augment, 1, rate, beta, "copy", frozen, report, accuracy.outcome,
                dict(options["loss_kwargs"], **noise.record()))


def measurement(options: Mapping[str, Any], dataset: TrainingSet, world: World, flags: SimpleNamespace,
                noise: Noise) -> Any:
    """Return the Accuracy on --eval-data, or else on images of the training set."""
    count, seed = options.get("accuracy_images", 500), options["seed"]
    test = noisy_set.open_eval_set(flags, dataset)
    if test is None:
        return accuracy_of(dataset, noisy_set.clean_labels(flags.data), count, noise.matrix, seed, world.device,
                           "training images")
    return accuracy_of(test, None, count, noise.matrix, seed, world.device, "images of --eval-data", observed=False)


def volmin_rate(options: Mapping[str, Any]) -> Callable[[int], float]:
    """Return number of images seen -> learning rate of VolMinNet: it falls twice to a tenth and, once the transition
    matrix is fixed, starts anew."""
    base, (first, second, third) = options["optimizer_kwargs"]["lr"], options.get("vm_schedule_kimg", VM_SCHEDULE)

    def rate(nimg: int) -> float:
        kimg = nimg / 1000
        return base * (1 if kimg < first or kimg >= third else 0.1 if kimg < second else 0.01)

    return rate


# ------------------------------------------------------------------------------------------------------ the denoiser

def denoising_from_noisy_labels(options: Mapping[str, Any], dataset: TrainingSet, world: World,
                                flags: SimpleNamespace) -> Task:
    """Return the training of a denoiser of clean classes from noisy labels."""
    snapshot = classifier_snapshot(flags.cls, dataset)
    noise = noisy_set.agreed_noise(flags, dataset.label_dim, snapshot)
    net, augment = build(options, dataset, world.device, PRECONDITIONERS)
    classifier = None
    if snapshot is not None and not np.array_equal(noise.matrix, np.eye(dataset.label_dim)):
        classifier = snapshot.build().to(world.device, memory_format=torch.channels_last)
    settings = {name: value for name, value in options["loss_kwargs"].items()
                if name in ("tau", "temp", "relative_tau", "renormalise", "full_gradient", "label_dropout")}
    loss_fn = TDSMLoss(levels_of(options), noise.matrix, classifier, **settings, pairs_at_once=flags.pairs_gpu,
                       device=world.device)
    return Task(net, loss_fn, augment, int(np.prod(image_shape(dataset))), ramp(options),
                lambda nimg: averaging(options, nimg), loss_kwargs=dict(options["loss_kwargs"], **noise.record()))


def classifier_snapshot(path: str | None, dataset: TrainingSet) -> Snapshot | None:
    """Read the classifier's snapshot; raise UserError unless it is one, for images and classes of the data set."""
    if path is None:
        return None
    snapshot = expect_kind(read_snapshot(path), CLASSIFIERS, "a classifier of noisy images")
    expected = dict(label_dim=dataset.label_dim, img_channels=dataset.num_channels, img_resolution=dataset.resolution)
    words = dict(label_dim="classes", img_channels="image channels", img_resolution="pixels a side")
    for name, value in expected.items():
        found = snapshot.init_kwargs.get(name, 0)
        if found != value:
            raise UserError(f"--cls: {path} is a classifier for {found} {words[name]}, but the data has {value}; train "
                            "one on this data with train_classifier.py")
    return snapshot


def levels_of(options: Mapping[str, Any]) -> Any:
    """Return the loss of EDM/training/loss.py whose noise levels and weights a run takes."""
    loss = options["loss_kwargs"]
    name = loss["class_name"].removeprefix("training.loss.")
    kind = next(kind for kind in PRECONDITIONINGS.values() if name.startswith(kind))
    constants = {name: loss[name] for name in ("sigma_data", "P_mean", "P_std") if name in loss}
    return LOSSES[f"{kind}Loss"](**constants)
