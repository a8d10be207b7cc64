"""Training steps with given draws, the published scripts' own steps and logs, the files of a checkpoint."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from EDM.latent.schedules import ContinuousSchedule, DiscreteSchedule
from EDM.latent.training import log_line, loss_of, make_optimizer, save_published, score_lines, update, warm_up
from EDM.latent.uvit import UViT
from EDM.latent.vae import SCALE, sample
from shared.training.ema import EMA
from tests.golden.cases import each, facts, serves
from tests.golden.dpt_imagenet_cases import PAPER, bound, cases_of, filled, relative, tensors

RUNS, SCRIPTS, CHECKPOINTS = cases_of("train_run"), cases_of("train_script"), cases_of("checkpoint")
SERVES = serves(RUNS, SCRIPTS, CHECKPOINTS)


class Trained:
    """A run over the draws of a case: losses and rates of its steps, the rates logged, network and average."""

    def __init__(self, case: dict, steps: int | None = None) -> None:
        stored = tensors(case)
        self.net = filled(UViT(**case["constructor"])).train()
        self.start = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.optimizer = make_optimizer(self.net, {"name": "adamw", **case["optimizer"]})
        self.rates = warm_up(self.optimizer, {"name": "customized", "warmup_steps": case["warmup_steps"]})
        self.ema = EMA(self.net)
        discrete = "n" in stored
        schedule = DiscreteSchedule() if discrete else ContinuousSchedule()
        self.losses, self.used, self.logged, self.times = [], [], [], []
        for step in range(steps or case["steps"]):
            moments, posterior, noise, labels, times = (stored[name][step % case["steps"]] for name in (
                "moments", "vae_noise", "eps", "y", "n" if discrete else "t"))
            x0 = sample(moments, posterior, case.get("scale_factor", SCALE))
            loss = loss_of(self.net, schedule, x0, labels, times, noise)
            self.times.append(schedule.network_time(times))
            self.used.append(self.rates.get_last_lr()[0])
            update(loss, self.net, self.ema, self.optimizer, self.rates, case["ema_rate"])
            self.losses.append(loss.item())
            self.logged.append(self.rates.get_last_lr()[0])

    def moved(self, net: torch.nn.Module) -> list[float]:
        return [(value.double() - self.start[name].double()).norm().item() for name, value in net.named_parameters()]


def check_weights(run: Trained, case: dict) -> None:
    """Assert how far each parameter and its average moved, and the values of one."""
    stored, tolerance = tensors(case), case["tolerance"]
    assert [name for name, _ in run.net.named_parameters()] == case["parameter_names"]
    relative(run.moved(run.net), stored["moved"], bound(tolerance["moved"]), "moved")
    # An average moves so little that rounding counts: half a unit in the last place of each value at each step.
    rounding = [case["steps"] * np.finfo(np.float32).eps / 2 * value.norm().item() for value in run.net.parameters()]
    excess = np.abs(np.array(run.moved(run.ema.module)) - stored["ema_moved"].numpy()) - np.array(rounding)
    assert (excess <= bound(tolerance["moved"]) * stored["ema_moved"].numpy()).all(), "ema_moved"
    for name, net in (("some_parameter", run.net), ("some_ema", run.ema.module)):
        wanted = stored[name]
        errors = [(value - wanted).abs().max().item() for value in net.parameters() if value.shape == wanted.shape]
        assert min(errors) <= bound(tolerance["some"]), name


@each(RUNS)
def test_training_run(case):
    run, stored = Trained(case), tensors(case)
    relative(run.losses, stored["losses"], bound(case["tolerance"]["losses"]), "losses")
    relative(run.used, stored["lrs"], bound(case["tolerance"]["lrs"]), "rates")
    check_weights(run, case)


@each(SCRIPTS)
def test_training_script(case):
    run, stored = Trained(case), tensors(case)
    assert torch.equal(torch.stack(run.times), stored["network_times"])
    relative(run.losses, stored["losses"], bound(case["tolerance"]["losses"]), "losses")
    check_weights(run, case)
    relative(run.logged, stored["logged_lrs"], 1e-5, "logged rates")
    for step, (line, rate, loss) in enumerate(zip(case["log_lines"], run.logged, stored["losses"], strict=True), 1):
        assert log_line(step, rate, loss.item()) == line
    lines = [line.replace("=", " ").replace("fid", "").split() for line in case["eval_log"].splitlines()]
    scores = [(int(step), int(count), float(value)) for _, step, count, value in lines]
    state = {"fids": {str(step): (count, value) for step, count, value in scores[:-1]}, "final": scores[-1]}
    assert score_lines(state) == case["eval_log"]


@each(CHECKPOINTS)
def test_checkpoint_files(case, tmp_path):
    if not RUNS:
        pytest.skip("no run whose checkpoint could be written")
    wanted = facts(PAPER, case["file"])
    step = wanted["step"]
    run = Trained(RUNS[0], step)
    folder = tmp_path / f"{step}.ckpt"
    save_published(folder, step, run.net, run.ema, run.optimizer, run.rates)
    assert sorted(path.name for path in folder.iterdir()) == wanted["files"]
    content = {path.stem: torch.load(path, weights_only=True) for path in folder.iterdir()}
    assert content["step"] == step
    assert list(content["nnet"])[:len(wanted["nnet_keys"])] == wanted["nnet_keys"]
    assert content["nnet"].keys() == content["nnet_ema"].keys()
    assert sorted(content["optimizer"]) == wanted["optimizer_keys"]
    assert content["lr_scheduler"]["last_epoch"] == step
    # Further keys of the learning rate's schedule are those of PyTorch's release.
    assert {"base_lrs", "last_epoch", "lr_lambdas"} <= set(wanted["lr_scheduler"]) & content["lr_scheduler"].keys()
    assert np.isfinite(content["lr_scheduler"]["_last_lr"]).all()
