"""SIGKILL at random moments of every trainer, every generator and the chain: the same command in the end has made
bitwise what it makes undisturbed, and nothing is left of what was killed. Of two that start at once one wins.

KILLS in the environment: how many of each program (default 8, over a hundred in all). The moments are random, from a
seed that a failure names.
"""
from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from DDAE.ddae.data import load_images
from DDAE.DiT.small import write_small
from EDM import train_classifier
from shared.data.datasets import load_dataset
from shared.data.writers import write_folder
from shared.training.checkpoint import read_checkpoint
from tests.ddae import tiny as ddae
from tests.edm import training_runs as edm
from tests.edm.scored_images import write_classifier, write_images, write_network
from tests.metasemi import photographs
from tests.shared.clean import script_process
from tests.shared.programs import ROOT, assert_same, environment, wait_until
from tests.shared.test_every_trainer import NOT_BITWISE, TRAINERS

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 8))
SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1 << 30)))
LONGEST = 300  # seconds of a program
STEPS = 12


@dataclass(frozen=True)
class Program:
    """prepare: writes what the program reads into the working folder. results: patterns of the files that must be the
    same bytes; those of checkpoints must hold the same tensors."""

    script: str
    flags: Callable[[Path], list[str]]
    results: tuple[str, ...]
    prepare: Callable[[Path], Any] = lambda folder: None
    refusal: str = ""  # what it says, as published, where its result is there already


def trainer(name: str) -> Program:
    made = TRAINERS[name]
    return Program(made.script, lambda folder: made.flags(folder, STEPS), (made.checkpoint,))


def diffusion_model(folder: Path) -> None:
    write_network(folder / "net.pkl")


def own_digits(folder: Path) -> None:
    for part in ("train", "test"):
        write_folder(load_dataset("digits", part).subset(slice(0, 300)), folder / "mine" / part)


def record_lists(folder: Path) -> None:
    photographs.make_tree(folder)
    lines = [f"{number}\t{number % 3}\t{path.relative_to(folder)}\n"
             for number, path in enumerate(sorted((folder / "train").rglob("*.JPEG")))]
    (folder / "some.lst").write_text("".join(lines * 20))


def scored(folder: Path) -> None:
    write_classifier(folder / "judge.pth")
    write_images(folder / "real", 400, seed=0)


def noisy_set(folder: Path) -> None:
    edm.write_set(folder / "set.zip")


def judged_set(folder: Path) -> None:
    noisy_set(folder)
    train_classifier.main([f"--data={folder}/set.zip", f"--outdir={folder}/judge", *NOISY, "--classifier=cnn",
                           "--duration=0.0001"])


def images_and_vae(folder: Path) -> None:
    own_digits(folder)
    write_small(folder, load_images(str(folder / "mine"), "train", "."), 16, 0)


def photograph_records(folder: Path) -> None:
    photographs.pack(photographs.make_tree(folder))


NOISY = ["--cond=1", "--noise_type=sym", "--noise_rate=0.4", "--cbase=8", "--batch=16", "--tick=1", "--seed=3",
         "--device=cpu", "--nosubdir"]
SHORT_NOISY = [*NOISY, "--data=set.zip", "--outdir=run", f"--duration={16 * STEPS / 1e6}", "--checkpoint-seconds=1e-6"]
NETWORK = ["--network=net.pkl", "--steps=6", "--seeds=0-39", "--classes=all", "--device=cpu", "--batch=20"]
PROGRAMS = {
    **{f"{name} trainer": trainer(name) for name in TRAINERS},
    "train_classifier.py": Program("EDM/train_classifier.py", lambda _: [*SHORT_NOISY, "--classifier=cnn"],
                                   ("run/checkpoint.pt",), noisy_set),
    "train_noise.py": Program("EDM/train_noise.py", lambda _: [
        *SHORT_NOISY, "--cres=1,1", "--num-blocks=1", "--attn-resolutions=4",
        "--cls=judge/network-snapshot-latest.pkl"], ("run/checkpoint.pt",), judged_set),
    "train_imagenet.py": Program("MetaSemi/train_imagenet.py", lambda _: [
        *photographs.TINY, "--data=.", "--save-path=run", "--epochs=6"], ("run/checkpoint.pth",), photograph_records),
    "train_meta_imagenet.py": Program("MetaSemi/train_meta_imagenet.py", lambda _: [
        *photographs.TINY, "--data=.", "--save-path=run"], ("run/checkpoint.pth",), photograph_records),
    "vae_preprocessing.py": Program("DDAE/DiT/vae_preprocessing.py", lambda _: [
        "--dataset=mine", "--vae=vae", "--resolution=16", "--num_copies=4", "--batch_size=5", "--device=cpu"],
        ("latent_codes/mine/*.npy",), images_and_vae),
    "generate.py into a folder": Program("EDM/generate.py", lambda _: [*NETWORK, "--outdir=made", "--grid=grid.png"],
                                         ("made/**/*.png", "grid.png"), diffusion_model),
    "generate.py into a ZIP": Program("EDM/generate.py", lambda _: [*NETWORK, "--outdir=made.zip"], ("made.zip",),
                                      diffusion_model),
    "sample.py": Program("DDAE/sample.py", lambda _: ["--config=tiny.yaml", "--device=cpu", "--images=60", "--batch=10",
                                                      "--epoch=2", "--steps=8", "--npz"],
                         ("out/*/pngs/*.png", "out/*.npz"), ddae.make_folder),
    "dataset_tool.py into a ZIP": Program("EDM/dataset_tool.py", lambda _: [
        "--source=mine/train", "--dest=set.zip", "--resolution=16x16"], ("set.zip",), own_digits),
    "dataset_tool.py into a folder": Program("EDM/dataset_tool.py", lambda _: [
        "--source=mine/train", "--dest=set", "--resolution=16x16"], ("set/**/*",), own_digits,
        "--dest folder must be empty"),
    "fid.py ref": Program("EDM/fid.py", lambda _: ["ref", "--data=real", "--dest=real.npz", "--detector=judge.pth",
                                                   "--device=cpu", "--batch=20"], ("real.npz",), scored),
    "im2rec.py": Program("MetaSemi/imagenet/im2rec.py", lambda folder: [
        "some", str(folder), "--resize=24", "--num-thread=2"], ("some.rec", "some.idx"), record_lists),
}


def started(program: Program, folder: Path) -> Process:
    process = script_process(ROOT / program.script, program.flags(folder), folder,
                             environment(FEWLABEL_CACHE=str(folder.parent / "cache"), OMP_NUM_THREADS="1"),
                             folder.parent / "stdout.txt", folder.parent / "stderr.txt")
    process.start()
    return process


def complaint(folder: Path) -> str:
    return (folder.parent / "stderr.txt").read_text()[-2000:]


def refused(program: Program, folder: Path) -> bool:
    return bool(program.refusal) and program.refusal in complaint(folder)


def place(tmp_path: Path, name: str, program: Program) -> Path:
    folder = tmp_path / name / "work"
    folder.mkdir(parents=True)
    program.prepare(folder)
    return folder


def outcome(program: Program, folder: Path) -> dict[str, Any]:
    """Return what a program has made: checkpoints as their content, other files as their bytes."""
    found = {}
    for path in sorted({path for pattern in program.results for path in folder.glob(pattern) if path.is_file()}):
        name = str(path.relative_to(folder))
        if path.suffix in (".pth", ".pt", ".tar"):
            found[name] = {key: value for key, value in read_checkpoint(path).items() if key not in NOT_BITWISE}
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif not name.rpartition("/")[2].startswith("."):
            found[name] = path.read_bytes()
    assert found, f"nothing matches {program.results}"
    return found


def leftovers(folder: Path) -> list[str]:
    """Return files that only a program at work has."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*")
            if re.search(r"\.tmp$|\.part-|\.parts?(\.json)?$", path.name)]


def whole(program: Program, tmp_path: Path) -> tuple[dict[str, Any], float]:
    """Return what the undisturbed program makes, and the seconds that it takes."""
    folder, began = place(tmp_path, "whole", program), time.monotonic()
    process = started(program, folder)
    process.join(LONGEST)
    assert process.exitcode == 0, complaint(folder)
    took = time.monotonic() - began
    assert not leftovers(folder)
    return outcome(program, folder), took


@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_at_random_moments(name: str, tmp_path: Path) -> None:
    program, chance = PROGRAMS[name], random.Random(f"{SEED} {name}")
    expected, took = whole(program, tmp_path)
    folder, killed = place(tmp_path, "killed", program), 0
    for attempt in range(4 * KILLS):
        if killed == KILLS:
            break
        process = started(program, folder)
        process.join(chance.uniform(0.05, 1.1) * took)
        if process.exitcode is None:
            process.kill()
            killed += 1
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0) or refused(program, folder), \
            f"seed {SEED}, attempt {attempt}: {complaint(folder)}"
    process = started(program, folder)
    process.join(LONGEST)
    assert process.exitcode == 0 or refused(program, folder), f"seed {SEED}: {complaint(folder)}"
    assert_same(outcome(program, folder), expected, f"seed {SEED}")
    assert not leftovers(folder), f"seed {SEED}"


@pytest.mark.parametrize("name", PROGRAMS)
def test_of_two_that_start_at_once_one_wins(name: str, tmp_path: Path) -> None:
    """The other one says so in one line, or finds everything complete; what is made is whole."""
    program = PROGRAMS[name]
    expected, _ = whole(program, tmp_path)
    folder = place(tmp_path, "both", program)
    both = [started(program, folder) for _ in range(2)]
    for process in both:
        process.join(LONGEST)
    statuses = sorted(process.exitcode for process in both)
    assert statuses in ([0, 0], [0, 2]), complaint(folder)
    errors = [line for line in complaint(folder).splitlines() if line.startswith("error: ")]
    assert len(errors) == statuses.count(2) and "Traceback" not in complaint(folder)
    assert_same(outcome(program, folder), expected)
    assert not leftovers(folder)


# --------------------------------------------------------------------------------------------------------- the chain

LEARNER = "--num_train_iter=6 --num_eval_iter=3 --batch_size=4 --uratio=2 --num_save_iter=1"
CHAIN = ["--images-per-class=3", "--gpus=1", f"--stage1-args={LEARNER}", f"--stage3-args={LEARNER}",
         "--stage2-args=--duration=0.001 --batch=16 --tick=1 --checkpoint-seconds=0.05"]


def chain(out: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", str(ROOT / "run_all.sh"), f"--out={out}", *CHAIN]
    return subprocess.Popen(command, text=True, env=environment(PATH=path), start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def made_by_chain(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pattern in ("saved_models/*/latest_model.pth", "training-runs/*/network-snapshot-latest.pkl"):
        for path in out.glob(pattern):
            content = torch.load(path, weights_only=True)
            found[str(path.relative_to(out))] = {key: value for key, value in content.items()
                                                 if key in ("model", "ema_model", "optimizer", "state_dict")}
    for pattern in ("saved_models/*/*.zip", "data-aug/**/*.png"):
        found |= {str(path.relative_to(out)): path.read_bytes() for path in out.glob(pattern)}
    report = json.loads((out / "report.json").read_text())
    return found | {key: report[key] for key in ("stage1_accuracy", "pseudo_label_accuracy", "stage3_accuracy")}


def test_the_chain_killed_at_random_moments(tmp_path: Path) -> None:
    chance, began = random.Random(SEED), time.monotonic()
    undisturbed = chain(tmp_path / "whole")
    said, _ = undisturbed.communicate(timeout=1200)
    assert undisturbed.returncode == 0, said[-3000:]
    took = time.monotonic() - began
    for _ in range(KILLS):
        process = chain(tmp_path / "killed")
        try:
            process.communicate(timeout=chance.uniform(0.02, 0.5) * took)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    process = chain(tmp_path / "killed")
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, f"seed {SEED}: {said[-3000:]}"
    assert_same(made_by_chain(tmp_path / "killed"), made_by_chain(tmp_path / "whole"), f"seed {SEED}")
    assert not leftovers(tmp_path / "killed"), f"seed {SEED}"


def test_of_two_chains_one_waits_for_nobody(tmp_path: Path) -> None:
    first = chain(tmp_path / "out")
    wait_until((tmp_path / "out" / ".lock").exists, first)
    second = chain(tmp_path / "out")
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 2 and "is in use by a run that is still going on" in said
    said, _ = first.communicate(timeout=1200)
    assert first.returncode == 0, said[-3000:]
