"""One bit of an input changes: the same command again does not pass off the old result as that of the new input.

One case for every program that keeps its result, and every input of it. A changed input is either named in one line, or
the result is made anew; unchanged ones give "complete". (The programs between the stages of DPT: test_made_again.py.)
"""
from __future__ import annotations

import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from DASO import get_labels as daso_labels
from DDAE import finetune, linear, noisy_classifier_DDAE, noisy_classifier_WRN, sample
from DDAE import train as ddae_train
from EDM import dataset_tool, evaluate, fid, generate, train, train_classifier, train_noise
from shared.cli import UserError
from shared.data.datasets import load_dataset
from shared.data.images import ImageSet
from shared.data.writers import write_folder
from tests.daso import small as daso
from tests.ddae import tiny as ddae
from tests.edm import training_runs as edm
from tests.edm.scored_images import write_classifier, write_images
from tests.metasemi import photographs
from tests.metasemi import tiny as metasemi
from tests.torchssl import tiny as torchssl

Change = Callable[[], None]


# --------------------------------------------------------------------------------------------------------- the changes

def pixel(folder: str) -> Change:
    """One bit of one pixel of the first PNG below a folder."""
    def change() -> None:
        path = min(Path(folder).rglob("*.png"))
        with Image.open(path) as image:
            pixels = np.array(image)
        pixels.flat[0] ^= 1
        Image.fromarray(pixels).save(path)
    return change


def member(path: str, name: str = "") -> Change:
    """One bit of one image of a ZIP, or with `name` "dataset.json" one label."""
    def change() -> None:
        with zipfile.ZipFile(path) as archive:
            content = {info.filename: archive.read(info) for info in archive.infolist()}
        if name:
            listed = json.loads(content[name])
            listed["labels"][0][1], listed["labels"][1][1] = listed["labels"][1][1], listed["labels"][0][1]
            content[name] = json.dumps(listed).encode()
        else:
            first = next(key for key in content if key.endswith(".png"))
            pixels = np.array(Image.open(io.BytesIO(content[first])))
            pixels.flat[0] ^= 1
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png")
            content[first] = buffer.getvalue()
        with zipfile.ZipFile(path, "w") as archive:
            for key, data in content.items():
                archive.writestr(key, data)
    return change


def array(path: str, name: str = "") -> Change:
    """One bit of an array of an .npz, or of an .npy."""
    def change() -> None:
        found = np.load(path)
        arrays = {key: found[key] for key in found.files} if name else {"": found}
        changed = arrays[name] = arrays[name].copy()
        changed.reshape(-1)[:1].view(np.uint8)[0] ^= 1
        np.savez(path, **arrays) if name else np.save(path, changed)
    return change


def weight(path: str) -> Change:
    """The lowest bit of one weight of a checkpoint or snapshot."""
    def change() -> None:
        content = torch.load(path, weights_only=True)
        largest = max(tensors_in(content), key=torch.numel)
        largest[(0,) * largest.ndim].view(torch.int32).bitwise_xor_(torch.tensor(1, dtype=torch.int32))
        torch.save(content, path)
    return change


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.dtype == torch.float32 and value.numel() else []
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inside for tensor in tensors_in(item)]


def last_byte(path: str) -> Change:
    def change() -> None:
        content = bytearray(Path(path).read_bytes())
        content[-1 if content[-1] else -9] ^= 1
        Path(path).write_bytes(bytes(content))
    return change


def exchanged(first: str, second: str) -> Change:
    """Two class folders exchange their names."""
    def change() -> None:
        Path(first).rename("exchanged")
        Path(second).rename(first)
        Path("exchanged").rename(second)
    return change


# -------------------------------------------------------------------------------------------------------- the programs

def call(module: ModuleType, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program.py", *words])
        module.main()


def own_digits() -> None:
    for part in ("train", "test"):
        write_folder(load_dataset("digits", part).subset(slice(0, 60)), Path("mine") / part)


def learner() -> None:
    torchssl.call("--dataset=mine", "--aug_path=extra", "--aug_filter=judge.pth", "--aug_confidence=0",
                  "--label_idx=index.npy", "--device=cpu")


def for_learner() -> None:
    own_digits()
    torchssl.call("--dataset=mine", "--device=cpu", "--save_name=judge")
    shutil.copy("saved_models/judge/latest_model.pth", "judge.pth")
    shutil.copy("saved_models/judge/sampled_label_idx.npy", "index.npy")
    write_folder(load_dataset("digits", "train").subset(slice(100, 140)), Path("extra"))


EDM = (*edm.TINY, "--nosubdir", "--data=set.zip")


def for_edm() -> None:
    edm.write_set(Path("set.zip"))
    edm.write_set(Path("test.zip"), seed=1)
    train.main([*EDM, "--outdir=first", "--duration=0.0001"])
    shutil.copy("first/network-snapshot-latest.pkl", "net.pkl")
    Path("matrix.json").write_text(json.dumps({"transition_matrix": (np.eye(3) * 0.7 + 0.1).tolist()}))


def classify() -> None:
    flags = [flag for flag in EDM if "blocks" not in flag and "attn" not in flag and "cres" not in flag]
    train_classifier.main([*flags, "--outdir=noise", "--noise_type=file", "--transition=matrix.json",
                           "--eval-data=test.zip", "--duration=0.0001", "--classifier=cnn"])


def tdsm() -> None:
    train_noise.main([*EDM, "--outdir=tdsm", "--noise_type=file", "--transition=matrix.json", "--duration=0.0001",
                      "--cls=noise/network-snapshot-latest.pkl", "--transfer=net.pkl"])


def for_tdsm() -> None:
    for_edm()
    classify()


def for_scores() -> None:
    write_classifier(Path("judge.pth"))
    write_images(Path("real"), 30, seed=0)
    write_images(Path("made"), 25, seed=1)


def for_ddae() -> None:
    ddae.make_folder(Path())


def ddae_call(module: ModuleType, *words: str) -> Callable[[], None]:
    return lambda: ddae.call_in(Path(), module, *words)


def stored_digits(name: str, part: str, *_: Any, **__: Any) -> ImageSet:
    """Stands in for `load_dataset`, so that the digits can change."""
    found = np.load(f"{part}.npz")
    return ImageSet(found["images"], found["labels"], tuple(map(str, range(10))), name)


def store_digits() -> None:
    for part in ("train", "test"):
        digits = load_dataset("digits", part)
        np.savez(f"{part}.npz", images=digits.images, labels=digits.labels)


def metasemi_call() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("MetaSemi.core.data.load_dataset", stored_digits)
        metasemi.call("train_baseline")


def daso_call() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("DASO.lib.data.sets.load_dataset", stored_digits)
        daso_main()


def daso_main() -> None:
    daso.call("fixmatch_daso", Path("out"), {"DATASET.AUG_PATH": "extra", "MODEL.PRETRAINED": "weights.pth",
                                                "EVAL_ON_TEST_SET": True})


def for_daso() -> None:
    store_digits()
    write_folder(load_dataset("digits", "train").subset(slice(100, 140)), Path("extra"))
    folder = daso.call("fixmatch_daso", Path("first"), {"SOLVER.MAX_ITER": 3})
    shutil.copy(folder / "model_final.pth.tar", "weights.pth")
    shutil.move(folder, "run")


def records() -> None:
    photographs.train("baseline", Path("packed"), "--epochs=1", "--warmup=0")


def for_records() -> None:
    photographs.pack(photographs.make_tree(Path("packed").absolute()))


DETECTOR = ("--detector=judge.pth", "--device=cpu")
SCORE = ("calc", "--images=made", "--ref=real", "--num=20", "--json=score.json", *DETECTOR)
EVALUATION = ("--data=set.zip", "--test=test.zip", "--network=net.pkl", "--per-class=8", "--outdir=scores",
              "--steps=2", "--classifier-steps=3", "--device=cpu", "--metrics=accuracy,fid")
STORED = {f"{part} {kind}": array(f"{part}.npz", f"{kind}s")
          for part in ("train", "test") for kind in ("image", "label")}
DDAE_SET = {"image": array("digits.npz.d/train.npz", "images"), "label": array("digits.npz.d/train.npz", "labels")}
DDAE_TEST = {"test image": array("digits.npz.d/test.npz", "images"),
             "test label": array("digits.npz.d/test.npz", "labels")}
SET = {"image": member("set.zip"), "label": member("set.zip", "dataset.json")}
# Name -> (what is there before, the program, its inputs).
PROGRAMS: dict[str, tuple[Callable[[], None], Callable[[], None], dict[str, Change]]] = {
    "TorchSSL learner": (for_learner, learner, {
        "image": pixel("mine/train"), "label": exchanged("mine/train/3", "mine/train/4"),
        "test image": pixel("mine/test"), "test label": exchanged("mine/test/3", "mine/test/4"),
        "extra image": pixel("extra"), "extra label": exchanged("extra/3", "extra/4"),
        "judge of extra images": weight("judge.pth"),
        "labelled images": lambda: np.save("index.npy", np.load("index.npy")[::-1])}),
    "EDM/train.py": (for_edm, lambda: train.main([*EDM, "--outdir=run", "--transfer=net.pkl", "--duration=0.0001"]),
                     {**SET, "snapshot": weight("net.pkl")}),
    "EDM/train_classifier.py": (for_edm, classify, {**SET, "matrix": lambda: Path("matrix.json").write_text(
        json.dumps({"transition_matrix": (np.eye(3) * 0.6 + 0.4 / 3).tolist()})), "test": member("test.zip")}),
    "EDM/train_noise.py": (for_tdsm, tdsm, {**SET, "snapshot": weight("net.pkl"),
                                            "classifier": weight("noise/network-snapshot-latest.pkl")}),
    "EDM/dataset_tool.py": (own_digits, lambda: dataset_tool.main(
        ["--source=mine/train", "--dest=set.zip", "--noise_type=sym", "--noise_rate=0.2"]), {
        "image": pixel("mine/train"), "label": exchanged("mine/train/3", "mine/train/4")}),
    "EDM/generate.py": (for_edm, lambda: generate.main(
        ["--network=net.pkl", "--guide-network=net2.pkl", "--guidance=2", "--outdir=made", "--seeds=0-3", "--steps=2",
         "--classes=all", "--device=cpu"]), {"network": weight("net.pkl"), "guide": weight("net2.pkl")}),
    "EDM/fid.py ref": (for_scores, lambda: fid.main(["ref", "--data=real", "--dest=real.npz", *DETECTOR]), {
        "image": pixel("real"), "detector": weight("judge.pth")}),
    "EDM/fid.py calc": (for_scores, lambda: fid.main(list(SCORE)), {
        "image": pixel("made"), "reference": pixel("real"), "detector": weight("judge.pth")}),
    "EDM/evaluate.py": (for_edm, lambda: evaluate.main(list(EVALUATION)), {
        **SET, "test image": member("test.zip"), "network": weight("net.pkl")}),
    "DDAE/train.py": (for_ddae, ddae_call(ddae_train, "--set", "n_epoch=1"), {"image": DDAE_SET["image"]}),
    "DDAE/sample.py": (for_ddae, ddae_call(sample, "--images=3", "--steps=2", "--epoch=2"),
                       {"checkpoint": weight("out/ckpts/model_2.pth")}),
    "DDAE/linear.py": (for_ddae, ddae_call(linear), {**DDAE_SET, "checkpoint": weight("out/ckpts/model_2.pth")}),
    "DDAE/finetune.py": (for_ddae, ddae_call(finetune, "--epochs=1", "--warm_epoch=0", "--batch_size=20"),
                         {**DDAE_SET, **DDAE_TEST, "checkpoint": weight("out/ckpts/model_2.pth")}),
    "DDAE/noisy_classifier_DDAE.py": (for_ddae, ddae_call(noisy_classifier_DDAE), {
        **DDAE_SET, "checkpoint": weight("out/ckpts/model_2.pth")}),
    "DDAE/noisy_classifier_WRN.py": (for_ddae, lambda: ddae.call(
        noisy_classifier_WRN, "--dataset=digits.npz.d", "--blocks_per_group=1", "--channel_multiplier=1", "--epoch=1",
        "--warm_epoch=0", "--device=cpu", "--batch_size=25"), DDAE_SET),
    "MetaSemi/train_imagenet.py": (for_records, records, {
        f"{name}.{end}": last_byte(f"packed/{name}.{end}") for name in ("train_label", "val") for end in ("rec",)}),
    "MetaSemi/train_baseline.py": (store_digits, metasemi_call, STORED),
    "DASO/main.py": (for_daso, daso_call, {
        **STORED,
        "extra image": pixel("extra"), "extra label": exchanged("extra/3", "extra/4"),
        "weights": weight("weights.pth")}),
    "DASO/get_labels.py": (for_daso, lambda: daso_labels.main(["--run=run"]), {
        "weights": weight("run/model_final.pth.tar")}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder in which a program has done its work once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("made") / "place"
            folders[name].mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folders[name])
                prepare, run, _ = PROGRAMS[name]
                prepare()
                if Path("net.pkl").exists():
                    shutil.copy("net.pkl", "net2.pkl")
                run()
        return folders[name]

    return make


CASES = [(name, change) for name, (*_, changes) in PROGRAMS.items() for change in ("", *changes)]


@pytest.mark.parametrize("name, change", CASES, ids=[f"{name}: {change or 'nothing'}" for name, change in CASES])
def test_a_changed_input_is_noticed(name: str, change: str, made: Callable[[str], Path], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(made(name), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    _, run, changes = PROGRAMS[name]
    if change:
        changes[change]()
    capsys.readouterr()
    try:
        run()
    except UserError as error:
        assert change and re.search("content|network|checkpoint|label|class|loss_kwargs|detector", str(error)), error
        return
    assert ("complete: " in capsys.readouterr().out) == (not change)
