"""HiF8 on all its codes, HiF4 by golden units and a scalar oracle of Algorithm 1 that shares no code with ours."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from microbat.formats.block import QTensor
from microbat.formats.hifloat import (
    E6M2,
    HIF4,
    HIF4_AMCT,
    HIF4_ASCEND,
    HIF8,
    HIF8_ELEMENT,
    HIF8_TO_INFINITY,
    S1P2,
    integer_product,
)
from microbat.formats.microscaling import MXFP4, NVFP4
from microbat.formats.packing import check, pack, unpack
from microbat.formats.scales import rules_for
from microbat.quantizers import kernel
from microbat.quantizers.base import AbsMax, Scales
from microbat.runtime import reference
from microbat.scheme import formats

PROFILES = [HIF4, HIF4_AMCT, HIF4_ASCEND]


def name(value):
    return getattr(value, "name", value)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(format, rule, x):
    y = AbsMax(format=format, rule=rule).quantize(x).dequantize()  # not fake, which is compiled for many numbers
    return ((y - x).square().sum() / x.square().sum()).item()


def decibels(format, rule, x):
    return -10 * math.log10(relative_error(format, rule, x))


# HiF8

VALUES = {
    0x01: 2.0**-22, 0x07: 2.0**-16, 0x08: 1, 0x09: 1.125, 0x0F: 1.875, 0x10: 2, 0x17: 3.75, 0x18: 0.5, 0x1F: 0.9375,
    0x20: 4, 0x27: 7.5, 0x28: 8, 0x2F: 15, 0x30: 0.25, 0x37: 0.46875, 0x38: 0.125, 0x3F: 0.234375, 0x40: 16, 0x43: 28,
    0x4F: 224, 0x50: 0.0625, 0x5F: 0.013671875, 0x60: 256, 0x61: 384, 0x6E: 32768, 0x70: 2.0**-8, 0x7E: 2.0**-15,
    0x7F: 1.5 * 2.0**-15, 0x81: -(2.0**-22), 0x88: -1,
}  # fmt: skip
CODES = {
    1.0625: 0x09, 1.1875: 0x0A, 15.49: 0x2F, 15.5: 0x40, 17: 0x40, 18: 0x41, 0.1171875: 0x38, 0.11: 0x53, 240: 0x60,
    300: 0x60, 320: 0x61, 40959: 0x6E, 2.0**-23: 0x01, 0.999 * 2.0**-23: 0x00, -0.999 * 2.0**-23: 0x00,
    1.49 * 2.0**-22: 0x01, 1.5 * 2.0**-22: 0x02, 1.5 * 2.0**-16: 0x7E, 1.75 * 2.0**-15: 0x7C, 0.1: 0x52, 1 / 3: 0x33,
    3.14159: 0x15, -7.3: 0xA7, 100: 0x4A, 1000: 0x64, 1e-4: 0x7D, 1e-6: 0x03, 1e-42: 0x00, float("nan"): 0x80,
}  # fmt: skip
ASCENDING = [
    *range(0x01, 0x08),
    *(0x7E, 0x7F, 0x7C, 0x7D, 0x7A, 0x7B, 0x78, 0x79, 0x76, 0x77, 0x74, 0x75, 0x72, 0x73, 0x70, 0x71),
    *range(0x5C, 0x60), *range(0x58, 0x5C), *range(0x54, 0x58), *range(0x50, 0x54), *range(0x38, 0x40),
    *range(0x30, 0x38), *range(0x18, 0x20), *range(0x08, 0x10), *range(0x10, 0x18), *range(0x20, 0x28),
    *range(0x28, 0x30), *range(0x40, 0x50), *range(0x60, 0x6F),
]  # fmt: skip


def test_hif8_codes_mean_what_the_paper_says():
    table = HIF8_ELEMENT.table
    assert {code: table[code].item() for code in VALUES} == VALUES
    assert table[0x80].isnan()
    assert table[0] == 0
    assert not torch.signbit(table[0])
    assert table[[0x6F, 0xEF]].tolist() == [math.inf, -math.inf]
    assert table.isfinite().sum() == 253
    assert HIF8_ELEMENT.bits == 8


def test_hif8_positive_codes_in_ascending_order():
    values = HIF8_ELEMENT.table[ASCENDING]
    assert len(ASCENDING) == 126
    assert (values.diff() > 0).all()
    assert values[-1] == HIF8_ELEMENT.max
    assert values[0] == HIF8_ELEMENT.min_subnormal


def test_hif8_encode_inverts_decode_on_all_codes():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(HIF8_TO_INFINITY.encode(HIF8_TO_INFINITY.decode(codes)), codes)
    finite = HIF8_ELEMENT.table[HIF8_ELEMENT.table.isfinite()]
    assert torch.equal(HIF8_ELEMENT.round(finite), finite)


@pytest.mark.parametrize("element", [HIF8_ELEMENT, HIF8_TO_INFINITY], ids=lambda e: e.overflow)
def test_hif8_golden_roundings(element):
    values = torch.tensor(list(CODES))
    assert element.encode(element.round(values)).tolist() == list(CODES.values())


def test_hif8_overflow_by_choice():
    x = torch.tensor([40959.996, 40960, 1e30, -40960, -math.inf])
    assert HIF8_ELEMENT.encode(HIF8_ELEMENT.round(x)).tolist() == [0x6E, 0x6E, 0x6E, 0xEE, 0xEE]
    assert HIF8_TO_INFINITY.encode(HIF8_TO_INFINITY.round(x)).tolist() == [0x6E, 0x6F, 0x6F, 0xEF, 0xEF]
    for name, largest in (("hif8", 2.0**15), ("hif8_inf", math.inf)):  # as schemes name them
        q = AbsMax(format=formats()[name], rule="unit").quantize(x[None, :4])
        assert unpack(pack(q), q.format, 4).dequantize()[0, 1:].tolist() == [largest, largest, -largest]


def test_hif8_rounds_to_the_nearest_code_and_ties_away_from_zero():
    """Every tie, the floats beside it, and random numbers of all magnitudes, against a search among all codes."""
    grid = HIF8_ELEMENT.grid.numpy().astype(np.float64)
    middle = torch.from_numpy((grid[1:] + grid[:-1]) / 2).float()
    beside = [torch.nextafter(middle, torch.tensor(bound)) for bound in (0.0, math.inf)]
    wide = normal(5000) * torch.exp2(
        torch.randint(-24, 16, (5000,), generator=torch.Generator().manual_seed(1)).float()
    )
    x = torch.cat([middle, *beside, wide])
    distance = np.abs(x.abs().numpy().astype(np.float64)[:, None] - grid)
    nearest = len(grid) - 1 - distance[:, ::-1].argmin(1)  # of two at one distance the larger
    assert HIF8_ELEMENT.round(x).abs().tolist() == grid[nearest].tolist()
    assert torch.equal(HIF8_ELEMENT.round(-x), -HIF8_ELEMENT.round(x))
    short = wide.to(torch.bfloat16)
    assert torch.equal(HIF8_ELEMENT.round(short.float()), HIF8_ELEMENT.round(short.to(torch.float64).float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hif8_of_every_number_of_sixteen_bits(dtype):
    """The sheet's formula in float64, which knows no grid, for all 65,536 bit patterns: denormals, infinities and NaN too."""
    short = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = short.double().numpy()
    a = np.abs(np.where(np.isfinite(x), x, 0))
    exponent = np.frexp(a)[1] - 1
    mantissa_bits = 3 - sum((np.abs(exponent) > bound).astype(int) for bound in (3, 7, 15))
    step = np.exp2(np.where(exponent == -23, -22, exponent) - np.where(exponent == -23, 0, mantissa_bits))
    rounded = np.where(a < 2.0**-23, 0, np.floor(a / step + 0.5) * step)  # below that even the tie is lost
    for element, beyond in ((HIF8_ELEMENT, 2.0**15), (HIF8_TO_INFINITY, math.inf)):
        expected = np.copysign(np.where((a >= 40960) | np.isinf(x), beyond, rounded), x)
        expected = torch.from_numpy(np.where(np.isnan(x), x, expected)).float()
        values = element.round(short.float())
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(element.decode(element.encode(values)), expected, rtol=0, atol=0, equal_nan=True)
    finite = short[torch.isfinite(short)]  # quantizers take it as it is, no float32 first
    by_quantizer = AbsMax(format=HIF8, rule="unit").quantize(finite).dequantize()
    assert torch.equal(by_quantizer, HIF8_ELEMENT.round(finite.float()))


@pytest.mark.parametrize(("scale", "expected"), [(1, 31.5), (1 / 8, 29.8), (1 / 64, 25.5), (64, 25.2), (1000, 19.7)])
def test_hif8_direct_cast_on_gaussian_data(scale, expected):
    """The sheet says 28.5 at 1/8; the arithmetic of the codes says 29.8, as does this."""
    assert decibels(HIF8, "unit", scale * normal(2**12, 64)) == pytest.approx(expected, abs=0.4)


def test_hif8_scales():
    x = normal(48, 96)
    for factor in (1e-6, 1, 1e6):  # a power of two for each row keeps numbers near 1
        assert decibels(HIF8, "floor", factor * x) == pytest.approx(31.5, abs=0.3)
    rows = torch.tensor([[1.0] * 8, [5.0] * 8, [15.9] * 8, [16.0] * 8, [0.0] * 8])
    assert AbsMax(format=HIF8).scales(rows).block.flatten().log2()[:4].tolist() == [-3, -1, 0, 1]
    assert AbsMax(format=HIF8).fake(rows)[4].tolist() == [0] * 8
    assert (AbsMax(format=HIF8, rule="unit").scales(x).block == 1).all()


def test_hif8_searches_the_best_scale_of_a_tensor():
    x = 0.01 * normal(48, 96)
    scales = AbsMax(format=HIF8, rule="pts").scales(x).block
    assert scales.unique().numel() == 1
    errors = {e: ((HIF8_ELEMENT.round(x * 2.0**-e) * 2.0**e - x).square().sum()).item() for e in range(-5, 5)}
    assert scales[0, 0].log2().item() == min(errors, key=errors.get)
    assert relative_error(HIF8, "pts", x) < 0.6 * relative_error(HIF8, "unit", x)
    x[3, 5] = math.nan  # a damaged row is NaN and does not count
    damaged = AbsMax(format=HIF8, rule="pts").fake(x)
    assert damaged[3].isnan().all()
    assert torch.equal(AbsMax(format=HIF8, rule="pts").scales(x).block[4:], scales[4:])


# HiF4


def test_e6m2_is_the_paper_s():
    assert E6M2.table[[0x00, 0x01, 0xC0, 0xFE]].tolist() == [2.0**-48, 1.25 * 2.0**-48, 1, 49152]
    assert E6M2.table[0xFF].isnan()
    assert E6M2.max == 49152
    codes = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(E6M2.encode(E6M2.decode(codes)), codes)
    values = torch.tensor([0, 2.0**-60, 1.125, 1.375, 1.9, 1e9])
    assert E6M2.round(values).tolist() == [2.0**-48, 2.0**-48, 1, 1.5, 2, 49152]


def test_s1p2_is_a_sign_and_quarters():
    assert S1P2.table.tolist() == [i / 4 for i in range(8)] + [-i / 4 for i in range(8)]
    assert torch.signbit(S1P2.table[8])
    x = torch.tensor([0.125, 0.124, 0.374, 0.375, 0.875, 1.625, 5, -0.375, -0.12, 0.5 - 2.0**-25])
    assert S1P2.round(x).tolist() == [0.25, 0, 0.25, 0.5, 1, 1.75, 1.75, -0.5, 0, 0.5]


@pytest.mark.parametrize(
    ("value", "expected"), [(7, 7), (0.875, 0.875), (1, 0.9375), (0.9375, 0.875), (4, 3.75), (3, 3.0625), (6, 6.125)]
)
@pytest.mark.parametrize("format", PROFILES, ids=name)
def test_units_of_equal_numbers(format, value, expected):
    assert AbsMax(format=format).fake(torch.full((64,), float(value))).tolist() == [expected] * 64


@pytest.mark.parametrize(("value", "scale", "code"), [(7, 1, 7), (1, 0.15625, 6), (3, 0.4375, 7), (6, 0.875, 7)])
@pytest.mark.parametrize("format", PROFILES, ids=name)
def test_what_units_of_equal_numbers_are_made_of(format, value, scale, code):
    """The value alone would also be that of twice the scale and half the flags."""
    q = AbsMax(format=format).quantize(torch.full((64,), float(value)))
    assert q.scales.tolist() == [scale]
    assert q.inner.tolist() == [[1] * 24]
    assert q.codes.tolist() == [code] * 64


@pytest.mark.parametrize(
    ("quarters", "reciprocal", "table"), [(0, 1, 0), (1, 0.80078125, 77), (2, 0.66796875, 43), (3, 0.5703125, 18)]
)
def test_reciprocals_of_unit_scales(quarters, reciprocal, table):
    """Four mantissas, so that hardware looks them up: the seven bits of the sheet's table under exponent -E, or -E - 1."""
    scales = E6M2.table[quarters:255:4]
    exponents = torch.arange(-48, -48 + len(scales))
    got = HIF4.reciprocal.element.round(scales.reciprocal())
    assert torch.equal(got, reciprocal * torch.exp2(-exponents.float()))
    assert (got.view(torch.int32) >> 16).tolist() == (((127 - exponents - int(quarters > 0)) << 7) | table).tolist()
    # And the quantizer uses it: an eighth's flag turns where its largest number times this, not times 1 / S, is 4.
    x = torch.zeros(2, 64)
    x[:, 0] = 7 * (1 + quarters / 4)
    x[:, 8] = 4 / reciprocal * torch.tensor([1 - 1e-6, 1 + 1e-6])
    for format in (HIF4, HIF4_AMCT):  # the third rounds the product before it compares
        q = AbsMax(format=format).quantize(x)
        assert q.scales.tolist() == [[1 + quarters / 4]] * 2
        assert q.inner[:, 0, 1].tolist() == [0, 1]


def test_the_unit_of_one_to_sixty_four():
    q = AbsMax(format=HIF4).quantize(torch.arange(1.0, 65.0))
    assert q.scales.tolist() == [10]
    assert HIF4.reciprocal.element.round(q.scales.reciprocal()).item() == pytest.approx(0.10009766, abs=5e-9)
    eighths, sixteenths = q.inner[0].split([8, 16])
    assert "".join(map(str, eighths.tolist())) == "00001111"
    assert "".join(map(str, sixteenths.tolist())) == "0000111101111111"
    assert q.dequantize()[:9].tolist() == [0, 2.5, 2.5, 5, 5, 5, 7.5, 7.5, 10]
    assert pack(q)["weight_scale"].tolist() == [0b110011_01, 0b00001111, 0b00001111, 0b01111111]
    assert pack(q)["weight_packed"][:3].tolist() == [0x10, 0x21, 0x22]


def to_bf16(x: Fraction) -> Fraction:
    """The nearest bfloat16 of a positive number, ties to even."""
    exponent = math.frexp(float(x))[1] - 1
    step = Fraction(2) ** (exponent - 7)
    return round(x / step) * step


def oracle(values, *, compared=lambda x: x, rounded=lambda x: x, ties_even=False):
    """Algorithm 1 in fractions, number by number: what a unit of 64 comes back as."""
    v = [Fraction(x) for x in values]
    peak = max(abs(x) for x in v)
    if not peak:
        return [0.0] * 64
    scale = to_bf16(peak * Fraction(0.142578125))
    scale = max(Fraction(2) ** -48, min(Fraction(49152), scale))
    exponent = math.frexp(float(scale))[1] - 1
    scale = round(scale / Fraction(2) ** (exponent - 2)) * Fraction(2) ** (exponent - 2)
    reciprocal = to_bf16(1 / scale)
    out = []
    for i, x in enumerate(v):
        eighth = max(abs(y) for y in v[i // 8 * 8 : i // 8 * 8 + 8])
        sixteenth = max(abs(y) for y in v[i // 4 * 4 : i // 4 * 4 + 4])
        first = int(compared(eighth * reciprocal) >= 4) if eighth else 0
        second = int(compared(sixteenth * reciprocal / 2**first) >= 2) if sixteenth else 0
        units = 4 * rounded(abs(x) * reciprocal / 2 ** (first + second)) if x else Fraction(0)
        code = min(7, round(units) if ties_even else math.floor(units + Fraction(1, 2)))
        out.append(math.copysign(float(scale * 2 ** (first + second) * Fraction(code, 4)), x))
    return out


@pytest.mark.parametrize(
    ("format", "how"),
    [(HIF4, {}), (HIF4_AMCT, {"rounded": to_bf16}),
     (HIF4_ASCEND, {"compared": to_bf16, "rounded": to_bf16, "ties_even": True})],
    ids=name,
)  # fmt: skip
def test_algorithm_1_bit_for_bit(format, how):
    """bfloat16 data of many magnitudes and shapes, and grids of quarters, on which there are ties."""
    scale = torch.exp2(torch.randint(-40, 20, (60, 1), generator=torch.Generator().manual_seed(1)).float())
    x = normal(60, 64) * torch.exp(normal(60, 64, seed=2)) * scale
    ties = torch.randint(-56, 57, (40, 64), generator=torch.Generator().manual_seed(3)) / 8.0
    ties[:, 17] = 7
    x = torch.cat([x, ties, torch.zeros(1, 64)]).to(torch.bfloat16).float()
    got = AbsMax(format=format).fake(x)
    expected = torch.tensor([oracle(row, **how) for row in x.tolist()])
    assert torch.equal(got, expected)


def units_on_the_grid(scale, U=400, seed=0):
    """Units [U, 64] of codes, flags and signs at random, the largest 7 ``scale``, where a part is doubled only if it must be;
    and which of them have a part whose largest number is exactly where its flag turns."""
    g = torch.Generator().manual_seed(seed)
    eighths = torch.randint(2, (U, 8), generator=g)
    sixteenths = torch.randint(2, (U, 8, 2), generator=g)
    codes = torch.randint(8, (U, 8, 2, 4), generator=g)
    signs = torch.randint(2, (U, 8, 2, 4), generator=g) * 2 - 1
    eighths[:, 0] = 1
    sixteenths[..., 0] |= eighths  # an eighth is doubled for a number of 4 or more, so one of its halves is too
    needed = torch.randint(4, 8, (U, 8, 2), generator=g)
    needed[:, 0, 0] = 7
    codes[..., 1] = torch.where(sixteenths == 1, needed, codes[..., 1])
    lane = scale * torch.exp2((eighths[..., None] + sixteenths).float())[..., None]
    x = lane * signs * codes / 4
    most = x.abs().amax(-1)
    turns = (most.amax(-1) == 4 * scale) | (most == 2 * scale * torch.exp2(eighths.float())[..., None]).any(-1)
    return x.flatten(1), torch.cat([eighths, sixteenths.flatten(1)], dim=1), turns.any(1)


@pytest.mark.parametrize("exponent", [-45, 0, 13])
@pytest.mark.parametrize("format", PROFILES, ids=name)
def test_what_is_on_the_grid_comes_back(format, exponent):
    """For three of four mantissas of the scale. bf16(1 / 1.75) is below 1 / 1.75, so that a number where a flag turns, 4 or 2
    times that scale, does not turn it and is cut to 3.5 or 1.75; the third profile rounds the product, 3.992, up to 4."""
    for mantissa in (1, 1.25, 1.5, 1.75):
        x, flags, turns = units_on_the_grid(mantissa * 2.0**exponent)
        q = AbsMax(format=format).quantize(x)
        same = (q.dequantize() == x).all(1)
        assert (q.scales == mantissa * 2.0**exponent).all()
        assert 0.2 < turns.float().mean() < 0.8
        if mantissa == 1.75 and format is not HIF4_ASCEND:
            assert torch.equal(same, ~turns)
        else:
            assert same.all()
            assert torch.equal(q.inner[:, 0].long(), flags)


@pytest.mark.parametrize("format", PROFILES, ids=name)
def test_powers_of_two_are_not_on_the_grid(format):
    """A seventh of the largest, 2^k, is 1.14 * 2^(k - 3), and 1.25 the nearest that scales have: it comes back as 6 of 6.4."""
    largest = torch.exp2(torch.arange(-40.0, 18))[:, None]
    x = largest * torch.exp2(-torch.randint(5, (58, 64), generator=torch.Generator().manual_seed(0)).float())
    x[:, 9] = -largest[:, 0]
    q = AbsMax(format=format).quantize(x)
    assert torch.equal(q.scales, 1.25 / 8 * largest)
    assert torch.equal(q.dequantize()[:, 9], -0.9375 * largest[:, 0])


@pytest.mark.parametrize("format", PROFILES, ids=name)
def test_the_scale_of_every_bfloat16_that_is_the_largest(format):
    """All 128 mantissas. One of them tells bf16(1 / 7) from 1 / 7, 1.9765625, and two a product that was rounded from one not."""
    largest = 1 + torch.arange(128) / 128
    x = torch.zeros(128, 64)
    x[:, 9] = largest
    expected = []
    for peak in map(Fraction, largest.tolist()):
        product = to_bf16(peak * Fraction(0.142578125))  # of [1/8, 1/2), where quarters are steps of 1/32 and 1/16
        step = Fraction(1, 32 if product < Fraction(1, 4) else 16)
        expected.append(float(round(product / step) * step))
    scales = AbsMax(format=format).quantize(x).scales[:, 0]
    assert scales.tolist() == expected
    assert scales[largest == 1.9765625].item() == 0.25  # of 1 / 7 it were 0.3125


def test_profiles_differ_where_they_may():
    x = normal(2**12, 64).to(torch.bfloat16).float()
    codes = [AbsMax(format=format).quantize(x) for format in PROFILES]
    different = [(q.dequantize() != codes[0].dequantize()).float().mean().item() for q in codes]
    assert different == [0, pytest.approx(0.0045, rel=0.1), pytest.approx(0.0099, rel=0.1)]
    flags = (codes[2].inner != codes[0].inner).float()
    assert flags[..., :8].mean().item() == pytest.approx(9e-4, rel=0.5)
    assert flags[..., 8:].mean().item() == pytest.approx(8e-4, rel=0.5)
    for format in PROFILES:
        assert decibels(format, "absmax", x) == pytest.approx(21.63, abs=0.03)


def test_relative_errors_of_four_bit_formats():
    x = 0.01 * normal(2**12, 64, seed=5)
    hif4, nvfp4, mxfp4 = (relative_error(f, r, x) for f, r in ((HIF4, "absmax"), (NVFP4, "absmax"), (MXFP4, "floor")))
    assert nvfp4 / hif4 == pytest.approx(1.31, rel=0.02)
    assert mxfp4 / hif4 == pytest.approx(1.93, rel=0.03)
    assert decibels(HIF4, "mse", x) == pytest.approx(22.1, abs=0.05)


def test_the_best_of_seven_scales_in_every_unit():
    x = normal(40, 128) * torch.exp(normal(40, 128, seed=1))

    def error(y):
        return (y - x).square().unflatten(-1, (-1, 64)).sum(-1)

    q = AbsMax(format=HIF4)
    chosen, plain = AbsMax(format=HIF4, rule="mse").scales(x).block, q.scales(x).block
    tried = []
    for step in range(-3, 4):
        block = E6M2.decode((E6M2.encode(plain).int() + step).to(torch.uint8))
        x_GB = x.unflatten(-1, (-1, 64))
        inner = kernel.inner_codes(x_GB, block, HIF4)
        tried.append(error(q.encode(x, Scales(block=block, inner=inner)).dequantize()))
    best = torch.stack(tried).amin(0)
    torch.testing.assert_close(error(AbsMax(format=HIF4, rule="mse").fake(x)), best, rtol=1e-4, atol=0)
    assert (chosen != plain).any()


@pytest.mark.parametrize("format", PROFILES, ids=name)
def test_hif4_is_equivariant_odd_and_not_idempotent(format):
    q, x = AbsMax(format=format), normal(7, 128)
    y = q.fake(x)
    assert torch.equal(q.fake(x * 2.0**9), y * 2.0**9)
    assert torch.equal(q.fake(-x), -y)
    one = torch.ones(64)
    assert [q.fake(one)[0], q.fake(q.fake(one))[0]] == [0.9375, 0.875]


def test_hif4_follows_powers_of_two_as_far_as_scales_go():
    """1.5 * 2^15 is the largest scale, 2^-48 the least: one step further and numbers saturate, or fall between codes."""
    q, x = AbsMax(format=HIF4), normal(3, 64)
    x = 7 * x / x.abs().amax(-1, keepdim=True)
    x[:, 40:48] = 0.25  # an eighth of numbers that are one code each
    top, bottom = 1.5 * x, x
    for unit, power, beyond in ((top, 15, 16), (bottom, -48, -49)):
        assert torch.equal(q.fake(unit * 2.0**power), q.fake(unit) * 2.0**power)
        assert (q.fake(unit * 2.0**beyond) != q.fake(unit) * 2.0**beyond).any(1).all()


def test_the_smallest_numbers_of_hif4():
    """A quarter of the least scale; the tie under it goes as the profile's ties go."""
    x = torch.zeros(64)
    x[:3] = torch.tensor([-(2.0**-50), 2.0**-51, 0.99 * 2.0**-51])
    for format, tie in ((HIF4, 2.0**-50), (HIF4_AMCT, 2.0**-50), (HIF4_ASCEND, 0)):
        assert AbsMax(format=format).quantize(x).dequantize()[:3].tolist() == [-(2.0**-50), tie, 0]


def test_hif4_edges():
    q = AbsMax(format=HIF4)
    zero = q.quantize(torch.zeros(64))
    assert pack(zero)["weight_scale"].tolist() == [0, 0, 0, 0]
    assert (zero.codes == 0).all()
    huge = q.fake(torch.full((64,), 1e30))
    assert (huge == 7 * 49152).all()
    for rule in rules_for(HIF4):
        for bad in (math.inf, -math.inf, math.nan):
            x = torch.ones(2, 128)
            x[0, 70] = bad
            y = AbsMax(format=HIF4, rule=rule).fake(x)
            stored = AbsMax(format=HIF4, rule=rule).quantize(x)
            assert y[0, 64:].isnan().all()
            assert y[0, :64].isfinite().all()
            assert y[1].isfinite().all()
            assert pack(stored)["weight_scale"][0, 4] == 0xFF
            assert torch.equal(stored.dequantize().isnan(), y.isnan())


def test_hif4_tail_is_padded_with_zeros():
    x = normal(3, 80)
    q = AbsMax(format=HIF4)
    assert torch.equal(q.fake(x)[:, 64:], q.fake(torch.nn.functional.pad(x, (0, 48)))[:, 64:80])
    assert q.quantize(x).inner.shape == (3, 2, 24)


def test_stored_units_take_four_and_a_half_bits_and_damage_is_refused():
    x = normal(6, 192)
    q = AbsMax(format=HIF4).quantize(x)
    stored = pack(q)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == {
        "weight_packed": (torch.uint8, (6, 96)),
        "weight_scale": (torch.uint8, (6, 12)),
    }
    assert HIF4.bits_per_element((6, 192)) == 4.5
    check(unpack(stored, HIF4, 192), (6, 192))
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    assert torch.equal(pack(unpack({**stored, "weight_scale": every_byte}, HIF4, 192))["weight_scale"], every_byte)
    stored["weight_scale"][2, 4] = 0xFF
    with pytest.raises(ValueError, match="not a number"):
        check(unpack(stored, HIF4, 192), (6, 192))
    with pytest.raises(ValueError, match="for a tensor of"):
        check(QTensor(format=HIF4, codes=q.codes, scales=q.scales), (6, 192))


@pytest.mark.parametrize("rule", rules_for(HIF4))
def test_the_integer_product_is_the_product(rule):
    x, weight = (AbsMax(format=HIF4, rule=rule).quantize(normal(n, 192, seed=n)) for n in (5, 7))
    assert torch.equal(integer_product(x, weight), reference.product(x, weight))
    most = AbsMax(format=HIF4).quantize(torch.full((1, 64), 7.0))
    assert integer_product(most, most).item() == 50176 / 16
    with pytest.raises(ValueError, match="not of nvfp4"):
        integer_product(most, AbsMax(format=NVFP4).quantize(torch.ones(1, 64)))


def test_four_over_six_takes_the_better_scale_of_every_block():
    x = normal(40, 64) * torch.exp(0.5 * normal(40, 64, seed=1))
    q = AbsMax(format=NVFP4, rule="four_over_six")
    scales = q.scales(x)
    assert scales.tensor.item() == pytest.approx(x.abs().amax().item() / (6 * 256), rel=1e-6)
    x_GB = x.unflatten(-1, (-1, 16))
    exact = x_GB.abs().amax(-1) / scales.tensor
    errors, tried = [], []
    for largest in (6, 4):
        block = (exact / largest).to(torch.float8_e4m3fn).float()
        y = q.encode(x, Scales(block=block, tensor=scales.tensor)).dequantize()
        errors.append((y - x).square().unflatten(-1, (-1, 16)).double().sum(-1))
        tried.append(block)
    four = scales.block == tried[1]
    assert 0.05 < four.float().mean() < 0.6
    assert ((scales.block == tried[0]) | four).all()
    assert (torch.where(four, errors[1], errors[0]) <= torch.minimum(*errors) * (1 + 1e-5)).all()
    assert relative_error(NVFP4, "four_over_six", x) < 0.97 * relative_error(NVFP4, "absmax", x)


def test_four_over_six_keeps_ten_twenty_thirty_forty():
    """The paper's example: under a scale for 4 these are exact, under one for 6 they are not. 40 is the tensor's largest."""
    x = torch.tensor([10.0, 20, 30, 40] * 4)
    scales = Scales(block=torch.tensor([10.0]), tensor=torch.tensor(1.0))
    q = AbsMax(format=NVFP4, rule="four_over_six")
    assert q.scales_within(x, torch.tensor(1.0)).block.item() == 10
    assert q.encode(x, scales).dequantize().tolist() == x.tolist()
