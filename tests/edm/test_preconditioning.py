"""Preconditioners and losses against their formulas, whatever the network inside."""
from __future__ import annotations

import math

import pytest
import torch

from EDM.training.loss import EDMLoss, VELoss, VPLoss
from EDM.training.networks import PRECONDITIONERS, EDMPrecond, VPPrecond, iDDPMPrecond
from shared.cli import UserError

TINY = dict(img_resolution=8, img_channels=1, label_dim=3, model_type="SongUNet", model_channels=8, channel_mult=[1],
            num_blocks=1, attn_resolutions=[])


class Recorder(torch.nn.Module):
    """Stands in for a network: answers with `channels` noise images and keeps what it was given."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        self.seen = x, noise_labels, class_labels, augment_labels
        return torch.full_like(x, 0.25).repeat(1, self.channels, 1, 1)


def with_recorder(kind: str, **options):
    net = PRECONDITIONERS[kind](**{**TINY, **options})
    net.model = Recorder(2 if kind == "iDDPMPrecond" else 1)
    return net


COEFFICIENTS = {  # c_skip, c_out, c_in, c_noise of σ
    "EDMPrecond": (lambda s: 0.25 / (s * s + 0.25), lambda s: s * 0.5 / math.sqrt(s * s + 0.25),
                   lambda s: 1 / math.sqrt(s * s + 0.25), lambda s: math.log(s) / 4),
    "VPPrecond": (lambda s: 1, lambda s: -s, lambda s: 1 / math.sqrt(s * s + 1),
                  lambda s: 999 * (math.sqrt(0.01 + 39.8 * math.log(s * s + 1)) - 0.1) / 19.9),
    "VEPrecond": (lambda s: 1, lambda s: s, lambda s: 1, lambda s: math.log(s / 2)),
}


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_coefficients(kind):
    net, x, sigmas = with_recorder(kind), torch.randn(3, 1, 8, 8, dtype=torch.float64), [0.05, 0.7, 30.0]
    labels, augment_labels = torch.eye(3), torch.randn(3, 9)
    out = net(x, torch.tensor(sigmas), labels, augment_labels=augment_labels)
    assert out.dtype == torch.float32
    inner, c_noise, seen_labels, seen_augment = net.model.seen
    assert torch.equal(seen_labels, labels) and seen_augment is augment_labels
    for i, sigma in enumerate(sigmas):
        c_skip, c_out, c_in, noise = (f(sigma) for f in COEFFICIENTS[kind])
        assert torch.allclose(out[i].double(), c_skip * x[i] + c_out * 0.25, rtol=1e-5, atol=1e-5)
        assert torch.allclose(inner[i].double(), c_in * x[i], rtol=1e-5, atol=1e-6)
        assert c_noise[i].item() == pytest.approx(noise, rel=1e-4)


def test_iddpm_uses_the_nearest_level_and_the_first_half_of_the_channels():
    net, x = with_recorder("iDDPMPrecond"), torch.randn(2, 1, 8, 8)
    sigma = net.u[[100, 900]] * 1.0001
    out = net(x, sigma, torch.eye(3)[:2])
    assert torch.equal(net.model.seen[1], torch.tensor([899.0, 99.0]))
    assert out.shape == x.shape and torch.allclose(out, x - sigma.reshape(-1, 1, 1, 1) * 0.25)


def test_iddpm_rounding_agrees_with_a_search_of_the_table():
    net = iDDPMPrecond(**TINY)
    wanted = torch.cat([torch.rand(2000, dtype=torch.float64) * 3, torch.logspace(-4, 6, 2000, dtype=torch.float64),
                        net.u.double(), torch.tensor([0.0, 1e9], dtype=torch.float64)])
    expected = (wanted.float()[:, None] - net.u).abs().argmin(dim=1)
    assert torch.equal(net.round_sigma(wanted, return_index=True), expected)
    assert torch.equal(net.round_sigma(wanted[None]), net.u[expected].double()[None])


def test_times_of_the_vp_process_are_inverse_to_its_levels():
    net = VPPrecond(**TINY)
    t = torch.linspace(0.01, 1, 50)
    assert torch.allclose(net.sigma_inv(net.sigma(t)), t, rtol=1e-4)


def test_missing_labels_are_a_row_of_zeros_and_unconditional_networks_get_none():
    for label_dim, expected in ((3, torch.zeros(1, 3)), (0, None)):
        net = with_recorder("EDMPrecond", label_dim=label_dim)
        net(torch.randn(2, 1, 8, 8), torch.tensor(1.0))
        seen = net.model.seen
        assert seen[1].shape == (1,) and (seen[2] is None if expected is None else torch.equal(seen[2], expected))


def test_constructor_arguments_rebuild_the_network():
    net = EDMPrecond(**TINY, sigma_data=0.7)
    again = EDMPrecond(**net.init_kwargs)
    assert again.sigma_data == 0.7 and again.init_kwargs == net.init_kwargs
    again.load_state_dict(net.state_dict())


def test_unknown_network_is_named():
    with pytest.raises(UserError, match='SongUnet.*did you mean "SongUNet"'):
        EDMPrecond(**{**TINY, "model_type": "SongUnet"})


# --------------------------------------------------------------------------------------------------------------- losses

LEVELS = {  # loss, σ of a drawn number, weight of σ
    "edm": (EDMLoss(), lambda z: math.exp(1.2 * z - 1.2), lambda s: (s * s + 0.25) / (s * 0.5) ** 2),
    "vp": (VPLoss(), lambda u: math.sqrt(math.expm1(9.95 * (1 - u * (1 - 1e-5)) ** 2 + 0.1 * (1 - u * (1 - 1e-5)))),
           lambda s: 1 / s**2),
    "ve": (VELoss(), lambda u: 0.02 * 5000**u, lambda s: 1 / s**2),
}


@pytest.mark.parametrize("name", LEVELS)
def test_loss_of_a_known_denoiser(name):
    """For the denoiser that returns its input the loss is weight·(σ·noise)²."""
    loss_fn, sigma_of, weight_of = LEVELS[name]
    level = torch.tensor([0.1, 0.4, 0.8]).reshape(-1, 1, 1, 1)
    images, noise = torch.randn(2, 3, 2, 4, 4).unbind()
    given = {}

    def denoiser(x, sigma, labels, augment_labels=None):
        given.update(sigma=sigma, labels=labels, augment_labels=augment_labels)
        return x

    loss = loss_fn(denoiser, images, "labels", "augmentation", level, noise)
    assert (given["labels"], given["augment_labels"]) == ("labels", "augmentation")
    for i, number in enumerate(level.flatten().tolist()):
        sigma = sigma_of(number)
        assert given["sigma"][i].item() == pytest.approx(sigma, rel=1e-4)
        assert torch.allclose(loss[i], weight_of(sigma) * (sigma * noise[i]) ** 2, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", LEVELS)
def test_draws_have_the_distribution_of_the_loss(name):
    loss_fn = LEVELS[name][0]
    level = loss_fn.draw(20000, torch.Generator().manual_seed(0))
    assert level.shape == (20000, 1, 1, 1)
    mean, deviation = (0, 1) if name == "edm" else (0.5, 12**-0.5)
    assert level.mean().item() == pytest.approx(mean, abs=0.03) and level.std().item() == pytest.approx(deviation, 0.03)
    assert torch.equal(level, loss_fn.draw(20000, torch.Generator().manual_seed(0)))
