"""The one training loop of TorchSSL, in reading order. An algorithm is a loss and its state (see algorithm.py)."""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from shared import distributed
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.data.datasets import NAMES, report
from shared.data.pool import Pool
from shared.distributed import World
from shared.training.batchnorm import sync_batchnorm
from shared.training.checkpoint import keep_layout
from shared.training.ema import EMA
from shared.training.precision import autocast, default_precision, set_arithmetic
from shared.training.log import Log
from shared.training.run import Run
from TorchSSL.core.algorithm import Algorithm
from TorchSSL.core.batches import Batch, Batches
from TorchSSL.core.classifier import keep_confident, make_network
from TorchSSL.core.data import TrainingData, load_training_data
from TorchSSL.core.evaluation import LOGGED_CLASSES, confusion_matrix, confusion_text, metrics, predict
from TorchSSL.core.options import method_config, relaunch
from TorchSSL.core.photographs import Ahead, PhotographPool, PhotographSet, make_pool
from TorchSSL.core.run_folder import LATEST, load_foreign, open_folder, resume_from, write_best, write_result
from TorchSSL.core.setting import Setting

FREQUENT_EVAL = 1000      # evaluations come at least this often ...
FREQUENT_FROM = 0.8       # ... in the last fifth of the training
MEDIAN_OF = 20            # evaluations that the median accuracy is taken over


def train(options: argparse.Namespace, algorithm: Callable[[argparse.Namespace, Setting], Algorithm]) -> None:
    """Train one classifier as the options say; see the module's parts for each step. UserError."""
    relaunch(options, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    world = distributed.start(f"cuda:{options.gpu}" if options.gpu is not None else options.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    precision = choose_precision(options, world.device)
    set_arithmetic(options.strict)
    batch_size = global_batch_size(options, world)

    # Everything is read and checked before the run folder is touched.
    folder = Path(options.save_dir) / options.save_name
    data = load_training_data(options, folder)
    data = keep_confident(data, options, world)
    shares = tuple(data.class_shares)
    learner = algorithm(options, Setting(data.num_classes, len(data.unlabeled), shares, world, options.seed))
    torch.manual_seed(options.seed)
    net = make_network(vars(options), data.num_classes, data.unlabeled.channels, learner.rotation_head)
    net = sync_batchnorm(net.to(world.device), world)
    if not options.strict:
        net = net.to(memory_format=torch.channels_last)
    trainer = Trainer(net, learner, options, world, precision)
    batches = Batches(data, options, world, learner.views, batch_size, learner.labeled_views)
    config = {**method_config(options), "precision": precision, "num_classes": data.num_classes,
              "labeled_images": len(data.labeled), "unlabeled_images": len(data.unlabeled)}
    open_folder(folder, options, config, data, world)

    facts = {"options": {**vars(options), "given": sorted(options.given), "num_classes": data.num_classes},
             "mean": data.mean, "std": data.std, "classes": data.unlabeled.classes}
    log = Log(folder, world, every=min(100, options.num_eval_iter), image_batch=sum(batches.counts),
              tensorboard=options.use_tensorboard, desc=options.save_name)
    run = Run(folder, config, keep=trainer.parts(), world=world, log=log, checkpoint=LATEST,
              resume=resume_from(folder, options), extra=lambda: {**facts, "it": trainer.iteration},
              save_seconds=options.save_seconds, save_every=options.num_save_iter)
    load_foreign(run, trainer, options)
    run.log.print(describe(data, options, world, precision))
    if options.dataset not in NAMES and run.resumed_from is None and world.main:
        run.log.print(report(data.unlabeled, data.test))

    warm_up = learner.supervised_steps
    test, validation = (
        None if images is None else make_pool(images, data.mean, data.std, world.device, options.num_workers,
                                              options.decoder) for images in (data.test, data.validation))
    total = warm_up + options.num_train_iter
    made = Ahead(batches, total - 1) if isinstance(data.unlabeled, PhotographSet) else batches
    for step in run.steps(total):
        started = time.perf_counter()
        batch = made(step)
        fetched = time.perf_counter()
        if step < warm_up:
            run.log.add(**trainer.supervised_step(batch))
            continue
        trainer.iteration = step - warm_up
        values = trainer.train_step(batch)
        values |= {"train/prefecth_time": fetched - started, "train/run_time": time.perf_counter() - fetched}
        run.log.add(**values)
        if is_evaluated(trainer.iteration, options):
            evaluate(run, trainer, test, validation, values, facts, options)
    write_result(run, data, options, precision)
    distributed.stop()


class Trainer:
    """A network on its way: forward, loss, backward, optimiser, schedule, average of the weights.

    net: on the world's device; its weights must be equal on all ranks. `iteration` is the iteration at hand, from 0.
    """

    def __init__(self, net: torch.nn.Module, algorithm: Algorithm, options: argparse.Namespace, world: World,
                 precision: str = "fp32") -> None:
        self.net, self.algorithm, self.options, self.world = net.train(), algorithm, options, world
        self.optimizer = make_optimizer(net, options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine(step, options.num_train_iter, options.num_warmup_iter))
        self.ema = EMA(net, buffers="copy")
        algorithm.teacher = self.ema.module
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.precision = precision
        self.iteration = 0
        self.forward = distributed.data_parallel(compiled(net, options, world.device), world)

    def train_step(self, batch: Batch) -> dict[str, torch.Tensor | float]:
        """Do one iteration on one batch; return what the algorithm logs, and the learning rate after the step."""
        seed_dropout(self.options, self.iteration, self.world)
        with self.autocast():
            loss, values = self.algorithm.loss(self.forward, batch, self.iteration)
        self.descend(loss)
        self.scheduler.step()
        self.ema.update(self.net, self.options.ema_m)
        return {**{name: value.detach() for name, value in values.items()}, "lr": self.scheduler.get_last_lr()[0]}

    def supervised_step(self, batch: Batch) -> dict[str, torch.Tensor | float]:
        """Learn from the labelled images alone, at the initial learning rate; the average starts from the result."""
        with self.autocast():
            loss = F.cross_entropy(self.forward(batch.labeled).float(), batch.labels)
        self.descend(loss)
        self.ema.update(self.net, 0.0)
        return {"train/warm_up_loss": loss}

    def descend(self, loss: torch.Tensor) -> None:
        """Take one optimiser step down the gradient of `loss` [], clipped if the options say so."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.options.clip > 0:
            self.scaler.unscale_(self.optimizer)  # the limit is on the gradient itself, not on its fp16 multiple
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.world.device, self.precision)

    def parts(self) -> dict[str, Any]:
        """Return what a checkpoint holds, under the published names first."""
        return {"model": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler, "ema_model": self.ema,
                "algorithm": self.algorithm, "scaler": self.scaler}


def make_optimizer(net: torch.nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW; weight decay on what is named neither `bn` nor `bias`."""
    decayed = [value for name, value in net.named_parameters() if "bn" not in name and "bias" not in name]
    plain = [value for name, value in net.named_parameters() if "bn" in name or "bias" in name]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if options.optim == "AdamW":
        optimizer = torch.optim.AdamW(groups, lr=options.lr, fused=not options.strict)
    else:
        optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0,
                                    fused=not options.strict)
    optimizer.register_load_state_dict_post_hook(keep_layout)
    return optimizer


def cosine(step: int, total: int, warm_up: int = 0) -> float:
    """Return the factor on the learning rate at a step: cos(7 pi / 16 * share done), after a linear rise."""
    if step < warm_up:
        return step / warm_up
    return max(0.0, math.cos(math.pi * 7 / 16 * (step - warm_up) / max(1, total - warm_up)))


def is_evaluated(iteration: int, options: argparse.Namespace) -> bool:
    """Whether an evaluation follows this iteration: the first, the last, and every --num_eval_iter-th."""
    period = options.num_eval_iter
    if iteration > FREQUENT_FROM * options.num_train_iter:
        period = min(period, FREQUENT_EVAL)
    return iteration % period == 0 or iteration == options.num_train_iter - 1


def evaluate(run: Run, trainer: Trainer, test: Pool | PhotographPool, validation: Pool | PhotographPool | None,
             values: dict[str, Any], facts: dict[str, Any], options: argparse.Namespace) -> None:
    """Measure the averaged weights on the test set, log it, and keep them if they are the best so far.

    The best on the test set is what the published tables report. Beside it are kept the last, the median, and that of
    the iteration with the best accuracy on the validation images.
    """
    is_last = trainer.iteration == options.num_train_iter - 1
    logits = predict(trainer.ema.module, test, options.eval_batch_size, run.world)
    found = metrics(logits, test.labels, auc=True if is_last else None)
    counts = confusion_matrix(test.labels.cpu().numpy(), logits.argmax(1).cpu().numpy(), logits.shape[1])
    accuracy, state = found["eval/top-1-acc"], run.state
    improved = accuracy > state.get("best_acc", 0.0)
    if improved:
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
    if improved:
        write_best(run, trainer, facts)


def choose_precision(options: argparse.Namespace, device: torch.device) -> str:
    """Return fp32, bf16 or fp16; UserError for fp16 without a GPU."""
    if options.strict:
        return "fp32"
    if options.precision == "auto" and "amp" not in options.given:
        return default_precision(device)
    if options.precision == "auto":
        return "fp32" if not options.amp else "fp16" if device.type == "cuda" else "bf16"
    if options.precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs a GPU; on this device use bf16 or fp32")
    return options.precision


def compiled(net: torch.nn.Module, options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Return the network, compiled where that was asked for, and by itself on GPUs.

    Where nobody asked, a machine without the compilers goes on uncompiled, with a warning.
    """
    automatic = options.compile == "auto" and device.type == "cuda" and not options.strict
    if not automatic and options.compile != "True":
        return net
    if automatic:
        torch._dynamo.config.suppress_errors = True
    return torch.compile(net, dynamic=False)


def global_batch_size(options: argparse.Namespace, world: World) -> int:
    """Return the labelled batch over all machines; --batch_size is that of one machine."""
    machines = max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    size = options.batch_size * machines
    if size % world.size:
        raise UserError(f"--batch_size {options.batch_size} cannot be shared evenly by {world.size // machines} "
                        "processes; choose a multiple of their number")
    return size


def seed_dropout(options: argparse.Namespace, iteration: int, world: World) -> None:
    """Let dropout, the only draw that networks make themselves, depend on the iteration and rank alone.

    Some networks of torchvision have a dropout of their own, whatever --dropout says.
    """
    if options.dropout > 0 or options.net_from_name:
        torch.manual_seed((options.seed * 1_000_003 + iteration) * 4096 + world.rank)


def describe(data: TrainingData, options: argparse.Namespace, world: World, precision: str) -> str:
    """Return the lines that open a log."""
    lines = [*data.notes, f"len(lb_dset) {len(data.labeled)}"] if data.notes else []
    return "\n".join([*lines, (
        f"{options.save_name}: {data.num_real} labelled of {len(data.unlabeled)} images, {data.num_classes} classes, "
        f"{len(data.test)} test images; {world.size} process(es) on {world.device.type}, {precision}")])
