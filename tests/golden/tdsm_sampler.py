"""EDM's sampler with the affine score of two networks, with the noises given."""
from __future__ import annotations

import torch

from EDM.sampling.samplers import affine, denoiser, edm_sampler
from EDM.training.networks import EDMPrecond
from tests.golden.cases import fill
from tests.golden.tdsm_cases import assert_state, cases_of, each, numbers, one_hot, tensors

SAMPLER_CASES = cases_of("sampler.npz")
CASES = {case["case"] for case in SAMPLER_CASES}


@each(SAMPLER_CASES)
def test_affine_score(case):
    given, (bound,) = tensors(case), numbers(case)
    latents, labels = given["latents"], one_hot(given["label"], case["num_classes"])
    image = dict(img_resolution=latents.shape[2], img_channels=latents.shape[1], label_dim=case["num_classes"])
    models = []
    for name in ("net", "net2"):
        net = fill(EDMPrecond(**image, **case[f"{name}_kwargs"])).eval()
        assert_state(net, f"sampler_{name}_{case['case']}_state.json", listed=False)
        models.append(denoiser(net, labels))

    def sample(model) -> torch.Tensor:
        return edm_sampler(model, latents, num_steps=case["steps"], noise=lambda step: given["noise"][step],
                           **case["sampler_kwargs"])

    assert (sample(affine(*models, case["affine_weight"])) - given["x"]).abs().max() <= bound
    assert (sample(affine(*models, 0.0)) - given["x_no_net2"]).abs().max() <= bound
