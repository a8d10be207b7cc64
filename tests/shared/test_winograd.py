"""3x3 convolutions by Winograd's algorithm against direct ones in float64."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shared.cpu import winograd
from shared.cpu.winograd import Winograd, convolve

LAST = torch.channels_last


def inputs(n: int, c: int, k: int, height: int, width: int, biased: bool) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    found = [torch.randn(n, c, height, width).to(memory_format=LAST), torch.randn(k, c, 3, 3).to(memory_format=LAST),
             torch.randn(k) if biased else None]
    return [value if value is None else value.requires_grad_() for value in found]


def outcome(compute, given: list[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the result and the gradients of a sum of it with weights."""
    given = [value if value is None else value.detach().to(dtype).requires_grad_() for value in given]
    out = compute(*given)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return [out.detach(), *(value.grad for value in given if value is not None)]


@pytest.mark.parametrize(("shape", "biased"), [((2, 128, 160, 16, 16), True), ((1, 130, 128, 8, 12), False),
                                               ((5, 8, 4, 4, 4), True)])
def test_results_and_gradients_are_those_of_a_direct_convolution(shape, biased, monkeypatch):
    monkeypatch.setattr(winograd, "PIXELS", 2 * shape[3] * shape[4])  # parts of two images and one of one
    given = inputs(*shape, biased)
    found = outcome(Winograd.apply, given, torch.float32)
    expected = outcome(lambda *values: F.conv2d(*values, padding=1), given, torch.float64)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 4e-6 * exact.norm()
    assert found[0].is_contiguous(memory_format=LAST)


def test_only_wide_channels_last_float32_on_a_cpu():
    x, weight, _ = inputs(2, 128, 128, 16, 16, False)
    assert Winograd.is_faster(x, weight)
    assert not Winograd.is_faster(x.contiguous(), weight)
    assert not Winograd.is_faster(x.bfloat16(), weight.bfloat16())
    assert not Winograd.is_faster(x[:, :, :15], weight)
    assert not Winograd.is_faster(x[:1], weight)
    assert not Winograd.is_faster(x, weight[:64])
    assert not Winograd.is_faster(x, weight[:, :, :1, :1])
    with torch.autocast("cpu", torch.bfloat16):
        assert not Winograd.is_faster(x, weight)
        assert convolve(x, weight, None).dtype == torch.bfloat16


def test_a_gradient_that_nobody_wants_is_not_computed():
    x, weight, bias = inputs(2, 128, 128, 16, 16, True)
    Winograd.apply(x.detach(), weight, bias).sum().backward()
    assert x.grad is None
    Winograd.apply(x, weight.detach(), bias.detach()).sum().backward()
    assert x.grad is not None
