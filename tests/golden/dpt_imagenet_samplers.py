"""DPM-Solver with noise prediction and with data prediction: noise levels, plans, every network call, guidance."""
from __future__ import annotations

import torch

from EDM.latent.dpm_solver import (
    ContinuousPath,
    DiscretePath,
    Path,
    data_times,
    dpm_solver,
    dpm_solver_pp,
    guided,
    noise_times,
    orders,
)
from EDM.latent.schedules import DiscreteSchedule
from EDM.latent.uvit import UViT
from tests.golden.cases import each, number, serves
from tests.golden.dpt_imagenet_cases import analytic, bound, bounds, cases_of, filled, near, relative, tensors

LEVELS, SAMPLERS, GUIDED = cases_of("sampler_schedule"), cases_of("sampler"), cases_of("guidance")
SERVES = serves(LEVELS, SAMPLERS, GUIDED)


def path_of(case: dict, dtype: torch.dtype) -> Path:
    if case["prediction"] == "noise":
        return ContinuousPath(dtype)
    betas = case["betas"]
    return DiscretePath(DiscreteSchedule(betas["linear_start"], betas["linear_end"], case["N"]).betas, dtype)


@each(LEVELS)
def test_noise_levels(case):
    stored, (all64, all32, absolute) = tensors(case), bounds(case["tolerance"])[:3]
    small = number(case["tolerance"], r"below t=#")
    for suffix, dtype in (("64", torch.float64), ("", torch.float32)):
        path, t = path_of(case, dtype), stored["t" + suffix]
        ours = {"log_alpha": path.log_alpha(t), "std": path.sigma(t), "lambda": path.level(t),
                "inverse_of_lambda": path.inverse(stored["lambda" + suffix])}
        for name, values in ours.items():
            assert values.dtype == dtype
            where = t >= small if name == "lambda" and not suffix else torch.full_like(t, True, dtype=torch.bool)
            relative(values[where], stored[name + suffix][where], float(suffix and all64 or all32), name + suffix)
            relative(values[~where], stored[name + suffix][~where], 0, name + suffix, absolute)


@each(SAMPLERS)
def test_sampler(case):
    stored, tolerance, steps = tensors(case), case["tolerance"], case["steps"]
    assert orders(steps) == stored["orders"].tolist()
    is_noise = case["prediction"] == "noise"
    for suffix, dtype in (("64", torch.float64), ("", torch.float32), ("", torch.float64)):  # the last is the default
        path, calls = path_of(case, dtype), []
        assert path.time_scale == case["time_scale"]
        stand_in = analytic(case)

        def model(x, time, calls=calls, stand_in=stand_in):
            calls.append((x, time[0]))
            return stand_in(x, time)

        x = stored["x"].double() if suffix else stored["x"].float()
        ours = (dpm_solver if is_noise else dpm_solver_pp)(model, x, steps, path, case["t_end"], case["t_start"])
        times = (noise_times(path, len(orders(steps)), case["t_start"], case["t_end"]) if is_noise else
                 data_times(path, steps, case["t_start"], case["t_end"]))
        if suffix:
            found = {"out64": ours, "times64": times, "x_calls64": torch.stack([x for x, _ in calls]),
                     "network_times64": torch.stack([time for _, time in calls])}
            for name, values in found.items():
                near(values, stored[name], bound(tolerance["float64"]), name)
        else:
            smallest, factor = bounds(tolerance["float32"])[0], number(tolerance["float32"], r"# \*float32_minus")
            near(ours, stored["out"], max(smallest, factor * case["float32_minus_float64"]), f"out {dtype}")


@each(GUIDED)
def test_guidance(case):
    net, stored, tolerance = filled(UViT(**case["constructor"])), tensors(case), case["tolerance"]
    model = guided(net, stored["y"], case["scale"], case["none_label"])
    betas = case["betas"]
    path = DiscretePath(DiscreteSchedule(betas["linear_start"], betas["linear_end"], betas["N"]).betas)
    with torch.no_grad():
        time = stored["t"].expand(len(stored["x"]))
        near(model(stored["x"], time), stored["eps"], bound(tolerance["eps"]), "eps")
    for steps in case["steps"]:
        near(dpm_solver(model, stored["x"], steps, end=case["t_end_noise"]), stored[f"noise{steps}"],
             bound(tolerance["samples"]), f"noise{steps}")
        near(dpm_solver_pp(model, stored["x"], steps, path, case["t_end_data"]), stored[f"data{steps}"],
             bound(tolerance["samples"]), f"data{steps}")
