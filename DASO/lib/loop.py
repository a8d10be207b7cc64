"""The one training loop of all learners, in reading order. A learner is its losses and its state (algorithm/)."""
from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from DASO.lib.algorithm.interface import Draws
from DASO.lib.checkpoints import load_foreign, load_weights, write_config, write_weights
from DASO.lib.config.config import Config
from DASO.lib.data.sets import load_data, shots
from DASO.lib.evaluation import extend_history, grouped
from DASO.lib.results import write_result, write_results
from DASO.lib.statistics import rates, report
from DASO.lib.trainer import Trainer
from shared import distributed
from shared.cli import UserError
from shared.cpu.allocator import keep_freed_memory
from shared.distributed import World
from shared.training.precision import set_arithmetic
from shared.training.log import Log
from shared.training.run import Run

CHECKPOINT = "checkpoint.pth.tar"
# Keys that may change between two parts of a run: where it runs and what it reports, not what it computes.
FREE_KEYS = ("GPU_ID", "DATASET.ROOT", "DATASET.NUM_WORKERS", "DATASET.DOWNLOAD", "OUTPUT_DIR", "RESUME", "EVAL_BATCH",
             "TENSORBOARD", "SAVE_SECONDS", "PERIODS.CHECKPOINT", "COMPILE", "CUDNN_BENCHMARK", "CUDNN_DETERMINISTIC")


def train(cfg: Config, folder: Path, world: World) -> None:
    """Train as the configuration says, in `folder`; UserError."""
    if world.device.type == "cpu":
        keep_freed_memory()
    set_arithmetic(cfg.STRICT, benchmark=cfg.CUDNN_BENCHMARK, deterministic=cfg.CUDNN_DETERMINISTIC)
    data = load_data(cfg)
    trainer = Trainer(cfg, data, world, folder)
    trainer.algorithm.begin(trainer)
    if cfg.RESUME and not (folder / CHECKPOINT).exists():
        load_weights(trainer, Path(cfg.RESUME))  # if it does not fit, it is said before there is a folder
    run = open_run(trainer)
    if run.resumed_from is None:
        write_config(cfg, folder, world)
        if cfg.RESUME:
            load_foreign(trainer, run, cfg.RESUME)
    run.log.print(describe(trainer))
    ended = time.perf_counter()
    for it in run.steps(cfg.SOLVER.MAX_ITER):
        trainer.iteration = it
        started = time.perf_counter()
        batch = trainer.batches(it)
        fetched = time.perf_counter()
        found, values = trainer.step(batch, it, Draws(cfg.SEED, it, world))
        trainer.note(batch, found)
        run.log.add(**values, **{"misc/data_time": fetched - started, "misc/iter_time": time.perf_counter() - ended})
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
    log = Log(trainer.folder, trainer.world, every=None, stats_name="metrics.json",
              tensorboard="." if cfg.TENSORBOARD else False, desc=cfg.ALGORITHM.NAME)
    trainer.run = run = Run(
        trainer.folder, {**cfg.flat, "precision": trainer.precision}, trainer.parts(), trainer.world, log=log,
        checkpoint=CHECKPOINT, ignore=FREE_KEYS,
        extra=lambda: {"meta": trainer.meta(trainer.run.state), **({"ema_model": None} if trainer.ema is None else {})},
        save_seconds=cfg.SAVE_SECONDS or None, save_every=cfg.PERIODS.CHECKPOINT)
    run.state.setdefault("history", {})
    run.state.setdefault("courses", {})
    return run


def log_evaluation(trainer: Trainer, run: Run, it: int) -> None:
    """Evaluate, and write the line of metrics.json, the scalars, and what the summary is made of."""
    found, classes = trainer.evaluate()
    history, courses = run.state["history"], run.state["courses"]
    values = {**run.log.means(), **found}
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
    run.log.record(values, line=dict(sorted(line.items())))
    run.log.print(console_line(trainer, run, values))
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
