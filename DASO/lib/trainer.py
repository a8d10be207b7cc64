"""The training loop of all learners, in reading order. A learner is its losses and its state (algorithm/)."""
from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from DASO.lib.algorithm import ALGORITHMS
from DASO.lib.algorithm.interface import Algorithm, Draws, Setting, Step
from DASO.lib.config.config import Config, dump
from DASO.lib.data.batches import Batch, Batches, ViewedPool
from DASO.lib.data.sets import TrainingData, load_data
from DASO.lib.evaluation import accuracy, class_accuracies, grouped, metrics, predict, shots
from DASO.lib.models.ema import ModelEMA, as_counters
from DASO.lib.models.semi import SemiModel, build_model
from DASO.lib.report import (
    PseudoLabelStatistics,
    console_line,
    extend_courses,
    extend_history,
    pseudo_label_numbers,
    write_history,
    write_result,
)
from DASO.lib.solver import Scheduler, average_gradients, make_optimizer
from shared import distributed
from shared.cli import UserError, less_memory
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World, sync_batchnorm
from shared.networks import source_of
from shared.training.checkpoint import previous_path, read_checkpoint, weights_in, write_checkpoint
from shared.training.files import write_text
from shared.training.fingerprint import fingerprint_arrays
from shared.training.log import Log
from shared.training.precision import autocast, compiles, computed_on, default_precision, set_arithmetic
from shared.training.run import Run

CHECKPOINT, BEST, FINAL = "checkpoint.pth.tar", "model_best.pth.tar", "model_final.pth.tar"
# Keys that may change between two parts of a run: device, reports, and paths, which count by their content.
FREE_KEYS = ("GPU_ID", "DATASET.ROOT", "DATASET.NUM_WORKERS", "DATASET.DOWNLOAD", "OUTPUT_DIR", "RESUME", "EVAL_BATCH",
             "TENSORBOARD", "SAVE_SECONDS", "PERIODS.CHECKPOINT", "COMPILE", "CUDNN_BENCHMARK", "CUDNN_DETERMINISTIC",
             "DATASET.AUG_PATH", "ALGORITHM.CRT.TARGET_DIR", "ALGORITHM.DARP.EST", "MODEL.PRETRAINED")


def device_of(cfg: Config) -> str | None:
    """Return the device of GPU_ID: 0 is the CPU without a GPU; under torchrun each process has its own GPU."""
    if cfg.GPU_ID < 0 or cfg.GPU_ID == 0 and not torch.cuda.is_available():
        return "cpu"
    return None if int(os.environ.get("WORLD_SIZE", 1)) > 1 else f"cuda:{cfg.GPU_ID}"


@less_memory("SOLVER.IMS_PER_BATCH or SOLVER.UNLABELED_BATCH_RATIO")
def train(cfg: Config, folder: Path, world: World, overwrite: bool = False) -> None:
    """Train as the configuration says; with `overwrite`, another run in `folder` is moved aside. Raises UserError
    before `folder` is touched."""
    # Arithmetic, data, network and learner.
    if world.device.type == "cpu":
        keep_freed_memory()
    set_arithmetic(cfg.STRICT, benchmark=cfg.CUDNN_BENCHMARK, deterministic=cfg.CUDNN_DETERMINISTIC)
    trainer = Trainer(cfg, load_data(cfg), world, folder)
    trainer.algorithm.begin(trainer)
    if cfg.RESUME and not (folder / CHECKPOINT).exists():
        trainer.load_weights(Path(cfg.RESUME))

    # Run folder, log and checkpoint.
    log = Log(folder, world, every=None, stats_name="metrics.json", tensorboard="." if cfg.TENSORBOARD else False,
              desc=cfg.ALGORITHM.NAME)
    trainer.run = run = Run(
        folder, {**cfg.flat, "precision": trainer.precision}, trainer.parts(), world, log=log, inputs=trainer.inputs(),
        checkpoint=CHECKPOINT, overwrite=overwrite, ignore=FREE_KEYS, extra=lambda: trainer.facts(trainer.run.step),
        save_seconds=cfg.SAVE_SECONDS or None, save_every=cfg.PERIODS.CHECKPOINT)
    run.state = {"history": {}, "courses": {}, **run.state}  # accuracies as published, and every number by name
    if run.resumed_from is None:
        if world.main:
            write_text(folder / "config.yaml", dump(cfg))
        if cfg.RESUME:
            trainer.load_foreign(Path(cfg.RESUME))
    is_complete = run.finished and (folder / FINAL).exists()
    if not is_complete:
        log.print(describe(trainer))

    # Training.
    if compiles(cfg.COMPILE, world.device, cfg.STRICT):
        for net in filter(None, (trainer.model, trainer.algorithm.teacher)):
            net.encoder.compile(dynamic=False)
    ended = time.perf_counter()
    for it in run.steps(cfg.SOLVER.MAX_ITER):
        started = time.perf_counter()
        batch = trainer.batches(it)
        fetched = time.perf_counter()
        found, values = trainer.step(batch, it, Draws(cfg.SEED, it, world))
        trainer.count(batch, found)
        log.add(**values, **{"misc/data_time": fetched - started, "misc/iter_time": time.perf_counter() - ended})
        ended = time.perf_counter()
        if (it + 1) % cfg.PERIODS.EVAL == 0 or it + 1 == cfg.SOLVER.MAX_ITER:
            log_evaluation(trainer, it)
            trainer.algorithm.evaluated(trainer, it)
        if (it + 1) % cfg.PERIODS.CHECKPOINT == 0:
            write_best(trainer, it)
        trainer.algorithm.after_iteration(trainer, it)

    # Results.
    if world.main and not is_complete:
        write_history(folder, run.state, trainer.data.counts)
        facts = {"name": folder.name, "algorithm": cfg.ALGORITHM.NAME, "dataset": cfg.DATASET.NAME, "seed": cfg.SEED,
                 "iterations": cfg.SOLVER.MAX_ITER, "labelled_counts": trainer.data.counts.tolist()}
        write_result(folder, run.state, facts, {"seconds": run.seconds, "precision": trainer.precision,
                                                "processes": world.size, **computed_on(world.device)})
        trainer.write_weights(folder / FINAL, run.step)
    distributed.stop()


def evaluate_only(cfg: Config, folder: Path, world: World) -> dict[str, float]:
    """Evaluate the checkpoint of RESUME, or the newest of `folder`; return the published numbers by name."""
    trainer = Trainer(cfg, load_data(cfg), world, folder)
    trainer.load_weights(Path(cfg.RESUME) if cfg.RESUME else folder / CHECKPOINT)
    values, classes = trainer.evaluate()
    for split, accuracies in classes.items():
        means = grouped(accuracies, shots(trainer.data.real_counts))
        values |= {f"{split}/{name}": mean for name, mean in means.items()}
    distributed.stop()
    return values


class Trainer:
    """Networks, optimiser, schedule, data and learner; one iteration of them.

    What a learner's hooks may use of it: algorithm.interface.Training. `ema` is None without an average.
    """

    def __init__(self, cfg: Config, data: TrainingData, world: World, folder: Path) -> None:
        self.cfg, self.data, self.world, self.folder, solver = cfg, data, world, folder, cfg.SOLVER
        self.run: Run | None = None
        self.precision = default_precision(world.device) if cfg.PRECISION == "auto" else cfg.PRECISION
        if cfg.STRICT:
            self.precision = "fp32"
        self.model = self.new_model(cfg.SEED)
        size = self.model.encoder.feature_size
        if cfg.MODEL.QUEUE.FEAT_DIM != size and "DASO" in cfg.ALGORITHM.NAME:
            warnings.warn(f"MODEL.QUEUE.FEAT_DIM {cfg.MODEL.QUEUE.FEAT_DIM}: the network's features have {size} "
                          "numbers; these are used", stacklevel=2)

        # Learner and batches.
        self.setting = Setting(data.num_classes, tuple(data.counts.tolist()),
                               0 if data.unlabelled is None else len(data.unlabelled), size, world)
        self.algorithm: Algorithm = ALGORITHMS[cfg.ALGORITHM.NAME](cfg, self.setting)
        beta = cfg.DATASET.SAMPLER_BETA if cfg.DATASET.SAMPLER_NAME == "ClassAwareSampler" else None
        self.batches = Batches(data, world, cfg.SEED, solver.IMS_PER_BATCH, solver.UNLABELED_BATCH_RATIO,
                               self.algorithm.views, self.algorithm.labelled_view, beta)
        self.valid, self.test = (None if images is None else ViewedPool(images, data.look, world.device)
                                 for images in (data.valid, data.test))
        self.statistics = PseudoLabelStatistics(data.num_classes, world.device)

        # Average of the weights, optimiser and schedule.
        self.ema: ModelEMA | None = None
        if self.algorithm.keeps_average:
            self.ema = ModelEMA(self.model, cfg.MODEL.EMA_DECAY, cfg.MODEL.EMA_WEIGHT_DECAY)
        self.algorithm.model, self.algorithm.teacher = self.model, None if self.ema is None else self.ema.module
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, cfg)
        self.scheduler = Scheduler(self.optimizer, cfg, self.algorithm.period)

    def new_model(self, seed: int) -> SemiModel:
        """Return an untrained network, the same for the same seed on all ranks."""
        torch.manual_seed(seed)
        model = build_model(self.cfg, self.data.labelled.channels).to(self.world.device)
        model = sync_batchnorm(model, self.world)
        if not self.cfg.STRICT:
            model = model.to(memory_format=torch.channels_last)
        return model.train()

    def restart(self, generation: int) -> None:
        """Begin again with untrained weights, a new average, optimiser and schedule (self-training)."""
        self.model.load_state_dict(self.new_model(self.cfg.SEED + 1_000_003 * generation).state_dict())
        if self.ema is not None:
            self.ema.module.load_state_dict(self.model.state_dict())
        self.optimizer.state.clear()
        self.scheduler.load_state_dict({"last_epoch": 0})

    def step(self, batch: Batch, it: int, draws: Draws) -> tuple[Step, dict[str, Tensor | float]]:
        """Do one iteration on a batch; return the learner's output, and the published log entries."""
        with autocast(self.world.device, self.precision, self.model, self.algorithm.teacher):
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
            update = self.algorithm.since_start(it)
            self.ema.update(self.model, update, lr)
            values["train/ema_decay"] = self.ema.decay(update)
        if found.logits is not None:
            values["train/top1"], values["train/top5"] = accuracy(found.logits.detach(), batch.labels)
        values |= {name if "/" in name else f"train/{name}": value for name, value in found.log.items()}
        return found, {**values, "misc/lr": lr}

    def count(self, batch: Batch, found: Step) -> None:
        """Count the pseudo-labels of all ranks."""
        if not found.pseudo_labels:
            return
        every = distributed.gather(torch.stack([batch.truth, *found.pseudo_labels.values()], dim=1), self.world)
        truth, *pseudo_labels = every.unbind(1)
        self.statistics.add(distributed.gather(batch.labels, self.world), truth,
                            dict(zip(found.pseudo_labels, pseudo_labels, strict=True)))

    @less_memory("EVAL_BATCH")
    def predict(self, pool: ViewedPool) -> Tensor:
        """Return the evaluated network's float32 logits [N, K] of all images in order, in eval mode."""
        averaged = self.ema is not None and self.algorithm.evaluates_average
        with autocast(self.world.device, self.precision):
            return predict(self.ema.module if averaged else self.model, pool, self.cfg.EVAL_BATCH, self.world)

    def evaluate(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the published numbers of the evaluated network, and its per-class accuracies [K] by split."""
        values, classes = {}, {}
        for split, pool in ("valid", self.valid), ("test", self.test):
            if pool is not None:
                logits = self.predict(pool)
                values |= metrics(logits, pool.labels, self.setting.prior, split, self.cfg.MISC.LOG_CLASSWISE)
                classes[split] = class_accuracies(logits, pool.labels).cpu().numpy()
        return values, classes

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def parts(self) -> dict[str, Any]:
        """Return the content of a checkpoint, the published names first."""
        kept = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
                "algorithm": self.algorithm, "batches": self.batches, "statistics": self.statistics}
        return kept if self.ema is None else {**kept, "ema_model": self.ema}

    def facts(self, iteration: int) -> dict[str, Any]:
        """Return the published `meta` of a checkpoint: iteration, and each tracked number now and at best."""
        meta: dict[str, Any] = {"iter": iteration}
        for name, values in self.run.state["history"].items():
            meta |= {name: values[-1], f"{name}_best": max(values)}
        return {"meta": meta, **self.images_seen(), **({"ema_model": None} if self.ema is None else {})}

    def images_seen(self) -> dict[str, Any]:
        """Return a checkpoint's record of its encoder and of the form of its images."""
        look, data = self.data.look, self.data
        sizes = {"size": (look.side, look.side), "resize": "square"}
        if look.policy.crop is not None:  # photographs were made squares of the stored side, whose middle is seen
            sizes |= {"resize": "centre", "side": data.labelled.size[0]}
        return {"classes": data.labelled.classes, "mean": look.mean, "std": look.std, "encoder": self.cfg.MODEL.NAME,
                **sizes}

    def inputs(self) -> dict[str, Any]:
        """Return the inputs of the run by key; see Run."""

        data, darp, encoder = self.data, getattr(self.algorithm, "darp", None), self.cfg.ALGORITHM.CRT.TARGET_DIR
        sets = [data.real_labelled, data.unlabelled, data.valid, data.test]
        arrays = [array for part in sets if part is not None for array in (part.images, part.labels, part.classes)]
        return {"DATASET.ROOT": fingerprint_arrays(*arrays),
                "DATASET.AUG_PATH": data.labelled.subset(slice(-data.generated, None)) if data.generated else None,
                "ALGORITHM.CRT.TARGET_DIR": Path(encoder) / FINAL if self.cfg.ALGORITHM.NAME == "cRT" else None,
                "ALGORITHM.DARP.EST": None if darp is None else darp.target.cpu().numpy(),
                "MODEL.PRETRAINED": source_of(self.cfg.MODEL.PRETRAINED)}

    def write_weights(self, path: Path, iteration: int) -> None:
        """Write a published form of checkpoint: networks, optimiser, schedule and `meta`."""
        write_checkpoint(path, {
            "model": self.model.state_dict(), "ema_model": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "meta": self.facts(iteration)["meta"], **self.images_seen()})
        previous_path(path).unlink(missing_ok=True)

    def load_weights(self, path: Path) -> dict[str, Any]:
        """Load the networks of a checkpoint, ours or a published one; return its content. UserError."""
        content = read_checkpoint(path)
        if "model" not in content:
            raise UserError(f"{path}: it holds no `model`; expected a checkpoint of this program")
        load_state(self.model, weights_in(content, "model", path), path, "model")
        if self.ema is not None:
            average = "ema_model" if content.get("ema_model") else "model"
            load_state(self.ema.module, weights_in(content, average, path), path, "ema_model")
        return content

    def load_foreign(self, path: Path) -> None:
        """Start a run from RESUME: all of a checkpoint of ours, or weights, optimiser and iteration of a published one.

        Queues, estimates and histories, which published files lack, start empty.
        """
        content = self.load_weights(path)
        if "algorithm" in content:
            self.run.restore(content, path)
            return
        try:
            for name in "optimizer", "scheduler":
                if content.get(name):
                    getattr(self, name).load_state_dict(content[name])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"RESUME {path}: its optimiser does not fit SOLVER.*: {' '.join(str(error).split())[:120]}"
                            ) from None
        self.run.step = int(content.get("meta", {}).get("iter", 0))
        self.run.log.print(f"RESUME {path}: weights, optimiser and iteration {self.run.step}; queues and statistics "
                           "start empty")


def load_state(net: torch.nn.Module, state: Mapping[str, Any], path: Path, name: str) -> None:
    """Load a state dict; UserError that names the first difference."""
    state, ours = as_counters(state), net.state_dict()
    remedy = "set MODEL.* and ALGORITHM.* as in its training"
    differing = next((key for key in ours if key in state and state[key].shape != ours[key].shape), None)
    if differing is not None:
        raise UserError(f"{path}: {name}.{differing} is {list(state[differing].shape)} there, "
                        f"{list(ours[differing].shape)} here; {remedy}")
    odd = sorted(set(ours) ^ set(state))
    if odd:
        where = "the network" if odd[0] in ours else "the file"
        raise UserError(f"{path}: {name}.{odd[0]} is in {where} alone; {remedy}")
    net.load_state_dict(state)


def log_evaluation(trainer: Trainer, it: int) -> None:
    """Evaluate; write the line of metrics.json, the scalars, and results.json and summary.json."""
    run, history = trainer.run, trainer.run.state["history"]
    found, classes = trainer.evaluate()
    values = {**run.log.means(), **found}
    for split in classes:
        values |= extend_history(history, found, split)
    counts = trainer.statistics.counts()
    extend_courses(run.state["courses"], it + 1, found, classes, shots(trainer.data.real_counts), counts)
    shown = trainer.algorithm.logged_pseudo_labels
    if shown:
        values |= pseudo_label_numbers({kind: numbers for kind, numbers in counts.items()
                                        if kind in ("labels", *shown)})
    run.log.record(values, line=dict(sorted({"iteration": it + 1, **values}.items())))
    memory = torch.cuda.max_memory_allocated() if trainer.world.device.type == "cuda" else 0
    run.log.print(console_line(values, it + 1, trainer.cfg.SOLVER.MAX_ITER, run.seconds, memory))
    if trainer.world.main:
        write_history(trainer.folder, run.state, trainer.data.counts)


def write_best(trainer: Trainer, it: int) -> None:
    """Keep the weights if the newest accuracy on the validation images is the highest so far."""
    course = trainer.run.state["history"].get("valid/top1")
    if course and course[-1] >= max(course) and trainer.world.main:
        trainer.write_weights(trainer.folder / BEST, it + 1)


def describe(trainer: Trainer) -> str:
    """Return the lines that open a log."""
    data, world = trainer.data, trainer.world
    sizes = ", ".join(f"{len(part)} {name}" for name, part in (
        ("labelled", data.labelled), ("unlabelled", data.unlabelled), ("validation", data.valid), ("test", data.test))
        if part is not None)
    lines = [f"{trainer.folder.name}: {sizes} images; {world.size} process(es) on {world.device.type}, "
             f"{trainer.precision}", f"labelled images a class: {data.counts.tolist()}"]
    if trainer.batches.beta is not None:
        fractions = ", ".join(f"{fraction:.4f}" for fraction in trainer.batches.drawn_fractions)
        lines.append(f"shares of the classes in what is drawn: {fractions}")
    return "\n".join(lines)
