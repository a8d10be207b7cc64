"""The U-Net beyond its golden numbers: early ends, names, labels, memory order, sizes."""
from __future__ import annotations

import itertools

import pytest
import torch

from DDAE.ddae.diffusion import DDPM, EDM
from DDAE.ddae.model import AttentionBlock, UNet, store_bf16_weights, use_channels_last
from shared.cli import UserError

SMALL = {"image_shape": (3, 8, 4), "n_channels": 64, "ch_mults": (1, 2), "is_attn": (False, True), "n_blocks": 1,
         "augment_dim": 9}


def make(**changes: object) -> UNet:
    torch.manual_seed(0)
    return UNet(**{**SMALL, **changes}).eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8, 4), torch.tensor([0.2, 0.9])


@pytest.mark.parametrize("updown", [False, True])
def test_a_feature_pass_ends_with_the_last_block_asked_for(updown: bool) -> None:
    net, ran = make(use_res_for_updown=updown), []
    for number, block in enumerate(net.up):
        block.register_forward_hook(lambda _, inputs, out, number=number: ran.append(number))
    net.final.register_forward_hook(lambda *_: ran.append("final"))
    x, t = inputs()
    _, every = net(x, t, ret_activation=True)
    assert ran == [0, 1, 2, 3, 4, "final"] and list(every) == net.block_names
    for names, expected in ((["out_1"], [0]), (["out_2", "out_1"], [0, 1]), (["out_3"], [0, 1, 2, 3]),
                            (None, [0, 1, 2, 3, 4])):
        ran.clear()
        found = net.features(x, t, names)
        assert ran == expected and list(found) == (names or net.block_names)
        assert all(torch.equal(found[name], every[name]) for name in found)
    assert {name: block.shape[1] for name, block in every.items()} == net.widths


def test_an_unknown_block_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no block 'out_5' .did you mean .* it has out_1, out_2, out_3, out_4"):
        make().features(*inputs(), ["out_5"])


def test_no_labels_are_labels_of_zero() -> None:
    net, (x, t) = make(), inputs()
    assert torch.equal(net(x, t), net(x, t, torch.zeros(2, 9)))
    assert not torch.equal(net(x, t), net(x, t, torch.ones(2, 9)))


def test_memory_order_changes_rounding_only() -> None:
    (x, t), plain, other = inputs(), make(use_res_for_updown=True), make(use_res_for_updown=True)
    use_channels_last(other)
    assert other.image_proj.weight.is_contiguous(memory_format=torch.channels_last)
    results = []
    for net in (plain, other):
        out = net(x, t)
        out.square().mean().backward()
        results.append((out, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-4)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("updown", [False, True])
def test_weights_stored_in_bf16_give_what_autocast_does(updown: bool) -> None:
    net = make(use_res_for_updown=updown).eval()
    x, t = torch.randn(2, *net.image_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.5])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = net(x, t)
        store_bf16_weights(net)
        assert torch.equal(net(x, t), expected)
    assert net.final.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("changes, message", [
    ({"n_channels": 48}, "multiple of 32"), ({"ch_mults": (1, 2, 2)}, "is_attn"), ({"image_shape": (3, 8)}, "height"),
    ({"image_shape": (3, 9, 8)}, "multiples of 2"), ({"attn_channels_per_head": 48}, "heads of 48"),
    ({"self_condition": "out_9"}, "no block 'out_9'")])
def test_arguments_that_make_no_network(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_heads_share_the_channels() -> None:
    block = AttentionBlock(64, 16)
    assert (block.heads, block.d_k) == (4, 16) and AttentionBlock(64).heads == 1


def test_ddim_visits_every_stride_and_ends_at_zero() -> None:
    for total, steps in itertools.product((7, 100, 1000), (1, 2, 5, 7)):
        model = DDPM((1e-4, 0.02), total)
        times, stride = model.ddim_times(steps), total // steps
        assert times[-1] == 0 and times[-2] == 1 and times == sorted(times, reverse=True)
        assert {a - b for a, b in zip(times[:-2], times[1:-1], strict=True)} <= {stride}
        assert model.evaluations("DDIM", steps) == len(times) - 1 >= steps
    with pytest.raises(UserError, match="--steps"):
        DDPM((1e-4, 0.02), 7).ddim_times(8)


@pytest.mark.parametrize("make_model", [lambda: DDPM((0.02, 1e-4), 10), lambda: DDPM((1e-4, 0.02), 1),
                                        lambda: EDM(sigma_min=1, sigma_max=0.5),
                                        lambda: EDM().schedule(1)])
def test_noise_levels_that_make_no_sense(make_model) -> None:
    with pytest.raises(UserError):
        make_model()


def test_training_draws_are_spread_as_stated() -> None:
    generator = torch.Generator().manual_seed(0)
    times = DDPM((1e-4, 0.02), 50).draw(20000, generator)
    assert (int(times.min()), int(times.max())) == (1, 50) and abs(float(times.float().mean()) - 25.5) < 0.5
    model = EDM(p_mean=-1.2, p_std=1.2)
    logs = model.training_sigma(model.draw(20000, generator)).log()
    assert abs(float(logs.mean()) + 1.2) < 0.03 and abs(float(logs.std()) - 1.2) < 0.03


def test_samples_of_a_single_image_are_that_image() -> None:
    """With the exact denoiser of a single image, 0 everywhere, every sample is that image."""
    def zero(x: torch.Tensor, t: torch.Tensor, aug: torch.Tensor | None = None) -> torch.Tensor:
        # F such that c_skip x + c_out F = 0, with c_skip, c_out of the level that t = ln(sigma)/4 stands for.
        sigma = (4 * t).exp().reshape(-1, 1, 1, 1)
        return -x * 0.5 / sigma  # x is c_in times the noisy image
    latents = torch.randn(2, 1, 4, 4)
    out = EDM(clip=False).sample(zero, latents, lambda step: latents)
    torch.testing.assert_close(2 * out - 1, torch.zeros_like(out), atol=1e-4, rtol=0)
