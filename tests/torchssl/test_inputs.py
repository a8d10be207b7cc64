"""What a user may get wrong with the TorchSSL scripts: one line, status 2, nothing touched."""
from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cli import UserError
from tests.shared.programs import one_line_error, run
from tests.torchssl import tiny
from TorchSSL import eval as evaluation_script
from TorchSSL import freematch, get_labels
from TorchSSL.core.evaluation import open_split
from TorchSSL.core.networks import make_network


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWLABEL_CACHE", str(tmp_path / "cache"))


def make_images(folder: Path, side: int = 8, count: int = 2, classes: int = 10, mode: str = "L") -> Path:
    """Write random images as <folder>/<class>/<number>.png."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for number in range(count):
            shape = (side, side) if mode == "L" else (side, side, 3)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / str(label) / f"{number:06d}.png")
    return folder


def files() -> set[str]:
    return {str(path) for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts}


def refused(*flags: str) -> str:
    """Return the message of the error that these flags end in, having checked that nothing was written."""
    before = files()
    with pytest.raises(UserError) as caught:
        tiny.call(*flags)
    assert "\n" not in str(caught.value) and files() == before
    return str(caught.value)


def text(name: str, content: str) -> str:
    Path(name).write_text(content)
    return name


WRONG_FLAGS = {
    "--lr=x": "Invalid value for '--lr': 'x' is not a valid float.",
    "--lr=nan": "Invalid value for '--lr': nan is not a finite number.",
    "--batch_size=0": "Invalid value for '--batch_size': 0 is not in the range x>=1.",
    "--hard_label=perhaps": "--hard_label",
    "--optim=Adam": "Invalid value for '--optim': 'Adam' is not one of 'SGD', 'AdamW'",
    "--num_lables=40": 'did you mean "--num_labels"',
    "--ema_m=1.5": "Invalid value for '--ema_m': 1.5 is not in the range 0<=x<=1.",
    "--val_fraction=1": "Invalid value for '--val_fraction'",
    "--save_name=a/b": "one folder",
    "--resume": "--load_path",
    "--epoch=2": "Invalid value for '--epoch': 2 is not in the range",
    "--real_fraction=0.5": "--real_fraction needs --aug_path",
    "--aug_filter=x.pth": "--aug_filter needs --aug_path",
    "--num_labels=25": "--num_labels 25 is not a positive multiple of the 10 classes",
    "--num_labels=5000": "every class, but class",
    "--num_classes=7": "--num_classes 7: digits has 10 classes",
    "--dataset=cifer10": 'did you mean "cifar10"',
    "--dataset=cifar10": "--download",
    "--dataset=stl10": "stl10",
    "--dataset=./no-such-folder": "no-such-folder",
    "--net=WideResnet": 'did you mean "WideResNet"',
    "--net=resnet18": "resnet18",
    "--depth=12": "depth",
    "--precision=fp16": "--precision fp16 needs a GPU",
    "--device=cuda:7": "GPU",
    "--device=tpu": "tpu",
    "--weak_pad=20": "window",
    "--aug_path=./nowhere": "--aug_path ./nowhere: no such folder",
    "--label_idx=none.npy": "--label_idx none.npy: no such file",
    "--c=none.yaml": "--c: cannot read none.yaml",
    "--weak_pad_mode=reflect": "--weak_subpixel",
}


@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_wrong_flag(flag: str) -> None:
    if flag == "--weak_pad=20":  # more than reflection can supply
        assert "larger images" in refused(flag, "--weak_pad_mode=reflect", "--weak_subpixel=False")
        return
    assert WRONG_FLAGS[flag] in refused(flag)


WRONG_YAML = {
    "lr: fast": "wrong.yaml: lr: 'fast' is not a valid float.",
    "num_lables: 40": 'unknown key "num_lables" (did you mean "num_labels"?)',
    "net: [1": "not plain YAML",
    "- 3": "one `key: value` per line",
    "x: !!python/object/apply:os.system ['touch hacked']": "not plain YAML",
    "hard_label: perhaps": "hard_label: 'perhaps' is not a valid boolean",
    "alg: fixmatch": "alg: 'fixmatch' is not one of 'freematch'",
}


@pytest.mark.parametrize("content", WRONG_YAML)
def test_wrong_yaml(content: str) -> None:
    assert WRONG_YAML[content] in refused(f"--c={text('wrong.yaml', content)}")
    assert not Path("hacked").exists()


def layout_nothing() -> str:
    Path("extra").mkdir()
    return "expected one folder per class"


def layout_loose_images() -> str:
    make_images(Path("made"), classes=1)
    shutil.move("made/0", "extra")
    return "expected one folder per class"


def layout_unknown_names() -> str:
    make_images(Path("extra"), classes=3)
    os.rename("extra/2", "extra/cat")
    return "'cat' is neither a class number nor one of the classes"


def layout_too_many_classes() -> str:
    make_images(Path("extra"), classes=11, count=1)
    return "only 10 classes"


def layout_wrong_size() -> str:
    make_images(Path("extra"), side=10)
    return "1 x 10 x 10, those of digits 1 x 8 x 8"


def layout_mixed_sizes() -> str:
    make_images(Path("extra"))
    Image.new("L", (9, 8)).save("extra/3/000000.png")
    return "9x8"


def layout_truncated_image() -> str:
    make_images(Path("extra"))
    file = Path("extra/4/000001.png")
    file.write_bytes(file.read_bytes()[:40])
    return "000001.png"


@pytest.mark.parametrize("prepare", [layout_nothing, layout_loose_images, layout_unknown_names, layout_too_many_classes,
                                     layout_wrong_size, layout_mixed_sizes, layout_truncated_image],
                         ids=lambda prepare: prepare.__name__)
def test_wrong_aug_path(prepare: Callable[[], str]) -> None:
    wanted = prepare()
    assert wanted in refused("--aug_path=extra")


def checkpoint_truncated(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-500])
    return "cut short or damaged"


def checkpoint_of_another_network(file: Path) -> str:
    torch.save({"ema_model": {"conv1.weight": torch.zeros(3)}, "model": {}, "optimizer": {}, "scheduler": {}, "it": 1},
               file)
    return "the weights of another network"


def checkpoint_hostile(file: Path) -> str:
    class Harm:
        def __reduce__(self) -> tuple:
            return os.system, ("touch hacked",)

    file.write_bytes(pickle.dumps({"ema_model": Harm()}))
    return "refused"


def checkpoint_of_something_else(file: Path) -> str:
    torch.save({"weights": torch.zeros(3)}, file)
    return "holds no classifier"


def checkpoint_of_numbers(file: Path) -> str:
    torch.save({"ema_model": {"conv1.weight": 3}, "options": 5}, file)
    return "its entry ema_model does not hold the weights"


SPOILT = (checkpoint_truncated, checkpoint_of_another_network, checkpoint_hostile, checkpoint_of_something_else,
          checkpoint_of_numbers)


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_wrong_checkpoint(spoil: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path("model.pth")
    torch.save({"ema_model": torch.zeros(10000)}, file)
    wanted = spoil(file)
    for script in (get_labels, evaluation_script):
        monkeypatch.setattr("sys.argv", ["script.py", "--load_path=model.pth", "--dataset=digits"])
        with pytest.raises(UserError, match=wanted):
            script.main()
    assert files() == {"model.pth"}
    extra = make_images(Path("extra"))
    assert wanted in refused(f"--aug_path={extra}", "--aug_filter=model.pth")
    assert not Path("hacked").exists()


def test_wrong_label_files() -> None:
    for name, content, wanted in (("range.npy", np.array([1, 1297]), "different positions in 0..1296"),
                                  ("twice.npy", np.array([3, 3]), "different positions"),
                                  ("float.npy", np.array([1.5]), "array of integers"),
                                  ("object.npy", np.array([{}], object), "not a plain array")):
        np.save(name, content, allow_pickle=True)
        assert wanted in refused(f"--label_idx={name}")


def test_folder_that_cannot_be_written() -> None:
    text("file", "")
    assert "cannot create the folder" in refused("--save_dir=file")


def test_user_set_without_test_part() -> None:
    make_images(Path("mine/train"), classes=2, count=4)
    assert "has no split 'test'" in refused("--dataset=mine")


@pytest.mark.parametrize("flags", [["--num_lables=40"], ["--dataset=digits", "--num_labels=25"]])
def test_as_a_program(flags: list[str], tmp_path: Path) -> None:
    """The whole way: exit status 2 and one line on stderr."""
    error = one_line_error(run("TorchSSL/freematch.py", *flags, cwd=tmp_path, status=2))
    assert "--num_labels" in error and files() == set()
    assert freematch.parse([]).num_labels == 40


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_and_a_set_are_matched_by_name(tmp_path: Path) -> None:
    """A test set with some of the classes, whose folders alone would be numbered from 0, is scored by name."""
    for level, name in enumerate(("bird", "ship")):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 40 * level).save(tmp_path / "set" / "test" / name / "1.png")
    options = evaluation_script.parse([f"--load_path={tmp_path}/c.pth", f"--dataset={tmp_path}/set", "--depth=10",
                                 "--widen_factor=1", "--device=cpu"])
    net = make_network({**vars(options), "dataset": "set"}, 3, 1)
    content = {"ema_model": net.state_dict(), "mean": (0.5,), "std": (0.5,), "options": {"num_classes": 3}}
    torch.save({**content, "classes": ("airplane", "bird", "ship")}, tmp_path / "c.pth")
    images = open_split(options, "test")[2]
    assert images.labels.tolist() == [1, 2] and images.classes == ("airplane", "bird", "ship")
    torch.save({**content, "classes": ("airplane", "bird", "car")}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="the class 'ship' is not one of the training set's classes"):
        open_split(options, "test")
    torch.save(content, tmp_path / "c.pth")  # of the original code
    assert open_split(options, "test")[2].labels.tolist() == [0, 1]
