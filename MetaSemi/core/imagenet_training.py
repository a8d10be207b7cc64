"""What train_meta_imagenet.py and train_imagenet.py share: data, network, run folder, log, validation.

The method is theirs. Draws are for the batch of all processes together, so two of them train as one of twice the batch.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from MetaSemi.core.classifiers import make_classifier
from MetaSemi.core.meters import Best, Meters
from MetaSemi.core.schedules import CosAnnealingLR
from MetaSemi.core.training import MEDIAN_OF, adopt, choose_precision
from MetaSemi.core.validation import validate
from MetaSemi.imagenet.records import RecordFile
from MetaSemi.imagenet.views import CentreCrop, Epochs, RandomCrop
from shared import distributed
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.data.photographs import Photographs, Request
from shared.data.pool import batches, choose_decoder
from shared.distributed import World, sync_batchnorm
from shared.training.checkpoint import load_newest, read_checkpoint
from shared.training.files import atomic
from shared.training.log import Log
from shared.training.precision import computed_on, dtype_of, set_arithmetic
from shared.training.randomness import numpy_rng
from shared.training.run import Run

CHECKPOINT, BEST, RESULT = "checkpoint.pth", "model_best.pth", "result.json"
LABELED, UNLABELED, VALIDATION = "train_label", "train_unlabel", "val"
VALIDATION_BATCH = 50
PREFIX = "module."  # before the names in published checkpoints


class Images(NamedTuple):
    """This rank's part of a step's batch: float32 [n, 3, S, S] normalised and int64 [n]; `truth` is for metrics."""

    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor | None = None
    truth: Tensor | None = None


class Prefixed:
    """A network whose state has `module.` before every name, as data-parallel training saves it."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.module = net

    def state_dict(self) -> dict[str, Tensor]:
        return {PREFIX + name: value for name, value in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()})


class Training:
    """A run of either script; iterate over `steps`, and give each step's numbers to `log`.

    unlabeled: whether batches have unlabelled images, which an epoch then passes over. Attributes for the method:
    `net`, `optimizer`, `world`, `autocast` (dtype or None).
    """

    def __init__(self, options: argparse.Namespace, unlabeled: bool) -> None:
        self.options = options
        self.decoder = choose_decoder(options.decoder)
        self.world = world = distributed.start(options.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.precision = choose_precision(options, world.device)
        self.autocast = dtype_of(self.precision)
        set_arithmetic(options.strict)

        # Everything is read and checked before the folder is touched.
        self.batch = options.batch_size * world.size
        self.view = RandomCrop(options.imcrop)
        names = (LABELED, UNLABELED) if unlabeled else (LABELED,)
        self.pools = {name: self.open(name) for name in (*names, VALIDATION)}
        self.orders = {name: Epochs(len(self.pools[name]), self.batch, self.rng, name) for name in names}
        self.length = self.orders[names[-1]].length
        self.total = self.length * options.epochs
        self.schedule = CosAnnealingLR(self.length, options.epochs, options.lr, options.warmup)
        torch.manual_seed(options.seed)
        net = make_classifier(options.arch, options.num_classes, options.imcrop)
        if world.device.type == "cuda" and not options.strict:
            net = net.to(memory_format=torch.channels_last)
        self.net = sync_batchnorm(net.to(world.device), world).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=options.lr, momentum=options.momentum,
                                         weight_decay=options.weight_decay, fused=not options.strict)
        self.meters, self.best = Meters(), Best()
        self.open_run()

    def open(self, name: str) -> Photographs:
        """Open a record file of --data; UserError."""
        options = self.options
        images = RecordFile(Path(options.data) / f"{name}.rec", options.skip_bad)
        if images.skipped:
            warnings.warn(f"{len(images.skipped)} bad records are left out, the first: {images.skipped[0]}",
                          stacklevel=2)
        return Photographs(images, options.num_classes, options.skip_bad)

    def open_run(self) -> None:
        """Open the run folder and continue what is in it, or what --resume names."""
        options, folder, world = self.options, Path(self.options.save_path), self.world
        sizes = {f"images in {name}": len(pool) for name, pool in self.pools.items()}
        config = {**options.method, "global_batch": self.batch, "precision": self.precision, **sizes}
        resume = resume_from(options, folder, config)
        if options.evaluate and resume == "auto" and load_newest(folder / CHECKPOINT) is None:
            raise UserError(f"--evaluate: give --resume FILE; {folder} holds no run")
        log = Log(folder, world, every=options.print_freq, image_batch=self.batch * len(self.orders), tensorboard=False)
        self.run = Run(folder, config, world=world, log=log, checkpoint=CHECKPOINT,
                       keep={"state_dict": Prefixed(self.net), "optimizer": self.optimizer, "best_acc1": self.best,
                             "meters": self.meters},
                       resume=resume, restart=options.overwrite, save_every=self.length,
                       save_seconds=options.save_seconds,
                       extra=lambda: {"epoch": self.run.step // self.length})
        self.meters.to(world.device)
        adopt(self.optimizer, fused=not options.strict)
        for group in self.optimizer.param_groups:  # the command line's, whatever the checkpoint was made with
            group |= {"momentum": options.momentum, "weight_decay": options.weight_decay}
        if self.run.resumed_from is None:
            self.run.step = options.start_epoch * self.length
        elif resume != "auto":
            content = read_checkpoint(resume)
            if "step" not in content:  # one of the original code
                self.run.step = int(content["epoch"]) * self.length
            self.run.state["resumed"] = str(Path(resume).resolve())
        self.board = None
        if world.main and not options.evaluate:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(folder))
        shown = {key: value for key, value in vars(options).items() if key not in ("method", "given")}
        self.say(f"Called with args: {argparse.Namespace(**shown)}")
        counts = ", ".join(f"{len(pool)} in {name}" for name, pool in self.pools.items())
        self.say(f"images: {counts}; {world.size} process(es) on {world.device.type}, {self.precision}, decoded by "
                 f"{self.decoder}; {self.length} iterations an epoch")

    # ---------------------------------------------------------------------------------------------------------- data

    def rng(self, step: int, purpose: str) -> np.random.Generator:
        """Return the host generator of a step, the same on every rank."""
        return numpy_rng(self.options.seed, step, purpose)

    def request(self, name: str, step: int) -> Request:
        """Return which photographs of a pool this rank takes in a step, and how they are cropped."""
        part = self.world.slice(self.batch)
        crops = self.view.draw(self.batch, self.rng(step, f"{name} crops"))
        return Request(self.orders[name](step)[part], crops[part])

    def stream(self, name: str, first: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.ready(batches(self.pools[name], self.view, lambda step: self.request(name, step),
                                  range(first, stop), self.decoding_device(), self.options.workers, self.decoder))

    def decoding_device(self) -> torch.device:
        return torch.device("cpu") if self.options.dali_cpu else self.world.device

    def ready(self, made: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches on the device of the training, in the layout that suits it."""
        layout = torch.channels_last if self.world.device.type == "cuda" and not self.options.strict \
            else torch.contiguous_format
        for images, labels in made:
            yield (images.to(self.world.device, non_blocking=True, memory_format=layout),
                   labels.to(self.world.device, non_blocking=True))

    def mixing(self, step: int) -> Tensor:
        """Return the mix-up coefficients of this rank's labelled images, float32 [n, 1]."""
        drawn = self.rng(step, "mix-up").beta(self.options.alpha, self.options.alpha, (self.batch, 1))
        return torch.from_numpy(drawn.astype(np.float32))[self.world.slice(self.batch)].to(self.world.device)

    # --------------------------------------------------------------------------------------------------------- steps

    def steps(self) -> Iterator[tuple[int, float, Images]]:
        """Yield (step, learning rate, this rank's images) to the end of the training; then write the result."""
        total = min(self.total, self.options.iterations or self.total)
        streams = [self.stream(name, self.run.step, total) for name in self.orders]
        self.batch_time, self.data_time, self.timed = 0.0, 0.0, 0
        last = time.perf_counter()
        for step in self.run.steps(total):
            # Dropout, in those networks that have it, depends on step and rank alone.
            torch.manual_seed((self.options.seed * 1_000_003 + step) * 4096 + self.world.rank & (1 << 63) - 1)
            images = Images(*(part for stream in streams for part in next(stream)))
            self.schedule.count = step
            self.rate = self.schedule.step()
            self.data_time += time.perf_counter() - last
            yield step, self.rate, images
            self.timed += 1
            self.batch_time += time.perf_counter() - last
            self.finish_step(step, step + 1 == total)
            last = time.perf_counter()
        self.write_result()
        distributed.stop()

    def log(self, line: str, total: Tensor, **values: Tensor) -> None:
        """Give the numbers of the step at hand, tensors [] which are read now and then.

        line: of the log, with {epoch}, {epochs}, {step}, {length}, {btime}, {dtime}, {rate}, and {name} and {name_avg}
        of each of `values`, which also become scalars. total: the loss, which must remain finite.
        """
        self.run.log.add(loss=total)
        means = distributed.mean(torch.stack([value.detach().float() for value in values.values()]), self.world)
        self.meters.add(dict(zip(values, means, strict=True)))
        self.line = line

    def finish_step(self, step: int, last: bool) -> None:
        epoch, place = divmod(step, self.length)
        if place % self.options.print_freq == 0:
            figures = {}
            for name, (value, average) in self.meters.read(World()).items():
                figures |= {name: value, f"{name}_avg": average}
            self.say(self.line.format(epoch=epoch, epochs=self.options.epochs, step=place, length=self.length,
                                      rate=self.rate, btime=self.batch_time / self.timed,
                                      dtime=self.data_time / self.timed, **figures))
            self.scalar("train/learning-rate", self.rate, step)
        if place + 1 == self.length or last:
            means = self.run.log.means()  # all losses were finite, or this ends the run
            for name, (_, average) in self.meters.read(World()).items():
                self.scalar(f"train/{name.replace('_', '-')}", average, epoch)
            if place + 1 == self.length:
                self.meters.reset()
            self.evaluate(epoch, means)

    def scalar(self, name: str, value: float, x: int) -> None:
        if self.board is not None:
            self.board.add_scalar(name, value, x)

    # ---------------------------------------------------------------------------------------------------- validation

    def validate(self) -> tuple[float, float, float]:
        """Return (top-1, top-5 in percent, cross-entropy) on the validation images, each counted once."""
        pool, size, world = self.pools[VALIDATION], VALIDATION_BATCH, self.world
        own = np.arange(len(pool))[world.rank::world.size]
        count = -(-len(own) // size)
        view = CentreCrop(self.options.imcrop, self.options.imsize)
        made = batches(pool, view, lambda step: Request(own[step * size:(step + 1) * size]), range(count),
                       self.decoding_device(), self.options.workers, self.decoder)
        return validate(self.net, self.ready(made), world, self.say, self.options.print_freq, count)

    def evaluate(self, epoch: int, means: Mapping[str, float]) -> None:
        """Measure the validation images, write scalars, and keep the weights if they are the best so far.

        means: what was logged since the last line.
        """
        acc1, acc5, loss = self.validate()
        self.scalar("test/acc1", acc1, epoch)
        self.scalar("test/acc5", acc5, epoch)
        improved = self.best.offer(acc1)
        self.say(f"Best acc1={self.best.value:.5f}")
        self.run.log.record({**means, "epoch": epoch, "test/acc1": acc1, "test/acc5": acc5, "test/loss": loss})
        state = self.run.state
        state["accuracies"] = [*state.get("accuracies", []), acc1 / 100][-MEDIAN_OF:]
        state |= {"acc5": acc5 / 100, "test_loss": loss}
        if improved:
            state["best_epoch"] = epoch
            if self.world.main:
                with atomic(self.run.outdir / BEST) as file:
                    torch.save({"epoch": epoch + 1, "state_dict": Prefixed(self.net).state_dict(),
                                "best_acc1": self.best.value, "optimizer": self.optimizer.state_dict()}, file)

    def write_result(self) -> None:
        """Say how many bad photographs were left out, and write result.json: accuracies as fractions."""
        bad = {name: len(union(set(pool.bad), self.world)) for name, pool in self.pools.items()}
        if any(bad.values()):
            self.say("bad records left out: " + ", ".join(f"{count} in {name}" for name, count in bad.items() if count))
        state, options = self.run.state, self.options
        if not self.world.main or "accuracies" not in state:
            return
        result = {
            "script": options.method["script"], "dataset": "imagenet", "arch": options.arch, "seed": options.seed,
            "iterations": self.run.step, "epochs": options.epochs, "global_batch": self.batch,
            "accuracy": {"last": state["accuracies"][-1], "last_top5": state["acc5"],
                         "median_of_last_20": statistics.median(state["accuracies"]),
                         "best_on_test": self.best.value / 100, "best_epoch": state.get("best_epoch")},
            "test_loss": state["test_loss"], "images": {name: len(pool) for name, pool in self.pools.items()},
            "bad_records": bad, "decoder": self.decoder, "seconds": self.run.seconds, "precision": self.precision,
            "processes": self.world.size, **computed_on(self.world.device)}
        with atomic(self.run.outdir / RESULT, "w") as file:
            json.dump(result, file, indent=1)
        self.board.flush()

    def say(self, message: str) -> None:
        """Write a line of log.txt in the published form, and onto the console."""
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03d}"
        self.run.log.print(f"{stamp} INFO {message}", console=message)


def union(positions: set[int], world: World) -> set[int]:
    """Return the union over ranks."""
    if world.size == 1:
        return positions
    parts: list[Any] = [None] * world.size
    torch.distributed.all_gather_object(parts, positions)
    return set().union(*parts)


def resume_from(options: argparse.Namespace, folder: Path, config: Mapping[str, Any]) -> str:
    """Return "auto" to continue what the folder holds, or the checkpoint of --resume, any whose network fits.

    The same command given again continues behind what it has reached since.
    """
    if options.resume is None:
        return "auto"
    path = Path(options.resume)
    if "state_dict" not in read_checkpoint(path):
        raise UserError(f"--resume: {path} holds no state_dict; expected a checkpoint.pth or model_best.pth")
    newest = load_newest(folder / CHECKPOINT)
    if newest is None:
        return str(path)
    own = path.resolve() == newest[0].resolve() or newest[1].get("state", {}).get("resumed") == str(path.resolve())
    return "auto" if own and newest[1].get("config") == json.loads(json.dumps(config)) else str(path)
