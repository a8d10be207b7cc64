"""The photographs of train_meta_imagenet.py and train_imagenet.py, from record files, and torchvision's networks."""
from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from MetaSemi.core.meta import CosAnnealingLR
from MetaSemi.core.training import Batch, Source
from MetaSemi.imagenet.records import RecordFile
from MetaSemi.imagenet.views import CentreCrop, Epochs, RandomCrop
from shared import distributed
from shared.cli import Choice, Option, UserError
from shared.data.photographs import MEAN, STD, Photographs, Request
from shared.data.pool import batches, choose_decoder
from shared.distributed import World
from shared.training.fingerprint import fingerprints
from shared.training.randomness import numpy_rng

LABELED, UNLABELED, VALIDATION = "train_label", "train_unlabel", "val"
VALIDATION_BATCH = 50
PREFIX = "module."  # before the names in published checkpoints
# These have auxiliary classifiers; built without them, their output is the logits alone.
WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
ARCH = Option("-a --arch", Choice(*CLASSIFIERS), "resnet18", "a classifier of torchvision")


class RecordImages(Source):
    """Photographs that are decoded and cropped as they are needed. An epoch passes over the unlabelled images, or over
    the labelled ones if there are no others.

    Draws are for the batch of all processes together, so two of them train as one of twice the batch.
    """

    network_entry, best_entry = "state_dict", "best_acc1"
    lines = ("Test: [{number}/{count}] Test Loss {loss:.3f} (avg={loss_avg:.3f}) Acc1 {acc1:.3f} (avg={acc1_avg:.3f}) "
             "Acc5 {acc5:.3f} (avg={acc5_avg:.3f})", " * Prec@1 {acc1:.5f} Prec@5 {acc5:.5f}")
    best_line = "Best acc1={:.5f}"
    rate_tag, test_tags = "train/learning-rate", ("test/acc1", "test/acc5")
    by_epoch = True
    channels = 3

    def __init__(self, options: SimpleNamespace, world: World, unlabeled: bool) -> None:
        self.options, self.world, self.log_every = options, world, options.print_freq
        self.decoder = choose_decoder(options.decoder)
        self.batch = options.batch_size * world.size
        self.view = RandomCrop(options.imcrop)
        names = (LABELED, UNLABELED) if unlabeled else (LABELED,)
        self.pools = {name: self._open(name) for name in (*names, VALIDATION)}
        self._match_classes()
        self.orders = {name: Epochs(len(self.pools[name]), self.batch, self._rng, name) for name in names}
        self.length = self.orders[names[-1]].length
        self.first, self.total = options.start_epoch * self.length, options.epochs * self.length
        records = {f"--data ({name})": [Path(options.data) / f"{name}.{suffix}" for suffix in ("rec", "idx")]
                   for name in self.pools}
        self.inputs = distributed.on_main(lambda: fingerprints(records), world)
        self.schedule = CosAnnealingLR(self.length, options.epochs, options.lr, options.warmup)
        on_gpu = world.device.type == "cuda" and not options.strict
        self.layout = torch.channels_last if on_gpu else torch.contiguous_format

    def _open(self, name: str) -> Photographs:
        """Open a record file of --data; UserError."""
        options = self.options
        images = RecordFile(Path(options.data) / f"{name}.rec", options.skip_bad)
        if images.skipped:
            warnings.warn(f"{len(images.skipped)} bad records are left out, the first: {images.skipped[0]}",
                          stacklevel=2)
        return Photographs(images, options.num_classes, options.skip_bad)

    def _match_classes(self) -> None:
        """Let the labels of all record files be those of the labelled one, by name; UserError."""
        self.classes = self.pools[LABELED].files.classes
        for pool in self.pools.values():
            if pool.files.classes and self.classes:
                pool.files.match_classes(self.classes)
        val = self.pools[VALIDATION]
        if len(val) > 1 and self.options.num_classes > 1 and val.files.has_one_label():
            raise UserError(f"{val.files.path}: all images have the same label, as of a folder without class folders; "
                            "sort them into val/<class>/<file> and pack them anew with im2rec.py --recursive")

    def _rng(self, step: int, purpose: str) -> np.random.Generator:
        return numpy_rng(self.options.seed, step, purpose)

    def __str__(self) -> str:
        counts = ", ".join(f"{len(pool)} in {name}" for name, pool in self.pools.items())
        return f"images: {counts}; decoded by {self.decoder}; {self.length} iterations an epoch"

    def config(self) -> dict[str, Any]:
        sizes = {f"images in {name}": len(pool) for name, pool in self.pools.items()}
        return {"global_batch": self.batch, **sizes}

    def network(self) -> nn.Module:
        return make_classifier(self.options.arch, self.options.num_classes, self.options.imcrop)

    def normalise_as(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        if not np.allclose((mean, std), (MEAN, STD), atol=1e-3):
            raise UserError(f"--pretrained {self.options.pretrained}: its weights expect images normalised by {mean} "
                            f"and {std}, photographs are by {MEAN} and {STD}; give weights of such images")

    def stored(self, net: nn.Module) -> Prefixed:
        return Prefixed(net)

    def images_seen(self) -> dict[str, Any]:
        options = self.options
        return {"classes": self.classes, "arch": options.arch, "mean": MEAN, "std": STD,
                "size": (options.imcrop, options.imcrop), "resize": "centre-edge", "side": options.imsize}

    def stream(self, first: int, stop: int) -> Iterator[Batch]:
        kinds = [self._decoded(self.pools[name], self.view, lambda step, name=name: self._request(name, step),
                               range(first, stop)) for name in self.orders]
        for parts in zip(*kinds, strict=True):
            yield Batch(*(tensor for part in parts for tensor in part))

    def _request(self, name: str, step: int) -> Request:
        """Return which photographs of a pool this rank takes in a step, and how they are cropped."""
        part = self.world.slice(self.batch)
        crops = self.view.draw(self.batch, self._rng(step, f"{name} crops"))
        return Request(self.orders[name](step)[part], crops[part])

    def _decoded(self, *wanted: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches on the device of the training, in its memory order. wanted: as for shared.data.pool.batches."""
        device = self.world.device
        decoding = torch.device("cpu") if self.options.dali_cpu else device
        for images, labels in batches(*wanted, decoding, self.options.workers, self.decoder):
            yield (images.to(device, non_blocking=True, memory_format=self.layout),
                   labels.to(device, non_blocking=True))

    def rate(self, step: int) -> float:
        self.schedule.count = step
        return self.schedule.step()

    def place(self, step: int) -> dict[str, int]:
        epoch, place = divmod(step, self.length)
        return {"epoch": epoch, "epochs": self.options.epochs, "step": place, "length": self.length}

    def test_batches(self) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
        """Return the validation images of this rank, each once."""
        pool, size = self.pools[VALIDATION], VALIDATION_BATCH
        own = np.arange(len(pool))[self.world.rank::self.world.size]
        count = -(-len(own) // size)
        view = CentreCrop(self.options.imcrop, self.options.imsize)
        return self._decoded(pool, view, lambda step: Request(own[step * size:(step + 1) * size]), range(count)), count

    def facts(self, state: dict[str, Any]) -> dict[str, Any]:
        options = self.options
        bad = {name: len(union(set(pool.bad), self.world)) for name, pool in self.pools.items()}
        note = ", ".join(f"{count} in {name}" for name, count in bad.items() if count)
        return {"dataset": "imagenet", "arch": options.arch, "epochs": options.epochs, "global_batch": self.batch,
                "images": {name: len(pool) for name, pool in self.pools.items()}, "bad_records": bad,
                "decoder": self.decoder, "note": f"bad records left out: {note}" if note else "",
                "accuracy": {"last_top5": state.get("acc5"), "best_epoch": state.get("best_epoch")}}


class Prefixed:
    """A network whose state has `module.` before every name, as data-parallel training saves it."""

    def __init__(self, net: nn.Module) -> None:
        self.module = net

    def state_dict(self) -> dict[str, Tensor]:
        return {PREFIX + name: value for name, value in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()})


def make_classifier(name: str, classes: int, side: int) -> nn.Module:
    """Return torchvision's untrained network `name` for images of `side` x `side`, on the CPU, in train mode.

    Networks whose weights depend on the size of the images (ViT, MaxViT) are built for `side`. Raises UserError for a
    side that the network does not take.
    """
    sized: dict[str, Any] = {}
    if name.startswith("vit_"):
        sized["image_size"] = side
    elif name == "maxvit_t":
        sized["input_size"] = (side, side)
    elif name in WITH_AUXILIARY_HEADS:
        sized = {"aux_logits": False, "init_weights": True}
    try:
        net = torchvision.models.get_model(name, weights=None, num_classes=classes, **sized)
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"--imcrop {side}: {name} does not take images of this size "
                        f"({str(error).partition(chr(10))[0]})") from None
    if logits.shape != (1, classes):
        raise UserError(f"--arch {name}: expected {classes} logits an image, found {tuple(logits.shape)}")
    return net.train()


def union(positions: set[int], world: World) -> set[int]:
    """Return the union over ranks."""
    if world.size == 1:
        return positions
    parts: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(parts, positions)
    return set().union(*parts)
