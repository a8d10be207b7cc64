"""The U-Nets and their layers: the same numbers in every memory order, precision and mode of execution."""
from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from EDM.training.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    PositionalEmbedding,
    downsample,
    store_bf16_weights,
    upsample,
)
from EDM.training.networks import DhariwalUNet, SongUNet, use_channels_last
from shared.cli import UserError
from shared.cpu.kernels import ChannelsLastGroupNorm, attention, is_channels_last, repeat_then_convolve
from shared.training.randomness import set_dropout_keys

SMALL = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=4, augment_dim=9, model_channels=16,
             channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
NETWORKS = {
    "ddpmpp": lambda **options: SongUNet(**{**SMALL, **options}),
    "ncsnpp": lambda **options: SongUNet(**{**SMALL, **options}, embedding_type="fourier", encoder_type="residual",
                                         channel_mult_noise=2, resample_filter=[1, 3, 3, 1]),
    "skip": lambda **options: SongUNet(**{**SMALL, **options}, encoder_type="skip", decoder_type="skip"),
    "adm": lambda **options: DhariwalUNet(**{**SMALL, "model_channels": 64, **options}),
}


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    """Return the network with no weight near zero, as after training."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def make(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomised(NETWORKS[name](**options))


def inputs(count: int = 3, resolution: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn([count, 3, resolution, resolution], generator=generator),
            torch.randn([count], generator=generator), torch.eye(4)[torch.arange(count) % 4],
            torch.randn([count, 9], generator=generator))


def output_and_gradients(net: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    net.zero_grad(set_to_none=True)
    out = net(*given)
    out.float().square().sum().backward()
    return out.detach().float(), torch.cat([p.grad.flatten().float() for p in net.parameters()])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_agrees_with_float64(name):
    net, given = make(name).eval(), inputs()
    expected, expected_gradients = output_and_gradients(copy.deepcopy(net).double(), [part.double() for part in given])
    out, gradients = output_and_gradients(net, given)
    assert apart(out, expected) < 1e-5 and apart(gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_order_and_precision_change_rounding_only(name, precision):
    options = dict(model_channels=64, img_resolution=16, attn_resolutions=[8])
    net, given = make(name, **options).eval(), inputs(resolution=16)
    expected, expected_gradients = output_and_gradients(net, given)
    use_channels_last(net)
    seen = []
    list(net.enc.values())[-1].register_forward_hook(lambda _, inputs, out: seen.append(is_channels_last(out)))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out, gradients = output_and_gradients(net, given)
    tolerance = 1e-5 if precision == "fp32" else 5e-2
    assert seen == [True]
    assert 0 < apart(out, expected) < tolerance and 0 < apart(gradients, expected_gradients) < tolerance


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_stored_in_bf16_give_what_autocast_does(name):
    net, given = make(name).eval(), inputs()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = net(*given)
        store_bf16_weights(net)
        assert torch.equal(net(*given), expected)
    assert {p.dtype for p in net.parameters() if p.dim() > 1} >= {torch.bfloat16}


def test_filters_of_bf16_are_those_of_fp32_rounded():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator).bfloat16()
    taps = torch.outer(taps := torch.tensor([1.0, 3, 3, 1]), taps)[None, None] / 64
    with torch.autocast("cpu", torch.bfloat16):
        for resample in (upsample, downsample):
            assert torch.equal(resample(x, taps), resample(x.double(), taps.double()).bfloat16())


def test_narrow_networks_keep_their_memory_order_on_a_cpu():
    net = make("ddpmpp")
    use_channels_last(net)
    assert all(parameter.is_contiguous() for parameter in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_compiles_as_one_graph(name):
    net, given = make(name, dropout=0.5, label_dropout=0.5).train(), inputs()
    set_dropout_keys(net, 0, 0, range(3))
    expected, expected_gradients = output_and_gradients(net, given)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for step in (0, 1):  # new keys need no new graph
        set_dropout_keys(net, 0, step, range(3))
        with torch._dynamo.config.patch(error_on_recompile=True):
            out, gradients = output_and_gradients(compiled, given)
        if step == 0:
            assert apart(out, expected) < 1e-5 and apart(gradients, expected_gradients) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_code_agrees(name, precision):
    net, given = make(name, dropout=0.5).train(), inputs()
    set_dropout_keys(net, 0, 0, range(3))
    expected, expected_gradients = output_and_gradients(net, given)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out, gradients = output_and_gradients(torch.compile(net, fullgraph=True), given)
    tolerance = 1e-5 if precision == "fp32" else 5e-2
    assert apart(out, expected) < tolerance and apart(gradients, expected_gradients) < tolerance


def test_label_dropout_hides_whole_labels():
    net = make("ddpmpp", label_dropout=0.5)
    x, noise, labels, augment = inputs(64)
    hidden = net.eval()(x, noise, torch.zeros_like(labels), augment)
    shown = net(x, noise, labels, augment)
    set_dropout_keys(net, 0, 0, range(64))
    for module in net.modules():
        if getattr(module, "rescale", False):
            module.p = 0
    out = net.train()(x, noise, labels, augment)
    like_hidden, like_shown = ((out - other).flatten(1).norm(dim=1) < 1e-4 for other in (hidden, shown))
    assert (like_hidden ^ like_shown).all() and 16 < like_hidden.sum() < 48


@pytest.mark.parametrize("option", ["embedding_type", "encoder_type", "decoder_type"])
def test_unknown_type_is_named(option):
    with pytest.raises(UserError, match=f"{option}: expected one of .*, got 'residul'"):
        SongUNet(**SMALL, **{option: "residul"})


def test_blocks_without_a_head_warn():
    with pytest.warns(UserWarning, match="64 channels"):
        net = DhariwalUNet(**SMALL)
    assert not any("qkv" in name for name, _ in net.named_parameters())


# --------------------------------------------------------------------------------------------------------------- layers

@pytest.mark.parametrize(("channels", "size"), [(128, 16), (128, 32), (512, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_group_norm(channels, size, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn([3, channels, size, size], generator=generator) * 2 + 1).to(dtype)
    gradient = torch.randn(x.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn([2, channels], generator=generator).unbind()
    reference = [part.double().requires_grad_() for part in (x, weight, bias)]
    expected = F.group_norm(reference[0], 32, *reference[1:], eps=1e-6)
    expected.backward(gradient.double())

    norm = GroupNorm(channels, eps=1e-6)
    norm.weight.data, norm.bias.data = weight, bias
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    assert ChannelsLastGroupNorm.is_faster(x)
    out = norm(x)
    out.backward(gradient)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    rounding = 1e-6 if dtype == torch.float32 else 4e-3
    assert apart(out, expected) < rounding and apart(x.grad, reference[0].grad) < rounding
    # Sums stay in float32 whatever the precision of the images.
    assert apart(norm.weight.grad, reference[1].grad) < 1e-5 and apart(norm.bias.grad, reference[2].grad) < 1e-5


def test_group_norm_of_small_images_is_pytorchs():
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    assert not ChannelsLastGroupNorm.is_faster(x)
    norm = GroupNorm(16)
    assert torch.equal(norm(x), F.group_norm(x, 4, norm.weight, norm.bias, norm.eps))


def test_attention_agrees_with_pytorchs():
    q, k, v = torch.randn(3, 2, 4, 64, 16, dtype=torch.float64)
    assert apart(attention(q, k, v), F.scaled_dot_product_attention(q, k, v)) < 1e-12


def test_repetition_and_convolution_in_one():
    x, weight = torch.randn(2, 5, 6, 7, dtype=torch.float64), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    expected = F.conv2d(upsample(x, None), weight, padding=1)
    assert apart(repeat_then_convolve(x, weight, None), expected) < 1e-12


def test_box_resampling_is_that_of_its_filter():
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    taps = torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64)
    assert apart(upsample(x, None), upsample(x, taps)) < 1e-12
    assert apart(downsample(x, None), downsample(x, taps)) < 1e-12


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_resampling_convolution(taps, kernel, direction):
    """Resample by the filter, then convolve, then add the bias, each as its definition says."""
    torch.manual_seed(0)
    layer = randomised(Conv2d(3, 3, kernel, resample_filter=taps, **{direction: True})).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    line = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    pad = (len(taps) - 1) // 2
    plane = torch.outer(line, line)[None, None].expand(3, 1, -1, -1)
    if direction == "down":
        expected = F.conv2d(F.pad(x, (pad, pad, pad, pad)), plane, stride=2, groups=3)
    else:
        spread = x.new_zeros(2, 3, 15, 15)
        spread[:, :, ::2, ::2] = x
        margin = len(taps) - 1 - pad
        expected = F.conv2d(F.pad(spread, (margin,) * 4), 4 * plane.flip(2, 3), groups=3)
    if kernel:
        expected = F.conv2d(expected, layer.weight, layer.bias, padding=kernel // 2)
    assert layer(x).shape == expected.shape and apart(layer(x), expected) < 1e-12


def test_embeddings():
    x = torch.tensor([0.0, 0.5, 700.0])
    for endpoint in (False, True):
        frequencies = [10000 ** (-j / (4 - endpoint)) for j in range(4)]
        expected = [[f(v * w) for f in (math.cos, math.sin) for w in frequencies] for v in x.tolist()]
        assert torch.allclose(PositionalEmbedding(8, endpoint)(x), torch.tensor(expected), atol=1e-4)
    fourier = FourierEmbedding(4096)
    assert fourier.freqs.std().item() == pytest.approx(16, rel=0.1)
    angles = 2 * math.pi * 0.5 * fourier.freqs.double()
    assert torch.allclose(fourier(x)[1].double(), torch.cat([angles.cos(), angles.sin()]), atol=1e-4)
