"""The continuous and the discrete noise schedule: tables, losses and their gradients, the ODE of the previews."""
from __future__ import annotations

import numpy as np
import torch

from EDM.latent.schedules import ContinuousSchedule, DiscreteSchedule, losses
from EDM.latent.uvit import UViT
from tests.golden.cases import each, number, serves
from tests.golden.dpt_imagenet_cases import (
    analytic,
    bound,
    bounds,
    cases_of,
    check_gradients,
    filled,
    given,
    near,
    relative,
    tensors,
)

MARGINALS, LOSSES, ODES = cases_of("vp_marginals"), cases_of("vp_loss"), cases_of("euler_ode")
TABLES, DISCRETE_LOSSES = cases_of("discrete_schedule"), cases_of("discrete_loss")
SERVES = serves(MARGINALS, LOSSES, ODES, TABLES, DISCRETE_LOSSES)


@each(MARGINALS)
def test_marginals(case):
    stored, (all64, small64, all32, absolute) = tensors(case), bounds(case["tolerance"])
    schedule = ContinuousSchedule(beta_min=case["beta_min"], beta_max=case["beta_max"])
    for bits, dtype in ((64, torch.float64), (32, torch.float32)):
        t = stored["t"].to(dtype)
        ours = {"cum_alpha": schedule.alpha_bar(t), "cum_beta": schedule.variance(t), "beta": schedule.beta(t),
                "nsr": schedule.noise_to_signal(t), "snr": 1 / schedule.noise_to_signal(t)}
        for name, values in ours.items():
            usual = np.array([all64 if bits == 64 else all32] * len(t))
            if name == "cum_beta":
                usual[t < number(case["tolerance"], r"below t=#")] = small64 if bits == 64 else all32
            reference = stored[f"{name}{bits}"].numpy().astype(np.float64)
            allowed = usual * np.abs(reference) + (absolute if bits == 32 and name == "cum_beta" else 0)
            assert (np.abs(values.double().numpy() - reference) <= allowed).all(), f"{name}{bits}"


@each(LOSSES)
def test_loss(case):
    net, stored, tolerance = filled(UViT(**case["constructor"])), tensors(case), case["tolerance"]
    schedule = ContinuousSchedule(case["pred"])
    assert schedule.time_scale == case["time_scale"]
    x0, t, noise, y = (stored[name] for name in ("x0", "t", "eps", "y"))
    found = losses(schedule, lambda x, time: net(x, time, y), x0, t, noise)
    found.mean().backward()
    relative(found, stored["loss"], bound(tolerance["loss"]), "loss")
    check_gradients(net, case)

    x = schedule.noised(x0, t, noise)
    predicted = schedule.noise_prediction(net(x, schedule.network_time(t), y), x, t)
    ours = {"xt": x, "noise_pred": predicted, "x0_pred": schedule.x0_prediction(predicted, x, t),
            "score": schedule.score(predicted, t)}
    for name, values in ours.items():
        near(values, stored[name], bound(tolerance["others"]), name)


@each(ODES)
def test_ode(case):
    stored = tensors(case)
    states = torch.stack(list(ContinuousSchedule().ode(analytic(case), stored["x"], case["steps"])))
    trace = stored["trace"]
    if len(trace) == len(states) + 1:
        states = torch.cat([stored["x"][None], states])
    near(states, trace, bound(case["tolerance"]), "trace")


@each(TABLES)
def test_discrete_schedule(case):
    stored, schedule = given(case), DiscreteSchedule(case["linear_start"], case["linear_end"], case["N"])
    ours = {"betas": schedule.betas, "cum_alphas": schedule.alpha_bars, "cum_betas": 1 - schedule.alpha_bars}
    for name, values in ours.items():
        relative(values, stored[name], bound(case["tolerance"]), name)


@each(DISCRETE_LOSSES)
def test_discrete_loss(case):
    net, stored = filled(UViT(**case["constructor"])), tensors(case)
    start, end, steps = (float(value) for value in case["schedule"].partition("(")[2].rstrip(")").split(","))
    schedule = DiscreteSchedule(start, end, int(steps))
    found = losses(schedule, lambda x, time: net(x, time, stored["y"]), stored["x0"], stored["n"].long(), stored["eps"])
    found.mean().backward()
    relative(found, stored["loss"], bound(case["tolerance"]["loss"]), "loss")
    check_gradients(net, case)
