"""Recorded training runs: our own training step on the recorded inputs gives the recorded numbers."""
from __future__ import annotations

import argparse
import importlib
import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from shared.distributed import World
from tests.golden.cases import arrays, facts, fill, index
from tests.golden.torchssl_networks import draw_inputs, expected
from TorchSSL.core.algorithm import Batch, Setting
from TorchSSL.core.evaluation import confusion_text, metrics, strip_prefix
from TorchSSL.core.networks import WideResNet
from TorchSSL.core.trainer import Trainer
from TorchSSL.freematch import FreeMatch

# Published name -> its class; more than one case may belong to a script.
SCRIPTS = {"freematch": "FreeMatch", "freematch_entropy": "FreeMatch", "softmatch": "SoftMatch", "fixmatch": "FixMatch",
           "flexmatch": "FlexMatch", "uda": "UDA", "pseudolabel": "PseudoLabel", "pimodel": "PiModel",
           "meanteacher": "MeanTeacher", "fullysupervised": "FullySupervised", "mixmatch": "MixMatch",
           "remixmatch": "ReMixMatch", "vat": "VAT"}
# The recorded views of unlabelled images, by how many an algorithm wants.
VIEWS = {0: (), 1: ("x_w",), 2: ("x_w", "x_s"), 4: ("x_w", "x_s1", "x_s2", "x_s1_rot")}


def script_of(case: dict[str, Any]) -> str | None:
    """Return the longest published name that the case's id begins with."""
    names = [name for name in SCRIPTS if f"{case['id']}_".startswith(f"train_{name}_")]
    return max(names, key=len, default=None)


CASES = [case for case in index("torchssl")["cases"] if case["file"] == "train.npz" and script_of(case)]
SERVES = {case["id"] for case in CASES}

# The stated tolerances let weight decay on the wrong parameters pass, which moves the norms of batch norm by 2e-4.
# A correct fp32 run is this close, whatever the processor: 2e-5 was seen between two.
NORMS = dict(rtol=1e-5, atol=3e-5)
LOGGED = dict(rtol=1e-4, atol=1e-6)
# The fourth step's targets of the published float32 run are 1e-5 away from those of the same run in float64.
TARGETS = dict(rtol=3e-5, atol=1e-7)


def options_of(given: dict[str, Any], script: ModuleType) -> argparse.Namespace:
    """Read the set-up of a case, part of which the index states in words."""
    optimizer = given["optimizer"].replace(",", " ").split()
    flags = {"lr": optimizer[optimizer.index("lr") + 1], "momentum": optimizer[optimizer.index("Nesterov") + 1],
             "weight_decay": optimizer[optimizer.index("decay") + 1], "ema_m": given["ema_decay"]}
    flags |= {key: value for key, value in given.items() if key in vars(script.parse([]))}
    return script.parse([f"--{key}={value}" for key, value in flags.items()])


def network_of(given: dict[str, Any], rotation_head: bool = False) -> torch.nn.Module:
    words = given["model"].replace(",", " ").split()
    net = fill(WideResNet(int(words[words.index("classes") - 1]), depth=int(words[words.index("depth") + 1]),
                          widen_factor=int(words[words.index("widen") + 1]), rotation_head=rotation_head))
    with torch.no_grad():
        net.fc.weight.mul_(float(words[words.index("x") + 1]))
    return net.double() if given.get("dtype", "").startswith("float64") else net


def learner_of(case: dict[str, Any], options: argparse.Namespace, script: ModuleType, classes: int) -> Any:
    given = case["arguments"]
    shares = tuple(given.get("p_target", [1 / classes] * classes))
    setting = Setting(classes, given.get("unlabelled_set_size", 64), shares, World())
    return getattr(script, SCRIPTS[script_of(case)])(options, setting)


def replay_draws(case: dict[str, Any], learner: Any, script: ModuleType, monkeypatch: pytest.MonkeyPatch,
                 targets: list[torch.Tensor]) -> None:
    """Give the learner the recorded draws in place of its own, and note the targets that it mixes."""
    given, stored = case["arguments"], arrays("torchssl", case["file"])
    first = given.get("first_iteration", 0)
    if "direction_noise" in given:
        rng = np.random.default_rng(int(re.search(r"default_rng\((\d+)\)", given["direction_noise"])[1]))
        monkeypatch.setattr(learner, "noise", lambda images, step: torch.from_numpy(
            rng.standard_normal(images.shape).astype(np.float32)).to(images.dtype))
    if "stored_input_keys" in case:
        shares, permutations = (stored[case["stored_input_keys"][key]] for key in ("raw_beta_draws", "permutations"))
        forward = script.forward_mixed

        def noted(net: Any, setting: Any, inputs: Any, mixed: list[torch.Tensor], *draws: Any) -> Any:
            targets.append(torch.cat(mixed))
            return forward(net, setting, inputs, mixed, *draws)

        monkeypatch.setattr(script, "forward_mixed", noted)
        monkeypatch.setattr(script, "draw_mixing", lambda setting, alpha, inputs, step: (
            float(shares[step - first]), permutations[step - first]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_training_run(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module(f"TorchSSL.{script_of(case)}")
    given, drawn, wanted = case["arguments"], draw_inputs(case), expected(case)
    options = options_of(given, script)
    net = network_of(given, getattr(script, SCRIPTS[script_of(case)]).rotation_head)
    dtype, classes = net.fc.weight.dtype, net.fc.out_features
    learner = learner_of(case, options, script, classes)
    trainer = Trainer(net, learner, options, World())
    targets: list[torch.Tensor] = []
    replay_draws(case, learner, script, monkeypatch, targets)
    logged: dict[str, list[float]] = {}
    for k in range(given["steps"]):
        trainer.iteration = given.get("first_iteration", 0) + k
        views = tuple(drawn[name][k].to(dtype) for name in VIEWS[len(learner.views)])
        index_ = drawn["idx_ulb"][k] if views else None
        unknown = torch.full_like(index_, -1) if views else None
        values = trainer.train_step(Batch(drawn["x_lb"][k].to(dtype), drawn["y_lb"][k], views, index_, unknown,
                                          drawn["rot"][k] if "rot" in drawn else None))
        if "class_status" in wanted:
            np.testing.assert_allclose(learner.status.beta, wanted["class_status"][k], rtol=1e-6)
        with torch.no_grad():
            logits = trainer.ema.module(drawn["x_eval"].to(dtype))
        logits = logits[0] if isinstance(logits, tuple) else logits
        values |= metrics(logits, torch.arange(len(logits)) % classes)
        for name, value in values.items():
            logged.setdefault(name, []).append(float(value))
    for key in wanted:
        if key.startswith("log__"):
            name = key.removeprefix("log__").replace("__", "/")
            np.testing.assert_allclose(logged[name], wanted[key], err_msg=name, **LOGGED)
    if "targets_before_mixup" in wanted:
        np.testing.assert_allclose(torch.stack(targets), wanted["targets_before_mixup"], **TARGETS)

    def norms(tensors: Any) -> list[float]:
        return [tensor.double().norm().item() for tensor in tensors]

    np.testing.assert_allclose(norms(net.parameters()), wanted["final_param_l2"], **NORMS)
    np.testing.assert_allclose(norms(trainer.ema.module.parameters()), wanted["final_ema_l2"], **NORMS)
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    # Layers whose output is never used need not keep statistics.
    used = [i for i, layer in enumerate(layers) if layer.num_batches_tracked > 0]
    assert len(layers) - len(used) <= case["note"].count(".bn1")
    for name, found in (("running_mean", norms(layer.running_mean for layer in layers)),
                        ("running_var", norms(layer.running_var for layer in layers))):
        np.testing.assert_allclose(np.array(found)[used], wanted[f"final_{name}_l2"][used], err_msg=name, **NORMS)
    tracked = np.array([int(layer.num_batches_tracked) for layer in layers])
    np.testing.assert_array_equal(tracked[used], wanted["num_batches_tracked"][used])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_logged_names(case: dict[str, Any]) -> None:
    """Every published name is logged (times are the loop's)."""
    names = facts("torchssl", "log_keys.json")[case["id"]]["logged_at_evaluation"]
    assert {name for name in names if not name.endswith("_time")} <= {
        key.removeprefix("log__").replace("__", "/") for key in case["output_keys"]}


def test_metric_names() -> None:
    wanted = facts("torchssl", "eval_keys.json")
    found = metrics(torch.randn(50, 10, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10)
    assert list(found) == wanted["metric_keys"]
    assert confusion_text(np.eye(3)).startswith(wanted["confusion_matrix_log_prefix"])


def test_checkpoint_structure() -> None:
    """A checkpoint has the published parts, in their published form."""
    wanted = facts("torchssl", "checkpoint_facts.json")
    case = next(case for case in CASES if script_of(case) == "freematch")
    drawn, net = draw_inputs(case), network_of(case["arguments"])
    options = options_of(case["arguments"], importlib.import_module("TorchSSL.freematch"))
    trainer = Trainer(net, FreeMatch(options, Setting(10, 64, (0.1,) * 10, World())), options, World())
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
        assert all(torch.equal(parts["model"][name], parts["ema_model"][name]) for name, _ in net.named_buffers())
