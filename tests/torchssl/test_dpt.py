"""run_all.sh prints the published commands and refuses mistakes in one line, before anything is installed or run."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.programs import ROOT, environment, one_line_error

PUBLISHED = """
python freematch.py --c config/freematch_cifar10_40_1.yaml
python get_labels.py --load_path ./saved_models/freematch_cifar10_40_1/model_best.pth --save_path \
./saved_models/freematch_cifar10_40_1/ >> saved_models/freematch_cifar10_40_1/get_labels.log
python pseudo_dataset.py --data_path ./data/cifar-10-batches-py --save_path ./saved_models/freematch_cifar10_40_1
python dataset_tool.py --source=./saved_models/freematch_cifar10_40_1/cifar-10-python.tar.gz \
--dest=./saved_models/freematch_cifar10_40_1/freematch-40-seed1-cifar10-32x32.zip
torchrun --standalone --nproc_per_node=4 train.py --outdir=training-runs \
--data=../TorchSSL/saved_models/freematch_cifar10_40_1/freematch-40-seed1-cifar10-32x32.zip --cond=1 --arch=ddpmpp \
--batch-gpu=32
bash generate.sh 1000 ../TorchSSL/data-aug/nums_1000 \
./training-runs/00000-freematch-40-seed1-cifar10-32x32-cond-ddpmpp-edm-gpus4-batch512-fp32/network-snapshot-latest.pkl 4
python freematch.py --c config/freematch_cifar10_40_1_aug1000.yaml --aug_path=./data-aug/nums_1000
""".strip().splitlines()


def run_all(*arguments: str | Path, status: int = 0, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run it; path: folder of the `python` that it finds, in place of this one."""
    search = os.pathsep.join([str(path or Path(sys.executable).parent), "/usr/bin", "/bin"])
    result = subprocess.run(["bash", str(ROOT / "run_all.sh"), *map(str, arguments)], cwd="/", text=True,
                            capture_output=True, env=environment(PATH=search), check=False)
    assert result.returncode == status, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


def bare_python(folder: Path) -> Path:
    """Return a folder with a Python that has no packages."""
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


def commands(*arguments: str | Path) -> list[str]:
    """The printed commands of the method: those after the look at the data, up to the report."""
    lines = [line for line in run_all("--dry-run", *arguments).stdout.splitlines() if line and line[0] != "#"]
    return [line for line in lines if not re.match(r"cd |export |python (check_data|report)\.py ", line)]


def test_cifar10_is_the_published_commands_word_for_word():
    assert commands("--dataset=cifar10", "--gpus=4") == PUBLISHED
    assert commands("--dataset=cifar10", "--gpus=1")[4].startswith("python train.py --outdir=training-runs --data=")


def test_everything_is_pasted_in_the_right_folders():
    lines = run_all("--dry-run", "--dataset=cifar10").stdout.splitlines()
    assert [line for line in lines if line.startswith("cd ")] == ["cd TorchSSL", "cd ../EDM", "cd ../TorchSSL"]


def test_digits_need_no_option_and_select_nothing_on_the_test_set():
    found = commands()
    assert found[0] == "python freematch.py --c config/freematch_digits_10_1.yaml"
    assert "latest_model.pth" in found[1] and "model_best" not in " ".join(found)
    assert found == commands("--dataset", "digits", "--seed", "1", "--labels", "10", "--images-per-class", "101")


def test_seeds_labels_and_stages_tell_their_folders_apart():
    found = commands("--seeds=2", "--seed=3", "--labels=20", "--images-per-class=50")
    assert len(found) == 14
    assert found[0].endswith("--num_labels=20 --seed=3 --save_name=freematch_digits_20_3")
    assert found[13].endswith("--num_labels=20 --seed=4 --save_name=freematch_digits_20_4_aug49 "
                              "--aug_path=./data-aug/freematch_digits_20_4/nums_49")
    assert " --seed=4" in found[11] and found[12].startswith("bash generate.sh 49 ")
    assert len(commands("--stages=2")) == 2 and len(commands("--stages=1,3")) == 5


def test_controls_keep_the_labels_and_change_one_thing_each():
    found = commands("--controls")
    assert len(found) == 12
    other, twice, _, everything, balanced = found[7:]
    assert "--seed=1001 " in other and "--label_idx=./saved_models/freematch_digits_10_1/sampled_label_idx.npy" in other
    assert "--num_train_iter=600" in twice and "--seed=" not in twice
    for command, name in ((everything, "real_all"), (balanced, "real_balanced")):
        assert "freematch_digits_10_1_aug100.yaml" in command
        assert command.endswith(f"--aug_path=./data-aug/freematch_digits_10_1/{name}")
    assert "--num_train_iter=14" in " ".join(commands("--controls", "--stage1-args", "--num_train_iter=7"))


def test_own_images_and_an_own_output_folder(tmp_path):
    own = tmp_path / "my images"
    own.mkdir()
    found = commands("--dataset", own, "--out", tmp_path / "out", "--stage2-args", "--duration=1", "--gpus=1")
    assert not (tmp_path / "out").exists()
    assert found[0].startswith(f"python freematch.py '--dataset={own}' --num_labels=0 --seed=1 ")
    assert f"{tmp_path}/out/training-runs/freematch-0-seed1-my images" in found[4] and found[4].endswith("--duration=1")


def test_labels_that_are_chosen_serve_both_classifiers():
    found = commands("--label-choice=typical", "--labels=12", "--seed=3", "--gpus=1")
    run = "./saved_models/freematch_digits_12_3_typical"
    assert found[0] == ("python suggest_labels.py --dataset=digits --budget=12 --strategy=typical --seed=3 "
                        f"--save_path={run}_labels")
    learners = [line for line in found if line.startswith("python freematch.py")]
    assert len(learners) == 2 and all(f"--label_idx={run}_labels/sampled_label_idx.npy" in line for line in learners)
    assert not any("label_idx" in line or "suggest" in line for line in commands("--gpus=1"))


@pytest.mark.parametrize("arguments, message", [
    (["--datset=digits"], "unknown option --datset=digits"),
    (["--dataset=cifar11"], "--dataset cifar11: neither digits, cifar10, cifar100, svhn, stl10, mnist nor a path"),
    (["--labels=none"], "--labels: expected a whole number of at least 1, got 'none'"),
    (["--seeds=0"], "--seeds: expected a whole number of at least 1, got '0'"),
    (["--stages=1,4"], "--stages: expected some of 1,2,3 separated by commas, got '1,4'"),
    (["--stage1-args", "--save_name='a"], "--stage1-args: cannot be split into flags"),
    (["--out"], "--out: expected a value"),
    (["--transition=volmin"], "--transition, .* belong to --stage2 tdsm"),
    (["--stage2=tdsm", "--transition=held-out"], "needs --held-out N"),
    (["--stage2=tdsm", "--held-out=20"], "--transition held-out"),
    (["--stage2=tdsm", "--transition=guess"], "expected predictions, held-out or volmin, got 'guess'"),
    (["--stage2=ddpm"], "expected edm or tdsm, got 'ddpm'"),
    (["--stage1=fixmach"], "got fixmach"),
    (["--imbalance=20"], "--imbalance belongs to --stage1 daso"),
    (["--stage1=daso", "--stage3=fixmatch"], "--stage3 fixmatch does not go with --stage1 daso"),
    (["--stage1=daso", "--stage2=tdsm"], "--stage2 tdsm does not go with --stage1 daso"),
    (["--stage1=daso", "--dataset=svhn"], "expected --dataset digits, cifar10 or cifar100, got svhn"),
    (["--stage3=daso"], "got daso"),
    (["--label-choice=best"], "--label-choice: expected class, typical, coverage or random, got 'best'"),
    (["--label-choice=typical", "--stage1=daso"], "--label-choice is not for --stage1 daso"),
    (["--gpus=64"], "--gpus 64: "),
])
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path):
    error = one_line_error(run_all(*arguments, status=2, path=bare_python(tmp_path)))
    assert re.search(message, error)


@pytest.mark.parametrize("arguments, message", [
    (["--stage1-args=--foo=1"], "freematch.py: unknown argument --foo=1"),
    (["--stage2-args=--lr=fast"], "train.py: Invalid value for '--lr'"),
    (["--generate-args=--steps=none"], "generate.py: Invalid value for '--steps'"),
    (["--stage3-args=--lr=-1"], "freematch.py: Invalid value for '--lr'"),
    (["--stage2=tdsm", "--classifier-args=--foo=1"], "train_classifier.py: unknown argument --foo=1"),
    (["--stage1=daso", "--stage1-args=SOLVER.MAX_ITERS 3"], "main.py: unknown key SOLVER.MAX_ITERS"),
])
def test_a_mistake_in_the_flags_of_a_stage_shows_before_the_first_one(arguments, message, tmp_path):
    out = tmp_path / "out"
    assert message in one_line_error(run_all("--out", out, *arguments, status=2))
    assert not out.exists()


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; choose another --out" in one_line_error(run_all("--out", tmp_path / "file" / "out", status=2))


def test_help_and_dry_runs_need_no_packages(tmp_path):
    said = run_all("--help", path=bare_python(tmp_path)).stdout
    for flag in ("--images-per-class", "--transition", "--imbalance", "--dry-run"):
        assert f"{flag} " in said
    assert "freematch.py" in run_all("--dry-run", path=bare_python(tmp_path)).stdout


def test_any_learner_in_either_stage():
    found = commands("--stage1=remixmatch", "--stage3=softmatch", "--out=/tmp/x")
    first, second = found[0], found[6]
    assert first.startswith("python remixmatch.py --c config/remixmatch/remixmatch_digits_40_0.yaml --num_labels=10 ")
    assert second.startswith("python softmatch.py --c config/softmatch/softmatch_digits_40_0.yaml --num_labels=10 ")
    assert "--save_name=remixmatch_digits_10_1 " in first and "--aug_path=" in second
    assert "--save_name=remixmatch_digits_10_1_aug100_softmatch " in second
    assert "config/uda/uda_cifar100_400_0.yaml" in commands("--stage1=uda", "--dataset=cifar100")[0]
    # Stage 1 has few labels, whatever the script's default.
    assert "--all_labels=False" in commands("--stage1=fullysupervised", "--dataset=mnist")[0]


@pytest.mark.parametrize("name", ["bilder ü", "it's", 'a "b"', "$HOME `id` &"])
def test_paths_are_quoted_as_they_can_be_typed(name, tmp_path):
    own = tmp_path / name
    own.mkdir()
    lines = run_all("--dry-run", "--dataset", own, "--out", tmp_path / "out").stdout.splitlines()
    words = shlex.split(next(line for line in lines if line.startswith("python check_data.py")))
    assert words == ["python", "check_data.py", f"--dataset={own}", "--download"]


def test_tdsm_keeps_plain_dpt_and_adds_its_own_stages():
    plain, both = commands(), commands("--stage2=tdsm")
    assert [command for command in both if command in plain] == plain
    added = [command for command in both if command not in plain]
    assert [command.split()[1] for command in added] == [
        "estimate_transition.py", "train_classifier.py", "train_noise.py", "generate.sh", "freematch.py", "evaluate.py",
        "evaluate.py"]
    estimate, classifier, diffusion, generate, again, *judged = added
    matrix = "freematch_digits_10_1/transition_tdsm_predictions.json"
    assert f"--dest=./saved_models/{matrix}" in estimate and estimate.endswith("--method=predictions")
    assert f"--noise_type=file --transition=../TorchSSL/saved_models/{matrix}" in classifier
    assert "--cls=training-runs/freematch-10-seed1-digits-8x8-tdsm-predictions-classifier/network-snapshot-latest.pkl" \
        in diffusion
    images = "data-aug/freematch_digits_10_1_tdsm_predictions/nums_100"
    assert f" ../TorchSSL/{images} " in generate and again.endswith(f"--aug_path=./{images}")
    assert "--save_name=freematch_digits_10_1_aug100_tdsm_predictions" in again
    # Equal training: the flags of the plain model, word for word.
    flags = plain[4].partition("--arch=ddpmpp ")[2]
    assert "--duration=0.08" in flags and diffusion.endswith(flags)
    assert [f"--images=../TorchSSL/{folder}" in command for folder, command in
            zip(("data-aug/freematch_digits_10_1/nums_100", images), judged, strict=True)] == [True, True]


def test_each_source_of_the_transition_has_folders_of_its_own():
    held_out = commands("--stage2=tdsm", "--transition=held-out", "--held-out=30", "--only-tdsm")
    assert not any(command.startswith("python train.py") for command in held_out)
    assert held_out[4].endswith("--method=held_out --held_out=30")
    assert "tdsm-held-out-30-classifier" in held_out[5] and "_tdsm_held_out_30/nums_100" in held_out[8]
    volmin = commands("--stage2=tdsm", "--transition=volmin", "--only-tdsm")
    assert "--precond=edm_vm" in volmin[4] and "--noise_type=learn" in volmin[5] and "estimate" not in " ".join(volmin)
    args = commands("--stage2=tdsm", "--stage2-args", "--duration=1", "--classifier-args", "--lr=1")
    assert sum(command.endswith("--duration=1") for command in args) == 2
    assert sum(command.endswith("--lr=1") for command in args) == 1


def test_tdsm_with_the_published_experiment_leaves_its_commands_as_they_are():
    found = commands("--dataset=cifar10", "--gpus=4", "--stage2=tdsm")
    assert [command for command in found if command in PUBLISHED] == PUBLISHED
    assert sum("tdsm" in command for command in found) == 5


FAKE = """#!/bin/sh
case "$1" in -c | -) exec {python} "$@" ;; esac
case "$*" in *check_data.py*--commands*) exec cat > /dev/null ;; esac
echo "$(basename "$PWD"): $*" >> {log}
case "$*" in *train.py*--dry-run*) echo "Output directory:        training-runs/00003-ours" ;; esac
"""


def test_the_published_training_numbers_its_folder_and_is_asked_for_it(tmp_path):
    """In a copy of the scripts, with a `python` that only notes how it is called."""
    for name in ("run_all.sh", "recipes", "shared/env.sh", "shared/stages.sh", "TorchSSL/config", "EDM/generate.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    zipped = tmp_path / "TorchSSL/saved_models/freematch_cifar10_40_1/freematch-40-seed1-cifar10-32x32.zip"
    zipped.parent.mkdir(parents=True)
    zipped.touch()
    (tmp_path / "bin").mkdir()
    log, fake = tmp_path / "calls", tmp_path / "bin" / "python"
    fake.write_text(FAKE.format(python=sys.executable, log=log))
    fake.chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "run_all.sh", "--dataset=cifar10"], text=True, capture_output=True,
                          env=environment(PATH=f"{fake.parent}:/usr/bin:/bin"), check=True)
    calls = log.read_text().splitlines()
    train = [call for call in calls if call.startswith("EDM: train.py --outdir=training-runs --data=")]
    assert len(train) == 3 and train[1] == train[2] == f"{train[0]} --dry-run"
    assert "--network=./training-runs/00003-ours/network-snapshot-latest.pkl" in " ".join(calls)
    assert "--stage2=../EDM/training-runs/00003-ours " in calls[-1]
    assert "bash generate.sh 1000 ../TorchSSL/data-aug/nums_1000 ./training-runs/00003-ours/" in done.stdout
    printed = done.stdout.splitlines()
    commands = [at for at, line in enumerate(printed) if line.startswith(("python ", "bash "))]
    assert len(commands) == 9 and all(re.fullmatch(r"# \d+\.\d s", printed[at + 1]) for at in commands)
    history = [json.loads(line) for line in (tmp_path / "runs/cifar10_40_1/commands.jsonl").read_text().splitlines()]
    assert [entry["command"] for entry in history] == [printed[at] for at in commands]
