"""The ImageNet scripts of MetaSemi: whole epochs on fixed batches, and the validation images."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from MetaSemi import train_imagenet, train_meta_imagenet
from MetaSemi.core.evaluation import Meters, evaluate
from MetaSemi.core.meta import CosAnnealingLR, MetaGradient, meta_step, supervised_step
from MetaSemi.imagenet.source import RecordImages
from MetaSemi.imagenet.views import CentreCrop
from shared.data.photographs import Photographs, Request
from shared.data.pool import batches
from shared.distributed import World
from shared.training.checkpoint import read_checkpoint
from tests.golden.cases import arrays, each, number
from tests.golden.metasemi_cases import PAPER, Case, Tolerances, cases_of, each_key, network_of, parts, section
from tests.golden.metasemi_cases import stored as stored_arrays
from tests.metasemi import photographs
from tests.metasemi.events import scalars

SCRIPTS = {"train_meta_imagenet.py": train_meta_imagenet, "train_imagenet.py": train_imagenet}
TRAININGS = [case for case in cases_of("training") if case.get("script") in SCRIPTS]
DALI, FACTS = section("dali_val"), section("output_facts")
TAGS = [name for name in FACTS if name.endswith("_imagenet_scalar_tags")]
KEYS = [name for name in FACTS if name.startswith("checkpoint_keys") and "imagenet" in name]
SERVES = {*(("training", case["name"]) for case in TRAININGS), ("dali_val", "dali_val"),
          *(("output_facts", name) for name in (*TAGS, *KEYS))}


class Recorder:
    """What a run of a script would write."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.scalars: list[tuple[str, float, int]] = []


def run_epochs(case: Case, found: Recorder, tmp_path: Path) -> dict[str, list]:
    """Train on the fixed batches as the script does, and return what was measured at every iteration and epoch."""
    script, data = SCRIPTS[case["script"]], stored_arrays(case)
    options = script.parse([*case["flags"], "--data", str(tmp_path)])
    given = {name: torch.from_numpy(data[name]) for name in ("label_img", "label_gt", "test_img", "test_gt")}
    is_meta = script is train_meta_imagenet
    if is_meta:
        given |= {name: torch.from_numpy(data[name]) for name in ("unlabel_img", "unlabel_gt", "lam")}
        meta = MetaGradient(options.epsilon)
    shapes = {name: list(value.shape[1:]) for name, value in parts(case, "state").items()}
    net = network_of({**case, "state_shapes": shapes}).train()
    descent = torch.optim.SGD(net.parameters(), lr=options.lr, momentum=options.momentum,
                              weight_decay=options.weight_decay)
    meters = Meters()
    schedule = CosAnnealingLR(case["steps"], options.epochs, options.lr, options.warmup)
    seen: dict[str, list] = {}

    def see(**values: Any) -> None:
        for name, value in values.items():
            value = value.detach().clone().numpy() if isinstance(value, torch.Tensor) else np.array(value)
            seen.setdefault(name, []).append(value)

    for step in range(case["steps"] * case["run_epochs"]):
        epoch, place = divmod(step, case["steps"])
        rate = schedule.step()
        images, labels = given["label_img"][step], given["label_gt"][step]
        if is_meta:
            truth = given["unlabel_gt"][step]
            result = meta_step(net, descent, images, labels, given["unlabel_img"][step], rate=rate,
                               lam=given["lam"][step], meta=meta)
            values = script.figures(result, labels, truth)
            see(meta_grad=result.pseudo.meta_grad, pseudo=result.pseudo.targets, epsilon=result.pseudo.step,
                label_loss=values["label_loss"], unlabel_loss=values["unlabel_loss"])
        else:
            result = supervised_step(net, descent, images, labels, rate=rate)
            values = script.figures(result, labels)
        see(lr=rate, loss=result.loss, **{f"state/{name}": value for name, value in net.state_dict().items()})
        meters.add(values)
        if place % options.print_freq == 0:
            figures = {key: number for name, (last, average) in meters.read().items()
                       for key, number in ((name, last), (f"{name}_avg", average))}
            found.lines.append(script.LINE.format(epoch=epoch, epochs=options.epochs, step=place, length=case["steps"],
                                                  rate=rate, btime=0.0, dtime=0.0, **figures))
            found.scalars.append(("train/learning-rate", rate, step))
        if place + 1 == case["steps"]:
            found.scalars += [(f"train/{name.replace('_', '-')}", average, epoch)
                              for name, (_, average) in meters.read().items()]
            meters.reset()
            # The original counts batches of its own size, not those given here.
            acc1, acc5, _ = evaluate(net, zip(given["test_img"], given["test_gt"], strict=True), World(),
                                     found.lines.append, RecordImages.lines, options.print_freq, 1)
            see(val_top1_top5=[acc1, acc5])
    return seen


@each(TRAININGS)
def test_imagenet_training(case: Case, tmp_path: Path) -> None:
    expected, limits, recorder = stored_arrays(case), Tolerances(case), Recorder()
    found = run_epochs(case, recorder, tmp_path)
    inputs = {"label_img", "label_gt", "unlabel_img", "unlabel_gt", "test_img", "test_gt", "lam"}
    assert set(expected) - inputs <= set(found)
    for key in set(expected) - inputs:
        measured, wanted = np.stack(found[key]), expected[key]
        if key == "pseudo":
            limit = limits.pseudo + limits.pseudo_by_rate * expected["lr"].reshape(-1, 1, 1)
            assert (np.abs(measured - wanted) <= limit).all(), key
        elif key == "meta_grad":
            limits.near(measured, wanted, limits.meta_grad, key)
        else:
            limits.close(measured, wanted, key)
    check_lines(recorder.lines, case.get("log_lines", recorder.lines))
    check_scalars(recorder.scalars, case.get("scalars", recorder.scalars), limits)


def check_lines(found: list[str], expected: list[str]) -> None:
    """Compare lines: numbers to the last digit shown, and those that end in "..." by their beginning."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.removesuffix("...").rstrip()
        words = ours.split() if not theirs.startswith("Ep[") else ours.split()[:len(theirs.split())]
        for word, other in zip(words, theirs.split(), strict=True):
            numbers = re.findall(r"\d+\.\d+", other)
            assert re.sub(r"\d+\.\d+", "#", word) == re.sub(r"\d+\.\d+", "#", other)
            for one, wanted in zip(re.findall(r"\d+\.\d+", word), numbers, strict=True):
                assert abs(float(one) - float(wanted)) <= 1.5 * 10.0 ** -len(wanted.partition(".")[2])


def check_scalars(found: list, expected: list, limits: Tolerances) -> None:
    assert [(tag, x) for tag, _, x in found] == [(tag, x) for tag, _, x in expected]
    limits.close([value for _, value, _ in found], [value for _, value, _ in expected], "scalars")


class StoredImages:
    """The JPEG files of a fixture."""

    def __init__(self) -> None:
        self.content = arrays(PAPER, DALI["file"])
        self.labels = self.content[DALI["keys"]["label"].split()[0]].reshape(-1)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        return f"image {position}"

    def get(self, position: int) -> tuple[bytes, float]:
        key = DALI["keys"]["jpeg bytes"].replace("<k>", str(position))
        return self.content[key].tobytes(), float(self.labels[position])


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_validation_images(decoder: str) -> None:
    if not DALI:
        pytest.skip("there are no validation images")
    stored = StoredImages()
    view = CentreCrop(DALI["imcrop"], DALI["imsize"])
    made = batches(Photographs(stored, int(stored.labels.max()) + 1), view,
                   lambda step: Request(np.arange(len(stored))), range(1), torch.device("cpu"), 1, decoder)
    (images, labels), = made
    difference = np.abs(images.numpy() - stored.content[DALI["keys"]["output"].split()[0]])
    said = DALI["tolerance"]
    assert difference.max() <= number(said, "same DALI: atol #" if decoder == "dali" else "max abs #")
    assert difference.mean() <= number(said, "mean abs #")
    np.testing.assert_array_equal(labels, stored.labels)


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a short run of each script."""
    data = photographs.pack(photographs.make_tree(tmp_path_factory.mktemp("data")))
    runs = {}
    for name in photographs.SCRIPTS:
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        photographs.train(name, data, "--epochs", "1", "--warmup", "0", "--iterations", "1", "--save-path",
                          str(runs[name]))
    return runs


@each_key(TAGS)
def test_imagenet_scalar_tags(name: str, tiny_runs: dict[str, Path]) -> None:
    run = tiny_runs["meta" if "meta" in name else "baseline"]
    assert sorted(scalars(run)) == sorted(FACTS[name])


@each_key(KEYS)
def test_imagenet_checkpoint_keys(name: str, tiny_runs: dict[str, Path]) -> None:
    expected = {text.split()[0] for text in FACTS[name]}
    for run in tiny_runs.values():
        content = read_checkpoint(run / "checkpoint.pth")
        assert expected <= set(content)
        assert all(key.startswith("module.") for key in content["state_dict"])
        assert type(content["epoch"]) is int and type(content["best_acc1"]) is float
