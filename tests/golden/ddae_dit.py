"""DiT: the network, the probe's feature, the schedule on all and on some of its steps, loss and samplers."""
from __future__ import annotations

import re

import numpy as np
import torch

from DDAE.DiT.gaussian import SpacedDiffusion
from DDAE.DiT.network import SIZES, DiT, latent_features, make_dit, position_table, sinusoid
from tests.golden.cases import NUMBER, each, fill, number, numbers, serves, whole
from tests.golden.ddae_compare import assert_close, cases_of, check_state, given, tensors

DITS, PROBED, TABLES, SINUSOIDS = cases_of("dit"), cases_of("dit feature"), cases_of("dit tables"), cases_of("sinusoid")
RESPACED, SAMPLERS, POSITIONS = cases_of("respacing"), cases_of("dit samplers"), cases_of("positions")
SERVES = serves(DITS, PROBED, TABLES, SINUSOIDS, RESPACED, SAMPLERS, POSITIONS)


@each(DITS)
def test_network(case):
    net, stored, tolerance = DiT(**case["constructor"]).eval(), tensors(case), case["tolerance"]
    check_state(net, f"{case['id']}_state.json")
    if "pos_embed_init" in stored:
        assert_close(net.pos_embed.data[0], stored["pos_embed_init"], tolerance, "pos_embed")
    fill(net)
    inputs = stored["x"], stored["t"], stored["y"]
    with torch.no_grad():
        assert_close(net(*inputs), stored["out"], tolerance, "out")
        if "t_embedding" in stored:
            assert_close(net.t_embedder(stored["t"]), stored["t_embedding"], tolerance, "t_embedding")
        blocks = net.features(*inputs, net.block_names)
        for key, reference in stored.items():
            if found := re.fullmatch(r"layer_(\d+)_(mean_tokens|slice)", key):
                tokens = blocks[f"layer-{found[1]}"]
                sides = tuple(slice(side) for side in reference.shape)
                assert_close(tokens.mean(1) if found[2] == "mean_tokens" else tokens[sides], reference, tolerance, key)
            elif found := re.fullmatch(r"out_cfg(.+)", key):
                assert_close(net.forward_with_cfg(*inputs, float(found[1])), reference, tolerance, key)


@each(PROBED)
def test_probe_feature(case):
    made = dict(case["constructor"])
    level, block = made.pop("timestep"), made.pop("blockname")
    net, stored = fill(DiT(**made).eval()), tensors(case)
    found = latent_features(net, stored["code"], level, [block], stored["noise"])[block]
    assert_close(found, stored["feature"], case["tolerance"], "feature")


@each(TABLES)
def test_tables(case):
    stored, diffusion = given(case), SpacedDiffusion()
    tables = {"sqrt_ab_f64": diffusion.sqrt_alphabar, "sqrt_1mab_f64": diffusion.sqrt_one_minus_alphabar,
              "post_var_f64": diffusion.posterior_variance, "post_logvar_f64": diffusion.posterior_log_variance,
              "coef1_f64": diffusion.posterior_mean_x0, "coef2_f64": diffusion.posterior_mean_xt}
    for key in stored.keys() - {"t"}:
        assert_close(tables[key][stored["t"].astype(int)], stored[key], case["tolerance"], key)


@each(SINUSOIDS)
def test_sinusoid(case):
    stored = tensors(case)
    # The last bit of a frequency is the processor's, and angles are up to t times it.
    angle = np.abs(stored["t"].numpy()).max() * np.finfo(np.float32).eps
    assert_close(sinusoid(stored["t"], stored["emb"].shape[1]), stored["emb"], str(float(case["tolerance"]) + angle),
                 "emb")


@each(RESPACED)
def test_respacing(case):
    diffusion, stored = SpacedDiffusion(case["constructor"]["timestep_respacing"]), given(case)
    assert_close(diffusion.timestep_map, stored["timestep_map"], "exact", "timestep_map")
    assert_close(diffusion.betas, stored["betas_f64"], case["tolerance"].replace("exact / ", ""), "betas")


def analytic(text: str):
    """Return the network of "eps = 0.6 sin(1.3x+0.5c)+0.2 x cos c, var = tanh(0.5x - c), c = base time / 1000"; the
    numbers are the case's."""
    a, b, d, e, f, steps = map(float, re.findall(NUMBER, text[text.index("eps ="):])[:6])

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        c = (t.float() / steps).view(-1, *[1] * (x.ndim - 1))
        return torch.cat([a * torch.sin(b * x + d * c) + e * x * torch.cos(c), torch.tanh(f * x - c)], dim=1)

    return network


@each(SAMPLERS)
def test_loss_and_samplers(case):
    made, stored, tolerance = case["constructor"], tensors(case), case["tolerance"]
    diffusion, net = SpacedDiffusion(made["timestep_respacing"]), analytic(case["what"])
    if "x0" in stored:
        found = diffusion.losses(net, stored["x0"], stored["t"].long(), stored["noise"])
        for key in found.keys() & stored.keys():
            assert_close(found[key], stored[key], tolerance, key)
    if "ddim_out" in stored:
        eta, clip = number(made["ddim"], "eta #", 0), "no clipping" not in made["ddim"]
        assert_close(diffusion.ddim(net, stored["xT"], eta, clip), stored["ddim_out"], tolerance, "ddim")
    if "ancestral_out" in stored:
        clip = made["ancestral"] == "clipped"
        ours = diffusion.ancestral(net, stored["xT"], stored["z"], clip=clip)
        assert_close(ours, stored["ancestral_out"], tolerance, "ancestral")


def published_size(case: dict) -> tuple[str, str]:
    """Return size and patch of the network that a case is about, such as XL and 2."""
    return re.search(r"DiT-(\w+)/(\d+)", case["what"]).groups()


@each(POSITIONS)
def test_position_table(case):
    stored = given(case)
    side = round(len(stored["row_sums"]) ** 0.5)
    size, _ = published_size(case)
    table = position_table(SIZES[size][1], side).numpy()
    rows = numbers(re.search(r"rows ([\d, ]+\d)", case["what"])[1])
    stride = whole(case["what"], "strided by #")
    assert_close(table[rows][:, ::stride], stored["rows"], case["tolerance"], "rows")
    assert_close(table.astype(np.float64).sum(1), stored["row_sums"], case["tolerance"], "row sums")


@each(POSITIONS)
def test_published_size(case):
    # On the meta device: names and shapes without 2.7 GB of weights.
    size, patch = published_size(case)
    with torch.device("meta"):
        net = make_dit(f"DiT-{size}/{patch}")
    assert sum(value.numel() for value in net.parameters()) == case["notes"]["params"]
    check_state(net, f"dit_{size.lower()}_{patch}_state.json")
