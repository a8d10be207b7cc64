"""What would end an experiment in a later stage is found before the first, in one line whose remedy works."""
from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.cli import UserError
from tests.shared.programs import ROOT, environment
from TorchSSL.core.plan import check_experiment

CLASSES = ("cat", "dog", "horse")
LEARNER = "--num_train_iter=6 --num_eval_iter=3 --batch_size=4 --uratio=2 --widen_factor=1 --depth=10"
TINY = ["--images-per-class=3", "--gpus=1", f"--stage1-args={LEARNER}", "--generate-args=--steps=3",
        "--stage2-args=--duration=0.001 --batch=16 --tick=1 --cbase=16 --cres=1,2 --num-blocks=1",
        f"--stage3-args={LEARNER}"]
EQUAL = ["--resolution=16x16", "--transform=center-crop"]


def photographs(folder: Path, least: tuple[int, int], most: tuple[int, int], splits: dict[str, int]) -> Path:
    """Write photographs of `least` to `most` pixels (width, height): so many of each class, in `unlabeled` in all."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for number, name in enumerate(CLASSES * count):
            place = folder / split / ("" if split == "unlabeled" else name)
            place.mkdir(parents=True, exist_ok=True)
            width, height = rng.integers(least, np.array(most) + 1)
            pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.{'jpg' if number % 2 else 'png'}")
    return folder


def printed(*arguments: str) -> subprocess.CompletedProcess:
    """Run run_all.sh, and return what it says."""
    return subprocess.run(["bash", ROOT / "run_all.sh", *arguments], text=True, capture_output=True, cwd="/",
                          env=environment())


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> Path:
    return photographs(tmp_path_factory.mktemp("own") / "square", (16, 16), (16, 16), {"train": 4, "test": 2})


def lines(dataset: Path, out: Path, stage2: str = "", generate: str = "", stage3: str = "", learner: str = "freematch"
          ) -> list[str]:
    """Return the commands of an experiment, shortened."""
    common = f"--dataset={dataset} --save_dir={out} --num_labels=0"
    return ["cd TorchSSL", f"python {learner}.py {common} --save_name=first", "cd ../EDM",
            f"torchrun --standalone --nproc_per_node=2 train.py --outdir={out}/models --data=x.zip --cond=1 {stage2}",
            f"bash generate.sh 2 {out}/images {out}/x.pkl 1 {generate}", "cd ../TorchSSL",
            f"python freematch.py {common} --save_name=second --aug_path={out}/images {stage3}"]


TINY_NETWORK = "--cbase=16 --cres=1,2 --num-blocks=1"


@pytest.mark.parametrize("changed, message", [
    ({"stage2": "--foo=1"}, "train.py: unknown argument --foo=1"),
    ({"stage2": f"{TINY_NETWORK} --batch=7"}, "train.py: --batch=7 cannot be shared evenly by 2 processes"),
    ({"stage2": f"{TINY_NETWORK} --batch=64 --batch-gpu=5"}, "train.py: --batch-gpu=5 does not divide the 32 images"),
    ({"stage2": f"{TINY_NETWORK} --strict --compile=1"}, "train.py: --strict and --compile=1 contradict each other"),
    ({"stage2": "--cbase=16 --cres=1,1,1,1,1,1,1"}, "train.py: no network of --arch with these --cbase and --cres"),
    ({"stage2": f"{TINY_NETWORK} --transfer=none.pkl"}, "train.py: --transfer: no such file: none.pkl"),
    ({"generate": "--stepz=3"}, 'generate.py: unknown argument --stepz=3 (did you mean "--steps"?)'),
    ({"generate": "--guide-network=none.pkl --guidance=2", "stage2": TINY_NETWORK},
     "generate.py: --guide-network: no such file: none.pkl"),
    ({"generate": "--S_churn=1 --sampler=ablation --solver=x"}, "generate.py: Invalid value for '--solver'"),
    ({"stage3": "--lr=-1"}, "freematch.py: Invalid value for '--lr'"),
    ({"stage3": "--depth=27"}, "freematch.py: depth: a wide residual network has 6 b + 4 layers"),
    ({"stage3": "--weak_pad=40"}, "freematch.py: "),
    ({"stage3": "--aug_filter=none.pth"}, "freematch.py: --aug_filter: there is no file none.pth"),
    ({"stage2": "--cbase=512"}, "stage 2 take about "),
    ({}, ""),
])
def test_what_a_later_stage_needs(square: Path, tmp_path: Path, changed: dict[str, str], message: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 5 << 30}))
    commands = lines(square, tmp_path / "out", **({"stage2": TINY_NETWORK} | changed))
    if not message:
        check_experiment(commands)
    else:
        with pytest.raises(UserError, match=re.escape(message)) as found:
            check_experiment(commands)
        assert "\n" not in str(found.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("least, most, message", [
    ((30, 30), (30, 30), "are 30x30, stage 2 takes squares whose side is a multiple of 4; give --resolution=16x16"),
    ((36, 40), (36, 40), "are 36x40, stage 2 takes squares whose side is a multiple of 4; give --resolution=32x32 "
                         "--transform=center-crop"),
    ((20, 20), (40, 40), "give --resolution=64x64 --transform=center-crop to make them equal"),
])
def test_sizes_and_their_remedy(tmp_path: Path, least: tuple[int, int], most: tuple[int, int], message: str) -> None:
    own = photographs(tmp_path / "own", least, most, {"train": 4, "test": 2})
    failed = printed(f"--dataset={own}", f"--out={tmp_path / 'out'}", *TINY)
    assert (failed.returncode, failed.stdout) == (2, "") and failed.stderr.count("\n") == 1, failed.stderr
    assert message in failed.stderr
    remedy = re.findall(r"--(?:resolution|transform)=\S+", failed.stderr)
    dry = printed(f"--dataset={own}", f"--out={tmp_path / 'out'}", *TINY, *remedy, "--dry-run")
    assert dry.returncode == 0 and f"dataset_tool.py --source={own}/train" in dry.stdout, dry.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize("arguments, message", [
    (["--resolution=30x30"], "a power of two, such as --resolution=16x16"),
    (["--transform=center-crop"], "--transform needs --resolution"),
    (["--resolution=16x16", "--dataset=digits"], "--resolution and --transform are for your own images"),
    (["--out=/proc/x"], "choose another"),
])
def test_mistakes_of_the_chain(square: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    failed = printed(f"--dataset={square}", f"--out={tmp_path / 'out'}", *TINY, *arguments)
    errors = [line for line in failed.stderr.splitlines() if not line.startswith("warning: ")]
    assert failed.returncode == 2 and len(errors) == 1 and message in errors[0], failed.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_photographs_of_mixed_sizes_go_through_all_stages(tmp_path: Path) -> None:
    own = photographs(tmp_path / "own", (16, 16), (40, 40), {"train": 8, "test": 4, "unlabeled": 10})
    done = printed(f"--dataset={own}", f"--out={tmp_path / 'out'}", *TINY, *EQUAL)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 <= report["stage3_accuracy"] <= 1
    counts = report["pseudo_label_counts"]
    assert sum(counts) == 8 * 3 + 30  # the labelled and the unlabelled photographs
    made = list((tmp_path / "out" / "data-aug").rglob("*.png"))
    assert made and all(Image.open(path).size == (16, 16) for path in made)
    work = {path: path.stat().st_mtime_ns for end in ("pth", "pt", "pkl", "png", "zip")
            for path in (tmp_path / "out").rglob(f"*.{end}") if path.parent.name != "out"}
    assert printed(f"--dataset={own}", f"--out={tmp_path / 'out'}", *TINY, *EQUAL).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in work} == work
