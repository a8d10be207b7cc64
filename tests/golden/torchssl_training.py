"""Recorded training runs: our own training step on the recorded inputs gives the recorded numbers."""
from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest
import torch

from shared.distributed import World
from tests.golden.cases import facts, fill, index
from tests.golden.torchssl_networks import draw_inputs, expected
from TorchSSL.batches import Batch
from TorchSSL.classifier import strip_prefix
from TorchSSL.evaluation import confusion_text, metrics
from TorchSSL.freematch import FreeMatch, parse
from TorchSSL.networks import WideResNet
from TorchSSL.trainer import Setting, Trainer

CASES = [case for case in index("torchssl")["cases"]
         if case["file"] == "train.npz" and case["id"].startswith("train_freematch")]
SERVES = {case["id"] for case in CASES}

# The stated tolerances let weight decay on the wrong parameters pass; a correct fp32 run is this close.
NORMS = dict(rtol=1e-5, atol=1e-7)


def options_of(given: dict[str, Any]) -> argparse.Namespace:
    """Read the set-up of a case, part of which the index states in words."""
    optimizer = given["optimizer"].replace(",", " ").split()
    return parse(["--lr", optimizer[optimizer.index("lr") + 1],
                  "--momentum", optimizer[optimizer.index("Nesterov") + 1],
                  "--weight_decay", optimizer[optimizer.index("decay") + 1],
                  "--num_train_iter", str(given["num_train_iter"]), "--ema_m", str(given["ema_decay"]),
                  "--ulb_loss_ratio", str(given["ulb_loss_ratio"]),
                  "--ent_loss_ratio", str(given.get("ent_loss_ratio", 0))])


def network_of(given: dict[str, Any]) -> torch.nn.Module:
    words = given["model"].replace(",", " ").split()
    net = fill(WideResNet(int(words[words.index("classes") - 1]), depth=int(words[words.index("depth") + 1]),
                          widen_factor=int(words[words.index("widen") + 1])))
    with torch.no_grad():
        net.fc.weight.mul_(float(words[words.index("x") + 1]))
    return net


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_training_run(case: dict[str, Any]) -> None:
    given, drawn, wanted = case["arguments"], draw_inputs(case), expected(case)
    net, options = network_of(given), options_of(given)
    classes = net.fc.out_features
    learner = FreeMatch(options, Setting(classes, 64, (1 / classes,) * classes, World()))
    trainer = Trainer(net, learner, options, World())
    logged: dict[str, list[float]] = {}
    for k in range(given["steps"]):
        trainer.iteration = k
        unknown = torch.full((len(drawn["x_w"][k]),), -1)
        values = trainer.train_step(Batch(drawn["x_lb"][k], drawn["y_lb"][k], (drawn["x_w"][k], drawn["x_s"][k]),
                                          drawn["idx_ulb"][k], unknown))
        with torch.no_grad():
            logits = trainer.ema.module(drawn["x_eval"])
        values |= metrics(logits, torch.arange(len(logits)) % classes)
        for name, value in values.items():
            logged.setdefault(name, []).append(float(value))
    for key in wanted:
        if key.startswith("log__"):
            name = key.removeprefix("log__").replace("__", "/")
            np.testing.assert_allclose(logged[name], wanted[key], rtol=1e-5, atol=1e-7, err_msg=name)

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
    case = CASES[0]
    drawn, net, options = draw_inputs(case), network_of(case["arguments"]), options_of(case["arguments"])
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
