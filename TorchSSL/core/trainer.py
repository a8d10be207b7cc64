"""The training loop of TorchSSL, in reading order. A learner is a loss and its state (see algorithm.py)."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared import distributed
from shared.cli import UserError, less_memory
from shared.cpu.allocator import keep_freed_memory
from shared.data.datasets import NAMES
from shared.data.photographs import EVAL_SIDE, PhotographSet
from shared.data.pool import PhotographPool, Pool, make_pool
from shared.distributed import World, sync_batchnorm
from shared.networks import TimmNetwork, freeze, is_below, is_timm, label_layers, start_from, train_mode
from shared.parallel import Prefetched
from shared.training.checkpoint import keep_layout
from shared.training.ema import EMA
from shared.training.log import Log
from shared.training.precision import autocast, compiles, computes_bf16, default_precision, set_arithmetic
from shared.training.randomness import set_dropout_keys
from shared.training.run import Run
from TorchSSL.core.algorithm import Algorithm, Batch, Setting
from TorchSSL.core.data import (
    Batches,
    TrainingData,
    input_fingerprints,
    load_training_data,
    report,
    resize_of,
    rows_of_rank,
)
from TorchSSL.core.evaluation import (
    LOGGED_CLASSES,
    confusion_matrix,
    confusion_text,
    keep_confident,
    metrics,
    predict,
)
from TorchSSL.core.networks import make_network
from TorchSSL.core.options import method_config, paths_in, relaunch
from TorchSSL.core.run_folder import LATEST, load_foreign, open_folder, resume_from, write_best, write_result

FREQUENT_EVAL = 1000      # evaluations come at least this often ...
FREQUENT_FROM = 0.8       # ... in the last fifth of the training
MEDIAN_OF = 20            # evaluations behind the median accuracy


@less_memory("--batch_size or --uratio")
def train(options: SimpleNamespace, algorithm: type[Algorithm]) -> None:
    """Train one classifier with the learner `algorithm`. Raises UserError before the run folder is touched."""
    # Processes, device and arithmetic.
    relaunch(options, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    world = distributed.start(f"cuda:{options.gpu}" if options.gpu is not None else options.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(options, world.device)
    set_arithmetic(options.strict)
    batch_size = global_batch_size(options, world)

    # Data.
    folder = Path(options.save_dir) / options.save_name
    data = keep_confident(load_training_data(options, folder), options, world)

    # Learner, network and batches.
    setting = Setting(data.num_classes, len(data.unlabeled), tuple(data.class_fractions), world, options.seed)
    learner = algorithm(options, setting)
    torch.manual_seed(options.seed)
    net = make_network(vars(options), data.num_classes, data.unlabeled.channels, learner.rotation_head,
                       tuple(data.unlabeled.size))
    data = prepare_start(net, data, options)
    net = sync_batchnorm(net.to(world.device), world)
    if options.freeze is not None:
        freeze(net, options.freeze, data.num_classes)
    if not options.strict:
        net = net.to(memory_format=torch.channels_last)
    heads = label_layers(net, data.num_classes) if options.head_lr is not None else ()
    trainer = Trainer(net, learner, options, world, precision, heads)
    test, validation = (
        None if images is None else make_pool(images, data.mean, data.std, world.device, options.num_workers,
                                              options.decoder) for images in (data.test, data.validation))
    batches = Batches(data, options, world, learner.views, batch_size, learner.labeled_views)
    warm_up = learner.supervised_steps
    total = warm_up + options.num_train_iter
    make_batch = Prefetched(batches, total - 1) if isinstance(data.unlabeled, PhotographSet) else batches

    # Run folder, log and checkpoint.
    config = {**method_config(options), "precision": precision, "num_classes": data.num_classes,
              "labeled_images": len(data.labeled), "unlabeled_images": len(data.unlabeled)}
    facts = {"options": {**vars(options), "given": sorted(options.given), "num_classes": data.num_classes},
             "mean": data.mean, "std": data.std, "classes": data.unlabeled.classes,
             # The images that the classifier takes, and the resize of others.
             **({"size": (EVAL_SIDE, EVAL_SIDE), "resize": "square"} if isinstance(data.unlabeled, PhotographSet) else
                {"size": data.unlabeled.size, "resize": resize_of(options.dataset)})}
    inputs = input_fingerprints(data, options)
    open_folder(folder, options, config, inputs, data, world)
    log = Log(folder, world, every=min(100, options.num_eval_iter), image_batch=sum(batches.counts),
              tensorboard=options.use_tensorboard, desc=options.save_name)
    run = Run(folder, config, keep=trainer.parts(), world=world, log=log, inputs=inputs, checkpoint=LATEST,
              ignore=paths_in(options), resume=resume_from(folder, options), save_seconds=options.save_seconds,
              save_every=options.num_save_iter, extra=lambda: {**facts, "it": trainer.iteration})
    load_foreign(run, trainer, options)
    log.print(describe(data, options, world, precision))
    if options.dataset not in NAMES and run.resumed_from is None and world.main:
        log.print(report(data.unlabeled, data.test))

    # Training.
    for step in run.steps(total):
        started = time.perf_counter()
        batch = make_batch(step)
        fetched = time.perf_counter()
        if step < warm_up:
            log.add(**trainer.supervised_step(batch, step))
            continue
        trainer.iteration = step - warm_up
        values = trainer.train_step(batch)
        values |= {"train/prefecth_time": fetched - started, "train/run_time": time.perf_counter() - fetched}
        log.add(**values)
        if is_evaluated(trainer.iteration, options) and evaluate(run, trainer, test, validation, values, options):
            write_best(run, trainer, facts)
    write_result(run, data, options, precision)
    distributed.stop()


def prepare_start(net: nn.Module, data: TrainingData, options: SimpleNamespace) -> TrainingData:
    """Load the weights of --pretrained into `net`; return the data, normalised as these weights expect, with a note."""
    images = data.unlabeled
    if options.pretrained is None:
        note = (f"{options.net}: random weights; --pretrained {options.net} starts from trained ones",)
        return dataclasses.replace(data, notes=(*data.notes, *note)) if is_timm(options.net) else data
    start = start_from(net, options.pretrained, images.classes, images.channels)
    return dataclasses.replace(data, notes=(*data.notes, start.note), mean=start.mean or data.mean,
                               std=start.std or data.std)


class Trainer:
    """Network, loss, optimiser, schedule and average of the weights: one training step.

    net: on the world's device, with equal weights on all ranks. heads: see `make_optimizer`. `iteration`: the iteration
    at hand, from 0.
    """

    def __init__(self, net: nn.Module, algorithm: Algorithm, options: SimpleNamespace, world: World,
                 precision: str = "fp32", heads: Sequence[str] = ()) -> None:
        self.net, self.algorithm, self.options, self.world = train_mode(net), algorithm, options, world
        self.optimizer = make_optimizer(net, options, heads)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine(step, options.num_train_iter, options.num_warmup_iter))
        self.ema = EMA(net, buffers="copy")
        algorithm.teacher = self.ema.module
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.precision = precision
        self.iteration = 0
        self.forward = distributed.data_parallel(compiled(net, options, world.device), world)
        self.step, self.sizes, self.passes = 0, [0], 0  # of the run, of the batch's parts, forward in this step
        if options.dropout > 0:
            for module in (self.forward, self.ema.module):
                module.register_forward_pre_hook(self.choose_dropout)

    def train_step(self, batch: Batch) -> dict[str, Tensor | float]:
        """Do one iteration on one batch; return the algorithm's log entries and the learning rate after the step."""
        self.begin(self.iteration + self.algorithm.supervised_steps, batch)
        with self.autocast():
            loss, values = self.algorithm.loss(self.forward, batch, self.iteration)
        self.descend(loss)
        self.scheduler.step()
        self.ema.update(self.net, self.options.ema_m)
        return {**{name: value.detach() for name, value in values.items()}, "lr": self.scheduler.get_last_lr()[0]}

    def supervised_step(self, batch: Batch, step: int) -> dict[str, Tensor | float]:
        """Learn from the labelled images alone, at the initial learning rate; the average starts from the result."""
        self.begin(step, batch)
        with self.autocast():
            loss = F.cross_entropy(self.forward(batch.labeled).float(), batch.labels)
        self.descend(loss)
        self.ema.update(self.net, 0.0)
        return {"train/warm_up_loss": loss}

    def begin(self, step: int, batch: Batch) -> None:
        """Let the dropout masks, a network's only draws, depend on the step alone."""
        self.step, self.passes = step, 0
        self.sizes = [len(part) for part in (batch.labeled, *batch.views, *batch.labeled_views)]
        if self.options.net_from_name or is_timm(self.options.net):  # they draw from PyTorch's generator
            torch.manual_seed((self.options.seed * 1_000_003 + step) * 4096 + self.world.rank)

    def choose_dropout(self, net: nn.Module, inputs: tuple[Tensor]) -> None:
        """Give a forward pass dropout masks of its own, the same on any number of ranks."""
        if net.training:
            count = len(inputs[0])
            sizes = self.sizes if count == sum(self.sizes) else [count]  # the whole batch, or one part of it
            rows = rows_of_rank(sizes, self.world)
            set_dropout_keys(net, self.options.seed, self.step, (self.passes << 32) + rows)
            self.passes += 1

    def descend(self, loss: Tensor) -> None:
        """Take one optimiser step down the gradient of `loss` [], clipped to --clip."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.options.clip > 0:
            self.scaler.unscale_(self.optimizer)  # the limit is on the gradient itself, not on its fp16 multiple
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.world.device, self.precision, self.net)

    def parts(self) -> dict[str, Any]:
        """Return the content of a checkpoint, the published names first."""
        return {"model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler, "ema_model": self.ema,
                "algorithm": self.algorithm, "scaler": self.scaler}


def make_optimizer(net: nn.Module, options: SimpleNamespace, heads: Sequence[str] = ()) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW, of the parameters that learn; weight decay on those of `decays`.

    heads: names of the layers whose learning rate is --head_lr.
    """
    found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, value in net.named_parameters():
        if value.requires_grad:
            is_head = any(is_below(name, head) for head in heads)
            found.setdefault((is_head, not decays(net, name, value)), []).append(value)
    groups = [{"params": part, "weight_decay": 0.0 if plain else options.weight_decay,
               "lr": options.head_lr if is_head else options.lr} for (is_head, plain), part in sorted(found.items())]
    if options.optim == "AdamW":
        optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=not options.strict)
    else:
        optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0,
                                    fused=not options.strict)
    optimizer.register_load_state_dict_post_hook(keep_layout)
    return optimizer


def decays(net: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter has weight decay: named neither `bn` nor `bias`; of timm the matrices that timm
    decays."""
    if isinstance(net, TimmNetwork):
        spared = net.body.no_weight_decay() if hasattr(net.body, "no_weight_decay") else ()
        return parameter.ndim > 1 and name.removeprefix("body.") not in spared
    return "bn" not in name and "bias" not in name


def cosine(step: int, total: int, warm_up: int = 0) -> float:
    """Return the factor on the learning rate at a step: cos(7 pi / 16 * fraction done), after a linear rise."""
    if step < warm_up:
        return step / warm_up
    return max(0.0, math.cos(math.pi * 7 / 16 * (step - warm_up) / max(1, total - warm_up)))


def is_evaluated(iteration: int, options: SimpleNamespace) -> bool:
    """Return whether an evaluation follows this iteration: the first, the last, and every --num_eval_iter-th."""
    period = options.num_eval_iter
    if iteration > FREQUENT_FROM * options.num_train_iter:
        period = min(period, FREQUENT_EVAL)
    return iteration % period == 0 or iteration == options.num_train_iter - 1


@less_memory("--eval_batch_size")
def evaluate(run: Run, trainer: Trainer, test: Pool | PhotographPool, validation: Pool | PhotographPool | None,
             values: dict[str, Any], options: SimpleNamespace) -> bool:
    """Measure the averaged weights on the test set and log them; return whether they are the best so far.

    The best on the test set is what the published tables report. `run.state` also keeps the last one, the accuracies
    for the median, and the one of the iteration with the best accuracy on the validation images.
    """
    is_last = trainer.iteration == options.num_train_iter - 1
    logits = predict(trainer.ema.module, test, options.eval_batch_size, run.world)
    found = metrics(logits, test.labels, auc=True if is_last else None)
    counts = confusion_matrix(test.labels.cpu().numpy(), logits.argmax(1).cpu().numpy(), logits.shape[1])
    accuracy, state = found["eval/top-1-acc"], run.state
    is_best = accuracy > state.get("best_acc", 0.0)
    if is_best:
        state |= {"best_acc": accuracy, "best_it": trainer.iteration}
    if validation is not None:
        logits = predict(trainer.ema.module, validation, options.eval_batch_size, run.world)
        found["eval/validation-acc"] = (logits.argmax(1) == validation.labels).double().mean().item()
        if found["eval/validation-acc"] > state.get("best_validation", {}).get("validation", 0.0):
            state["best_validation"] = {"validation": found["eval/validation-acc"], "test": accuracy,
                                        "iteration": trainer.iteration}
    state["accuracies"] = [*state.get("accuracies", []), accuracy][-MEDIAN_OF:]
    state |= {"last": found, "confusion": counts.tolist()}
    if "train/pseudo_label_acc" in values:
        state["pseudo_label_acc"] = float(values["train/pseudo_label_acc"])

    values = {name: float(value) for name, value in values.items()} | found
    run.log.record(found, line={"step": run.step, **values})
    best = f"BEST_EVAL_ACC: {state.get('best_acc', 0.0)}, at {state.get('best_it', 0)} iters"
    matrix = [confusion_text(counts)] if len(counts) <= LOGGED_CLASSES else []
    lines = [*matrix, f"{trainer.iteration} iteration, USE_EMA: True, {values}, {best}"]
    run.log.print("\n".join(time.strftime("[%Y-%m-%d %H:%M:%S INFO] ") + line for line in lines),
                  console=f"{trainer.iteration} iteration, eval/top-1-acc: {accuracy:.4f}, "
                          f"eval/loss: {found['eval/loss']:.4f}, {best}")
    return is_best


def choose_precision(options: SimpleNamespace, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; UserError for fp16 without a GPU."""
    if options.strict:
        return "fp32"
    if options.precision == "auto" and "amp" not in options.given:
        return default_precision(device)
    if options.precision == "auto":
        if options.amp and device.type != "cuda" and not computes_bf16(device):
            warnings.warn("--amp True: this processor has no bf16 and would be many times slower with it; fp32 is "
                          "taken (--precision bf16 insists)", stacklevel=2)
            return "fp32"
        return "fp32" if not options.amp else "fp16" if device.type == "cuda" else "bf16"
    if options.precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a GPU; on this device use bf16 or fp32")
    return options.precision


def compiled(net: nn.Module, options: SimpleNamespace, device: torch.device) -> nn.Module:
    """Return the network, compiled with --compile True and, by default, on GPUs; see `compiles`."""
    asked = {"True": True, "False": False}.get(options.compile)
    return torch.compile(net, dynamic=False) if compiles(asked, device, options.strict) else net


def global_batch_size(options: SimpleNamespace, world: World) -> int:
    """Return the labelled batch over all machines; --batch_size is that of one machine."""
    machines = max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    size = options.batch_size * machines
    if size % world.size:
        raise UserError(f"--batch_size {options.batch_size} cannot be shared evenly by {world.size // machines} "
                        "processes; choose a multiple of their number")
    return size


def describe(data: TrainingData, options: SimpleNamespace, world: World, precision: str) -> str:
    """Return the first lines of a log."""
    lines = [*data.notes, f"len(lb_dset) {len(data.labeled)}"] if options.aug_path else list(data.notes)
    return "\n".join([*lines, (
        f"{options.save_name}: {data.num_real} labelled of {len(data.unlabeled)} images, {data.num_classes} classes, "
        f"{len(data.test)} test images; {world.size} process(es) on {world.device.type}, {precision}")])
