"""What train_meta.py and train_baseline.py share: data, network, run folder, log, evaluation. The method is theirs."""
from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from MetaSemi.core.data import NORMALISATION, Batch, Batches, in_order, split, streams
from MetaSemi.core.meters import Best, Meters, evaluate
from MetaSemi.core.model import ConvLarge, SmallNet, shakeshake26
from MetaSemi.core.noise import set_noise
from shared import distributed
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.data.datasets import load_dataset
from shared.data.pool import Pool
from shared.distributed import sync_batchnorm
from shared.training.checkpoint import keep_layout, load_newest, read_checkpoint
from shared.training.files import atomic
from shared.training.log import Log
from shared.training.precision import computed_on, default_precision, dtype_of, set_arithmetic
from shared.training.run import Run

CHECKPOINT, BEST, LABELS, RESULT = "checkpoint.pth", "model_best.pth", "label_indices.txt", "result.json"
TEST_BATCH = 100
# A step is a fifth faster on a CPU when freed memory is kept, and ConvLarge with batches of 128 then takes 2.5 GB in
# place of 1.5: beyond this batch size it is given back.
KEEP_MEMORY_UP_TO = 64
MEDIAN_OF = 20  # evaluations that the median accuracy is taken over


class Training:
    """A run of either script; iterate over `steps`, and give each step's numbers to `log`.

    unlabeled: whether batches have unlabelled images. Attributes for the method: `net`, `optimizer`, `world`,
    `autocast` (dtype or None).
    """

    def __init__(self, options: argparse.Namespace, unlabeled: bool) -> None:
        self.options = options
        self.world = world = distributed.start("cuda" if options.gpu else "cpu")
        if world.device.type == "cpu" and options.batch_size <= KEEP_MEMORY_UP_TO:
            keep_freed_memory()
        self.precision = choose_precision(options, world.device)
        self.autocast = dtype_of(self.precision)
        set_arithmetic(options.strict)

        # Everything is read and checked before the folder is touched; what is said before goes into its log later.
        self.run: Run | None = None
        self.unwritten: list[str] = []
        self.say("Called with args:")
        shown = {key: value for key, value in vars(options).items() if key not in ("method", "given")}
        self.say(str(argparse.Namespace(**shown)))
        self.say("Loading data...")
        folder = Path(options.save_path)
        train, test = (load_dataset(options.dataset, part, options.data_path, options.download)
                       for part in ("train", "test"))
        rng = random.Random(options.seed)
        labeled, rest = split(train.labels, options.num_label // options.num_classes, rng)
        if unlabeled and not len(rest):
            raise UserError(f"--num-label {options.num_label}: no unlabelled images are left of {len(train)}; give "
                            "fewer labels")
        warn_of_split(options, train.labels[labeled])
        check_labels(options, folder, label_text(labeled))
        config = {**options.method, "precision": self.precision}
        resume = resume_from(options, folder, config)
        pools = streams(labeled, rest if unlabeled else None, options.total_steps * options.batch_size, rng)
        layout = torch.contiguous_format if options.strict else torch.channels_last
        self.batches = Batches(train, pools, options.dataset, options.batch_size, options.seed, world, layout)
        self.test = Pool(test, *NORMALISATION[options.dataset], world.device)
        self.say(f"{len(labeled)} labelled and {len(rest)} unlabelled images, {len(test)} test images; {world.size} "
                 f"process(es) on {world.device.type}, {self.precision}")
        self.say("Building model and optimizer...")
        self.net = make_network(options, train.channels)
        if not options.strict:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.net = sync_batchnorm(self.net.to(world.device), world).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=options.lr, momentum=options.momentum,
                                         weight_decay=options.weight_decay, fused=not options.strict)
        self.meters, self.best = Meters(), Best()

        self.run = Run(folder, config, world=world, log=Log(folder, world, every=None, tensorboard="."),
                       checkpoint=CHECKPOINT, keep={"model": self.net, "optimizer": self.optimizer,
                                                    "best_acc": self.best, "meters": self.meters},
                       resume=resume, restart=options.overwrite, save_every=options.test_freq)
        self.meters.to(world.device)
        adopt(self.optimizer, fused=not options.strict)
        if self.run.resumed_from is None:
            self.run.step = options.start_step
        elif resume != "auto":
            self.run.state["resumed"] = str(Path(options.resume).resolve())
        if world.main:
            with atomic(folder / LABELS, "w") as file:
                file.write(label_text(labeled))
        parameters = sum(value.numel() for value in self.net.parameters())
        self.say(f"{self.net}\n{self.optimizer}", f"{type(self.net).__name__}, {parameters:,} parameters")
        if options.compile:
            self.net.compile()

    def steps(self) -> Iterator[tuple[int, Batch]]:
        """Yield (step, this rank's batch) to the end of the training; then write the result."""
        self.say("Start training...")
        self.batch_time, self.data_time, self.timed = 0.0, 0.0, 0
        last = time.perf_counter()
        for step in self.run.steps(self.options.total_steps):
            set_noise(self.net, self.options.seed, step, self.world)
            batch = self.batches(step)
            self.data_time += time.perf_counter() - last
            yield step, batch
            self.timed += 1
            self.batch_time += time.perf_counter() - last
            self.finish_step(step)
            last = time.perf_counter()
        self.write_result()
        distributed.stop()

    def mixing(self, step: int) -> torch.Tensor | None:
        """Return the mix-up coefficients of `step` [b, 1], None without --mix-up."""
        return self.batches.mixing(step, self.options.alpha) if self.options.mix_up else None

    def log(self, line: str, rate: float, total: torch.Tensor, **values: torch.Tensor) -> None:
        """Give the numbers of the step at hand, tensors [] which are read now and then.

        line: of the log, with {step}, {dtime}, {btime}, {rate}, and {name} and {name_avg} of each of `values`, which
        also become scalars. total: the loss, which must remain finite.
        """
        self.run.log.add(loss=total)
        self.meters.add(values)
        self.line, self.rate = line, rate

    def finish_step(self, step: int) -> None:
        if step % self.options.print_freq == 0:
            figures = {}
            for name, (last, average) in self.meters.read(self.world).items():
                figures |= {name: last, f"{name}_avg": average}
            self.say(self.line.format(step=step, total=self.options.total_steps, rate=self.rate, **figures,
                                      dtime=self.data_time / self.timed, btime=self.batch_time / self.timed))
        if (step + 1) % self.options.test_freq == 0 or step + 1 == self.options.total_steps:
            self.evaluate(step)

    def evaluate(self, step: int) -> None:
        """Measure the test set, write scalars, and keep the weights if they are the best so far."""
        self.run.log.means()  # all losses were finite, or this ends the run
        accuracy, loss = evaluate(self.net, in_order(self.test, TEST_BATCH, self.world), self.world, self.say,
                                  self.options.print_freq, -(-len(self.test) // TEST_BATCH))
        state, improved = self.run.state, self.best.offer(accuracy)
        self.say(f" * Accuracy {accuracy:.5f}")
        self.say(f"Best Accuracy: {self.best.value:.5f}")
        averages = {f"train/{name.replace('_', '-')}": average
                    for name, (_, average) in self.meters.read(self.world).items()}
        self.run.log.record({**averages, "train/lr": self.rate, "test/accuracy": accuracy})
        self.meters.reset()
        state["accuracies"] = [*state.get("accuracies", []), accuracy / 100][-MEDIAN_OF:]
        state["test_loss"] = loss
        if improved:
            state["best_step"] = step
            self.write_best(step)

    def write_best(self, step: int) -> None:
        if self.world.main:
            with atomic(self.run.outdir / BEST) as file:
                torch.save({"step": step + 1, "model": self.net.state_dict(), "best_acc": self.best.value,
                            "optimizer": self.optimizer.state_dict()}, file)

    def write_result(self) -> None:
        """Write result.json: accuracies as fractions, by each protocol."""
        state, options = self.run.state, self.options
        if not self.world.main or "accuracies" not in state:
            return
        result = {
            "script": options.method["script"], "dataset": options.dataset, "seed": options.seed,
            "num_labels": options.num_label, "iterations": options.total_steps, "mix_up": options.mix_up,
            "accuracy": {"last": state["accuracies"][-1],
                         "median_of_last_20": statistics.median(state["accuracies"]),
                         "best_on_test": self.best.value / 100, "best_iteration": state.get("best_step")},
            "test_loss": state["test_loss"], "test_images": len(self.test), "seconds": self.run.seconds,
            "precision": self.precision, "processes": self.world.size, **computed_on(self.world.device)}
        with atomic(self.run.outdir / RESULT, "w") as file:
            json.dump(result, file, indent=1)

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


def make_network(options: argparse.Namespace, channels: int) -> torch.nn.Module:
    """Return the untrained network, whose weights follow from --seed."""
    torch.manual_seed(options.seed)
    if options.architecture == "convlarge":
        return ConvLarge(channels, options.num_classes)
    if options.architecture == "shakeshake":
        return shakeshake26(options.num_classes, random_eval=getattr(options, "eval_gate", "random") == "random")
    return SmallNet(channels, options.num_classes)


def adopt(optimizer: torch.optim.Optimizer, fused: bool) -> None:
    """Make what a checkpoint has put into an optimizer its own: kernels as chosen here, memory as of the parameters."""
    for group in optimizer.param_groups:
        group["fused"] = fused
    keep_layout(optimizer)


def choose_precision(options: argparse.Namespace, device: torch.device) -> str:
    """Return fp32 or bf16."""
    if options.precision != "auto":
        return options.precision
    return default_precision(device, options.strict)


# ------------------------------------------------------------------------------------------------- the labelled set

def label_text(labeled: np.ndarray) -> str:
    """Return the content of label_indices.txt: the labelled positions in the order taken, one a line."""
    return "".join(f"{position}\n" for position in labeled.tolist())


def warn_of_split(options: argparse.Namespace, labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=options.num_classes)
    if options.num_label % options.num_classes:
        warnings.warn(f"--num-label {options.num_label} is no multiple of {options.num_classes} classes: "
                      f"{counts.sum()} images are labelled", stacklevel=2)
    elif counts.min() < options.num_label // options.num_classes:
        warnings.warn(f"class {counts.argmin()} has only {counts.min()} images, all of them are labelled", stacklevel=2)


def check_labels(options: argparse.Namespace, folder: Path, text: str) -> None:
    """Refuse to continue a run with labelled images other than its own; UserError."""
    if options.overwrite or not (options.resume or (folder / CHECKPOINT).exists()):
        return
    beside = Path(options.resume).parent if options.resume else folder
    if (beside / LABELS).exists() and (beside / LABELS).read_text(encoding="utf-8") != text:
        raise UserError(f"{beside / LABELS} lists other labelled images than --seed {options.seed} --num-label "
                        f"{options.num_label} of {options.dataset}; give the options of that run, or another "
                        "--save-path")


def resume_from(options: argparse.Namespace, folder: Path, config: Mapping[str, Any]) -> str:
    """Return "auto" to continue what the folder holds, or the checkpoint of --resume, any whose network fits.

    The same command given again continues behind what it has reached since.
    """
    if options.resume is None:
        return "auto"
    path = Path(options.resume)
    if not path.is_file():
        raise UserError(f"--resume: there is no file {path}; leave it out to start from the beginning")
    if "model" not in read_checkpoint(path):
        raise UserError(f"--resume: {path} holds no model; expected a checkpoint.pth or model_best.pth")
    newest = load_newest(folder / CHECKPOINT)
    if newest is None:
        return str(path)
    own = path.resolve() == newest[0].resolve() or newest[1].get("state", {}).get("resumed") == str(path.resolve())
    saved: Mapping[str, Any] = newest[1].get("config", {})
    same = all(saved.get(key) == value for key, value in json.loads(json.dumps(config)).items())
    return "auto" if own and same else str(path)
