"""Recorded training runs: our own training step on the recorded inputs gives the recorded numbers."""
from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.distributed import World
from tests.golden.cases import each, facts, serves, tolerance, whole
from tests.golden.torchssl_cases import (
    PAPER,
    cases_of,
    draw_inputs,
    expected,
    method_of,
    network_of,
    norms,
    options_of,
    stored_input,
)
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.evaluation import confusion_text, metrics
from TorchSSL.core.networks import strip_prefix
from TorchSSL.core.trainer import Trainer

TRAININGS = cases_of("training")
SERVES = serves(TRAININGS)
# The recorded views of unlabelled images, by how many an algorithm wants.
VIEWS = {0: (), 1: ("x_w",), 2: ("x_w", "x_s"), 4: ("x_w", "x_s1", "x_s2", "x_s1_rot")}


def stated(case: dict[str, Any], name: str) -> dict[str, float]:
    """Return the tolerance of an array: parts of the case's words speak of norms, of the loss and of fractions at an
    evaluation, and of all other logged values."""
    word = "norms" if name.endswith("_l2") else "logged"
    if name.startswith("log__eval__"):
        word = "eval/loss" if name.endswith("__loss") else "eval fractions"
    part = next(part for part in case["tolerance"].split(";") if word in part)
    # Fractions that are equal as such may differ in the last bits of a float.
    return tolerance(part.replace("exact", "rtol 1e-6").partition(word)[2])


def script_of(case: dict[str, Any]) -> ModuleType:
    return importlib.import_module(f"TorchSSL.{method_of(case)[0]}")


def learner_of(case: dict[str, Any], options: SimpleNamespace, script: ModuleType, classes: int) -> Any:
    given = case["arguments"]
    shares = tuple(given.get("p_target", [1 / classes] * classes))
    drawn = [entry["high"] for entry in case["inputs"]["recipe"] if entry["name"] == "idx_ulb"]
    unlabeled = given.get("unlabelled_set_size", *drawn or [0])
    return getattr(script, method_of(case)[1])(options, Setting(classes, unlabeled, shares, World()))


def replay_draws(case: dict[str, Any], learner: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch,
                 targets: list[torch.Tensor]) -> None:
    """Give the learner the recorded draws in place of its own, and note the targets that it mixes."""
    given = case["arguments"]
    first = given.get("first_iteration", 0)
    if "direction_noise" in given:
        rng = np.random.default_rng(whole(given["direction_noise"], r"default_rng\(#\)"))
        monkeypatch.setattr(learner, "noise", lambda images, step: torch.from_numpy(
            rng.standard_normal(images.shape).astype(np.float32)).to(images.dtype))
    if "stored_input_keys" in case:
        shares, permutations = (stored_input(case, key).numpy() for key in ("raw_beta_draws", "permutations"))
        forward = script.forward_mixed

        def noted(net: Any, setting: Any, inputs: Any, mixed: list[torch.Tensor], *draws: Any) -> Any:
            targets.append(torch.cat(mixed))
            return forward(net, setting, inputs, mixed, *draws)

        monkeypatch.setattr(script, "forward_mixed", noted)
        monkeypatch.setattr(script, "draw_mixing", lambda setting, alpha, inputs, step: (
            float(shares[step - first]), permutations[step - first]))


@each(TRAININGS)
def test_training_run(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    script = script_of(case)
    given, drawn, wanted = case["arguments"], draw_inputs(case), expected(case)
    options = options_of(given, script)
    described = given["model"] + given.get("dtype", "")
    net = network_of(described, getattr(script, method_of(case)[1]).rotation_head)
    dtype, classes = net.fc.weight.dtype, net.fc.out_features
    learner = learner_of(case, options, script, classes)
    trainer = Trainer(net, learner, options, World())
    targets: list[torch.Tensor] = []
    replay_draws(case, learner, script, monkeypatch, targets)
    labels = torch.arange(len(drawn["x_eval"])) % whole(case["note"], r"\) mod #", classes)
    found: dict[str, list[Any]] = {}
    for k in range(given["steps"]):
        trainer.iteration = given.get("first_iteration", 0) + k
        views = tuple(drawn[name][k].to(dtype) for name in VIEWS[len(learner.views)])
        index_ = drawn["idx_ulb"][k] if views else None
        unknown = torch.full_like(index_, -1) if views else None
        values = trainer.train_step(Batch(drawn["x_lb"][k].to(dtype), drawn["y_lb"][k], views, index_, unknown,
                                          drawn["rot"][k] if "rot" in drawn else None))
        if "class_status" in wanted:
            found.setdefault("class_status", []).append(learner.status.beta.numpy())
        with torch.no_grad():
            logits = trainer.ema.module(drawn["x_eval"].to(dtype))
        logits = logits[0] if isinstance(logits, tuple) else logits
        values |= metrics(logits, labels)
        for name, value in values.items():
            found.setdefault(f"log__{name.replace('/', '__')}", []).append(float(value))
    if targets:
        found["targets_before_mixup"] = [target.numpy() for target in targets]

    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    found |= {"final_param_l2": norms(net.parameters()), "final_ema_l2": norms(trainer.ema.module.parameters()),
              "final_running_mean_l2": norms(layer.running_mean for layer in layers),
              "final_running_var_l2": norms(layer.running_var for layer in layers),
              "num_batches_tracked": [int(layer.num_batches_tracked) for layer in layers]}
    # Layers whose output is never used need not keep statistics.
    used = np.array([layer.num_batches_tracked > 0 for layer in layers])
    assert (~used).sum() <= case["note"].count(".bn1")
    for name, value in wanted.items():
        rows = used if len(np.shape(value)) == 1 and ("running" in name or "tracked" in name) else slice(None)
        np.testing.assert_allclose(np.array(found[name])[rows], value[rows], err_msg=name, **stated(case, name))


@each(TRAININGS)
def test_logged_names(case: dict[str, Any]) -> None:
    """Every published name is logged (times are the loop's)."""
    names = facts(PAPER, "log_keys.json")[case["id"]]["logged_at_evaluation"]
    assert {name for name in names if not name.endswith("_time")} <= {
        key.removeprefix("log__").replace("__", "/") for key in case["output_keys"]}


def test_metric_names() -> None:
    wanted = facts(PAPER, "eval_keys.json")
    found = metrics(torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10)
    assert list(found) == wanted["metric_keys"]
    assert confusion_text(np.eye(3)).startswith(wanted["confusion_matrix_log_prefix"])


def test_checkpoint_structure() -> None:
    """A checkpoint has the published parts, in their published form; which of the runs it is of shows in its sizes."""
    wanted = facts(PAPER, "checkpoint_facts.json")
    group = wanted["param_group0"]
    for case in TRAININGS:
        if method_of(case)[1] != "FreeMatch":
            continue
        script, net = script_of(case), network_of(case["arguments"]["model"])
        options = options_of(case["arguments"], script)
        trainer = Trainer(net, learner_of(case, options, script, net.fc.out_features), options, World())
        if options.lr == group["initial_lr"] and \
                f"{len(trainer.optimizer.param_groups[0]['params'])} ids" == group["params"]:
            check_checkpoint(wanted, case, trainer)
            return
    pytest.skip("there is no run like that of the checkpoint")


def check_checkpoint(wanted: dict[str, Any], case: dict[str, Any], trainer: Trainer) -> None:
    """Train for as many steps as the checkpoint has seen and compare what a checkpoint of ours holds."""
    drawn = draw_inputs(case)
    batch = Batch(drawn["x_lb"][0], drawn["y_lb"][0], (drawn["x_w"][0], drawn["x_s"][0]), drawn["idx_ulb"][0],
                  drawn["idx_ulb"][0])
    for _ in range(int(wanted["scheduler"]["last_epoch"])):
        trainer.train_step(batch)
    parts = {name: part.state_dict() for name, part in trainer.parts().items()}
    assert set(wanted["keys"]) <= {*parts, "it"}
    assert list(parts["optimizer"]) == wanted["optimizer_keys"]
    for number, group in enumerate(parts["optimizer"]["param_groups"]):
        published = wanted[f"param_group{number}"]
        assert f"{len(group['params'])} ids" == published["params"]
        for key in ("weight_decay", "momentum", "dampening", "nesterov", "maximize", "initial_lr", "lr"):
            assert group[key] == pytest.approx(published[key]), key
    assert len(parts["optimizer"]["state"]) == wanted["n_optimizer_state"]
    assert {str(key): str(parts["scheduler"][key]) for key in ("base_lrs", "last_epoch", "_step_count")} == {
        key: wanted["scheduler"][key] for key in ("base_lrs", "last_epoch", "_step_count")}
    assert list(strip_prefix(parts["model"])) == list(parts["ema_model"])
    if wanted["ema_buffers_equal_model_buffers"]:
        buffers = [name for name, _ in trainer.net.named_buffers()]
        assert all(torch.equal(parts["model"][name], parts["ema_model"][name]) for name in buffers)
