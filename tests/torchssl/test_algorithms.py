"""Every learner, end to end on the digits: its command, a kill and the same command again, and two ranks as one."""
from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.cli import UserError
from shared.distributed import World
from shared.training.checkpoint import read_checkpoint
from tests.shared.clean import clean_process
from tests.shared.programs import ROOT, assert_same, run
from tests.torchssl import tiny
from TorchSSL.core.algorithm import (
    Batch,
    ClassStatus,
    DistributionAlignment,
    Setting,
    frozen_batchnorm,
    pseudo_label_metrics,
)
from TorchSSL.core.data import Batches, load_training_data
from TorchSSL.core.networks import WideResNet, make_network
from TorchSSL.core.trainer import Trainer
from TorchSSL.make_configs import CONFIG, LEARNERS, all_files

# The README's command with its own configuration, so short that a test can wait for it.
SHORT = ("--num_train_iter=6 --num_eval_iter=3 --num_save_iter=2 --batch_size=4 --uratio=2 --seed=1 "
         "--save_name=short --save_dir=saved_models --eval_batch_size=500").split()


def command(name: str) -> list[str]:
    return ["--c", str(CONFIG / name / f"{name}_digits_40_0.yaml"), *SHORT]


def run_learner(name: str, folder: Path, extra: tuple[str, ...], sabotage: Callable[[], None] | None) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(folder / "output.txt", "a", buffering=1)  # noqa: SIM115 - until the process ends
    sys.argv = [f"{name}.py", *command(name), *extra]
    if sabotage is not None:
        sabotage()
    runpy.run_path(str(ROOT / "TorchSSL" / f"{name}.py"), run_name="__main__")


def start_and_wait(name: str, folder: Path, *extra: str, sabotage: Callable[[], None] | None = None) -> int:
    """Run a learner's script in a process of its own; return its exit status."""
    process = clean_process(run_learner, name, folder, extra, sabotage)
    process.start()
    process.join(120)
    return process.exitcode


def content(folder: Path) -> dict:
    saved = read_checkpoint(folder / "saved_models" / "short" / "latest_model.pth")
    return {key: value for key, value in saved.items() if key not in tiny.NOT_BITWISE}


@pytest.mark.parametrize("name", LEARNERS)
def test_run_kill_and_same_command(name: str, tmp_path: Path) -> None:
    """It trains and evaluates; killed between two saves and started again, it ends bitwise as if it had not been."""
    from tests.torchssl.test_resume import kill_after_steps

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert start_and_wait(name, whole) == 0, (whole / "output.txt").read_text()[-2000:]
    result = json.loads((whole / "saved_models/short/result.json").read_text())
    assert 0 < result["accuracy"]["last"] <= 1 and len(result["accuracy_by_class"]) == 10
    assert content(whole)["it"] == 5 and (whole / "saved_models/short/model_best.pth").exists()
    assert start_and_wait(name, killed, sabotage=kill_after_steps(5)) == -signal.SIGKILL
    assert start_and_wait(name, killed) == 0
    assert_same(content(killed), content(whole))


# One of each kind of state: none, counts and averages, mixing across ranks, perturbations, more labelled views.
@pytest.mark.parametrize("name", ["flexmatch", "softmatch", "remixmatch", "vat", "meanteacher", "defixmatch",
                                  "sequencematch"])
def test_two_ranks_are_one(name: str, tmp_path: Path) -> None:
    """In one process: the parts of two ranks, put together, are the batch, the noise and the mixing of one."""
    script = importlib.import_module(f"TorchSSL.{name}")
    options = script.parse(command(name))
    data = load_training_data(options, tmp_path)
    views = {"remixmatch": ("weak", "strong", "strong", "rotated"), "vat": ("weak",),
             "sequencematch": ("weak", "medium", "strong")}.get(name, ("weak", "strong"))
    labeled_views = ("strong",) if name == "defixmatch" else ()
    whole = Batches(data, options, World(), views, 4, labeled_views)(3)
    parts = [Batches(data, options, World(rank, 2), views, 4, labeled_views)(3) for rank in range(2)]
    for number in range(len(views)):
        assert torch.equal(torch.cat([part.views[number] for part in parts]), whole.views[number])
    for number in range(len(labeled_views)):
        assert torch.equal(torch.cat([part.labeled_views[number] for part in parts]), whole.labeled_views[number])
    if whole.turns is not None:
        assert torch.equal(torch.cat([part.turns for part in parts]), whole.turns)
        assert torch.equal(whole.views[3][whole.turns == 0], whole.views[1][whole.turns == 0])
    if name == "vat":
        def noise(world: World, batch: Batch) -> torch.Tensor:
            return script.VAT(options, Setting(10, 100, (0.1,) * 10, world, 5)).noise(batch.views[0], 3)

        assert torch.equal(torch.cat([noise(World(rank, 2), parts[rank]) for rank in range(2)]), noise(World(), whole))


@pytest.mark.parametrize("name, flags", [
    # Thresholds that images pass at once, so that there is something to agree on.
    ("flexmatch", ["--p_cutoff=0.2"]),
    # Aligned predictions of a new network are nearly equal for all classes: only soft labels without a threshold make
    # no decision that the last digit of a sum could tip.
    ("flexmatch", ["--p_cutoff=0.0", "--use_DA=True", "--hard_label=False"]),
    ("remixmatch", []), ("softmatch", [])])
def test_two_processes_are_one(name: str, flags: list[str], tmp_path: Path) -> None:
    """Weights, queues and averages are those of one process with the whole batch."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert start_and_wait(name, one, "--lr=0.01", *flags) == 0
    run(f"TorchSSL/{name}.py", *command(name), "--lr=0.01", *flags, cwd=two, ranks=2)
    mine, theirs = content(one), content(two)

    def compare(a: dict, b: dict, path: str) -> None:
        for key, value in a.items():
            if isinstance(value, dict):
                compare(value, b[key], f"{path}/{key}")
            else:
                torch.testing.assert_close(b[key], value, rtol=1e-4, atol=3e-5,
                                           msg=lambda m, where=f"{path}/{key}": f"{where}: {m}")

    for part in ("model", "ema_model", "algorithm"):
        compare(mine[part], theirs[part], part)
    if name == "flexmatch":
        assert (mine["algorithm"]["status"]["label"] >= 0).any()


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch", "uda", "pseudolabel", "softmatch", "freematch_entropy"])
def test_nothing_kept_is_no_nan(name: str) -> None:
    """Where no image reaches its threshold, the loss on unlabelled images and its gradient are 0."""
    script = importlib.import_module(f"TorchSSL.{name}")
    options = script.parse([])
    options.p_cutoff, options.use_flex = 1.0, False
    learner = tiny.learner_class(script)(options, Setting(4, 20, (0.25,) * 4, World()))
    if name == "flexmatch":
        learner.status.label[:] = torch.arange(20) % 4
    if name == "freematch_entropy":
        learner.time_p.fill_(1.0)
        options.ema_p = 1.0
    if name == "softmatch":
        learner.prob_max_mu_t.fill_(1e4)
    weak, strong = torch.zeros(6, 4), torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    batch = Batch(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), (weak, strong)[:len(learner.views)],
                  torch.arange(6), torch.full((6,), -1))
    total, values = learner.loss(torch.nn.Identity(), batch, 5)
    assert all(torch.isfinite(torch.as_tensor(value)).all() for value in values.values())
    assert values["train/unsup_loss"] == 0 and values["train/mask_ratio"] == 1
    if strong is batch.views[-1]:
        assert torch.autograd.grad(total, strong)[0].abs().max() == 0


def test_frozen_batch_norm_leaves_no_trace() -> None:
    """It normalises as in train mode, also in a network in eval mode, and no buffer moves."""
    net = WideResNet(10, depth=10, widen_factor=1)
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in net.named_buffers()}
    with frozen_batchnorm(net):
        frozen = net(images)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert torch.equal(frozen, net(images)) and not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])
    net.eval()
    with frozen_batchnorm(net):
        assert torch.equal(net(images), frozen)
    assert not net.training and net.bn1.track_running_stats


def test_an_image_drawn_twice_keeps_its_later_class() -> None:
    status = ClassStatus(Setting(3, 10, (1 / 3,) * 3, World()))
    status.remember(torch.tensor([4, 7, 4, 7, 1]), torch.tensor([0, 1, 2, 2, 0]),
                    torch.tensor([True, True, True, False, False]))
    assert status.label.tolist() == [-1, -1, -1, -1, 2, -1, -1, 1, -1, -1]
    status.refresh()
    assert status.beta.tolist() == pytest.approx([0, 1 / 8, 1 / 8])


def test_aligned_predictions_have_the_labelled_shares() -> None:
    align = DistributionAlignment(Setting(2, 10, (0.9, 0.1), World()))
    aligned = align(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(aligned, torch.tensor([[0.9, 0.1], [0.9, 0.1]]))


def test_metrics_name_what_they_say() -> None:
    found = pseudo_label_metrics(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 1, 1, 2]),
                                 torch.tensor([0, 2, 1, -1]))
    assert found["train/mask_ratio"] == 0.25 and found["train/utilisation"] == 0.75
    assert found["train/pseudo_label_acc"] == 0.5  # of those kept, where the truth is known


def test_teacher_is_the_average_of_the_weights() -> None:
    script = importlib.import_module("TorchSSL.meanteacher")
    options = script.parse([])
    net = WideResNet(10, depth=10, widen_factor=1)
    learner = script.MeanTeacher(options, Setting(10, 10, (0.1,) * 10, World()))
    trainer = Trainer(net, learner, options, World())
    assert learner.teacher is trainer.ema.module


def test_held_out_images_are_in_no_other_set(tmp_path: Path) -> None:
    """--val_fraction: the validation images are neither learned nor seen, and the labelled ones stay the same."""
    script = importlib.import_module("TorchSSL.fixmatch")
    plain = load_training_data(script.parse(command("fixmatch")), tmp_path)
    held = load_training_data(script.parse([*command("fixmatch"), "--val_fraction=0.1"]), tmp_path)
    assert len(held.validation) == round(0.1 * len(plain.unlabeled))
    assert len(held.unlabeled) + len(held.validation) == len(plain.unlabeled)
    assert (held.labeled_index == plain.labeled_index).all()
    supervised = importlib.import_module("TorchSSL.fullysupervised")
    every = load_training_data(supervised.parse([*command("fullysupervised"), "--val_fraction=0.1"]), tmp_path)
    assert len(every.labeled) + len(every.validation) == len(plain.unlabeled)
    assert start_and_wait("fixmatch", tmp_path, "--val_fraction=0.1") == 0
    result = json.loads((tmp_path / "saved_models/short/result.json").read_text())
    assert {"last", "median_of_last_20", "best_on_validation", "best_on_test"} <= set(result["accuracy"])
    assert result["accuracy"]["best_on_validation"] > 0 and result["validation_images"] == len(held.validation)


def test_configuration_files_are_those_of_the_tables() -> None:
    for name, text in all_files().items():
        assert (CONFIG / name).read_text() == text, name
    for path in CONFIG.glob("*/*.yaml"):
        assert f"{path.parent.name}/{path.name}" in all_files(), path


@pytest.mark.parametrize("name", LEARNERS)
def test_every_configuration_file_builds_its_learner(name: str) -> None:
    """Its script takes every file, and the learner and the network that the file describes can be made."""
    script = importlib.import_module(f"TorchSSL.{name}")
    paths = sorted((CONFIG / name).glob("*.yaml"))
    for path in paths:
        options = script.parse(["--c", str(path)])
        assert options.save_name == path.stem and options.gpu is None
        classes = options.num_classes
        learner = tiny.learner_class(script)(options, Setting(classes, 1000, (1 / classes,) * classes, World()))
        with torch.device("meta"):
            net = make_network(vars(options), classes, 1 if options.dataset == "digits" else 3, learner.rotation_head)
        assert net.fc.out_features == classes and (net.rot_classifier is not None) == (name == "remixmatch")
    assert len(paths) == len([file for file in all_files() if file.startswith(f"{name}/")])


def test_published_switches_take_a_value_too() -> None:
    script = importlib.import_module("TorchSSL.uda")
    assert script.parse(["--overwrite", "True"]).overwrite is True
    assert script.parse(["--overwrite", "False"]).overwrite is False
    assert script.parse(["--overwrite"]).overwrite is True
    with pytest.raises(UserError, match="unknown argument perhaps"):
        script.parse(["--overwrite", "perhaps"])
    with pytest.raises(UserError, match="alg"):
        script.parse(["--alg", "fixmatch"])


@pytest.mark.parametrize("name", ["mixmatch", "fullysupervised"])
def test_extra_images_join_the_labelled_ones(name: str, tmp_path: Path) -> None:
    """Every learner is a stage 3: --aug_path adds labelled images, of which the class shares know nothing."""
    from tests.torchssl.test_inputs import make_images

    extra = make_images(tmp_path / "extra", count=3)
    assert start_and_wait(name, tmp_path, f"--aug_path={extra}") == 0, (tmp_path / "output.txt").read_text()[-2000:]
    result = json.loads((tmp_path / "saved_models/short/result.json").read_text())
    assert result["labeled_images"] == result["num_labels"] + 30


def test_sequencematch_loss() -> None:
    """Against its definition in float64, image by image; only what follows is moved, never what leads."""
    from TorchSSL.sequencematch import SequenceMatch, parse

    class Given(torch.nn.Module):
        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return logits

    generator = torch.Generator().manual_seed(0)
    weak, medium, strong = (4 * torch.randn(12, 5, generator=generator) for _ in range(3))
    medium.requires_grad_(), strong.requires_grad_()
    batch = Batch(torch.randn(3, 5, generator=generator), torch.tensor([0, 1, 2]), (weak, medium, strong),
                  truth=torch.full((12,), -1))
    learner = SequenceMatch(parse(["--p_cutoff=0.8", "--kl_loss_ratio=0.7"]), Setting(5, 12, (0.2,) * 5, World()))
    total, found = learner.loss(Given(), batch, 0)

    w, m, s = (logits.detach().double() for logits in (weak, medium, strong))
    confident, unsure = 0.0, 0.0
    for i in range(12):
        p = w[i].softmax(0)
        if p.max() >= 0.8:
            confident -= m[i].log_softmax(0)[p.argmax()] + s[i].log_softmax(0)[p.argmax()]
        else:
            for leader, follower in ((w, m), (m, s), (w, s)):
                target = (leader[i] / 0.5).softmax(0)
                unsure += (target * (target.log() - follower[i].log_softmax(0))).sum()
    assert 0 < float(found["train/utilisation"]) < 1
    torch.testing.assert_close(found["train/unsup_loss"].double(), confident / 12, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["train/divergence_loss"].double(), unsure / 12, rtol=1e-6, atol=1e-6)
    supervised = torch.nn.functional.cross_entropy(batch.labeled.double(), batch.labels)
    torch.testing.assert_close(total.double(), supervised + confident / 12 + 0.7 * unsure / 12, rtol=1e-6, atol=1e-6)


def test_defixmatch_loss() -> None:
    """Against its definition in float64, image by image; and it cannot be lowered by spoiling strong labelled views."""
    from TorchSSL.defixmatch import DeFixMatch, parse

    generator = torch.Generator().manual_seed(0)
    labeled, labeled_strong = (4 * torch.randn(8, 5, generator=generator) for _ in range(2))
    weak, strong = (4 * torch.randn(12, 5, generator=generator) for _ in range(2))
    labels = labeled.argmax(1)
    learner = DeFixMatch(parse(["--p_cutoff=0.8"]), Setting(5, 12, (0.2,) * 5, World()))

    def loss(strong_view: torch.Tensor) -> torch.Tensor:
        batch = Batch(labeled, labels, (weak, strong), truth=torch.full((12,), -1), labeled_views=(strong_view,))
        return learner.loss(torch.nn.Identity(), batch, 0)[0]

    def fixmatch(w: torch.Tensor, s: torch.Tensor) -> float:
        kept = [(p, row) for p, row in zip(w.double().softmax(1), s.double(), strict=True) if p.max() >= 0.8]
        assert 0 < len(kept) < len(w)
        return -sum(float(row.log_softmax(0)[p.argmax()]) for p, row in kept) / len(w)

    supervised = sum(torch.nn.functional.cross_entropy(view.double(), labels) for view in (labeled, labeled_strong)) / 2
    expected = supervised + 0.5 * (fixmatch(weak, strong) - fixmatch(labeled, labeled_strong))
    torch.testing.assert_close(loss(labeled_strong).double(), expected, rtol=1e-6, atol=1e-6)
    wrong = 1e4 * torch.nn.functional.one_hot((labels + 1) % 5, 5).float()
    assert loss(wrong) > loss(10 * torch.nn.functional.one_hot(labels, 5).float()) - 1e-4


def test_medium_view_is_one_operation_without_cutout(tmp_path: Path) -> None:
    """An image of one value stays one under every single operation but those that move it; cutout would show."""
    script = importlib.import_module("TorchSSL.sequencematch")
    options = script.parse([*command("sequencematch"), "--weak_pad=0", "--weak_subpixel=False"])
    data = load_training_data(options, tmp_path)
    data.unlabeled.images[:] = 0  # black: what is moved in is black too
    batch = Batches(data, options, World(), ("weak", "medium", "strong"), 4)(0)
    spread = [view.flatten(1).amax(1) - view.flatten(1).amin(1) for view in batch.views]
    assert (spread[1] == 0).all() and (spread[2] > 0).any()
