"""The second stage of DPT that knows its labels to be wrong at times: TDSM in place of plain EDM.

Pseudo-labels are noisy labels. TDSM (Na et al., "Label-Noise Robust Diffusion Models", ICLR 2024) needs to know how
they err: the transition matrix p(pseudo-label | class). It is estimated from stage 1 (estimate_transition.py), or
learned together with the classifier of noisy images (VolMinNet).
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shared.cli import UserError
from TorchSSL.steps import Step

if TYPE_CHECKING:
    from TorchSSL.dpt import Experiment

TRANSITIONS = {
    "predictions": "from the classifier's predictions of the unlabelled images; needs no further label",
    "held-out": "from --held-out N further labelled images that stage 1 has not seen",
    "volmin": "learned with the classifier of noisy images (VolMinNet)",
}


def check(options: argparse.Namespace) -> None:
    """Raise UserError for flags of the second stage that contradict each other."""
    if options.stage2 != "tdsm":
        for flag, given in (("--transition", options.transition), ("--held-out", options.held_out),
                            ("--only-tdsm", options.only_tdsm), ("--classifier-args", options.classifier_args)):
            if given:
                raise UserError(f"{flag} belongs to --stage2 tdsm")
    options.transition = options.transition or "predictions"
    if (options.transition == "held-out") != (options.held_out is not None):
        raise UserError("--transition held-out needs --held-out N, the number of further labelled images, and "
                        "--held-out N needs --transition held-out")


class NoiseAware:
    """The steps of TDSM within an experiment. Paths are as typed in TorchSSL/, those of stage 2 as typed in EDM/."""

    def __init__(self, experiment: Experiment) -> None:
        options, self.experiment = experiment.options, experiment
        self.name = f"tdsm-{options.transition}" + (f"-{options.held_out}" if options.held_out else "")
        tag = self.name.replace("-", "_")
        self.transition = None if options.transition == "volmin" else f"{experiment.stage1}/transition_{tag}.json"
        self.model = f"{experiment.models}/{experiment.zip_name}-{self.name}"
        self.classifier = f"{self.model}-classifier"
        self.generated = f"{experiment.images}/{experiment.name}_{tag}/nums_{experiment.last}"
        self.stage3 = f"{experiment.stage3}_{tag}"

    def stage_2(self) -> Iterator[Step]:
        ours, options = self.experiment, self.experiment.options
        data = ours.from_edm(f"{ours.stage1}/{ours.zip_name}.zip")
        noise, inputs = ["--precond=edm_vm", "--noise_type=learn", *ours.recipe.volmin.split()], [data]
        if self.transition is not None:
            yield self.estimate()
            matrix = ours.from_edm(self.transition)
            noise = ["--noise_type=file", f"--transition={matrix}", *ours.recipe.noise_classifier.split()]
            inputs = [data, matrix]
        seed = f"--seed={ours.seed}"
        yield Step("noise classifier", "Stage 2, TDSM: a classifier of noisy images, corrected for wrong labels", "EDM",
                   [*ours.launch(), "train_classifier.py", f"--outdir={self.classifier}", "--nosubdir",
                    f"--data={data}", "--cond=1", "--arch=ddpmpp", *noise, seed,
                    *options.classifier_args],
                   output=f"{self.classifier}/result.json", inputs=tuple(inputs))
        snapshot = f"{self.classifier}/network-snapshot-latest.pkl"
        learned = ["--noise_type=learn"] * (self.transition is None)
        yield Step("diffusion model tdsm", "Stage 2, TDSM: train the diffusion model on what labels may mean", "EDM",
                   [*ours.launch(), "train_noise.py", f"--outdir={self.model}", "--nosubdir", f"--data={data}",
                    "--cond=1", "--arch=ddpmpp", f"--cls={snapshot}", *learned, *ours.recipe.diffusion.split(), seed,
                    *options.stage2_args],
                   output=f"{self.model}/result.json", inputs=(data, snapshot))
        yield ours.generate("generated images tdsm", f"{self.model}/network-snapshot-latest.pkl", self.generated)

    def estimate(self) -> Step:
        ours, options = self.experiment, self.experiment.options
        checkpoint, labels = f"{ours.stage1}/{ours.recipe.checkpoint}", f"{ours.stage1}/pseudo_label.npy"
        held_out = ["--method=held_out", f"--held_out={options.held_out}"] if options.held_out else \
            ["--method=predictions"]
        return Step("transition", "How the pseudo-labels err, estimated from stage 1", "TorchSSL",
                    ["python", "estimate_transition.py", f"--dataset={ours.dataset}", *ours.elsewhere(),
                     f"--load_path={checkpoint}", f"--save_path={ours.stage1}", f"--dest={self.transition}",
                     f"--seed={ours.seed}", *held_out], output=self.transition, inputs=(checkpoint, labels))

    def stage_3(self) -> Step:
        return self.experiment.train_again("classifier again tdsm", "Stage 3 with the images of TDSM", self.stage3,
                                           self.generated)

    def judgements(self) -> Iterator[Step]:
        """Yield the evaluations of the generated images by a judge that was trained with all true labels."""
        ours = self.experiment
        if not ours.recipe.judge:
            return
        judge = f"{ours.models}/judge-{ours.dataset}"
        sources = [("tdsm", self.generated)]
        if not ours.options.only_tdsm:
            sources.insert(0, ("plain", f"{ours.images}/{ours.generated}"))
        for kind, folder in sources:
            images, outdir = ours.from_edm(folder), f"{ours.models}/{ours.zip_name}-{self.name}-judged-{kind}"
            yield Step(f"judged {kind}", "How many generated images show their class, by a judge trained with all "
                       "true labels", "EDM",
                       ["python", "evaluate.py", f"--outdir={outdir}", f"--data={ours.dataset}", f"--images={images}",
                        "--metrics=accuracy", f"--judge-dir={judge}"],
                       output=f"{outdir}/result.json", inputs=(images,))

    def report_flags(self) -> list[str]:
        ours = self.experiment
        found = [f"--tdsm_stage3={self.stage3}", f"--tdsm_images={self.generated}",
                 f"--tdsm_stage2={ours.from_torchssl(self.model)}"]
        if self.transition is not None:
            found.append(f"--tdsm_transition={self.transition}")
        if ours.recipe.judge:
            judged = ours.from_torchssl(f"{ours.models}/{ours.zip_name}-{self.name}-judged")
            found.append(f"--judged={judged}")
        return found
