"""Floats to stored bits in one pass, and back, against the steps one by one."""

import pytest
import torch

from microbat.formats.block import BlockFormat
from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NVFP4,
)
from microbat.formats.packing import pack, unpack
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.transforms.hadamard import BlockHadamard
from microbat.transforms.kronecker import GPK, FullBlocks

pytest.importorskip("triton")
kernels = pytest.importorskip("microbat.kernels.quantize")

ALL = [MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8, NVFP4, INT8_ROW, INT4_GROUP]


def outliers(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.exp(torch.randn(shape[-1], generator=g))


def small_integers(*shape, seed=0):
    """Numbers whose products with +-2^-n sum exactly in float32, in any order."""
    return torch.randint(-40, 41, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def stored(q):
    parts = pack(q)
    return parts["weight" if "weight" in parts else "weight_packed"], parts["weight_scale"], q.tensor_scale


def assert_same_bytes(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("width", [96, 80, 90])
@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_stored_bits_are_those_of_pack_and_come_back(format, width):
    x = outliers(7, 3, width)
    q = AbsMax(format=format).quantize(x)
    codes, scales, outer = stored(q)
    got = kernels.quantize(x, format=format, rule=AbsMax(format=format).rule, outer=outer)
    assert_same_bytes(got, (codes, scales))
    back = kernels.dequantize(codes, scales, format=format, width=width, outer=outer)
    assert torch.equal(back, q.dequantize())
    into = torch.empty_like(back, dtype=torch.float64)
    assert kernels.dequantize(codes, scales, format=format, width=width, outer=outer, out=into) is into
    assert torch.equal(into.float(), back)


@pytest.mark.parametrize("format", [MXFP4, NVFP4, INT8_ROW], ids=lambda f: f.name)
def test_clip_ratios_of_a_weight_and_of_an_activation(format):
    inner, x = AbsMax(format=format), outliers(6, 96)
    groups = 96 // format.block_of(96)
    for shape in ((groups,), (6, groups)):
        ratios = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(4)) * 0.5 + 0.5
        codes, scales, outer = stored(Clip(inner, ratios).quantize(x))
        low, high = ratios.unbind(-1)
        got = kernels.quantize(x, format=format, rule=inner.rule, low=low, high=high, outer=outer)
        assert_same_bytes(got, (codes, scales))


@pytest.mark.parametrize("format", [MXFP4, MXFP8_E4M3, NVFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("block", [16, 32, 64])
def test_exact_transforms_give_the_same_bits(format, block):
    """Hadamard blocks of 16 and 64 are +-2^-n; so are integers times a signed permutation."""
    width = 192
    if block == 32:
        order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
        transform = FullBlocks(width=width, block=32)
        transform.P.data = -torch.eye(32)[order].repeat(6, 1, 1) * torch.arange(1.0, 7.0)[:, None, None]
    else:
        transform = BlockHadamard(width=width, block=block)
    x = small_integers(5, width)
    q = AbsMax(format=format)
    codes, scales, outer = stored(q.quantize(transform(x)))
    got = kernels.quantize(x, format=format, rule=q.rule, blocks=transform.blocks().detach(), outer=outer)
    assert_same_bytes(got, (codes, scales))


@pytest.mark.parametrize(("block", "g1", "width"), [(16, 4, 144), (32, 8, 160), (64, 8, 192)])
def test_gpk_with_clip_differs_by_neighbouring_codes_at_most(block, g1, width):
    """The product's terms add in another order: of 10^4 codes at most one in a thousand falls to a neighbour."""
    generator = torch.Generator().manual_seed(1)
    transform = GPK(width=width, block=block, g1=g1, init="orthogonal", generator=generator)
    ratios = torch.rand(-(-width // 32), 2, generator=generator) * 0.3 + 0.7
    clip, x = Clip(AbsMax(format=MXFP4), ratios), outliers(70, width)
    with torch.no_grad():
        expected = clip.quantize(transform(x))
        blocks = transform.blocks()
    low, high = ratios.unbind(-1)
    codes, scales = kernels.quantize(x, format=MXFP4, rule="even", blocks=blocks, low=low, high=high)
    got = unpack({"weight_packed": codes, "weight_scale": scales}, MXFP4, width)
    assert torch.equal(got.scales, expected.scales)
    differ = got.codes != expected.codes
    assert differ.float().mean() <= 1e-3
    steps = (got.codes.int() & 7) - (expected.codes.int() & 7)
    assert steps[differ].abs().le(1).all()


def test_the_tensor_scale_of_a_transformed_and_clipped_activation():
    transform, x = BlockHadamard(width=192, block=64), small_integers(70, 192)
    blocks, ratios = transform.blocks(), torch.full((12, 2), 0.5)
    low, high = ratios.unbind(-1)
    assert torch.equal(kernels.largest(x, format=NVFP4), x.abs().amax())
    assert torch.equal(kernels.largest(x, format=NVFP4, blocks=blocks), transform(x).abs().amax())
    clipped = Clip(AbsMax(format=NVFP4), ratios).clip(transform(x))
    assert torch.equal(kernels.largest(x, format=NVFP4, blocks=blocks, low=low, high=high), clipped.abs().amax())
    x[3, 100] = float("nan")
    assert kernels.largest(x, format=NVFP4, blocks=blocks).isnan()
    assert kernels.largest(x, format=NVFP4, low=low, high=high).isnan()


@pytest.mark.parametrize("format", [MXFP4, NVFP4], ids=lambda f: f.name)
def test_values_are_those_of_the_codes(format):
    transform, x = GPK(width=192, block=64, g1=8, init="orthogonal"), outliers(5, 192)
    ratios = torch.rand(192 // format.block, 2, generator=torch.Generator().manual_seed(4)) * 0.5 + 0.5
    low, high = ratios.unbind(-1)
    settings = {"format": format, "rule": AbsMax(format=format).rule, "blocks": transform.blocks().detach()}
    settings |= {"low": low, "high": high, "outer": torch.tensor(0.003) if format is NVFP4 else None}
    codes, scales = kernels.quantize(x, **settings)
    expected = kernels.dequantize(codes, scales, format=format, width=192, outer=settings["outer"])
    assert torch.equal(kernels.fake(x, **settings), expected)
    assert torch.equal(kernels.fake(x, **settings, dtype=torch.float16), expected.to(torch.float16))


def test_bfloat16_input_is_read_as_it_is():
    x = outliers(4, 64).to(torch.bfloat16)
    codes, scales, _ = stored(AbsMax(format=MXFP4).quantize(x))
    assert_same_bytes(kernels.quantize(x, format=MXFP4, rule="even"), (codes, scales))


def test_joined_blocks_are_the_same_map():
    blocks = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))
    joined = kernels.joined_blocks(blocks, 32)
    assert joined.shape == (3, 32, 32)
    assert torch.equal(torch.block_diag(*joined)[:80, :80], torch.block_diag(*blocks))


@pytest.mark.parametrize(
    ("format", "blocks", "message"),
    [(MXFP4, torch.ones(3, 32, 32), "3 transform blocks of 32 do not make a width of 64"),
     (INT8_ROW, torch.ones(2, 32, 32), "format 'int8' has a scale a row"),
     (MXFP4, torch.ones(8, 8, 8), "transform block of 8 is not a power of two from 16 to 128"),
     (NVFP4, None, "format 'nvfp4' has a scale of the whole tensor; pass it as outer")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(format: BlockFormat, blocks, message):
    with pytest.raises(ValueError, match=message):
        kernels.quantize(torch.ones(2, 64), format=format, rule=AbsMax(format=format).rule, blocks=blocks)
