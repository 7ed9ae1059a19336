"""Residual channels: the laws, the layout, the golden block, the sheet's errors, nested S, the bound."""

import pytest
import torch

from microbat.formats.integer import INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP8_E4M3, NVFP4
from microbat.formats.packing import pack, unpack
from microbat.quantizers.base import AbsMax
from microbat.quantizers.residual import Residual, effective, facing
from microbat.runtime import reference

T, N, K = 7, 5, 160
GOLDEN = [0.1, -0.4, 1.3, 2.7, -5.2, 0.6, 3.3, -0.05, 4.9, -1.8, 0.9, 2.2, -3.7, 6.6, -0.3, 1.1]


def spread(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(torch.randn(shape[-1], generator=g))


def residual(channels, format=NVFP4):
    return Residual(inner=AbsMax(format=format), channels=channels)


@pytest.mark.parametrize("format", [NVFP4, MXFP4, MXFP8_E4M3], ids=lambda f: f.name)
@pytest.mark.parametrize("channels", [32, 96, K])
def test_q_law(format, channels):
    quantizer, x = residual(channels, format), spread(2, T, K)
    q = quantizer.quantize(x)
    assert q.shape == (2, T, K + channels)
    again = unpack(pack(q), format, K + channels)
    assert torch.equal(again.dequantize(), quantizer.fake(x))
    packed = quantizer.pack(x)
    assert torch.equal(packed.codes, pack(q)["weight" if format is MXFP8_E4M3 else "weight_packed"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.fake(x), again.dequantize())


@pytest.mark.parametrize("channels", [32, 96, K])
def test_a_stock_product_computes_both_terms(channels):
    """Q(X) Q(W)^T + Q(R) Q(W_last)^T, from nothing but the two wide tensors in their own format."""
    quantizer, x, w = residual(channels), spread(T, K), AbsMax(format=NVFP4).quantize(spread(N, K, seed=1))
    first = quantizer.inner.quantize(x).dequantize()
    rest = (x - first)[:, K - channels :]
    second = quantizer.inner.encode(rest, quantizer.inner.scales_within(rest, quantizer.inner.scales(x).tensor))
    last = w.dequantize().double()[:, K - channels :]
    expected = first.double() @ w.dequantize().double().T + second.dequantize().double() @ last.T
    torch.testing.assert_close(
        reference.product(quantizer.quantize(x), quantizer.facing(w)), expected, rtol=1e-12, atol=1e-9
    )
    wide = quantizer.fake(x)
    torch.testing.assert_close(
        wide.double() @ quantizer.facing(w.dequantize()).double().T,
        quantizer.effective(wide).double() @ w.dequantize().double().T,
        rtol=1e-6,
        atol=1e-6,
    )
    assert torch.equal(quantizer.facing(w).dequantize(), quantizer.facing(w.dequantize()))
    assert torch.equal(quantizer.original(quantizer.facing(w.dequantize())), w.dequantize())


def test_layout_is_interleaved():
    quantizer = residual(48)
    groups = quantizer.facing(torch.arange(K).float()[None]).view(-1, 16)[:, 0] / 16
    assert groups.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9, 9]
    # Copies are bytes: quantizing the last columns anew under the same scale gives them too.
    w = AbsMax(format=NVFP4).quantize(spread(N, K, seed=1))
    wide = quantizer.facing(w)
    for place, group in enumerate(groups.int().tolist()):
        codes = slice(16 * place, 16 * place + 16), slice(16 * group, 16 * group + 16)
        assert torch.equal(wide.codes[:, codes[0]], w.codes[:, codes[1]])
        assert torch.equal(wide.scales[:, place], w.scales[:, group])


def test_golden_block():
    x = torch.zeros(32)
    x[16:] = torch.tensor(GOLDEN)
    x[0] = 2688  # a tensor scale of 1
    q = residual(16).quantize(x)
    values = NVFP4.element.decode(q.codes)
    assert q.tensor_scale == 1
    assert q.scales[1:].tolist() == [1.125, 0.1171875]
    assert values[16:32].tolist() == [0, -0.5, 1, 2, -4, 0.5, 3, 0, 4, -1.5, 1, 2, -3, 6, -0.5, 1]
    assert values[32:].tolist() == [1, 1.5, 1.5, 4, -6, 0.5, -0.5, -0.5, 3, -1, -2, -0.5, -3, -1.5, 2, 0]
    assert (effective(residual(16), q.dequantize()) - x)[16:].abs().max().item() == pytest.approx(0.0484375, abs=1e-6)


@pytest.mark.parametrize(
    ("draw", "once", "twice"),
    [(lambda g: torch.randn(256, 512, generator=g), 9.03e-3, 7.48e-5), (lambda g: _laplace(g), 8.60e-3, 7.10e-5)],
    ids=["gaussian", "laplace"],
)
def test_errors_of_the_sheet(draw, once, twice):
    x, inner = draw(torch.Generator().manual_seed(0)), AbsMax(format=NVFP4)
    error = lambda y: ((y - x).square().sum() / x.square().sum()).item()  # noqa: E731
    assert error(inner.fake(x)) == pytest.approx(once, rel=0.03)
    whole = residual(512)
    assert error(whole.effective(whole.fake(x))) == pytest.approx(twice, rel=0.05)
    assert error(whole.effective(whole.fake(x))) < error(AbsMax(format=MXFP8_E4M3).fake(x)) / 8


def _laplace(g):
    u = torch.rand(256, 512, generator=g) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs())


def test_more_channels_never_add_error_anywhere():
    x = spread(T, K)
    before = (AbsMax(format=NVFP4).fake(x) - x).abs()
    for channels in (16, 32, 80, K):
        quantizer = residual(channels)
        after = (quantizer.effective(quantizer.fake(x)) - x).abs()
        assert (after <= before + 1e-6 * x.abs()).all()
        before = after


def test_bound_of_what_is_quantized_twice():
    """Where scales are normal numbers: (1.0625 / 6)^2 of the block's largest, below MXFP8's 32 / 448."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    quantizer = residual(512)
    q = quantizer.quantize(x)
    normal = (q.scales.unflatten(-1, (-1, 2)) >= 2.0**-6).all(-1)
    assert normal.double().mean() > 0.99
    largest = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    once = (quantizer.inner.fake(x) - x).unflatten(-1, (-1, 16)).abs().amax(-1) / largest
    twice = (quantizer.effective(q.dequantize()) - x).unflatten(-1, (-1, 16)).abs().amax(-1) / largest
    assert once.max() <= 1.0625 / 6
    assert twice[normal].max() <= (1.0625 / 6) ** 2 < 32 / 448


def test_nothing_left_is_nothing_added():
    inner = AbsMax(format=NVFP4)
    exact = inner.fake(spread(T, K))
    quantizer = residual(64)
    q = quantizer.quantize(exact)
    assert torch.equal(quantizer.effective(q.dequantize()), inner.fake(exact))


def test_powers_of_two_change_no_code():
    x, quantizer = spread(T, K), residual(64)
    one, two = quantizer.quantize(x), quantizer.quantize(x * 4)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)


def test_what_does_not_fit_is_refused():
    for channels in (0, 8, -16):
        with pytest.raises(ValueError, match=f"channels={channels} must be a positive multiple"):
            residual(channels)
    with pytest.raises(ValueError, match="block of int8"):
        Residual(inner=AbsMax(format=INT8_ROW), channels=64)
    with pytest.raises(ValueError, match=f"do not fit a width of {K}"):
        residual(K + 16).fake(spread(T, K))


def test_other_quantizers_leave_widths_alone():
    w = spread(N, K)
    assert facing(None, w) is w
    assert effective(AbsMax(format=NVFP4), w) is w
