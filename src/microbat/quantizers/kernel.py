"""The one numerical core of every block quantizer: clip, scale, round, in one pass over blocks, and its gradient.

``forward`` and ``backward`` are plain functions of tensors. :func:`fake_quantize` runs them as one fused kernel each
(on a GPU those of ``kernels.fake_quantize``, elsewhere by ``torch.compile``) with the straight-through gradient; small
tensors and machines without a compiler run the same functions eagerly, with the same bits. Per block x of B numbers
(paper, eq. 3 and 4):

    high = r_high * max(max x, 0),  low = r_low * min(min x, 0),  c = clip(x, low, high)
    s = scale rule(max(high, -low)),  y = s * round(c / s)

Gradient: roundings pass it straight through, that of the scale as well, so that s grows in proportion to the block's
clipped amax: with c = s u, dy = s du where |u| <= element.max, and dy = (y - c) ds / s besides. Thus the quantizer is
homogeneous to its gradient as it is to its values: sum x dL/dx = sum y dL/dy, per block. With the scale held fixed it is
not: the gradient then pretends that a larger weight has a smaller relative error, transforms drift until they explode,
and clips never see what a finer scale gains (LOG.md). A clipped lane passes its gradient to the bound, and a bound to
its ratio and to the lane with the extreme.
"""

# Shapes: G blocks, B block size.

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from microbat import kernels
from microbat.formats.block import BlockFormat
from microbat.formats.element import power_of_two
from microbat.formats.scales import POWER_OF_TWO_RULES

EAGER_BELOW = 1 << 17  # elements; under this a kernel launch costs more than it saves
MIN_FLOAT_SCALE = 2.0**-9  # the smallest E4M3 subnormal: an all-zero block must not divide by zero


def tensor_scale(amax: Tensor, format: BlockFormat) -> Tensor:
    """Outer scale of a two-level format from the whole tensor's amax: the largest block scale becomes its maximum."""
    return (amax / (format.element.max * format.scale_element.max)).clamp(min=torch.finfo(torch.float32).tiny)


def block_scale(x_GB: Tensor, amax_G: Tensor, outer: Tensor | None, format: BlockFormat, rule: str) -> Tensor:
    """Scale values [G] in the block scale's own format (the outer scale not multiplied in)."""
    element = format.element
    if not format.scale_element.is_power_of_two:
        amax_G = amax_G if outer is None else amax_G / outer
        return format.scale_element.round(amax_G / element.max).clamp(min=MIN_FLOAT_SCALE if outer is not None else 0.0)
    base = POWER_OF_TWO_RULES["floor" if rule == "mse" else rule](amax_G, element).clamp(-127, 127)
    if rule == "mse":
        wider = (base + 1).clamp(max=127)
        error, wider_error = (_squared_error(x_GB, power_of_two(e), format) for e in (base, wider))
        base = torch.where(wider_error < error, wider, base)
    return torch.where(torch.isfinite(amax_G), power_of_two(base), float("nan"))


def round_blocks(x_GB: Tensor, scale_G: Tensor, format: BlockFormat) -> Tensor:
    """Element values [G, B] of ``x / scale``; ``scale`` is the product of all levels."""
    if format.scale_element.is_power_of_two:
        return format.element.round(x_GB * scale_G.reciprocal()[..., None])
    return format.element.round(torch.where(scale_G[..., None] == 0, 0.0, x_GB / scale_G[..., None]))


def _squared_error(x_GB: Tensor, scale_G: Tensor, format: BlockFormat) -> Tensor:
    # In units of the scale, so that huge blocks do not overflow.
    scaled = x_GB * scale_G.reciprocal()[..., None]
    error = (format.element.round(scaled) - scaled).square().sum(-1)
    return torch.where(scaled.isfinite().all(-1), error, float("inf")) * scale_G.square()


def bounds(x_GB: Tensor, low_G: Tensor, high_G: Tensor) -> tuple[Tensor, Tensor]:
    """What each block is clipped to, [G] each, for shares of its extremes."""
    return low_G * x_GB.amin(-1).clamp(max=0), high_G * x_GB.amax(-1).clamp(min=0)


def _clip(x_GB: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x_GB, low[..., None]), high[..., None])


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
    """Write the values [G, B] after clipping, scaling and rounding to ``out_GB``; return the scales [G], all levels.

    No ratios (None), no clipping. That the scales are a result makes the compiler work them out once a block; as an
    intermediate it would inline them into every vector of the block.
    """
    x_GB = x_GB.to(torch.float32)
    if low_G is None or high_G is None:
        amax_G = x_GB.abs().amax(-1)
    else:
        low, high = bounds(x_GB, low_G, high_G)
        x_GB, amax_G = _clip(x_GB, low, high), torch.maximum(high, -low)
    scale = block_scale(x_GB, amax_G, outer, format, rule)
    scale = scale if outer is None else scale * outer
    out_GB.copy_(round_blocks(x_GB, scale, format) * scale[..., None])
    return scale


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
    """Gradients with respect to x [G, B], in its dtype, and the clip ratios [G]; ``scale_G`` as ``forward`` returned it."""
    dtype = x_GB.dtype
    x_GB, grad_GB = x_GB.to(torch.float32), grad_GB.to(torch.float32)
    smallest, largest = x_GB.amin(-1).clamp(max=0), x_GB.amax(-1).clamp(min=0)
    clips = low_G is not None and high_G is not None
    low_G, high_G = (torch.ones_like(scale_G) if ratio is None else ratio for ratio in (low_G, high_G))
    low, high = low_G * smallest, high_G * largest
    clipped, amax = _clip(x_GB, low, high), torch.maximum(high, -low)
    grad_c = torch.where(clipped.abs() <= (scale_G * format.element.max)[..., None], grad_GB, 0.0)
    y = round_blocks(clipped, scale_G, format) * scale_G[..., None]
    grad_amax = torch.where(amax > 0, (grad_GB * y - grad_c * clipped).sum(-1) / amax, 0.0)
    above, below = x_GB > high[..., None], x_GB < low[..., None]
    grad_high = torch.where(above, grad_c, 0.0).sum(-1) + torch.where(high >= -low, grad_amax, 0.0)
    grad_low = torch.where(below, grad_c, 0.0).sum(-1) - torch.where(high >= -low, 0.0, grad_amax)
    # The bounds follow the block's extremes: the lanes that hold those carry the bounds' gradient.
    grad_x = torch.where(above | below, 0.0, grad_c)
    grad_x = grad_x + torch.where(x_GB == largest[..., None], (grad_high * high_G)[..., None], 0.0)
    grad_x = grad_x + torch.where(x_GB == smallest[..., None], (grad_low * low_G)[..., None], 0.0)
    grad_ratios = (grad_low * smallest, grad_high * largest) if clips else (None, None)
    return grad_x.to(dtype), *grad_ratios


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_GB, low_G, high_G, outer, out_GB, format, rule):  # type: ignore[no-untyped-def]
        scale_G = _run(forward, (x_GB, low_G, high_G, outer, out_GB), format, rule)
        ctx.save_for_backward(x_GB, low_G, high_G, scale_G)
        ctx.format, ctx.rule = format, rule
        ctx.mark_dirty(out_GB)
        return out_GB

    @staticmethod
    def backward(ctx, grad_GB):  # type: ignore[no-untyped-def]
        grads = _run(backward, (grad_GB.contiguous(), *ctx.saved_tensors), ctx.format, ctx.rule)
        return *grads, None, None, None, None


def fake_quantize(
    x_GB: Tensor,
    low_G: Tensor | None,
    high_G: Tensor | None,
    outer: Tensor | None,
    out_GB: Tensor,
    *,
    format: BlockFormat,
    rule: str,
) -> Tensor:
    """Fused :func:`forward` into ``out_GB``, rounded to its dtype, with the straight-through gradient."""
    return _FakeQuantize.apply(x_GB, low_G, high_G, outer, out_GB, format, rule)


@torch.no_grad()
def _run(function: Callable, tensors: tuple, format: BlockFormat, rule: str):  # type: ignore[no-untyped-def]
    if kernels.runs_on(tensors[0].device.type):
        from microbat.kernels import fake_quantize as fused

        return {forward: fused.forward, backward: fused.backward}[function](*tensors, format=format, rule=rule)
    if tensors[0].numel() < EAGER_BELOW or not can_compile():
        return function(*tensors, format=format, rule=rule)
    tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in tensors)
    dtypes = tuple("" if tensor is None else str(tensor.dtype) for tensor in tensors)
    return _compiled(function, format, rule, dtypes)(*tensors)


@functools.cache
def _compiled(function: Callable, format: BlockFormat, rule: str, dtypes: tuple[str, ...]) -> Callable:
    def kernel(*tensors):  # type: ignore[no-untyped-def]
        return function(*tensors, format=format, rule=rule)

    return compiled(kernel, "_".join((function.__name__, format.name, rule, *dtypes)))


def compiled(function: Callable, name: str) -> Callable:
    """``function`` of tensors, compiled for any length of their first axes, under a ``name`` of its own.

    torch.compile counts recompilations per code object, closures share theirs, and it gives up after a few.
    """
    function.__code__ = function.__code__.replace(co_name=name)
    fast = torch.compile(function)

    def call(*tensors):  # type: ignore[no-untyped-def]
        for tensor in tensors:
            if tensor is not None and tensor.dim():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fast(*tensors)

    return call


@functools.cache
def can_compile() -> bool:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception as error:  # no C++ compiler: any of several exception types, so all are reported
        warnings.warn(
            f"torch.compile does not work here ({type(error).__name__}: {str(error)[:200]}); quantizers run eagerly, "
            "many times slower. Installing a C++ compiler (g++) mends this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
