"""Long-tailed dual pseudo training: DASO labels, the diffusion model evens out the classes, DASO learns again.

Stage 1 trains DASO (Oh et al., CVPR 2022) on long-tailed labelled and unlabelled images and labels the latter; stage 2
trains a diffusion model on all of them and generates as many images of every class; stage 3 trains DASO with these
among the labelled ones. The scripts of DASO/ are run as commands.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shared.cli import UserError
from TorchSSL.steps import Step

if TYPE_CHECKING:
    from TorchSSL.dpt import Experiment

NAME = "daso"
# Data set -> labelled and unlabelled images of its most frequent class, and the imbalance where none is given.
HEADS = {"digits": (40, 70, 20), "cifar10": (1500, 3000, 100), "cifar100": (150, 300, 10)}


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go with the learner of stage 1; complete those of long-tailed DPT."""
    if options.stage1 != NAME:
        for flag, given in (("--imbalance", options.imbalance), ("--stage3 daso", options.stage3 == NAME)):
            if given:
                raise UserError(f"{flag} belongs to --stage1 daso")
        options.stage3 = options.stage3 or "freematch"
        return
    if options.dataset not in HEADS:
        raise UserError(f"--stage1 daso: expected --dataset {', '.join(HEADS)}, got {options.dataset}")
    for flag, wrong in (("--stage2 tdsm", options.stage2 == "tdsm"), (f"--stage3 {options.stage3}",
                                                                     options.stage3 not in (None, NAME))):
        if wrong:
            raise UserError(f"{flag} does not go with --stage1 daso, which trains itself again in stage 3")
    options.stage3 = NAME
    options.imbalance = options.imbalance or HEADS[options.dataset][2]


class LongTail:
    """The steps of a long-tailed experiment. Paths are as typed in DASO/ and EDM/, where the commands run."""

    def __init__(self, experiment: Experiment) -> None:
        ours, options = experiment, experiment.options
        self.experiment, self.options, self.dataset, self.factor = ours, options, ours.dataset, options.imbalance
        head, unlabelled, _ = HEADS[self.dataset]
        self.heads = (options.labels or head, unlabelled)
        self.title = f"{NAME}_{self.dataset}_{self.heads[0]}_imb{self.factor}_{ours.seed}"
        absolute = options.out is not None
        self.runs = f"{ours.saved}" if absolute else "outputs/dpt"
        self.stage1, self.stage3 = (self.folder(memo) for memo in ("", f"aug{ours.last}"))
        self.zip = f"{self.stage1}/{self.title}{ours.recipe.shape}.zip"
        self.model = f"{ours.models}/{self.title}"
        self.images = f"{ours.images if absolute else 'data-aug'}/{self.title}/nums_{ours.last}"

    def folder(self, memo: str) -> str:
        """Return the run folder that main.py names by its settings, as typed in DASO/."""
        (head, unlabelled), factor = self.heads, self.factor
        name = f"DASO_{self.dataset}_l_{head}_{factor}_ul_{unlabelled}_{factor}_seed_{self.experiment.seed}"
        return f"{self.runs}/{name}" + (f"_{memo}" if memo else "")

    def from_edm(self, path: str) -> str:
        """Return the path, given as typed in DASO/, as typed in EDM/."""
        return path if path.startswith("/") else f"../DASO/{path}"

    def from_daso(self, path: str) -> str:
        """Return the path, given as typed in EDM/, as typed in DASO/."""
        return path if path.startswith("/") else f"../EDM/{path}"

    def train(self, *pairs: str) -> list[str]:
        """Return the command of a run of DASO with further keys and values."""
        section, (head, unlabelled) = f"DATASET.{self.dataset.upper()}", self.heads
        keys = {"NUM_LABELED_HEAD": head, "IMB_FACTOR_L": self.factor, "NUM_UNLABELED_HEAD": unlabelled,
                "IMB_FACTOR_UL": self.factor}
        command = ["python", "main.py", "--config-file", f"configs/{self.dataset}/fixmatch_daso.yaml"]
        command += [word for key, value in keys.items() for word in (f"{section}.{key}", str(value))]
        command += ["SEED", str(self.experiment.seed), "OUTPUT_DIR", self.runs]
        if self.experiment.data_dir != "./data":
            command += ["DATASET.ROOT", self.experiment.data_dir]
        return [*command, *pairs]

    def steps(self) -> Iterator[Step]:
        """Yield the steps one by one."""
        stages = {1: self.stage_1, 2: self.stage_2, 3: self.stage_3}
        for number in sorted(self.options.stages):
            yield from stages[number]()
        if self.options.controls:
            yield from self.controls()
        yield self.report()

    def stage_1(self) -> Iterator[Step]:
        weights, labels = f"{self.stage1}/model_final.pth.tar", f"{self.stage1}/pseudo_label.npz"
        yield Step("classifier", "Stage 1: train DASO on the long-tailed images", "DASO",
                   self.train(*self.options.stage1_args), output=f"{self.stage1}/result.json")
        yield Step("pseudo-labels", "Label the unlabelled images", "DASO",
                   ["python", "get_labels.py", "--run", self.stage1, "--per_class", str(self.experiment.last + 1)],
                   output=labels, inputs=(weights,))
        yield Step("zip", "Convert them for EDM", "EDM",
                   ["python", "dataset_tool.py", f"--source={self.from_edm(labels)}",
                    f"--dest={self.from_edm(self.zip)}"], output=self.from_edm(self.zip),
                   inputs=(self.from_edm(labels),))

    def stage_2(self) -> Iterator[Step]:
        ours, data = self.experiment, self.from_edm(self.zip)
        images, snapshot = self.from_edm(self.images), f"{self.model}/network-snapshot-latest.pkl"
        yield Step("diffusion model", "Stage 2: train the diffusion model on the pseudo-labels", "EDM",
                   [*ours.launch(), "train.py", f"--outdir={self.model}", "--nosubdir", f"--data={data}", "--cond=1",
                    "--arch=ddpmpp", *ours.recipe.diffusion.split(), f"--seed={ours.seed}", *self.options.stage2_args],
                   output=f"{self.model}/result.json", inputs=(data,))
        yield Step("generated images", f"Generate the images 0 to {ours.last} of every class", "EDM",
                   ["bash", "generate.sh", str(ours.last), images,
                    snapshot if snapshot.startswith("/") else f"./{snapshot}", str(ours.gpus)],
                   output=images, inputs=(snapshot,))

    def stage_3(self) -> Iterator[Step]:
        yield Step("classifier again", "Stage 3: train DASO with the generated images among the labelled ones", "DASO",
                   self.train("DATASET.AUG_PATH", self.images, "MEMO", f"aug{self.experiment.last}",
                              *self.options.stage3_args),
                   output=f"{self.stage3}/result.json", inputs=(self.images,))

    def controls(self) -> Iterator[Step]:
        given = dict(zip(self.options.stage1_args[::2], self.options.stage1_args[1::2], strict=False))
        twice = 2 * int(given.get("SOLVER.MAX_ITER", self.iterations()))
        yield Step("control twice", "Control: stage 1 with the iterations of stages 1 and 3 together", "DASO",
                   self.train(*self.options.stage1_args, "SOLVER.MAX_ITER", str(twice), "MEMO", "twice"),
                   output=f"{self.folder('twice')}/result.json")
        real = f"{self.stage1}/real_balanced"
        yield Step("control real", "Control: as many real images of every class, under their pseudo-labels", "DASO",
                   self.train("DATASET.AUG_PATH", real, "MEMO", "real_balanced", *self.options.stage3_args),
                   output=f"{self.folder('real_balanced')}/result.json", inputs=(f"{self.stage1}/pseudo_label.npz",))

    def iterations(self) -> int:
        """Return SOLVER.MAX_ITER of the configuration."""
        from TorchSSL.dpt import ROOT

        text = (ROOT / f"DASO/configs/{self.dataset}/fixmatch_daso.yaml").read_text(encoding="utf-8")
        found = [line.split(":")[1] for line in text.splitlines() if line.strip().startswith("MAX_ITER:")]
        return int(found[0]) if found else 250_000

    def report(self) -> Step:
        command = ["python", "dpt_report.py", f"--out={self.experiment.report_folder()}", f"--stage1={self.stage1}",
                   f"--stage3={self.stage3}"]
        command += [f"--control={self.folder(name)}" for name in ("twice", "real_balanced")] * self.options.controls
        return Step("report", "The report: what each class gained", "DASO", command)
