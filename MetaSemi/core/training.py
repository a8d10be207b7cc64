"""The shared part of the four training scripts: network, run folder, log, evaluation. The images come
from a source: data sets in memory (data.py) or photographs in record files (imagenet/source.py).
"""
from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from MetaSemi.core.evaluation import Best, Meters, evaluate
from MetaSemi.core.model import set_noise
from shared import distributed
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World, sync_batchnorm
from shared.networks import start_from
from shared.training.checkpoint import keep_layout, load_newest, read_checkpoint
from shared.training.files import atomic, write_json
from shared.training.log import Log, tensorboard_writer
from shared.training.precision import compiles, computed_on, default_precision, dtype_of, set_arithmetic, to_device
from shared.training.randomness import numpy_rng
from shared.training.run import Run

CHECKPOINT, BEST, RESULT = "checkpoint.pth", "model_best.pth", "result.json"
MEDIAN_OF = 20  # evaluations that the median accuracy is taken over


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step's batch, on its device.

    labeled, unlabeled: float32 [b, C, H, W], augmented and normalised; labels, truth: int64 [b]. unlabeled, truth: None
    if the method has no use for them. truth is for metrics only, no loss may look at it.
    """

    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor | None = None
    truth: Tensor | None = None


class Source:
    """Where images come from, and the published names and lines of the scripts that take them.

    Attributes: batch (images of a kind in the global batch), length (steps between evaluations), first and total (steps
    of a new run), layout (memory order of images and network), channels, classes (names; None if not known). A source
    also has the methods network() -> untrained network, stream(first, stop) -> this rank's batches of these steps,
    rate(step) -> learning rate, place(step) -> what the log's lines say of a step, `step` among it, test_batches() ->
    (batches for `evaluate`, their number), facts(state) -> entries of result.json, and str(source) -> the log's line
    about the images.
    """

    network_entry, best_entry = "model", "best_acc"  # in checkpoints
    lines = ("Test: [{number}/{count}] Time {each:.3f} (avg={each:.3f}) Test Loss {loss:.3f} (avg={loss_avg:.3f}) "
             "Acc {acc1:.3f} (avg={acc1_avg:.3f})", " * Accuracy {acc1:.5f}")
    best_line = "Best Accuracy: {:.5f}"
    rate_tag, test_tags = "train/lr", ("test/accuracy",)
    by_epoch = False              # scalars of evaluations are over epochs
    log_every: int | None = None  # steps between lines of stats.jsonl besides those of evaluations
    keep_memory_up_to = math.inf  # images in a batch; beyond it a CPU gives freed memory back to the system
    inputs: Mapping[str, str] = MappingProxyType({})  # fingerprints of the images, by the flag that names them

    def stored(self, net: nn.Module) -> Any:
        """Return the network's part of a checkpoint: an object with state_dict and load_state_dict."""
        return net

    def normalise_as(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Normalise all images so, as the weights of --pretrained expect; UserError if that cannot be."""

    def config(self) -> dict[str, Any]:
        """Return the values besides the options that must agree for a run to be continued."""
        return {}

    def images_seen(self) -> dict[str, Any]:
        """Return the form of the classifier's images, for checkpoints."""
        return {}

    def check(self, folder: Path) -> None:
        """Raise UserError if the run in `folder` has other images; nothing is written yet."""

    def opened(self, folder: Path) -> None:
        """Write the files about the images into the folder of the run (rank 0)."""


class Training:
    """A run of any of the scripts; iterate over `steps`, and give each step's numbers to `log`.

    make_source: called with (options, world, unlabeled). unlabeled: whether batches have unlabelled images. Attributes
    for the method: `net`, `optimizer`, `world`, `autocast` (dtype or None).
    """

    def __init__(self, options: SimpleNamespace, make_source: type[Source], unlabeled: bool) -> None:
        self.options = options
        device = options.device if hasattr(options, "device") else "cuda" if options.gpu else "cpu"
        self.world = world = distributed.start(device)
        if world.device.type == "cpu" and options.batch_size <= make_source.keep_memory_up_to:
            keep_freed_memory()
        self.precision = options.precision
        if self.precision == "auto":
            self.precision = default_precision(world.device, options.strict)
        self.autocast = dtype_of(self.precision)
        set_arithmetic(options.strict)

        # Everything is read and checked before the folder is touched; earlier messages go into its log later.
        self.run: Run | None = None
        self.unwritten: list[str] = []
        shown = {key: value for key, value in vars(options).items() if key not in ("method", "given")}
        self.say("Called with args:")
        self.say(str(argparse.Namespace(**shown)))
        self.say("Loading data...")
        folder = Path(options.save_path)
        self.source = source = make_source(options, world, unlabeled)
        source.check(folder)
        config = {**options.method, "precision": self.precision, **source.config()}
        resume = self.resume_from(folder, config)
        self.say(f"{source}; {world.size} process(es) on {world.device.type}, {self.precision}")

        self.say("Building model and optimizer...")
        torch.manual_seed(options.seed)
        net = source.network().to(memory_format=source.layout)
        if options.pretrained is not None:
            classes = source.classes or tuple(map(str, range(options.num_classes)))
            start = start_from(net, options.pretrained, classes, source.channels)
            if start.mean and start.std:
                source.normalise_as(start.mean, start.std)
            self.say(start.note)
        self.net = sync_batchnorm(net.to(world.device), world).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=options.lr, momentum=options.momentum,
                                         weight_decay=options.weight_decay, fused=not options.strict)
        self.meters, self.best = Meters(), Best()

        images = source.batch * (2 if unlabeled else 1)
        log = Log(folder, world, every=source.log_every, image_batch=images, tensorboard=False)
        self.run = Run(folder, config, world=world, log=log, checkpoint=CHECKPOINT,
                       inputs={**source.inputs, "--pretrained": options.pretrained},
                       keep={source.network_entry: source.stored(self.net), "optimizer": self.optimizer,
                             source.best_entry: self.best, "meters": self.meters},
                       resume=resume, overwrite=options.overwrite, save_every=source.length,
                       save_seconds=getattr(options, "save_seconds", 600.0), extra=self.extra)
        # The command line's settings and this run's kernels and memory order overrule those of the checkpoint.
        for group in self.optimizer.param_groups:
            group |= {"momentum": options.momentum, "weight_decay": options.weight_decay, "fused": not options.strict}
        keep_layout(self.optimizer)
        if self.run.resumed_from is None:
            self.run.step = source.first
        elif resume != "auto":
            content = read_checkpoint(resume)
            if "step" not in content:  # one of the original code
                self.run.step = int(content["epoch"]) * source.length
            self.run.state["resumed"] = str(Path(resume).resolve())
        self.board = None
        if world.main and not getattr(options, "evaluate", False):
            self.board = tensorboard_writer(folder, self.run.step)
            source.opened(folder)
        parameters = sum(value.numel() for value in self.net.parameters())
        self.say(f"{self.net}\n{self.optimizer}", f"{type(self.net).__name__}, {parameters:,} parameters")
        if compiles(options.compile, world.device, options.strict):
            self.net.compile()

    def resume_from(self, folder: Path, config: Mapping[str, Any]) -> str:
        """Return "auto" to continue what the folder holds, or the checkpoint of --resume, any whose network fits.

        The same command given again continues its own progress.
        """
        newest = load_newest(folder / CHECKPOINT)
        if self.options.resume is None:
            if newest is None and getattr(self.options, "evaluate", False):
                raise UserError(f"--evaluate: give --resume FILE; {folder} holds no run")
            return "auto"
        path = Path(self.options.resume)
        if not path.is_file():
            raise UserError(f"--resume: there is no file {path}; leave it out to start from the beginning")
        if self.source.network_entry not in read_checkpoint(path):
            raise UserError(f"--resume: {path} holds no {self.source.network_entry}; expected a checkpoint.pth or "
                            "model_best.pth")
        if newest is None:
            return str(path)
        saved: Mapping[str, Any] = newest[1].get("config", {})
        same = all(saved.get(key) == value for key, value in json.loads(json.dumps(config)).items())
        resumed = newest[1].get("state", {}).get("resumed")
        return "auto" if same and str(path.resolve()) in (str(newest[0].resolve()), resumed) else str(path)

    def extra(self) -> dict[str, int]:
        """Return further entries of a checkpoint."""
        epoch = {"epoch": self.run.step // self.source.length} if self.source.by_epoch else {}
        return {**epoch, **self.source.images_seen()}

    def steps(self) -> Iterator[tuple[int, float, Batch]]:
        """Yield (step, learning rate, this rank's batch) to the end of the training; then write the result."""
        self.say("Start training...")
        total = min(self.source.total, getattr(self.options, "iterations", None) or self.source.total)
        stream = self.source.stream(self.run.step, total)
        self.batch_time, self.data_time, self.timed = 0.0, 0.0, 0
        last = time.perf_counter()
        for step in self.run.steps(total):
            set_noise(self.net, self.options.seed, step, self.world)
            batch = next(stream)
            self.rate = self.source.rate(step)
            self.data_time += time.perf_counter() - last
            yield step, self.rate, batch
            self.timed += 1
            self.batch_time += time.perf_counter() - last
            self.finish_step(step, step + 1 == total)
            last = time.perf_counter()
        self.write_result()
        distributed.stop()

    def mixing(self, step: int) -> Tensor | None:
        """Return the mix-up coefficients [b, 1] of this rank's labelled images, from Beta(alpha, alpha); None without
        mix-up."""
        if not getattr(self.options, "mix_up", True):
            return None
        return mixing(self.options.seed, step, self.options.alpha, self.source.batch, self.world)

    def log(self, line: str, total: Tensor, **values: Tensor) -> None:
        """Give the numbers of the step at hand, tensors [] which are read now and then.

        line: of the log, with the names of `Source.place`, {btime}, {dtime}, {rate}, and {name} and {name_avg} of each
        of `values`, which also become scalars. total: the loss, which must remain finite.
        """
        self.run.log.add(loss=total)
        means = distributed.mean(torch.stack([value.detach().float() for value in values.values()]), self.world)
        self.meters.add(dict(zip(values, means, strict=True)))
        self.line = line

    def finish_step(self, step: int, is_last: bool) -> None:
        place = self.source.place(step)
        if place["step"] % self.options.print_freq == 0:
            figures = {}
            for name, (last, average) in self.meters.read().items():
                figures |= {name: last, f"{name}_avg": average}
            self.say(self.line.format(**place, rate=self.rate, btime=self.batch_time / self.timed,
                                      dtime=self.data_time / self.timed, **figures))
            if self.source.by_epoch:
                self.scalars({self.source.rate_tag: self.rate}, step)
        if (step + 1) % self.source.length == 0 or is_last:
            self.evaluate(step)

    def measure(self) -> tuple[float, float, float]:
        """Return (top-1, top-5 in percent, cross-entropy) on the test images, and say so."""
        batches, count = self.source.test_batches()
        return evaluate(self.net, batches, self.world, self.say, self.source.lines, self.options.print_freq, count)

    def evaluate(self, step: int) -> None:
        """Measure the test images, write scalars, and keep the weights if they are the best so far."""
        source, state = self.source, self.run.state
        means = self.run.log.means()  # all losses were finite, or this ends the run
        averages = {f"train/{name.replace('_', '-')}": average for name, (_, average) in self.meters.read().items()}
        if (step + 1) % source.length == 0:
            self.meters.reset()
        acc1, acc5, loss = self.measure()
        tests = dict(zip(source.test_tags, (acc1, acc5), strict=False))
        where = step // source.length if source.by_epoch else step
        self.scalars({**averages, **({} if source.by_epoch else {source.rate_tag: self.rate}), **tests}, where)
        self.run.log.record({**means, **averages, source.rate_tag: self.rate, **tests, "test/loss": loss,
                             **({"epoch": where} if source.by_epoch else {})})
        improved = acc1 > self.best.value
        self.best.value = max(acc1, self.best.value)
        self.say(source.best_line.format(self.best.value))
        state["accuracies"] = [*state.get("accuracies", []), acc1 / 100][-MEDIAN_OF:]
        state |= {"acc5": acc5 / 100, "test_loss": loss}
        if improved:
            state["best_epoch" if source.by_epoch else "best_step"] = where
            if self.world.main:
                with atomic(self.run.outdir / BEST) as file:
                    torch.save({"epoch" if source.by_epoch else "step": where + 1, source.best_entry: self.best.value,
                                source.network_entry: source.stored(self.net).state_dict(),
                                "optimizer": self.optimizer.state_dict(), **source.images_seen()}, file)

    def scalars(self, values: Mapping[str, float], where: int) -> None:
        for name, value in values.items() if self.board is not None else ():
            self.board.add_scalar(name, value, where)

    def write_result(self) -> None:
        """Write result.json: accuracies as fractions, by each protocol."""
        state = self.run.state
        facts = self.source.facts(state)  # on all ranks
        if note := facts.pop("note", ""):
            self.say(note)
        if not self.world.main or "accuracies" not in state:
            return
        accuracies = {"last": state["accuracies"][-1], "median_of_last_20": statistics.median(state["accuracies"]),
                      "best_on_test": self.best.value / 100, **facts.pop("accuracy")}
        result = {"script": self.options.method["script"], "seed": self.options.seed, "iterations": self.run.step,
                  **facts, "accuracy": accuracies, "test_loss": state["test_loss"], "seconds": self.run.seconds,
                  "precision": self.precision, "processes": self.world.size, **computed_on(self.world.device)}
        write_json(self.run.outdir / RESULT, result)
        if self.board is not None:
            self.board.flush()

    def say(self, message: str, console: str | None = None) -> None:
        """Write a line of log.txt in the published form, and onto the console, where `console` may be shorter."""
        if not self.world.main:
            return
        now = time.time()
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03d} INFO {message}"
        console = message if console is None else console
        if self.run is None:
            self.unwritten.append(line)
            print(console, flush=True)
        else:
            self.run.log.print("\n".join((*self.unwritten, line)), console=console)
            self.unwritten.clear()


def mixing(seed: int, step: int, alpha: float, batch: int, world: World) -> Tensor:
    """Return this rank's part of `batch` coefficients from Beta(alpha, alpha), float32 [b, 1] on its device."""
    drawn = numpy_rng(seed, step, "mix-up").beta(alpha, alpha, (batch, 1)).astype(np.float32)
    return to_device(drawn[world.slice(batch)], world.device)
