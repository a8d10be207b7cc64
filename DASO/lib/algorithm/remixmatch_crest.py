"""ReMixMatch in generations: CReST, or CReST+ with MODEL.DIST_ALIGN.APPLY (and, as published, PROGRESSIVE_ALIGN)."""
from __future__ import annotations

from DASO.lib.algorithm.alignment import DistributionAlignment
from DASO.lib.algorithm.darp import make_darp
from DASO.lib.algorithm.interface import Algorithm, Batch, Draws, Setting, Step, Training, ramp_up
from DASO.lib.algorithm.mixing import guess, sharpen
from DASO.lib.algorithm.remixmatch import VIEWS, labelled_view, remixmatch_step
from DASO.lib.algorithm.self_training import SelfTraining
from DASO.lib.config.config import Config


class ReMixMatchCReST(Algorithm):
    state = ("alignment", "darp")

    def __init__(self, cfg: Config, setting: Setting) -> None:
        super().__init__(cfg, setting)
        self.self_training = SelfTraining(cfg, setting)
        self.alignment = DistributionAlignment(setting.prior, setting) if cfg.MODEL.DIST_ALIGN.APPLY else None
        self.darp = make_darp(cfg, setting) if cfg.ALGORITHM.DARP.APPLY else None

    @staticmethod
    def views(cfg: Config) -> tuple[str, ...]:
        return VIEWS

    @staticmethod
    def labelled_view(cfg: Config) -> str:
        return labelled_view(cfg)

    def losses(self, batch: Batch, it: int, draws: Draws) -> Step:
        target = guess(self, batch.views[0])
        if self.alignment is not None:
            target = self.alignment(target, self.self_training.exponent(it))
        target = sharpen(target, self.cfg.ALGORITHM.REMIXMATCH.TEMPERATURE)
        if self.darp is not None:
            target = self.darp(target, batch.index)
        # The losses on guesses rise anew in every generation.
        ramp = ramp_up(it % self.self_training.period, self.self_training.period,
                       self.cfg.ALGORITHM.CONS_RAMPUP_ITERS_RATIO, self.cfg.ALGORITHM.CONS_RAMPUP_SCHEDULE)
        step = remixmatch_step(self, batch, target, ramp, draws)
        step.log |= self.self_training.log(it)
        return step

    def ema_step(self, it: int) -> int:
        return it % self.self_training.period

    def begin(self, training: Training) -> None:
        self.self_training.begin(training)

    def after_iteration(self, training: Training, it: int) -> None:
        self.self_training.after_iteration(training, it)
