"""The fused quantizer in Triton against the plain one: same bits forward, same gradient to rounding."""

import pytest
import torch

from microbat import kernels
from microbat.formats.block import split_blocks
from microbat.formats.element import E8M0
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
from microbat.formats.scales import rules_for
from microbat.quantizers import kernel

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
element = pytest.importorskip("microbat.kernels.element")
fake_quantize = pytest.importorskip("microbat.kernels.fake_quantize")

ALL = [MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8, NVFP4, INT8_ROW, INT4_GROUP]
CASES = [pytest.param(f, r, id=f"{f.name}-{r}") for f in ALL for r in rules_for(f) if kernels.knows(f, r)]


@triton.jit
def table_kernel(code_ptr, value_ptr, back_ptr, N: tl.constexpr, E: tl.constexpr):
    lanes = tl.arange(0, N)
    value = element.decode(tl.load(code_ptr + lanes), E)
    tl.store(value_ptr + lanes, value)
    tl.store(back_ptr + lanes, element.encode(value, E))


def blocks(format, num_blocks=37, seed=0):
    g = torch.Generator().manual_seed(seed)
    width = format.block_of(88)
    x = torch.randn(num_blocks, width, generator=g) * torch.exp(4 * torch.randn(num_blocks, 1, generator=g))
    x[3], x[5, 0] = 0.0, -0.0
    return x.to(torch.bfloat16).float()  # short numbers: ties happen


def ratios(num_blocks, seed=1):
    return torch.rand(2, num_blocks, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.4


def outer_of(x, format):
    return kernel.tensor_scale(x.abs().amax(), format) if format.has_tensor_scale else None


def same_bits(got, expected):
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(
        got.nan_to_num(0.0).view(torch.int32), expected.nan_to_num(0.0).view(torch.int32)
    )


@pytest.mark.parametrize("format", ALL, ids=lambda f: f.name)
def test_every_code_decodes_to_its_value_and_back(format):
    for which in {format.element, format.scale_element}:
        if which.bits > 8:
            continue
        codes = torch.arange(1 << which.bits, dtype=torch.int32)
        value, back = torch.empty(len(codes)), torch.empty_like(codes)
        table_kernel[(1,)](codes, value, back, N=len(codes), E=which, **element.EXACT)
        assert same_bits(value, which.table)
        number = torch.isfinite(which.table)
        unused = which.is_fixed_point & (codes == 1 << (which.bits - 1))
        assert torch.equal(back[number & ~unused], codes[number & ~unused])
        if which is E8M0:
            assert back[255] == 255


@pytest.mark.parametrize(("format", "rule"), CASES)
def test_forward_gives_the_same_bits(format, rule):
    x = blocks(format)
    for low, high in ((None, None), ratios(len(x))):
        expected, got = torch.empty_like(x), torch.empty_like(x)
        outer = outer_of(x, format)
        scale = kernel.forward(x, low, high, outer, expected, format=format, rule=rule)
        got_scale = fake_quantize.forward(x, low, high, outer, got, format=format, rule=rule)
        assert same_bits(got_scale, scale)
        assert same_bits(got, expected)


def test_forward_reads_and_writes_bfloat16():
    x = blocks(MXFP4).to(torch.bfloat16)
    expected, got = torch.empty_like(x), torch.empty_like(x)
    kernel.forward(x, None, None, None, expected, format=MXFP4, rule="even")
    fake_quantize.forward(x, None, None, None, got, format=MXFP4, rule="even")
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with NumPy
@pytest.mark.parametrize("rule", ["floor", "even", "rceil", "ceil", "mse"])
def test_edges_of_float32(rule):
    tiny = 2.0 ** torch.arange(-149.0, -117.0)
    huge = torch.tensor([3.4e38, -3e38, 1.0, 6 * 2.0**125]).repeat(8)
    x = torch.stack([tiny, huge, torch.zeros(32), *torch.ones(4, 32)])
    x[3, 4], x[4, 5], x[5, 6] = float("nan"), float("inf"), -float("inf")
    for low, high in ((None, None), ratios(len(x))):
        expected, got = torch.empty_like(x), torch.empty_like(x)
        scale = kernel.forward(x, low, high, None, expected, format=MXFP4, rule=rule)
        got_scale = fake_quantize.forward(x, low, high, None, got, format=MXFP4, rule=rule)
        assert same_bits(got_scale, scale)
        assert same_bits(got, expected)
        assert got[3:6].isnan().all()
        assert not got[6].isnan().any()


@pytest.mark.parametrize(("format", "rule"), CASES)
def test_backward_agrees_to_rounding(format, rule):
    x = blocks(format, seed=2)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    for low, high in ((None, None), ratios(len(x))):
        scale = kernel.forward(x, low, high, outer_of(x, format), torch.empty_like(x), format=format, rule=rule)
        expected = kernel.backward(grad, x, low, high, scale, format=format, rule=rule)
        got = fake_quantize.backward(grad, x, low, high, scale, format=format, rule=rule)
        assert torch.isfinite(got[0]).all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_output_that_is_not_contiguous_is_refused():
    x = split_blocks(torch.zeros(2, 64), 32).flatten(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        fake_quantize.forward(x, None, None, None, torch.empty(32, 4).T, format=MXFP4, rule="even")
