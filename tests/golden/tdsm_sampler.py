"""EDM's sampler with the affine score of two networks, with the noises given."""
from __future__ import annotations

import torch

from EDM.sampling.samplers import affine, denoiser, edm_sampler
from EDM.training.networks import PRECONDITIONERS
from tests.golden.cases import bounds, each, fill, serves
from tests.golden.tdsm_cases import assert_state, cases_of, one_hot, tensors

SAMPLERS = cases_of("sampler")
SERVES = serves(SAMPLERS)


@each(SAMPLERS)
def test_affine_score(case):
    given, (bound, *_) = tensors(case), bounds(case["tolerance"])
    latents, labels = given["latents"], one_hot(given["label"], case["num_classes"])
    image = dict(img_resolution=latents.shape[2], img_channels=latents.shape[1], label_dim=case["num_classes"])
    models = []
    for name in ("net", "net2"):
        kind = PRECONDITIONERS[case.get("precond", "EDMPrecond")]
        net = fill(kind(**image, **case[f"{name}_kwargs"])).eval()
        assert_state(net, f"sampler_{name}_{case['case']}_state.json", listed=False)
        models.append(denoiser(net, labels))

    def sample(model) -> torch.Tensor:
        return edm_sampler(model, latents, num_steps=case["steps"], noise=lambda step: given["noise"][step],
                           **case["sampler_kwargs"])

    for key, weight in (("x", case["affine_weight"]), ("x_no_net2", 0.0)):
        if key in given:
            assert (sample(affine(*models, weight)) - given[key]).abs().max() <= bound
