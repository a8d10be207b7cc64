"""Weights that are no numbers, or are not there, give no result: one line, wherever a file of them is loaded."""
from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from DASO import get_labels as daso_labels
from DASO import main as daso_main
from DDAE import contrastive, finetune, linear, noisy_classifier_DDAE, sample
from EDM import evaluate, example, fid, generate, train, train_noise
from MetaSemi import plot_features
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.writers import write_folder
from tests.daso import small as daso
from tests.ddae import tiny as ddae
from tests.edm.scored_images import write_classifier, write_images
from tests.metasemi import tiny as metasemi
from tests.shared.test_changed_inputs import EDM, call, classify, for_edm, tensors_in
from tests.torchssl import tiny as torchssl
from TorchSSL import estimate_transition, eval, get_labels


def spoil(path: str, value: float) -> None:
    """Set one number of each tensor of more than one dimension in a file to `value`."""
    content = torch.load(path, weights_only=True)
    for tensor in tensors_in(content):
        if tensor.ndim > 1:
            tensor[(0,) * tensor.ndim] = value
    torch.save(content, path)


def stripped(path: str) -> None:
    """Take the networks out of a checkpoint."""
    content = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in content.items()
                if key not in ("model", "ema_model", "net", "ema", "state_dict", "MODEL", "EMA", "state")}, path)


def torchssl_run() -> None:
    torchssl.call("--dataset=digits", "--device=cpu")
    shutil.copy("saved_models/tiny/latest_model.pth", "net.pth")


def classifier(module: object) -> Callable[[], None]:
    return lambda: call(module, "--load_path=net.pth", "--save_path=made", "--dataset=digits")


def daso_run() -> None:
    folder = daso.call("fixmatch_daso", Path("first"))
    shutil.copy(folder / "model_final.pth.tar", "net.pth")
    shutil.copytree(folder, "run")


def daso_call(*words: str) -> Callable[[], None]:
    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["main.py", *daso.command("fixmatch_daso", Path("again"), {}), *words])
            daso_main.main()
    return run


def metasemi_run() -> None:
    metasemi.call("train_baseline")
    shutil.copy("run/checkpoint.pth", "net.pth")


def metasemi_resume() -> None:
    metasemi.call("train_baseline", "--save-path=again", "--resume=net.pth", "--total-steps=16")


def ddae_folder() -> None:
    ddae.make_folder(Path())
    Path("net.pth").symlink_to("out/ckpts/model_2.pth")


def tdsm_folder() -> None:
    for_edm()
    classify()
    Path("net.pth").symlink_to("noise/network-snapshot-latest.pkl")


def edm_folder() -> None:
    for_edm()
    Path("net.pth").symlink_to("net.pkl")


def scores_folder() -> None:
    write_classifier(Path("net.pth"))
    write_images(Path("made"), 20, seed=1)


GENERATE = ("--outdir=made", "--seeds=0-3", "--steps=2", "--device=cpu", "--class=1")
# Program -> (what makes net.pth, the program that loads it)
PROGRAMS: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
    "TorchSSL/eval.py": (torchssl_run, lambda: call(eval, "--load_path=net.pth", "--dataset=digits")),
    "TorchSSL/get_labels.py": (torchssl_run, classifier(get_labels)),
    "TorchSSL/estimate_transition.py": (torchssl_run, lambda: call(
        estimate_transition, "--load_path=net.pth", "--save_path=made", "--dataset=digits", "--method=held_out",
        "--held_out=20")),
    "TorchSSL --aug_filter": (torchssl_run, lambda: torchssl.call(
        "--dataset=digits", "--save_name=again", "--aug_path=extra", "--aug_filter=net.pth")),
    "TorchSSL --resume": (torchssl_run, lambda: torchssl.call(
        "--dataset=digits", "--save_name=again", "--resume", "--load_path=net.pth", "--num_train_iter=50")),
    "EDM/train.py --transfer": (edm_folder, lambda: train.main([*EDM, "--outdir=run", "--transfer=net.pth"])),
    "EDM/train_noise.py --cls": (tdsm_folder, lambda: train_noise.main(
        [*EDM, "--outdir=tdsm", "--noise_type=file", "--transition=matrix.json", "--cls=net.pth"])),
    "EDM/generate.py": (edm_folder, lambda: generate.main(["--network=net.pth", *GENERATE])),
    "EDM/generate.py --guide-network": (edm_folder, lambda: generate.main(
        ["--network=net.pkl.kept", "--guide-network=net.pth", "--guidance=2", *GENERATE])),
    "EDM/example.py": (edm_folder, lambda: example.main(["--network=net.pth", "--preset=cifar10", "--outdir=made",
                                                             "--device=cpu"])),
    "EDM/fid.py": (scores_folder, lambda: fid.main(
        ["ref", "--data=made", "--dest=real.npz", "--detector=net.pth", "--device=cpu"])),
    "EDM/evaluate.py": (edm_folder, lambda: evaluate.main(
        ["--data=set.zip", "--test=test.zip", "--network=net.pth", "--per-class=8", "--outdir=made", "--steps=2",
         "--classifier-steps=3", "--device=cpu", "--metrics=accuracy"])),
    "DDAE/sample.py": (ddae_folder, lambda: ddae.call_in(Path(), sample, "--images=3", "--steps=2", "--epoch=2")),
    "DDAE/linear.py": (ddae_folder, lambda: ddae.call_in(Path(), linear)),
    "DDAE/contrastive.py": (ddae_folder, lambda: ddae.call_in(Path(), contrastive, "--epochs=2")),
    "DDAE/finetune.py": (ddae_folder, lambda: ddae.call_in(Path(), finetune, "--epochs=1", "--batch_size=20")),
    "DDAE/noisy_classifier_DDAE.py": (ddae_folder, lambda: ddae.call_in(Path(), noisy_classifier_DDAE)),
    "MetaSemi --resume": (metasemi_run, metasemi_resume),
    "MetaSemi/plot_features.py": (metasemi_run, lambda: call(
        plot_features, "--dataset=digits", "--checkpoint-path=net.pth", "--index-path=run/label_indices.txt",
        "--save-path=made")),
    "DASO --eval-only": (daso_run, daso_call("--eval-only", "RESUME", "net.pth")),
    "DASO RESUME": (daso_run, daso_call("RESUME", "net.pth", "SOLVER.MAX_ITER", "9", "PERIODS.EVAL", "9",
                                        "PERIODS.LOG", "9")),
    "DASO/get_labels.py": (daso_run, lambda: daso_labels.main(["--run=run"])),
}
SPOILT: dict[str, Callable[[str], None]] = {
    "nan": lambda path: spoil(path, float("nan")), "inf": lambda path: spoil(path, float("inf")), "none": stripped}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[Callable, Path] = {}

    def make(name: str) -> Path:
        prepare = PROGRAMS[name][0]
        if prepare not in folders:
            folders[prepare] = tmp_path_factory.mktemp("made") / "place"
            folders[prepare].mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[prepare])
                write_folder(load_dataset("digits", "train").subset(slice(100, 140)), Path("extra"))
                prepare()
                if Path("net.pkl").exists():
                    shutil.copy("net.pkl", "net.pkl.kept")
        return folders[prepare]

    return make


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_ends_in_one_line(name: str, how: str, made: Callable[[str], Path], tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made(name), tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    kept = {path.name for path in Path().rglob("*") if path.is_file()}
    file = "run/model_final.pth.tar" if name == "DASO/get_labels.py" else "net.pth"
    SPOILT[how](file)
    with warnings.catch_warnings(), pytest.raises(UserError) as found:
        warnings.simplefilter("ignore")
        PROGRAMS[name][1]()
    message = str(found.value)
    assert "\n" not in message
    if how != "none":
        assert "not finite" in message
    results = [path for path in Path("made").rglob("*") if path.suffix in (".json", ".npy", ".png", ".npz")]
    assert not [path for path in results if path.name not in ("generate.json", *kept)]
