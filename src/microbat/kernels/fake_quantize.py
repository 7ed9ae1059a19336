"""Fake quantization forward and backward, fused: ``quantizers.kernel.forward`` and ``backward`` with the same arguments.

Forward gives the same bits (under the rule ``mse``, whose two errors are sums, a tie may fall the other way). Backward
sums in another order: its results agree to float32 rounding. Traffic: one read and one write a tensor, and 4 bytes a
block.
"""

# Shapes: G blocks, B block size; a program takes R blocks, padded to L lanes.

import torch
import triton
import triton.language as tl
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.kernels.element import (
    EXACT,
    block_scale,
    bounds,
    clip,
    largest_magnitude,
    round_blocks,
)

ELEMENTS = 4096  # of one program


@triton.jit
def forward_kernel(
    x_ptr, low_ptr, high_ptr, outer_ptr, y_ptr, scale_ptr, num_blocks,
    B: tl.constexpr, R: tl.constexpr, L: tl.constexpr, F: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * R + tl.arange(0, R)
    lanes = tl.arange(0, L)
    real = blocks < num_blocks
    inside = real[:, None] & (lanes < B)[None, :]
    offsets = blocks.to(tl.int64)[:, None] * B + lanes[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if low_ptr is None:
        amax = largest_magnitude(x)
    else:
        low, high = tl.load(low_ptr + blocks, mask=real), tl.load(high_ptr + blocks, mask=real)
        low, high = bounds(x, low, high)
        x, amax = clip(x, low, high)
    if outer_ptr is None:
        scale = block_scale(x, amax, None, F, RULE)
    else:
        outer = tl.load(outer_ptr)
        scale = block_scale(x, amax, outer, F, RULE) * outer
    y = round_blocks(x, scale, F) * scale[:, None]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + blocks, scale, mask=real)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, low_ptr, high_ptr, scale_ptr, grad_x_ptr, grad_low_ptr, grad_high_ptr, num_blocks,
    B: tl.constexpr, R: tl.constexpr, L: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    blocks = tl.program_id(0) * R + tl.arange(0, R)
    lanes = tl.arange(0, L)
    real = blocks < num_blocks
    inside = real[:, None] & (lanes < B)[None, :]
    offsets = blocks.to(tl.int64)[:, None] * B + lanes[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + blocks, mask=real, other=1.0)
    smallest, largest = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    if low_ptr is None:
        low_ratio, high_ratio = tl.full((R,), 1.0, tl.float32), tl.full((R,), 1.0, tl.float32)
    else:
        low_ratio, high_ratio = tl.load(low_ptr + blocks, mask=real), tl.load(high_ptr + blocks, mask=real)
    low, high = low_ratio * smallest, high_ratio * largest
    clipped, amax = clip(x, low, high)
    grad_c = tl.where(tl.abs(clipped) <= (scale * F.element.max)[:, None], grad, 0.0)
    y = round_blocks(clipped, scale, F) * scale[:, None]
    through_scale = tl.sum(grad * y - grad_c * clipped, 1)
    grad_amax = tl.where(amax > 0, tl.div_rn(through_scale, tl.where(amax > 0, amax, 1.0)), 0.0)
    above, below = x > high[:, None], x < low[:, None]
    high_rules = high >= -low
    grad_high = tl.sum(tl.where(above, grad_c, 0.0), 1) + tl.where(high_rules, grad_amax, 0.0)
    grad_low = tl.sum(tl.where(below, grad_c, 0.0), 1) - tl.where(high_rules, 0.0, grad_amax)
    # The bounds follow the block's extremes: the lanes that hold those carry the bounds' gradient.
    grad_x = tl.where(above | below, 0.0, grad_c)
    grad_x += tl.where(x == largest[:, None], (grad_high * high_ratio)[:, None], 0.0)
    grad_x += tl.where(x == smallest[:, None], (grad_low * low_ratio)[:, None], 0.0)
    tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if low_ptr is not None:
        tl.store(grad_low_ptr + blocks, grad_low * smallest, mask=real)
        tl.store(grad_high_ptr + blocks, grad_high * largest, mask=real)


def forward(
    x_GB: Tensor,
    low_G: Tensor | None,
    high_G: Tensor | None,
    outer: Tensor | None,
    out_GB: Tensor,
    *,
    format: BlockFormat,
    rule: str,
) -> Tensor:
    """Write the values [G, B] after clipping, scaling and rounding to ``out_GB``; return the scales [G], all levels."""
    if not out_GB.is_contiguous():
        raise ValueError("fake quantization writes to a contiguous tensor; out_GB is not")
    scale_G = torch.empty(x_GB.shape[0], dtype=torch.float32, device=x_GB.device)
    grid, shape = _launch(x_GB)
    low_G, high_G = (None if ratio is None else ratio.contiguous() for ratio in (low_G, high_G))
    with torch.cuda.device_of(x_GB):
        forward_kernel[grid](
            x_GB.contiguous(), low_G, high_G, outer, out_GB, scale_G, x_GB.shape[0],
            **shape, F=format, RULE=rule, **EXACT,
        )  # fmt: skip
    return scale_G


def backward(
    grad_GB: Tensor,
    x_GB: Tensor,
    low_G: Tensor | None,
    high_G: Tensor | None,
    scale_G: Tensor,
    *,
    format: BlockFormat,
    rule: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients with respect to x [G, B], in its dtype, and the clip ratios [G]; ``scale_G`` as ``forward`` returned it.

    The gradient does not depend on ``rule``; it is there for the arguments to be those of ``quantizers.kernel``.
    """
    low_G, high_G = (None if ratio is None else ratio.contiguous() for ratio in (low_G, high_G))
    grad_x, grad_low, grad_high = (
        None if like is None else torch.empty_like(like, memory_format=torch.contiguous_format)
        for like in (x_GB, low_G, high_G)
    )
    grid, shape = _launch(x_GB)
    with torch.cuda.device_of(x_GB):
        backward_kernel[grid](
            grad_GB.contiguous(), x_GB.contiguous(), low_G, high_G, scale_G, grad_x, grad_low, grad_high, x_GB.shape[0],
            **shape, F=format, **EXACT,
        )  # fmt: skip
    return grad_x, grad_low, grad_high


def _launch(x_GB: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and B, R and L."""
    num_blocks, width = x_GB.shape
    lanes = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // lanes)
    return (triton.cdiv(num_blocks, rows),), {"B": width, "R": rows, "L": lanes}
