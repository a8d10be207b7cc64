"""Preconditioners: coefficients, labels that reach the network, denoised images, rounding of noise levels."""
from __future__ import annotations

import pytest
import torch

from EDM.training.networks import PRECONDITIONERS
from tests.golden.cases import Stored, fill, name_of, number, serves
from tests.golden.edm_cases import bound, cases, listed_state, stated, tensors

PRECONDITIONER_CASES = cases(kind="preconditioner")
SERVES = serves(PRECONDITIONER_CASES)


@pytest.fixture(scope="module", params=PRECONDITIONER_CASES, ids=name_of)
def denoiser(request) -> tuple[dict, torch.nn.Module, Stored]:
    case = request.param
    net, given = fill(PRECONDITIONERS[case["network"]](**case["constructor"]).eval()), tensors(case)
    if "freqs" in given:
        net.model.map_noise.freqs.copy_(given["freqs"])
    return case, net, given


def of_levels(case: dict) -> float:
    """Return the relative bound on a table of levels, which follows from a sine in float32: its last bit is the
    processor's."""
    return number(stated(case, "round_out"), "u: #", 0)


def test_denoiser_state(denoiser):
    case, net, given = denoiser
    levels = of_levels(case) if "u" in given else 0
    assert (net.sigma_min, net.sigma_max) == pytest.approx((float(case["sigma_min"]), float(case["sigma_max"])),
                                                           rel=levels, abs=0)
    if "state_file" in case:
        expected = listed_state(case["state_file"])
        if not expected:
            pytest.skip(f"there is no {case['state_file']}")
        assert [[name, list(tensor.shape)] for name, tensor in net.state_dict().items()] == expected


def test_denoised_images(denoiser):
    case, net, given = denoiser
    seen = {}
    hook = net.model.register_forward_pre_hook(lambda _, inputs: seen.update(enumerate(inputs)))
    with torch.no_grad():
        denoised = net(given["x"], given["sigma"], given.get("class_labels"))
    hook.remove()
    relative, said = bound(case, "F_input"), stated(case, "c_noise")
    # Near σ = 0 the time of the VP process cancels in float32.
    vp = case["network"] == "VPPrecond"
    relative_noise = number(said, r"vp c_noise[^:]*: #", relative) if vp else bound(case, "c_noise")
    torch.testing.assert_close(seen[0], given["F_input"], rtol=relative, atol=relative)
    torch.testing.assert_close(seen[1], given["c_noise"], rtol=relative_noise, atol=1e-6)
    if "class_labels_seen" in given:
        assert torch.equal(seen[2], given["class_labels_seen"])
    else:
        assert seen[2] is None
    error = (denoised - given["D"]).abs().flatten(1).amax(1)
    assert (error <= bound(case, "D") * given["D"].abs().flatten(1).amax(1)).all()


def test_rounding_of_noise_levels(denoiser):
    case, net, given = denoiser
    if "u" in given:
        torch.testing.assert_close(net.u, given["u"], rtol=of_levels(case), atol=0)
        net.u.copy_(given["u"])  # the rounding itself is exact, on the published table
    if "round_in" in given:
        rounded = net.round_sigma(given["round_in"])
        assert rounded.dtype == given["round_in"].dtype and torch.equal(rounded, given["round_out"])
    if "round_index" in given:
        assert torch.equal(net.round_sigma(given["round_in"], return_index=True), given["round_index"])


def test_times_of_noise_levels(denoiser):
    _, net, given = denoiser
    if "sigma_of_t" in given:
        torch.testing.assert_close(net.sigma(given["t"]), given["sigma_of_t"], rtol=1e-5, atol=0)
        torch.testing.assert_close(net.sigma_inv(given["sigma_of_t"]), given["t_of_sigma"], rtol=1e-3, atol=1e-6)
