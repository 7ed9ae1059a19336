"""Learnable clipping: no-op at ratio 1, bounds that never cross, gradients against autograd of the written-out formula."""

import pytest
import torch

from microbat.formats.hifloat import HIF4
from microbat.formats.microscaling import MXFP4
from microbat.formats.scales import rules_for
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.scheme import formats

QUANTIZER = AbsMax(format=MXFP4, rule="floor")


def data(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_ratio_one_is_no_clipping():
    x = data(5, 96)
    clip = Clip(QUANTIZER, torch.ones(3, 2))
    assert torch.equal(clip.fake(x), QUANTIZER.fake(x))
    assert torch.equal(clip.quantize(x).dequantize(), clip.fake(x))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", formats())
def test_fake_is_quantize_of_the_clipped(name, whole):
    x = data(5, 96)
    quantizer = AbsMax(format=formats()[name])
    blocks = 1 if whole else -(-96 // quantizer.format.block_of(96))
    ratios = torch.rand(blocks, 2, generator=torch.Generator().manual_seed(1))
    clip = Clip(quantizer, ratios, whole=whole)
    assert torch.equal(clip.fake(x), quantizer.fake(clip.clip(x)))
    assert torch.equal(clip.quantize(x).dequantize(), clip.fake(x))


def test_same_sign_blocks_keep_ordered_bounds():
    x = data(4, 32).abs() + 1
    clip = Clip(QUANTIZER, torch.tensor([[0.99, 0.5]]))
    clipped = clip.clip(x)
    assert (clipped <= 0.5 * x.amax(-1, keepdim=True)).all()
    assert (clipped > 0).all()


def test_freeze_keeps_the_values():
    clip = Clip(QUANTIZER, shape=(3,))
    with torch.no_grad():
        clip.logits += torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    x = data(4, 96)
    frozen = clip.freeze()
    assert torch.equal(frozen.fake(x), clip.fake(x))
    assert not list(frozen.parameters())


def test_gradients_equal_those_of_the_formula():
    """Reference: clip, scale and mask with autograd in float64, straight-through roundings of values and scale."""
    x = data(6, 64).to(torch.float64)
    logits = torch.randn(2, 2, generator=torch.Generator().manual_seed(4)).to(torch.float64)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(5)).to(torch.float64)

    x1, l1 = x.clone().requires_grad_(), logits.clone().requires_grad_()
    blocks, ratio = x1.unflatten(-1, (2, 32)), torch.sigmoid(l1)
    low = (ratio[:, 0] * blocks.amin(-1).clamp(max=0))[..., None]
    high = (ratio[:, 1] * blocks.amax(-1).clamp(min=0))[..., None]
    clipped = torch.minimum(torch.maximum(blocks, low), high)
    amax = torch.maximum(high, -low)
    exact = QUANTIZER.scales(clipped.detach().flatten(-2).float()).block.to(torch.float64)[..., None]
    scale = amax * (exact / amax).detach()
    units = (clipped / scale).clamp(-6, 6)
    rounded = QUANTIZER.format.element.round((clipped / exact).detach().float()).to(torch.float64)
    y = scale * (units + (rounded - units).detach())
    assert (clipped.abs() > 6 * exact).any()
    (y.flatten(-2) * weight).sum().backward()

    clip = Clip(QUANTIZER, shape=(2,))
    with torch.no_grad():
        clip.logits.copy_(logits)
    x2 = x.float().requires_grad_()
    (clip.fake(x2) * weight.float()).sum().backward()
    torch.testing.assert_close(x2.grad.double(), x1.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip.logits.grad.double(), l1.grad, rtol=1e-4, atol=1e-5)
    assert (clip.logits.grad != 0).all()


@pytest.mark.parametrize(
    ("name", "rule"),
    [(n, r) for n, f in formats().items() if not f.has_tensor_scale and not f.terms for r in rules_for(f)],
)
@pytest.mark.parametrize("ratios", [None, (0.7, 0.9), (1.0, 1.0)])
def test_the_gradient_is_homogeneous(name, rule, ratios):
    """Scaling a block scales its values: Euler's sum x dL/dx = sum y dL/dy in every block."""
    format = formats()[name]
    block = format.block_of(128)
    x = data(6, 128, seed=7).requires_grad_()
    grad = data(6, 128, seed=8)
    low, high = (None, None) if ratios is None else (torch.tensor(r) for r in ratios)
    y = AbsMax(format=format, rule=rule).fake(x, low, high)
    y.backward(grad)
    by_input, by_output = ((a * b).unflatten(-1, (-1, block)).sum(-1) for a, b in ((x, x.grad), (y, grad)))
    torch.testing.assert_close(by_input, by_output, rtol=1e-4, atol=1e-4)


def test_scales_inside_a_block_saturate_where_their_part_does():
    """HiF4: what is beyond its own part's reach passes its gradient to the block's largest, as in other formats."""
    x = torch.zeros(64)
    x[0], x[1], x[8], x[9] = 7.0, 1.0, 3.9, 0.5  # S = 1; the second eighth is not doubled, its first half is: up to 3.5
    x.requires_grad_()
    y = AbsMax(format=HIF4).fake(x)
    assert y[[0, 1, 8, 9]].tolist() == [7, 1, 3.5, 0.5]
    y.sum().backward()
    assert x.grad[[1, 9]].tolist() == [1, 1]
    assert x.grad[8] == 0
    assert x.grad[0].item() == pytest.approx(((7 + 1 + 3.5 + 0.5) - (1 + 0.5)) / 7)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_a_clip_of_rows_is_autograd_s(compiled):
    """Against amin, amax and clamp in float64, with ties, an all-positive and an all-zero row."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1200 if compiled else 12, 128, generator=g).to(torch.float64)
    x[0, :3], x[1], x[2] = x[0].amax() + 1, x[1].abs() + 0.5, 0.0
    ratios = 0.5 + 0.4 * torch.rand(len(x), 1, 2, generator=g).to(torch.float64)
    weigh = torch.randn(x.shape, generator=g).to(torch.float64)

    def reference(x, ratios):
        low = ratios[..., 0] * x.amin(-1, keepdim=True).clamp(max=0)
        high = ratios[..., 1] * x.amax(-1, keepdim=True).clamp(min=0)
        return torch.minimum(torch.maximum(x, low), high)

    def clip(x, ratios):
        return Clip(AbsMax(format=MXFP4), ratios, whole=True).clip(x)

    wanted = torch.autograd.functional.vjp(reference, (x, ratios), weigh)
    found = torch.autograd.functional.vjp(clip, (x.float(), ratios.float()), weigh.float())
    torch.testing.assert_close(found[0], wanted[0].float())
    for ours, exact in zip(found[1], wanted[1], strict=True):
        rows = [row for row in range(len(x)) if row != 2]  # between bounds of zero a zero is on all three sides
        torch.testing.assert_close(ours[rows], exact[rows].float(), rtol=1e-4, atol=1e-5)
