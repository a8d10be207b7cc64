"""DiT: the network, the probe's feature, the schedule on all and on some of its steps, loss and samplers."""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from DDAE.DiT.gaussian import SpacedDiffusion
from DDAE.DiT.network import SIZES, DiT, latent_features, make_dit, position_table, sinusoid
from tests.golden.cases import facts, fill, index
from tests.golden.ddae_compare import assert_close, cases, given, served, tensors

ALL = cases("dit.npz")
FEATURES = [case for case in ALL if "blockname" in case["constructor"]]
NETWORKS = [case for case in ALL if "depth" in case["constructor"] and case not in FEATURES]
TABLES = [case for case in ALL if "sqrt_ab_f64" in case["keys"]]
SINUSOIDS = [case for case in ALL if "emb" in case["keys"]]
RESPACED = [case for case in ALL if "timestep_map" in case["keys"]]
SAMPLERS = [case for case in ALL if "ancestral_out" in case["keys"]]
POSITIONS = [case for case in ALL if "row_sums" in case["keys"]]
CASES = served(NETWORKS + FEATURES + TABLES + SINUSOIDS + RESPACED + SAMPLERS + POSITIONS)


def name(case: dict) -> str:
    return case["id"]


def shapes(net: torch.nn.Module) -> list[list]:
    return [[key, list(value.shape)] for key, value in net.state_dict().items()]


def expected_shapes(file: str) -> list[list]:
    return [[key, shape] for key, shape in facts("ddae", file).items()]


@pytest.mark.parametrize("case", NETWORKS, ids=name)
def test_network(case):
    net, stored, tolerance = DiT(**case["constructor"]).eval(), tensors(case), case["tolerance"]
    file = f"{case['id']}_state.json"
    if file in index("ddae")["state_files"]:
        assert shapes(net) == expected_shapes(file)
    assert_close(net.pos_embed.data[0], stored["pos_embed_init"], tolerance, "pos_embed")
    fill(net)
    inputs = stored["x"], stored["t"], stored["y"]
    with torch.no_grad():
        assert_close(net(*inputs), stored["out"], tolerance, "out")
        assert_close(net.t_embedder(stored["t"]), stored["t_embedding"], tolerance, "t_embedding")
        blocks = net.features(*inputs, net.block_names)
        for key, reference in stored.items():
            if found := re.fullmatch(r"layer_(\d+)_(mean_tokens|slice)", key):
                tokens = blocks[f"layer-{found[1]}"]
                sides = tuple(slice(side) for side in reference.shape)
                assert_close(tokens.mean(1) if found[2] == "mean_tokens" else tokens[sides], reference, tolerance, key)
            elif found := re.fullmatch(r"out_cfg(.+)", key):
                assert_close(net.forward_with_cfg(*inputs, float(found[1])), reference, tolerance, key)


@pytest.mark.parametrize("case", FEATURES, ids=name)
def test_probe_feature(case):
    made = dict(case["constructor"])
    level, block = made.pop("timestep"), made.pop("blockname")
    net, stored = fill(DiT(**made).eval()), tensors(case)
    found = latent_features(net, stored["code"], level, [block], stored["noise"])[block]
    assert_close(found, stored["feature"], case["tolerance"], "feature")


@pytest.mark.parametrize("case", TABLES, ids=name)
def test_tables(case):
    stored, diffusion = given(case), SpacedDiffusion()
    tables = {"sqrt_ab_f64": diffusion.sqrt_alphabar, "sqrt_1mab_f64": diffusion.sqrt_one_minus_alphabar,
              "post_var_f64": diffusion.posterior_variance, "post_logvar_f64": diffusion.posterior_log_variance,
              "coef1_f64": diffusion.posterior_mean_x0, "coef2_f64": diffusion.posterior_mean_xt}
    assert stored.keys() == {"t", *tables}
    for key, table in tables.items():
        assert_close(table[stored["t"].astype(int)], stored[key], case["tolerance"], key)


@pytest.mark.parametrize("case", SINUSOIDS, ids=name)
def test_sinusoid(case):
    stored = tensors(case)
    # The last bit of a frequency is the processor's, and angles are up to t times it.
    angle = np.abs(stored["t"].numpy()).max() * np.finfo(np.float32).eps
    assert_close(sinusoid(stored["t"], stored["emb"].shape[1]), stored["emb"], str(float(case["tolerance"]) + angle),
                 "emb")


@pytest.mark.parametrize("case", RESPACED, ids=name)
def test_respacing(case):
    diffusion, stored = SpacedDiffusion(case["constructor"]["timestep_respacing"]), given(case)
    assert_close(diffusion.timestep_map, stored["timestep_map"], "exact", "timestep_map")
    assert_close(diffusion.betas, stored["betas_f64"], case["tolerance"].replace("exact / ", ""), "betas")


def analytic(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The network that the sampler cases describe."""
    c = (t.float() / 1000).view(-1, *[1] * (x.ndim - 1))
    return torch.cat([0.6 * torch.sin(1.3 * x + 0.5 * c) + 0.2 * x * torch.cos(c), torch.tanh(0.5 * x - c)], dim=1)


@pytest.mark.parametrize("case", SAMPLERS, ids=name)
def test_loss_and_samplers(case):
    diffusion, stored, tolerance = SpacedDiffusion(case["constructor"]["timestep_respacing"]), tensors(case), \
        case["tolerance"]
    found = diffusion.losses(analytic, stored["x0"], stored["t"].long(), stored["noise"])
    for key in ("mse", "vb", "loss"):
        assert_close(found[key], stored[key], tolerance, key)
    assert case["constructor"]["ddim"] == "eta 0, no clipping" and case["constructor"]["ancestral"] == "clipped"
    assert_close(diffusion.ddim(analytic, stored["xT"]), stored["ddim_out"], tolerance, "ddim")
    ours = diffusion.ancestral(analytic, stored["xT"], stored["z"], clip=True)
    assert_close(ours, stored["ancestral_out"], tolerance, "ancestral")


def published_size(case: dict) -> tuple[str, str]:
    """Return size and patch of the network that a case is about, such as XL and 2."""
    return re.search(r"DiT-(\w+)/(\d+)", case["what"]).groups()


@pytest.mark.parametrize("case", POSITIONS, ids=name)
def test_position_table(case):
    stored = given(case)
    side = round(len(stored["row_sums"]) ** 0.5)
    size, _ = published_size(case)
    table = position_table(SIZES[size][1], side).numpy()
    rows = [int(number) for number in re.search(r"rows ([\d, ]+\d)", case["what"])[1].split(",")]
    stride = int(re.search(r"strided by (\d+)", case["what"])[1])
    assert_close(table[rows][:, ::stride], stored["rows"], case["tolerance"], "rows")
    assert_close(table.astype(np.float64).sum(1), stored["row_sums"], case["tolerance"], "row sums")


@pytest.mark.parametrize("case", POSITIONS, ids=name)
def test_published_size(case):
    # On the meta device: names and shapes without 2.7 GB of weights.
    size, patch = published_size(case)
    with torch.device("meta"):
        net = make_dit(f"DiT-{size}/{patch}")
    assert sum(value.numel() for value in net.parameters()) == case["notes"]["params"]
    file = f"dit_{size.lower()}_{patch}_state.json"
    if file in index("ddae")["state_files"]:
        assert shapes(net) == expected_shapes(file)
