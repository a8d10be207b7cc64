"""run_imagenet.sh and what it adds to the published commands: the folder to work in, and the report."""
from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from EDM.imagenet import prepare, report
from EDM.imagenet.experiment.config import read_config
from shared.cli import UserError
from tests.shared.programs import ROOT, environment

CONFIGS = ROOT / "EDM/imagenet/configs"
# Every step of the script, as short as it can be.
SHORT = ["--encoder-args", "--epochs=1 --warmup=0 --model=deit_tiny --img_size=32 --patch_size=16 --embed_dim=32 "
         "--depth=1 --num_heads=2 --hidden=32 --output_dim=8 --prototypes=10 --focal_views=1 --focal_size=16 "
         "--batch_size=4",
         "--config-args", "--config.train.n_steps=4 --config.train.batch_size=4 --config.sample.sample_steps=2 "
         "--config.lr_scheduler.warmup_steps=2", "--images-per-class=2"]


NO_VAE = ["--config.autoencoder.pretrained_path=space-to-depth", "--config.z_shape=192,32,32",
          "--config.nnet.in_chans=192"]


def photographs(folder: Path) -> Path:
    """Make train/<class>/, test/<class>/ and unlabeled/ of small photographs."""
    rng = np.random.default_rng(0)
    for part, count in (("train/cat", 4), ("train/dog", 3), ("test/cat", 2), ("test/dog", 2), ("unlabeled", 2)):
        (folder / part).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 120, (40, 48 + number, 3)) + 120 * part.endswith("dog")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"{number}.jpg")
    return folder


def shell(*flags: str | Path, status: int = 0) -> str:
    done = subprocess.run(["bash", ROOT / "run_imagenet.sh", *map(str, flags)], text=True, capture_output=True,
                          env=environment())
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout if status == 0 else done.stderr


def test_commands_of_the_published_experiment():
    lines = shell("--dataset=imagenet", "--config=accelerate_b4_subset1_2img_k_128_huge", "-n").splitlines()
    commands = [line for line in lines if line.startswith("python")]
    assert "cd EDM/imagenet" in lines and len(commands) == 9
    assert all(line.split()[2] == "--config=configs/accelerate_b4_subset1_2img_k_128_huge.py" for line in commands)
    assert [line.split()[1] for line in commands[3:6]] == ["extract_imagenet_features_semi.py",
                                                          "train_ldm_discrete.py", "sample_ldm_discrete_all.py"]


@pytest.mark.parametrize("flags, message", [
    (["--dataset=absent"], "--dataset absent: neither digits, imagenet nor a folder that exists"),
    (["--config=absent"], "--config: there is no EDM/imagenet/configs/absent.py"),
    (["--dataset=imagenet", "--labels=2"], "--labels, --encoder and --seeds are for digits and your own photographs"),
    (["--config-args=--n_steps=3"], "--config-args: expected --config.KEY=VALUE, got --n_steps=3"),
    (["--stages=4"], "--stages: expected some of 1,2,3"),
])
def test_wrong_options(flags, message):
    assert message in shell(*flags, "-n", status=2)


def test_a_folder_for_photographs(tmp_path, monkeypatch):
    images = photographs(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    flags = [f"--config={CONFIGS}/own.py", f"--dataset={images}", "--dest=run", "--config.train.n_steps=7", *NO_VAE]
    with pytest.raises(UserError, match="--config.train.batch_size=256: .* has only 18 latents; give a smaller batch"):
        prepare.main(flags)
    flags.append("--config.train.batch_size=4")
    prepare.main([*flags, "--encoder=timm:test_vit"])
    config = read_config("run/config.py")
    assert (config.image_path, config.nnet.num_classes, config.train.n_steps) == (str(images), 3, 7)
    assert (config.encoder, config.fname) == ("timm:test_vit", "timm-test_vit")
    everything = Path("run/labels.txt").read_text().split()
    assert everything == [f"cat/{n}.jpg" for n in range(4)] + [f"dog/{n}.jpg" for n in range(3)]
    with pytest.raises(UserError, match="labels was 0, is 2.*--overwrite"):
        prepare.main([*flags, "--labels=2"])
    prepare.main([*flags, "--labels=2", "--overwrite"])
    chosen = Path("run/labels.txt").read_text().split()
    assert len(chosen) == 4 and set(chosen) < set(everything)
    Path("run/labels.txt").write_text("cat/0.jpg\ndog/0.jpg\n")
    prepare.main([*flags, "--labels=2"])
    assert Path("run/labels.txt").read_text() == "cat/0.jpg\ndog/0.jpg\n"
    with pytest.raises(UserError, match="--labels: dog has only 3 images in train"):
        prepare.main([*flags, "--labels=4"])


@pytest.mark.parametrize("flags, message", [
    (["--encoder=timm:absent"], "timm has no model 'absent'"),
    (["--config.autoencoder.pretrained_path=absent.pth"], "there is no file absent.pth"),
    ([*NO_VAE, "--config.nnet.num_heads=7"], "heads must divide the width"),
    (["--config.autoencoder.pretrained_path=space-to-depth"], r"give --config.z_shape=192,32,32"),
])
def test_networks_are_tried_before_the_first_stage(tmp_path, flags, message):
    images = photographs(tmp_path / "photos")
    with pytest.raises(UserError, match=message):
        prepare.main([f"--config={CONFIGS}/own.py", f"--dataset={images}", f"--dest={tmp_path}/run", *flags])
    assert not (tmp_path / "run").exists()


def test_report_over_seeds(tmp_path, capsys):
    scores = {1: (0.5, 0.75, 0.6), 2: (0.5, 0.7, 0.8)}
    for seed, (first, third, control) in scores.items():
        kinds = {"stage1": first, "stage3": third, "control_real": control}
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "report.json").write_text(json.dumps({
            "labelled_images": 10, "pseudo_labels": {"accuracy": 0.5},
            "scores": {name: {"top1": value, "top5": 1.0} for name, value in kinds.items()}}))
    report.main([f"--out={tmp_path}/all", "--seed_report", str(tmp_path / "1"), str(tmp_path / "2")])
    text = (tmp_path / "all/report.md").read_text()
    assert "Stage 3 minus stage 1: few labels: +22.50 points of top-1, standard error 2.50, above 0 with 2 of 2" in text
    assert "place of generated ones: +2.50 points of top-1, standard error 12.50, above 0 with 1 of 2" in text
    with pytest.raises(UserError, match="give either --config of one run, or --seed_report of several"):
        report.main([f"--out={tmp_path}/all"])


@pytest.mark.slow
def test_three_stages_on_photographs(tmp_path):
    flags = ["--dataset", photographs(tmp_path / "photos"), "--config=digits", "--out", tmp_path / "out", "--controls",
             *SHORT]
    first = shell(*flags)
    assert "stage 3: with generated images" in first
    content = json.loads((tmp_path / "out/report/report.json").read_text())
    assert content["scores"]["stage3"]["rows"] == {"generated": 4, "labelled": 7}
    assert content["scores"]["control_real"]["rows"] == {"real": 9, "labelled": 7}
    assert content["pseudo_labels"]["images"] == 9 and (tmp_path / "out/report/generated.png").exists()
    files = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.suffix in (
        ".png", ".pkl", ".tar") and "report" not in str(path)}
    shell(*flags)
    changed = {path.name for path, then in files.items() if os.stat(path).st_mtime_ns != then}
    assert changed <= {"encoder.pth.tar"}
