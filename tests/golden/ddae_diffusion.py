"""DDPM and EDM: tables, perturbation, losses and their gradients, features, samplers, the augmentation pipe."""
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.model import UNet
from EDM.training.augment import AugmentPipe
from tests.golden.cases import each, fill, number, serves
from tests.golden.ddae_compare import analytic, assert_close, cases_of, stated, tensors

SCHEDULES, PERTURBATIONS, GRADIENTS = cases_of("schedules"), cases_of("perturb"), cases_of("gradients")
FEATURES, SAMPLES = cases_of("features"), cases_of("sample")
PIPES, AUGMENTED = cases_of("pipe"), cases_of("augmented loss")
SERVES = serves(SCHEDULES, PERTURBATIONS, GRADIENTS, FEATURES, SAMPLES, PIPES, AUGMENTED)


def model_of(case: dict[str, Any]) -> DDPM | EDM:
    made = case["constructor"]
    if "betas" in made:
        return DDPM(made["betas"], made["n_T"])
    names = ("sigma_data", "p_mean", "p_std", "sigma_min", "sigma_max", "rho", "S_min", "S_max", "S_noise",
             "augment_prob")
    return EDM(**{name: made[name] for name in names if name in made})


class Analytic(torch.nn.Module):
    """The stand-in network that the cases describe; `times` are those it was asked with."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.formula, self.of_labels = analytic(text), number(text, r"add # \*", 0)
        self.times: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor, aug: torch.Tensor | None = None) -> torch.Tensor:
        self.times.append(t)
        out = self.formula(x, t.reshape(-1, 1, 1, 1))
        return out if aug is None else out + self.of_labels * aug.sum(1).reshape(-1, 1, 1, 1)


def network_of(case: dict[str, Any]) -> torch.nn.Module:
    made = case["constructor"]
    return fill(UNet(**made["unet"])).eval() if "unet" in made else Analytic(made["net"])


def base(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the arrays and the inputs of the perturbation case that shares them: the one named, or one of the same
    process and size."""
    made, said = case["constructor"], str(case["inputs"].get("same", ""))
    alike = [other for other in PERTURBATIONS if ("betas" in other["constructor"]) == ("betas" in made)
             and other["keys"]["x01"][1:] == made["unet"]["image_shape"]]
    own = [other for other in alike if other["id"] in said.replace(",", " ").split()] or alike
    if not own:
        pytest.skip("there is no case with the inputs")
    return tensors(own[0]), own[0]["inputs"]


@each(SCHEDULES)
def test_schedules(case: dict[str, Any]) -> None:
    model, tolerance = model_of(case), case["tolerance"]
    exact_or_not = tolerance.rpartition(";")[2]  # the last one is for a schedule computed in float64
    for key, reference in tensors(case).items():
        if isinstance(model, EDM):
            steps = int(key.removeprefix("steps").removesuffix("_f64"))
            assert_close(model.schedule(steps), reference, exact_or_not, key)
            continue
        which, _, name = key.partition("_")
        table = model.train_tables if which == "ddpm" else model.ddim_tables
        name, later = name.removesuffix("_from1"), key.endswith("_from1")
        named = name if name in tolerance else "sqrtab"  # one table goes without mention
        assert_close(table[name][later:], reference, stated(tolerance.replace(" and", ","), named), key)


@each(PERTURBATIONS)
def test_perturbation_and_loss(case: dict[str, Any]) -> None:
    model, stored, inputs = model_of(case), tensors(case), case["inputs"]
    x, noise, times = 2 * stored["x01"] - 1, stored["noise"], torch.tensor(inputs["t"])
    net = network_of(case)
    if isinstance(model, DDPM):
        found = {"x_noised": model.perturb(x, times, noise)[0], "loss": model.loss(net, x, times, noise),
                 "x_noised_tint": model.perturb(x, inputs["t_int"], noise)[0]}
        for key in found.keys() & stored.keys():
            assert_close(found[key], stored[key], case["tolerance"], key)
        return
    level, steps = stored["rnd"].flatten(), case["constructor"]["steps"]
    sigma = model.training_sigma(level).reshape(-1, 1, 1, 1)
    compare = {"sigma": sigma, "x_noised": x + sigma * noise,
               "denoised": model.denoise(net, x + sigma * noise, sigma),
               "loss": model.loss(net, x, level, noise),
               "x_noised_tint": model.perturb(x, inputs["t_int"], noise, steps)[0],
               "x_noised_tvec": model.perturb(x, times, noise, steps)[0],
               "sigma_tint_f64": model.sigma(inputs["t_int"], steps), "sigma_tvec_f64": model.sigma(times, steps)}
    for key in compare.keys() & stored.keys():
        value, scale = compare[key], float(stored[key].abs().max())
        assert_close(value / scale, stored[key] / scale, case["tolerance"].replace("relative", ""), key)


@each(GRADIENTS)
def test_loss_and_gradients(case: dict[str, Any]) -> None:
    model, net, stored, (shared, inputs) = model_of(case), network_of(case), tensors(case), base(case)
    level = torch.tensor(inputs["t"]) if isinstance(model, DDPM) else shared["rnd"].flatten()
    loss = model.loss(net, 2 * shared["x01"] - 1, level, shared["noise"])
    loss.backward()
    assert_close(loss, stored["loss"], case["tolerance"])
    grads = {name: p.grad for name, p in net.named_parameters()}
    norms = torch.stack([grads[name].norm() for name in case["notes"]["grad_norms_order"]])
    assert len(norms) == len(grads)
    # A gradient that is zero but for rounding has no relative accuracy.
    assert_close(norms, stored["grad_norms"], f"1e-6 {case['tolerance']}")
    # Keys drop the "_emb" of the time embedding.
    names = {"grad_" + name.replace("_emb.", ".").replace(".", "_"): name for name in grads}
    for key in stored:
        if key.startswith("grad_") and key != "grad_norms":
            gradient = grads[names[key]]
            scale = float(stored[key].abs().max())
            assert_close(gradient / scale, stored[key] / scale, case["tolerance"].replace("relative", ""), key)


@each(FEATURES)
def test_features(case: dict[str, Any]) -> None:
    model, net, stored, (shared, inputs) = model_of(case), network_of(case), tensors(case), base(case)
    options = {"steps": case["constructor"]["steps"]} if isinstance(model, EDM) else {}
    times = {"tint": inputs["t_int"], "tvec": torch.tensor(inputs["t"])}
    with torch.no_grad():
        for (name, t), (form, norm) in itertools.product(times.items(), (("raw", False), ("norm", True))):
            found = model.features(net, shared["x01"], t, shared["noise"], norm=norm, **options)
            wanted = {key: value for key, value in stored.items() if key.startswith(f"{name}_{form}_")}
            assert {f"{name}_{form}_{block}" for block in found} == set(wanted)
            for block, feature in found.items():
                assert_close(feature, wanted[f"{name}_{form}_{block}"], case["tolerance"], f"{name} {form} {block}")
            first = next(iter(found))
            one = model.features(net, shared["x01"], t, shared["noise"], [first], norm=norm, **options)
            assert torch.equal(one[first], found[first])


@each(SAMPLES)
def test_sampler(case: dict[str, Any]) -> None:
    model, net, stored, made = model_of(case), network_of(case), tensors(case), case["constructor"]
    noise = stored.get("z")
    mode = "DDPM" if "steps" not in made else "DDIM"
    out = model.sample(net, stored["xT"], lambda step: noise[step], mode, made.get("steps"), made.get("eta", 0.0))
    reference = stored["out_f64"] if "out_f64" in stored else stored["out"]
    assert_close(out, reference, case["tolerance"])
    if isinstance(net, Analytic) and "net_times" in stored:
        assert_close(torch.cat(net.times), stored["net_times"], case["tolerance"])
        assert model.evaluations(mode, made["steps"]) == len(net.times)
    if "actual_network_evaluations" in case.get("notes", {}):
        assert len(net.times) == case["notes"]["actual_network_evaluations"]


def pipe_of(case: dict[str, Any]) -> tuple[AugmentPipe, torch.Tensor]:
    """Return the pipe of a case and the parameters that follow from its draws."""
    stored, draws = tensors(case), case["inputs"]["draws in this order"]
    pipe = AugmentPipe(**case["constructor"])
    numbers = []
    for name in draws:
        value = stored[name].float()
        numbers.extend(value.reshape(-1, len(stored["images"])))
    # Of a number of several rows and its one gate, the pipe takes rows first, then the gate, as they are stored.
    return pipe, pipe.parameters(numbers)


@each(PIPES)
def test_augmentation(case: dict[str, Any]) -> None:
    stored = tensors(case)
    pipe, parameters = pipe_of(case)
    images, labels = pipe.apply(stored["images"], parameters)
    assert_close(images, stored["out"], stated(case["tolerance"], "images"))
    assert_close(labels, stored["labels"], stated(case["tolerance"], "labels"))


@each(AUGMENTED)
def test_augmented_loss(case: dict[str, Any]) -> None:
    sources = [other for other in PIPES if other["id"] == case["inputs"]["same draws as"]]
    if not sources:
        pytest.skip(f"there is no {case['inputs']['same draws as']}")
    source, = sources
    model, net, stored = model_of(case), network_of(case), tensors(case)
    pipe, parameters = pipe_of(source)
    assert vars(model.augment)["multipliers"] == pipe.multipliers and model.augment.p == pipe.p
    images, labels = model.augment.apply(tensors(source)["images"], parameters)
    with torch.no_grad():
        loss = model.loss(net, images, stored["rnd"].flatten(), stored["noise"], labels)
    assert_close(loss, stored["loss"], case["tolerance"])
    assert np.isfinite(float(loss))
