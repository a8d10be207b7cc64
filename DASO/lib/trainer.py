"""The one training loop of all learners, in reading order. A learner is its losses and its state (algorithm/)."""
from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step
from DASO.lib.algorithms import algorithm_of
from DASO.lib.checkpoints import load_foreign, load_weights, write_config, write_weights
from DASO.lib.config.config import Config
from DASO.lib.data.batches import Batches, ViewedPool
from DASO.lib.data.sets import TrainingData, load_data, shots, warn_of_queue
from DASO.lib.evaluation import accuracy, class_accuracies, extend_history, grouped, metrics, predict
from DASO.lib.models.ema import ModelEMA
from DASO.lib.models.semi import SemiModel, build_model
from DASO.lib.results import write_result, write_results
from DASO.lib.solver import Scheduler, average_gradients, make_optimizer
from DASO.lib.statistics import PseudoLabelStatistics, rates, report
from shared import distributed
from shared.allocator import keep_freed_memory
from shared.batchnorm import sync_batchnorm
from shared.cli import UserError
from shared.distributed import World
from shared.precision import autocast, default_precision, set_arithmetic
from shared.run import Run

CHECKPOINT = "checkpoint.pth.tar"
# Keys that may change between two parts of a run: where it runs and what it reports, not what it computes.
FREE_KEYS = ("GPU_ID", "DATASET.ROOT", "DATASET.NUM_WORKERS", "DATASET.DOWNLOAD", "OUTPUT_DIR", "RESUME", "EVAL_BATCH",
             "TENSORBOARD", "SAVE_SECONDS", "PERIODS.CHECKPOINT", "COMPILE", "CUDNN_BENCHMARK", "CUDNN_DETERMINISTIC")


class Trainer:
    """Networks, optimiser and learner on their way. What learners may use:

    cfg, world, data, setting, batches; model and ema (None without an average); predict, restart, folder, run.
    """

    def __init__(self, cfg: Config, data: TrainingData, world: World, folder: Path) -> None:
        self.cfg, self.data, self.world, self.folder = cfg, data, world, folder
        kind = algorithm_of(cfg.ALGORITHM.NAME)
        solver = cfg.SOLVER
        weighted = cfg.DATASET.SAMPLER_NAME == "ClassAwareSampler"
        self.batches = Batches(data, world, cfg.SEED, solver.IMS_PER_BATCH, solver.UNLABELED_BATCH_RATIO,
                               kind.views(cfg), kind.labelled_view(cfg), cfg.DATASET.SAMPLER_BETA if weighted else None)
        self.precision = choose_precision(cfg, world.device)
        self.channels = data.labelled.channels
        self.model = self.new_model(cfg.SEED)
        size = self.model.encoder.feature_size
        warn_of_queue(cfg, size)
        unlabelled = len(data.unlabelled) if data.unlabelled is not None else 0
        self.setting = Setting(data.num_classes, tuple(data.counts.tolist()), unlabelled, size, world, cfg.SEED)
        self.algorithm: Algorithm = kind(cfg, self.setting)
        self.ema: ModelEMA | None = None
        self.valid, self.test = (ViewedPool(part, data.look, world.device) if part is not None else None
                                 for part in (data.valid, data.test))
        self.statistics = PseudoLabelStatistics(data.num_classes, world.device)
        self.period: int | None = None  # iterations that the schedule spans, None for the whole run
        self.iteration = 0
        self.run: Run | None = None
        self.start_optimising()

    def new_model(self, seed: int) -> SemiModel:
        """Return an untrained network, the same for the same seed on all ranks."""
        torch.manual_seed(seed)
        model = sync_batchnorm(build_model(self.cfg, self.channels).to(self.world.device), self.world)
        if not self.cfg.STRICT:
            model = model.to(memory_format=torch.channels_last)
        return model.train()

    def start_optimising(self) -> None:
        """Make the average, the optimiser and the schedule of the present network, and hand it to the learner."""
        cfg = self.cfg
        if self.algorithm.keeps_average:
            self.ema = ModelEMA(self.model, cfg.MODEL.EMA_DECAY, cfg.MODEL.EMA_WEIGHT_DECAY)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, cfg)
        self.scheduler = Scheduler(self.optimizer, cfg, self.period)
        self.algorithm.model = self.model
        self.algorithm.teacher = self.ema.module if self.ema is not None else None
        if cfg.COMPILE:
            self.model.encoder.compile(dynamic=False)

    def restart(self, generation: int) -> None:
        """Begin again with untrained weights, a new average, optimiser and schedule (self-training)."""
        self.model.load_state_dict(self.new_model(self.cfg.SEED + 1_000_003 * generation).state_dict())
        if self.ema is not None:
            self.ema.module.load_state_dict(self.model.state_dict())
        self.optimizer.state.clear()
        self.scheduler.load_state_dict({"last_epoch": 0})

    def extend_labelled(self, index: Tensor, labels: Tensor) -> None:
        """Let the labelled set be the initial one and these unlabelled images with these labels, int64 [n]."""
        self.batches.extend(index.cpu().numpy(), labels.cpu().numpy())

    @property
    def measured(self) -> SemiModel:
        """The network that is evaluated."""
        return self.ema.module if self.ema is not None and self.algorithm.evaluates_average else self.model

    def predict(self, pool: ViewedPool, net: SemiModel | None = None) -> Tensor:
        """Return float32 logits [N, K] of all images in order, in eval mode; `net` None: of the measured network."""
        with self.autocast():
            return predict(net or self.measured, pool, self.cfg.EVAL_BATCH, self.world)

    def autocast(self) -> contextlib.AbstractContextManager:
        return autocast(self.world.device, self.precision)

    def step(self, batch: Batch, it: int, draws: Draws) -> tuple[Step, dict[str, Tensor | float]]:
        """Do one iteration on a batch; return what the learner returned, and what to log under its published name."""
        with self.autocast():
            found = self.algorithm.losses(batch, it, draws)
            total = torch.stack([loss.float() for loss in found.losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        average_gradients(self.parameters, self.world)
        lr = self.scheduler.lr
        self.optimizer.step()
        self.scheduler.step()
        values: dict[str, Tensor | float] = {f"train/{name}": loss.detach() for name, loss in found.losses.items()}
        if len(values) > 1:
            values["train/total_loss"] = total.detach()
        if self.ema is not None:
            update = self.algorithm.ema_step(it)
            self.ema.update(self.model, update, lr)
            values["train/ema_decay"] = self.ema.decay(update)
        if found.logits is not None:
            values["train/top1"], values["train/top5"] = accuracy(found.logits.detach(), batch.labels)
        values |= {name if "/" in name else f"train/{name}": value for name, value in found.log.items()}
        return found, {**values, "misc/lr": lr}

    def note(self, batch: Batch, found: Step) -> None:
        """Count the pseudo-labels of all ranks."""
        gather = self.setting.gather
        if not found.pseudo_labels:
            return
        kinds = list(found.pseudo_labels)
        every = gather(torch.stack([batch.truth, *found.pseudo_labels.values()], dim=1))
        self.statistics.add(gather(batch.labels), every[:, 0],
                            {kind: every[:, number + 1] for number, kind in enumerate(kinds)})

    def evaluate(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the published numbers of the measured network, and its per-class accuracies [K] by split."""
        values, classes = {}, {}
        for split, pool in ("valid", self.valid), ("test", self.test):
            if pool is not None:
                logits = self.predict(pool)
                values |= metrics(logits, pool.labels, self.setting.prior, split, self.cfg.MISC.LOG_CLASSWISE)
                classes[split] = class_accuracies(logits, pool.labels).cpu().numpy()
        return values, classes

    def parts(self) -> dict[str, Any]:
        """Return what a checkpoint holds, under the published names first."""
        kept = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
                "algorithm": self.algorithm, "batches": self.batches, "statistics": self.statistics}
        return kept if self.ema is None else {**kept, "ema_model": self.ema}

    def meta(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the published `meta` of a checkpoint: iteration, and each tracked number now and at best."""
        found: dict[str, Any] = {"iter": self.iteration + 1}
        for name, values in state.get("history", {}).items():
            found |= {name: values[-1], f"{name}_best": max(values)}
        return found


def train(cfg: Config, folder: Path, world: World) -> None:
    """Train as the configuration says, in `folder`; UserError."""
    if world.device.type == "cpu":
        keep_freed_memory()
    set_arithmetic(cfg.STRICT, benchmark=cfg.CUDNN_BENCHMARK, deterministic=cfg.CUDNN_DETERMINISTIC)
    data = load_data(cfg)
    trainer = Trainer(cfg, data, world, folder)
    trainer.algorithm.begin(trainer)
    run = open_run(trainer)
    if run.resumed_from is None:
        write_config(cfg, folder, world)
        if cfg.RESUME:
            load_foreign(trainer, run, cfg.RESUME)
    run.print(describe(trainer))
    ended = time.perf_counter()
    for it in run.steps(cfg.SOLVER.MAX_ITER):
        trainer.iteration = it
        started = time.perf_counter()
        batch = trainer.batches(it)
        fetched = time.perf_counter()
        found, values = trainer.step(batch, it, Draws(cfg.SEED, it, world))
        trainer.note(batch, found)
        run.log(**values, **{"misc/data_time": fetched - started, "misc/iter_time": time.perf_counter() - ended})
        ended = time.perf_counter()
        last = it + 1 == cfg.SOLVER.MAX_ITER
        if (it + 1) % cfg.PERIODS.EVAL == 0 or last:
            log_evaluation(trainer, run, it)
            trainer.algorithm.evaluated(trainer, it)
        if (it + 1) % cfg.PERIODS.CHECKPOINT == 0:
            write_best(trainer, run)
        trainer.algorithm.after_iteration(trainer, it)
    trainer.algorithm.finish(trainer)
    if world.main:
        write_weights(trainer, folder / "model_final.pth.tar", run.state)
        write_results(trainer, run.state)
        write_result(trainer, run.state)
    distributed.stop()


def open_run(trainer: Trainer) -> Run:
    """Return the run of the trainer's folder, continued if there is a checkpoint."""
    cfg = trainer.cfg
    trainer.run = run = Run(
        trainer.folder, {**cfg.flat, "precision": trainer.precision}, trainer.parts(), trainer.world,
        checkpoint=CHECKPOINT, ignore=FREE_KEYS,
        extra=lambda: {"meta": trainer.meta(trainer.run.state), **({"ema_model": None} if trainer.ema is None else {})},
        save_seconds=cfg.SAVE_SECONDS or None, save_every=cfg.PERIODS.CHECKPOINT, log_every=1 << 62,
        stats_name="metrics.json", tensorboard="." if cfg.TENSORBOARD else False, desc=cfg.ALGORITHM.NAME)
    run.state.setdefault("history", {})
    run.state.setdefault("courses", {})
    return run


def log_evaluation(trainer: Trainer, run: Run, it: int) -> None:
    """Evaluate, and write the line of metrics.json, the scalars, and what the summary is made of."""
    found, classes = trainer.evaluate()
    history, courses = run.state["history"], run.state["courses"]
    values = {**run.means(), **found}
    for split in classes:
        values |= extend_history(history, found, split)
        add(courses, f"{split}/top1", found[f"{split}/top1"])
        add(courses, f"{split}/classes", classes[split].tolist())
        for group, mean in grouped(classes[split], shots(trainer.data.real_counts)).items():
            add(courses, f"{split}/{group}", mean)
    counted = trainer.statistics.counts()
    for kind, confusion in counted.items():
        if kind != "labels" and confusion[:-1].any():
            for name, numbers in rates(confusion).items():
                add(courses, f"pseudo_labels/{kind}/{name}", numbers.tolist())
    shown = trainer.algorithm.logged_pseudo_labels
    if shown:
        values |= report({"labels": counted["labels"], **{kind: counted[kind] for kind in shown if kind in counted}})
    add(courses, "iteration", it + 1)
    line = {"iteration": it + 1, **values}
    run.record(values, line=dict(sorted(line.items())))
    run.print(console_line(trainer, run, values))
    if trainer.world.main:
        write_results(trainer, run.state)


def add(courses: dict[str, list[Any]], name: str, value: Any) -> None:
    courses.setdefault(name, []).append(value)


def write_best(trainer: Trainer, run: Run) -> None:
    """Keep the weights if the newest accuracy on the validation images is the highest so far."""
    course = run.state["history"].get("valid/top1")
    if course and course[-1] >= max(course) and trainer.world.main:
        write_weights(trainer, trainer.folder / "model_best.pth.tar", run.state)


def evaluate_only(cfg: Config, folder: Path, world: World) -> dict[str, float]:
    """Measure the checkpoint of RESUME, or the newest of `folder`; return the published numbers by name."""
    trainer = Trainer(cfg, load_data(cfg), world, folder)
    load_weights(trainer, Path(cfg.RESUME) if cfg.RESUME else folder / CHECKPOINT)
    values, classes = trainer.evaluate()
    for split, each in classes.items():
        values |= {f"{split}/{name}": mean for name, mean in grouped(each, shots(trainer.data.real_counts)).items()}
    distributed.stop()
    return values


def choose_precision(cfg: Config, device: torch.device) -> str:
    """Return fp32 or bf16."""
    if cfg.STRICT:
        return "fp32"
    return default_precision(device) if cfg.PRECISION == "auto" else cfg.PRECISION


def check_batches(cfg: Config, world: World) -> None:
    """Raise UserError where the ranks cannot share a batch evenly."""
    size = cfg.SOLVER.IMS_PER_BATCH
    if size % world.size:
        raise UserError(f"SOLVER.IMS_PER_BATCH {size} cannot be shared evenly by {world.size} processes; choose a "
                        "multiple of their number")


def console_line(trainer: Trainer, run: Run, values: Mapping[str, float]) -> str:
    """Return the line for the console and log.txt."""
    done, total = trainer.iteration + 1, trainer.cfg.SOLVER.MAX_ITER
    left = run.seconds / max(1, done) * (total - done)
    losses = "  ".join(f"{name.removeprefix('train/')}: {value:.4g}" for name, value in values.items()
                       if name.startswith("train/") and "loss" in name)
    memory = ""
    if trainer.world.device.type == "cuda":
        memory = f"  max_mem: {math.ceil(torch.cuda.max_memory_allocated() / 2 ** 20)}M"
    accuracies = "  ".join(f"{split}_{name}: {values[f'{split}/{name}']:.2f}" for split in ("valid", "test")
                           for name in ("top1", "top1_median20", "top1_la") if f"{split}/{name}" in values)
    return (f"eta: {int(left)}s  iter: {done}/{total}  {losses}  iter_time: {values['misc/iter_time']:.4f}  "
            f"data_time: {values['misc/data_time']:.4f}  lr: {values['misc/lr']:.4g}{memory}  {accuracies}")


def describe(trainer: Trainer) -> str:
    """Return the lines that open a log."""
    data, world = trainer.data, trainer.world
    sizes = ", ".join(f"{len(part)} {name}" for name, part in (
        ("labelled", data.labelled), ("unlabelled", data.unlabelled), ("validation", data.valid), ("test", data.test))
        if part is not None)
    lines = [f"{trainer.folder.name}: {sizes} images; {world.size} process(es) on {world.device.type}, "
             f"{trainer.precision}", f"labelled images a class: {data.counts.tolist()}"]
    if trainer.batches.beta is not None:
        shares = ", ".join(f"{share:.4f}" for share in trainer.batches.drawn_shares)
        lines.append(f"shares of the classes in what is drawn: {shares}")
    return "\n".join(lines)
