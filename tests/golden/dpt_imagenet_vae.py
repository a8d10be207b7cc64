"""The VAE: published files in CompVis' layout, moments, latents and decoded images; names of the published size."""
from __future__ import annotations

import torch

from EDM.latent.vae import Coder, autoencoder, diffusers_state, sample, vae_for
from tests.edm.latent_runs import compvis_name
from tests.golden.cases import each, facts, fill_value, serves
from tests.golden.dpt_imagenet_cases import PAPER, bound, cases_of, near, tensors

SMALL, SIZES = cases_of("vae"), cases_of("vae_state")
SERVES = serves(SMALL, SIZES)


def published_vae(case: dict) -> torch.nn.Module:
    """Return the case's VAE with filled weights under CompVis' names, read as a published file is."""
    made = case["ddconfig"]
    levels = len(made["ch_mult"])
    names = autoencoder()(
        block_out_channels=[made["ch"] * factor for factor in made["ch_mult"]], latent_channels=made["z_channels"],
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=made["num_res_blocks"]).state_dict()
    state = {compvis_name(name, levels): tensor for name, tensor in names.items()}
    shapes = {name: (*tensor.shape, 1, 1) if ".attn_1." in name and tensor.ndim == 2 else tuple(tensor.shape)
              for name, tensor in state.items()}
    filled = diffusers_state({name: torch.from_numpy(fill_value(name, shape)) for name, shape in shapes.items()})
    vae = vae_for(filled)
    vae.load_state_dict(filled)
    return vae.eval()


@each(SMALL)
def test_vae(case):
    stored, allowed = tensors(case), bound(case["tolerance"])
    coder = Coder(published_vae(case))
    assert coder.scale == case["scale_factor"]
    near(coder.moments(stored["x"]), stored["moments"], allowed, "moments")
    for suffix in ("", "_clipped"):
        near(sample(stored["moments" + suffix], stored["noise"]), stored["z" + suffix], allowed, "z" + suffix)
    with torch.no_grad():
        near(coder.vae.decode(stored["z"] / coder.scale).sample, stored["decoded"], allowed, "decoded")
    near(coder.decode(stored["z"]), (0.5 * (stored["decoded"] + 1)).clamp(0, 1), 2 * allowed, "image")


@each([*SMALL, *SIZES])
def test_published_names(case):
    listed = facts(PAPER, case["state_file"])
    with torch.device("meta"):
        state = diffusers_state({name: torch.empty(shape) for name, shape in listed})
        own = vae_for(state).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: tensor.shape for n, tensor in own.items()}
    if "parameters" in case:
        assert sum(tensor.numel() for tensor in own.values()) == case["parameters"]
