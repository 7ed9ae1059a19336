"""GPTQ's block kernel against the plain column loop."""

import pytest
import torch

from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP8_E4M3, NVFP4
from microbat.methods.gptq import _round_columns, inverse_cholesky
from microbat.quantizers.base import AbsMax

pytest.importorskip("triton")
kernels = pytest.importorskip("microbat.kernels.gptq")

N, K = 13, 80


def problem(seed=0):
    """A weight, the Hessian of correlated inputs, and the factor that GPTQ works with."""
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * K, K, generator=g) @ torch.randn(K, K, generator=g)
    hessian = (inputs.T @ inputs).double()
    factor, _ = inverse_cholesky(hessian, 0.01, hessian.diagonal() == 0)
    return torch.randn(N, K, generator=g), hessian, factor.float()


def run(weight, factor, quantizer, **settings):
    scales = quantizer.scales(weight)
    row_scale = scales.block if quantizer.format.block is None else None
    return kernels.round_columns(
        weight,
        factor,
        format=quantizer.format,
        rule=quantizer.rule,
        outer=scales.tensor,
        row_scale=row_scale,
        **settings,
    )


def loss(weight, hessian, q):
    error = q.dequantize().double() - weight
    return ((error @ hessian) * error).sum().item()


@pytest.mark.parametrize("format", [MXFP4, MXFP8_E4M3, NVFP4, INT4_GROUP, INT8_ROW], ids=lambda f: f.name)
def test_a_launch_a_block_gives_the_codes_of_the_plain_loop(format):
    weight, _, factor = problem()
    quantizer = AbsMax(format=format)
    expected = _round_columns(weight, factor, quantizer)
    got = run(weight, factor, quantizer, columns=format.block or 32)
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.codes, expected.codes)


@pytest.mark.parametrize("format", [MXFP4, NVFP4, INT8_ROW], ids=lambda f: f.name)
def test_many_blocks_in_a_launch_are_as_good(format):
    """Sums in another order may flip a code at a boundary, and what follows from it; never the outcome by 1 %."""
    weight, hessian, factor = problem(seed=1)
    quantizer = AbsMax(format=format)
    expected, got = _round_columns(weight, factor, quantizer), run(weight, factor, quantizer)
    assert loss(weight, hessian, got) == pytest.approx(loss(weight, hessian, expected), rel=0.01)
    assert loss(weight, hessian, got) < 0.7 * loss(weight, hessian, quantizer.quantize(weight))
    assert (got.codes != expected.codes).float().mean() < 0.01


def test_exact_feedback_gives_the_same_codes_in_one_launch():
    """A factor of +-1/2 and 1 and weights on a coarse grid: no sum rounds, so its order is no matter."""
    g = torch.Generator().manual_seed(2)
    factor = torch.eye(64) + torch.triu(torch.randint(-1, 2, (64, 64), generator=g).float() / 2, 1) * (
        torch.rand(64, 64, generator=g) < 0.05
    )
    weight = torch.randint(-12, 13, (N, 64), generator=g).float() / 4
    quantizer = AbsMax(format=MXFP4)
    expected, got = _round_columns(weight, factor, quantizer), run(weight, factor, quantizer)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)


def test_what_does_not_fit_is_refused():
    weight, _, factor = problem()
    with pytest.raises(ValueError, match="columns=48 is not a power of two that holds whole blocks of format 'mxfp4'"):
        kernels.round_columns(weight, factor, format=MXFP4, rule="even", columns=48)
    with pytest.raises(ValueError, match="row_scale is for formats with a scale a row"):
        kernels.round_columns(weight, factor, format=INT8_ROW, rule="absmax")
