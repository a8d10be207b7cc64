"""What a run is made of: networks, average, optimiser, schedule, data and learner, and one iteration of them."""
from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from DASO.lib.algorithm.interface import Algorithm, Draws, Setting, Step
from DASO.lib.algorithms import algorithm_of
from DASO.lib.config.config import Config
from DASO.lib.data.batches import Batch, Batches, ViewedPool
from DASO.lib.data.sets import TrainingData, warn_of_queue
from DASO.lib.evaluation import accuracy, class_accuracies, metrics, predict
from DASO.lib.models.ema import ModelEMA
from DASO.lib.models.semi import SemiModel, build_model
from DASO.lib.solver import Scheduler, average_gradients, make_optimizer
from DASO.lib.statistics import PseudoLabelStatistics
from shared.distributed import World, sync_batchnorm
from shared.training.precision import autocast, default_precision
from shared.training.run import Run


class Trainer:
    """Networks, optimiser and learner on their way. What a learner's hooks may use of it: interface.Training.

    `ema` is None without an average.
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


def choose_precision(cfg: Config, device: torch.device) -> str:
    """Return fp32 or bf16."""
    if cfg.STRICT:
        return "fp32"
    return default_precision(device) if cfg.PRECISION == "auto" else cfg.PRECISION
