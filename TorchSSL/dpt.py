"""Dual pseudo training (DPT) end to end: the commands of the README in order, each printed before it runs.

You et al., "Diffusion Models and Semi-Supervised Learners Benefit Mutually with Few Labels", NeurIPS 2023
(arXiv 2302.10586). Started by run_all.sh. Stage 1 trains a classifier on few labels and labels the training images
with it; stage 2 trains a diffusion model on these pseudo-labels and generates images of every class; stage 3 trains
the classifier again with the generated images. The same command again skips what is complete and continues what is not.
"""
from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from shared.cli import Parser, UserError, nearest, run_main
from TorchSSL import dpt_longtail, dpt_tdsm
from TorchSSL.dpt_recipes import OWN_IMAGES, RECIPES
from TorchSSL.make_configs import CONFIG, DATASETS, LEARNERS
from TorchSSL.steps import Runner, Step

TORCHSSL = Path(__file__).resolve().parent
ROOT = TORCHSSL.parent
# Flags whose value is further flags, and what takes these.
ARGS = {"--stage1-args": "its learner", "--stage2-args": "train.py and train_noise.py",
        "--generate-args": "generate.py", "--stage3-args": "its learner",
        "--classifier-args": "train_classifier.py, for tdsm"}


def whole_number(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return read


def stage_list(text: str) -> set[int]:
    if not text or set(text.split(",")) - {"1", "2", "3"}:
        raise argparse.ArgumentTypeError(f"expected some of 1,2,3 separated by commas, got {text!r}")
    return {int(stage) for stage in text.split(",")}


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"cannot be split into flags ({error}): {text!r}") from None


def joined(argv: list[str]) -> list[str]:
    """Return the arguments with --...-args and its value as one, or a value that begins with -- would be a flag."""
    found: list[str] = []
    for argument in argv:
        if found and found[-1] in ARGS:
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="bash run_all.sh", description=__doc__.split("\n\n")[1].partition("run_all.sh. ")[2],
                    allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="digits", metavar="NAME", help="digits (default, needs no download), cifar10, cifar100, "
        "svhn, stl10, mnist, or the path of your own images: a folder with train/<class>/ and test/<class>/, or a zip "
        "with dataset.json. A published set that is not in --data-dir is fetched")
    add("--labels", type=whole_number(1), metavar="N", help="labelled images in all [digits 10, cifar100 400, your "
        "own: all that have a label, others 40]")
    add("--images-per-class", type=whole_number(1), metavar="N", help="generated images [digits 101, others 1001]")
    add("--seed", type=whole_number(0), default=1, metavar="S", help="first seed [1]")
    add("--seeds", type=whole_number(1), default=1, metavar="N", help="repeat with N seeds and report mean, standard "
        "deviation and differences [1]")
    add("--controls", action="store_true", help="also run what else could explain a gain: another training seed, twice "
        "the iterations, pseudo-labelled real images in place of generated ones (all, and as many of every class)")
    add("--gpus", type=whole_number(1), metavar="N", help="GPUs of stage 2 [all visible ones]; stages 1 and 3 use "
        "every visible one")
    add("--stages", type=stage_list, default={1, 2, 3}, metavar="LIST", help="which stages to run [1,2,3]")
    add("--data-dir", default="./data", metavar="DIR", help="folder of the published data sets [TorchSSL/data]")
    add("--out", metavar="DIR", help="put everything below DIR [TorchSSL/saved_models, TorchSSL/data-aug and "
        "EDM/training-runs, the report in runs/]")
    for stage in (1, 3):
        add(f"--stage{stage}", choices=(*LEARNERS, dpt_longtail.NAME), default="freematch" if stage == 1 else None,
            metavar="NAME", help=f"semi-supervised learner of stage {stage}: {', '.join(LEARNERS)} [freematch]; or "
            "daso in both, for long-tailed data")
    add("--imbalance", type=whole_number(1), metavar="G", help="for daso: the most frequent class has G times the "
        "images of the rarest, labelled (--labels in the former) and unlabelled [digits 20, cifar10 100, cifar100 10]")
    add("--stage2", choices=("edm", "tdsm"), default="edm", help="diffusion model of stage 2: edm, or also tdsm, which "
        "knows that pseudo-labels err, and is then compared with edm [edm]")
    add("--transition", choices=list(dpt_tdsm.TRANSITIONS), help="where tdsm learns how pseudo-labels err: "
        + "; ".join(f"{name}, {text}" for name, text in dpt_tdsm.TRANSITIONS.items()) + " [predictions]")
    add("--held-out", type=whole_number(1), metavar="N", help="labelled images for --transition held-out, in all")
    add("--only-tdsm", action="store_true", help="leave out the plain edm that tdsm is compared with")
    for name, script in ARGS.items():
        add(name, type=words, default=[], metavar='"..."', help=f"further flags of {script}")
    add("-n", "--dry-run", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(joined(sys.argv[1:] if argv is None else argv))
    if options.dataset not in RECIPES:
        if not Path(options.dataset).exists():
            raise UserError(f"--dataset {options.dataset}: neither one of {', '.join(RECIPES)} nor a path that exists"
                            f"{nearest(options.dataset, RECIPES)}")
        options.dataset = str(Path(options.dataset).resolve())
    dpt_tdsm.check(options)
    dpt_longtail.check(options)
    if options.data_dir != "./data":
        options.data_dir = str(Path(options.data_dir).resolve())
    return options


class Experiment:
    """The commands of one seed. Paths are as typed in TorchSSL/ and EDM/, where the commands run."""

    def __init__(self, options: argparse.Namespace, seed: int, report: Path) -> None:
        self.options, self.seed, self.report = options, seed, report
        self.dataset, self.data_dir = options.dataset, options.data_dir
        self.recipe = RECIPES.get(self.dataset, OWN_IMAGES)
        title = Path(self.dataset).name.removesuffix(".zip")
        self.labels = options.labels or self.recipe.labels
        self.last = options.images_per_class - 1 if options.images_per_class else self.recipe.last
        self.gpus = options.gpus or visible_gpus()
        self.name = f"{options.stage1}_{title}_{self.labels}_{seed}"
        self.zip_name = f"{options.stage1}-{self.labels}-seed{seed}-{title}{self.recipe.shape}"

        if options.out is None:  # the folders of the published commands
            self.saved, self.images, self.models = "./saved_models", "./data-aug", "training-runs"
        else:
            out = Path(options.out).resolve()
            self.saved, self.images, self.models = f"{out}/saved_models", f"{out}/data-aug", f"{out}/training-runs"
        other = "" if options.stage3 == options.stage1 else f"_{options.stage3}"
        self.stage1, self.stage3 = f"{self.saved}/{self.name}", f"{self.saved}/{self.name}_aug{self.last}{other}"
        # The published folder of images does not tell data sets and seeds apart, and the published training command
        # numbers its folder: both are kept for the published experiment alone.
        self.published = (self.dataset, self.labels, seed, options.out) == ("cifar10", 40, 1, None) \
            and not (options.stage2_args or options.generate_args) and options.stage1 == options.stage3 == "freematch"
        self.generated = f"nums_{self.last}" if self.published else f"{self.name}/nums_{self.last}"
        self.tdsm = dpt_tdsm.NoiseAware(self) if options.stage2 == "tdsm" else None

    def steps(self) -> Iterator[Step]:
        """Yield the steps one by one; later ones may depend on what earlier ones have written."""
        if self.options.stage1 == dpt_longtail.NAME:
            yield from dpt_longtail.LongTail(self).steps()
            return
        yield Step("data", "The data set: fetched where it is missing; classes, counts, sizes, duplicates", "TorchSSL",
                   ["python", "check_data.py", f"--dataset={self.dataset}", "--download", *self.elsewhere()])
        stages = {1: self.stage_1, 2: self.stage_2, 3: self.stage_3}
        for number in sorted(self.options.stages):
            yield from stages[number]()
        if self.tdsm is not None and 2 in self.options.stages:
            yield from self.tdsm.judgements()
        if self.options.controls:
            yield from self.controls()
        yield self.report_step()

    def classifier(self, name: str, stage: int = 1, seed: int | None = None) -> list[str]:
        """Return the command of a learner's run, saying what its configuration file does not."""
        recipe, seed = self.recipe, self.seed if seed is None else seed
        learner = self.options.stage1 if stage == 1 else self.options.stage3
        command = ["python", f"{learner}.py"]
        if recipe.config and learner == "freematch":
            config = recipe.config if stage == 1 else f"{recipe.config}_aug{recipe.last}"
            command += ["--c", f"config/{config}.yaml"]
            command += [f"--num_labels={self.labels}"] * (self.labels != recipe.labels)
            command += [f"--seed={seed}"] * (seed != 1) + [f"--save_name={name}"] * (name != config)
        elif learner != "freematch" and (config := self.config_of(learner)):
            command += ["--c", config, f"--num_labels={self.labels}", f"--seed={seed}", f"--save_name={name}"]
        else:
            command += [f"--dataset={self.dataset}", *words(recipe.classifier), f"--num_labels={self.labels}",
                        f"--seed={seed}", f"--save_name={name}"]
        # The published script of this name would take every label there is.
        command += ["--all_labels=False"] * (learner == "fullysupervised")
        return command + [f"--save_dir={self.saved}"] * (self.saved != "./saved_models") + self.elsewhere()

    def from_edm(self, path: str) -> str:
        """Return the path, given as typed in TorchSSL/, as typed in EDM/."""
        return path if Path(path).is_absolute() else f"../TorchSSL/{path.removeprefix('./')}"

    def from_torchssl(self, path: str) -> str:
        """Return the path, given as typed in EDM/, as typed in TorchSSL/."""
        return path if Path(path).is_absolute() else f"../EDM/{path}"

    def config_of(self, learner: str) -> str | None:
        """Return the learner's configuration file for the data set, as typed in TorchSSL/; None: there is none."""
        usual = 40 if self.dataset == "digits" else DATASETS.get(self.dataset, ((0,),))[-1][0]
        names = (f"{learner}/{learner}_{self.dataset}_{labels}_0.yaml" for labels in (self.labels, usual))
        return next((f"config/{name}" for name in names if (CONFIG / name).exists()), None)

    def elsewhere(self) -> list[str]:
        """Return the flag that says where the data sets are, if not in the usual place."""
        return [] if self.data_dir == "./data" else [f"--data_dir={self.data_dir}"]

    def stage_1(self) -> Iterator[Step]:
        stage1, checkpoint = self.stage1, f"{self.stage1}/{self.recipe.checkpoint}"
        yield Step("classifier", "Stage 1: train the classifier on the few labels", "TorchSSL",
                   [*self.classifier(self.name), *self.options.stage1_args], output=f"{stage1}/result.json")
        cifar10 = self.dataset == "cifar10"
        source = [f"--dataset={self.dataset}", *self.elsewhere()]
        pseudo = f"{stage1}/" + ("cifar-10-python.tar.gz" if cifar10 else f"{self.name}-pseudo.npz")
        yield Step("pseudo-labels", "Generate pseudo-labels", "TorchSSL",
                   ["python", "get_labels.py", *([] if cifar10 else source[:1]), *self.elsewhere(), "--load_path",
                    checkpoint, "--save_path", f"{stage1}/"], append_to=f"{stage1.removeprefix('./')}/get_labels.log",
                   output=f"{stage1}/pseudo_label.npy", inputs=(checkpoint,))
        if cifar10:  # the published command names the folder; a download is the archive alone, which does as well
            folder, archive = f"{self.data_dir}/cifar-10-batches-py", f"{self.data_dir}/cifar-10-python.tar.gz"
            only_archive = (TORCHSSL / archive).exists() and not (TORCHSSL / folder).exists()
            source = ["--data_path", archive if only_archive else folder]
        yield Step("pseudo-data set", "Make a data set with pseudo-labels in place of the true ones", "TorchSSL",
                   ["python", "pseudo_dataset.py", *source, "--save_path", stage1],
                   output=pseudo, inputs=(f"{stage1}/pseudo_label.npy",))
        yield Step("zip", "Convert it for EDM", "TorchSSL",
                   ["python", "dataset_tool.py", f"--source={pseudo}", f"--dest={stage1}/{self.zip_name}.zip"],
                   output=f"{stage1}/{self.zip_name}.zip", inputs=(pseudo,))

    def stage_2(self) -> Iterator[Step]:
        if not self.options.only_tdsm:
            yield from self.plain_stage_2()
        if self.tdsm is not None:
            yield from self.tdsm.stage_2()

    def launch(self) -> list[str]:
        """Return what starts a training script of EDM/."""
        return ["python"] if self.gpus == 1 else ["torchrun", "--standalone", f"--nproc_per_node={self.gpus}"]

    def plain_stage_2(self) -> Iterator[Step]:
        data = self.from_edm(f"{self.stage1}/{self.zip_name}.zip")
        where = [f"--outdir={self.models}"] if self.published else [f"--outdir={self.model_folder()}", "--nosubdir"]
        seed = [] if self.published else [f"--seed={self.seed}"]
        yield Step("diffusion model", "Stage 2: train the diffusion model on the pseudo-labels", "EDM",
                   [*self.launch(), "train.py", *where, f"--data={data}", "--cond=1", "--arch=ddpmpp",
                    *words(self.recipe.diffusion), *seed, *self.options.stage2_args],
                   output=f"{self.model_folder()}/result.json", inputs=(data,), output_suffices=self.published)
        yield self.generate("generated images", f"{self.model_folder()}/network-snapshot-latest.pkl",
                            f"{self.images}/{self.generated}")

    def generate(self, name: str, snapshot: str, folder: str) -> Step:
        """Return the step that makes the images of a snapshot. folder: as typed in TorchSSL/."""
        images = self.from_edm(folder)
        return Step(name, f"Generate the images 0 to {self.last} of every class", "EDM",
                    ["bash", "generate.sh", str(self.last), images,
                     snapshot if Path(snapshot).is_absolute() else f"./{snapshot}", str(self.gpus),
                     *words(self.recipe.generate), *self.options.generate_args],
                    output=images, inputs=(snapshot,))

    def model_folder(self) -> str:
        """Return the run folder of stage 2, as typed in EDM/; before a numbered one exists, the name it will get."""
        if not self.published:
            return f"{self.models}/{self.zip_name}"
        folder = ROOT / "EDM" / self.models
        numbered = sorted(path.name for path in folder.glob("[0-9]*-*") if path.is_dir())
        ours = [name for name in numbered if f"-{self.zip_name}-cond-ddpmpp-edm-gpus" in name]
        number = int(numbered[-1].partition("-")[0]) + 1 if numbered else 0
        new = f"{number:05d}-{self.zip_name}-cond-ddpmpp-edm-gpus{self.gpus}-batch512-fp32"
        return f"{self.models}/{ours[-1] if ours else new}"

    def stage_3(self) -> Iterator[Step]:
        if not self.options.only_tdsm:
            yield self.train_again("classifier again", "Stage 3: train the classifier with the generated images",
                                   self.stage3, f"{self.images}/{self.generated}")
        if self.tdsm is not None:
            yield self.tdsm.stage_3()

    def train_again(self, name: str, title: str, folder: str, images: str) -> Step:
        """Return the training of stage 3 with a folder of images, in the run folder `folder`."""
        return Step(name, title, "TorchSSL",
                    [*self.classifier(Path(folder).name, stage=3), f"--aug_path={images}", *self.options.stage3_args],
                    output=f"{folder}/result.json", inputs=(images,))

    def controls(self) -> Iterator[Step]:
        same_labels, args = f"--label_idx={self.stage1}/sampled_label_idx.npy", self.options.stage1_args
        real = f"{self.images}/{self.name}"

        def train(kind: str, title: str, command: list[str], inputs: tuple[str, ...] = ()) -> Step:
            return Step(f"control {kind}", f"Control: {title}", "TorchSSL", command,
                        output=f"{self.saved}/{self.name}_{kind}/result.json", inputs=inputs)

        yield train("other_seed", "stage 1 with another training seed and the same labels",
                    [*self.classifier(f"{self.name}_other_seed", seed=self.seed + 1000), same_labels, *args])
        yield train("twice", "stage 1 with the iterations of stages 1 and 3 together",
                    [*self.classifier(f"{self.name}_twice"), *args, f"--num_train_iter={2 * self.iterations()}"])
        yield Step("real images", "Pseudo-labelled real images: all of them, and as many of every class", "TorchSSL",
                   ["python", "pseudo_folder.py", f"--dataset={self.dataset}",
                    f"--labels={self.stage1}/pseudo_label.npy", f"--dest={real}", f"--per_class={self.last + 1}",
                    f"--seed={self.seed}", *self.elsewhere()],
                   output=f"{real}/real_balanced", inputs=(f"{self.stage1}/pseudo_label.npy",))
        for kind, title in (("real_all", "all pseudo-labelled real images in place of generated ones"),
                            ("real_balanced", "as many pseudo-labelled real images of every class")):
            yield train(kind, title, [*self.classifier(f"{self.name}_{kind}", stage=3), f"--aug_path={real}/{kind}",
                                      *self.options.stage3_args], inputs=(f"{real}/real_balanced",))

    def iterations(self) -> int:
        """Return --num_train_iter of stage 1, wherever it is said."""
        config = TORCHSSL / "config" / f"{self.recipe.config}.yaml"
        if self.options.stage1 != "freematch":
            config = TORCHSSL / (self.config_of(self.options.stage1) or "")
        said = config.read_text().replace(":", " ").split() if config.is_file() else []
        said += " ".join(self.options.stage1_args).replace("=", " ").replace("--", "").split()
        found = [value for key, value in zip(said, said[1:], strict=False) if key == "num_train_iter"]
        return int(found[-1]) if found and found[-1].isdigit() else 2**20

    def report_folder(self) -> Path:
        """Return the folder of the report, as typed in any of the papers' folders."""
        return self.report if self.options.out else Path("..") / self.report.relative_to(ROOT)

    def report_step(self) -> Step:
        model = self.model_folder()
        command = ["python", "report.py", f"--out={self.report_folder()}", f"--dataset={self.dataset}",
                   f"--stage1={self.stage1}", f"--stage2={self.from_torchssl(model)}",
                   f"--images={self.images}/{self.generated}", f"--stage3={self.stage3}", *self.elsewhere()]
        command += self.tdsm.report_flags() if self.tdsm is not None else []
        return Step("report", "The report", "TorchSSL", command)


def visible_gpus() -> int:
    """Return the number of GPUs that CUDA_VISIBLE_DEVICES or else nvidia-smi lists, at least 1."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return max(1, sum(device.strip() not in ("", "-1") for device in chosen.split(",")))
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 1
    return max(1, sum(line.startswith("GPU ") for line in listed.splitlines()))


def main() -> None:
    options = parse()
    if not options.dry_run and (options.gpus or 1) > (found := visible_gpus()):
        raise UserError(f"--gpus {options.gpus}: {found} at most on this machine; give fewer, or leave it out")
    title = Path(options.dataset).name.removesuffix(".zip")
    labels = options.labels or RECIPES.get(options.dataset, OWN_IMAGES).labels
    kind, folder_of_report = (f"imbalance{options.imbalance}", "DASO") if options.imbalance else (labels, "TorchSSL")
    script = "dpt_report.py" if options.imbalance else "report.py"
    seeds = range(options.seed, options.seed + options.seeds)
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]}-{seeds[-1]}"
    out = Path(options.out).resolve() if options.out else ROOT / "runs" / f"{title}_{kind}_{span}"
    folders = [out] if len(seeds) == 1 else [out / f"seed_{seed}" for seed in seeds]

    if RECIPES.get(options.dataset, OWN_IMAGES).one_thread and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        print("export OMP_NUM_THREADS=1", flush=True)
    with Runner(ROOT, out, dry_run=options.dry_run) as runner:
        for seed, folder in zip(seeds, folders, strict=True):
            runner.history = folder / "commands.jsonl"
            for step in Experiment(options, seed, folder).steps():
                runner.run(step)
        if len(seeds) > 1:
            runner.history = out / "commands.jsonl"
            reports = [f"--seed_report={folder}" for folder in folders]
            runner.run(Step("report of all seeds", "Mean and standard deviation over the seeds", folder_of_report,
                            ["python", script, f"--out={out}", *reports]))


if __name__ == "__main__":
    run_main(main)
