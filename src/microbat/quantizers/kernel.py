"""The one numerical core of every block quantizer: clip, scale, round, in one pass over blocks, and its gradient.

``forward`` and ``backward`` are plain functions of tensors. :func:`fake_quantize` runs them as one fused kernel each
(on a GPU those of ``kernels.fake_quantize``, on a CPU the native ones, for formats that these do not know by ``torch.compile``)
with the straight-through gradient; where there is no compiler, and small tensors of such formats, run the same functions eagerly.
Values have the same bits everywhere; the native gradient's sums come in another order. Per block x of B numbers
(paper, eq. 3 and 4):

    high = r_high * max(max x, 0),  low = r_low * min(min x, 0),  c = clip(x, low, high)
    s = scale rule(max(high, -low)),  y = s * round(c / s)

Gradient: roundings pass it straight through, that of the scale as well, so that s grows in proportion to the block's
clipped amax: with c = s u, dy = s du where |u| <= element.max, and dy = (y - c) ds / s besides. Thus the quantizer is
homogeneous to its gradient as it is to its values: sum x dL/dx = sum y dL/dy, per block. With the scale held fixed it is
not: the gradient then pretends that a larger weight has a smaller relative error, transforms drift until they explode,
and clips never see what a finer scale gains (LOG.md). A clipped lane passes its gradient to the bound, and a bound to
its ratio and to the lane with the extreme. Scales inside a block (HiF4's flags) are powers of two that multiply s lane by
lane: u is in units of their product, and the rest is the same.
"""

# Shapes: G blocks, B block size, S scales inside a block, C candidates for a scale.

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from microbat import kernels, native
from microbat.formats.block import BlockFormat
from microbat.formats.element import FLOAT32_MANTISSA_BITS, Element, power_of_two
from microbat.formats.scales import NEIGHBOURS, POWER_OF_TWO_RULES, TENSOR_EXPONENTS, largest

EAGER_BELOW = 1 << 17  # elements; under this a kernel launch costs more than it saves
MIN_FLOAT_SCALE = 2.0**-9  # the smallest E4M3 subnormal: an all-zero block must not divide by zero


def tensor_scale(amax: Tensor, format: BlockFormat, rule: str = "absmax") -> Tensor:
    """Outer scale of a two-level format from the whole tensor's amax: the largest block scale becomes its maximum, or, where
    a rule may stretch it by half, the largest power of two."""
    largest = 2.0**format.scale_element.emax if rule == "four_over_six" else format.scale_element.max
    return (amax / (format.element.max * largest)).clamp(min=torch.finfo(torch.float32).tiny)


def block_scale(x_GB: Tensor, amax_G: Tensor, outer: Tensor | None, format: BlockFormat, rule: str) -> Tensor:
    """Scale values [G] in the block scale's own format (the outer scale not multiplied in)."""
    if format.scale_element.is_power_of_two:
        return torch.where(
            torch.isfinite(amax_G), _power_of_two_scale(x_GB, amax_G, format.element, rule), float("nan")
        )
    if format.reciprocal is not None:
        return torch.where(torch.isfinite(amax_G), _multiplied_scale(x_GB, amax_G, format, rule), float("nan"))
    amax_G = amax_G if outer is None else amax_G / outer
    least = MIN_FLOAT_SCALE if outer is not None else 0.0
    scale = format.scale_element.round(amax_G / largest(format, rule)).clamp(min=least)
    if rule == "four_over_six":
        four = format.scale_element.round(amax_G / 2.0**format.element.emax).clamp(min=least)
        scale = _better(x_GB, [scale, four], outer, format)
    return scale


def _power_of_two_scale(x_GB: Tensor, amax_G: Tensor, element: Element, rule: str) -> Tensor:
    if rule == "pts":
        return _best_of_tensor(x_GB, amax_G, element)
    base = POWER_OF_TWO_RULES["floor" if rule == "mse" else rule](amax_G, element).clamp(-127, 127)
    if rule == "mse":
        wider = (base + 1).clamp(max=127)
        error, wider_error = (_error_of_power(x_GB, power_of_two(e), element) for e in (base, wider))
        base = torch.where(wider_error < error, wider, base)
    return power_of_two(base)


def _best_of_tensor(x_GB: Tensor, amax_G: Tensor, element: Element) -> Tensor:
    """One power of two for all blocks; those that hold NaN or Inf do not count."""
    exponents = torch.arange(TENSOR_EXPONENTS.start, TENSOR_EXPONENTS.stop, dtype=torch.int32, device=amax_G.device)
    scales_C = power_of_two(exponents)
    scales_CG = scales_C.view(-1, *(1,) * amax_G.dim()).expand(-1, *amax_G.shape)
    errors_CG = _each(lambda scale: _error_of_power(x_GB, scale, element), scales_CG)
    errors_CG = torch.where(torch.isfinite(amax_G), errors_CG, 0.0)
    return scales_C[errors_CG.flatten(1).sum(1, dtype=torch.float64).argmin()].expand(amax_G.shape)


def _multiplied_scale(x_GB: Tensor, amax_G: Tensor, format: BlockFormat, rule: str) -> Tensor:
    assert format.reciprocal is not None
    rounded = format.reciprocal.element.round
    scale = format.scale_element.round(rounded(amax_G * rounded(torch.full_like(amax_G, 1 / format.max))))
    if rule != "mse":
        return scale
    # The next scale is one step further in the bits of float32, across binades too.
    step = 1 << (FLOAT32_MANTISSA_BITS - format.scale_element.mantissa_bits)
    beside = ((scale.view(torch.int32) + n * step).view(torch.float32) for n in NEIGHBOURS)
    limits = 2.0**format.scale_element.emin, format.scale_element.max
    return _better(x_GB, [scale, *(s.clamp(*limits) for s in beside)], None, format)


def _better(x_GB: Tensor, scales: list[Tensor], outer: Tensor | None, format: BlockFormat) -> Tensor:
    """Of several scales [G] for each block the one with the smallest squared error, the first of equals."""
    scales_CG = torch.stack(scales)
    products_CG = scales_CG if outer is None else scales_CG * outer
    errors_CG = _each(lambda product: _squared_error(x_GB, product, format), products_CG)
    best, least = scales[0], errors_CG[0]
    for scale, error in zip(scales[1:], errors_CG[1:], strict=True):
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _each(error: Callable[[Tensor], Tensor], scales_CG: Tensor) -> Tensor:
    """``error`` of every candidate [C, G]: compiled as one loop, which unrolled takes minutes to compile; eagerly one after the
    other, which takes the memory of one."""
    if torch.compiler.is_compiling():
        return error(scales_CG)
    return torch.stack([error(scale_G) for scale_G in scales_CG])


def inner_codes(x_GB: Tensor, scale_G: Tensor, format: BlockFormat) -> Tensor | None:
    """Codes uint8 [G, S] of the scales inside each block: 1, doubled, where a part's largest magnitude is beyond the reach of
    what the levels below it can still double. None for formats without such levels."""
    if not format.inner:
        return None
    how = format.reciprocal
    assert how is not None, f"{format.name}: scales inside a block are chosen by products with a reciprocal"
    reciprocal = how.element.round(scale_G.reciprocal())[..., None]
    codes: list[Tensor] = []
    for below, (group, _) in zip(reversed(range(len(format.inner))), format.inner, strict=True):
        parts = x_GB.shape[-1] // group
        if codes:  # this level's parts inherit the reciprocal of the part that they belong to
            halved = torch.where(codes[-1] == 1, reciprocal * 0.5, reciprocal)
            reciprocal = halved[..., None].expand(*halved.shape, parts // halved.shape[-1]).flatten(-2)
        else:
            reciprocal = reciprocal.expand(*reciprocal.shape[:-1], parts)
        amax = x_GB.unflatten(-1, (parts, group)).abs().amax(-1)
        reached = how.compared.round(amax * reciprocal) >= 2.0 ** (format.element.emax + 1 + below)
        codes.append(reached.to(torch.uint8))
    return torch.cat(codes, dim=-1)


def lane_scale(scale_G: Tensor, inner: Tensor | None, format: BlockFormat) -> Tensor:
    """What element values are multiplied with, [G, 1] or, where there are scales inside a block, [G, B]."""
    return scale_G[..., None] if inner is None else scale_G[..., None] * format.factors(inner)


def round_blocks(x_GB: Tensor, scale_G: Tensor, format: BlockFormat, inner: Tensor | None = None) -> Tensor:
    """Element values [G, B] of ``x / scale``; ``scale`` is the product of all levels but the ``inner`` ones, given as codes."""
    return round_lanes(x_GB, scale_G[..., None], format, None if inner is None else format.factors(inner))


def round_lanes(x: Tensor, scale: Tensor, format: BlockFormat, factors: Tensor | None = None) -> Tensor:
    """:func:`round_blocks` of any numbers: each has its block's scale, and what the scales inside the block make of it."""
    if format.scale_element.is_power_of_two:
        return format.element.round(x * scale.reciprocal())
    if format.reciprocal is None:
        return format.element.round(torch.where(scale == 0, 0.0, x / scale))
    reciprocal = format.reciprocal.element.round(scale.reciprocal())
    reciprocal = reciprocal if factors is None else reciprocal / factors
    return format.element.round(format.reciprocal.rounded.round(x * reciprocal))


def _error_of_power(x_GB: Tensor, scale_G: Tensor, element: Element) -> Tensor:
    # In units of the scale, so that huge blocks do not overflow.
    scaled = x_GB * scale_G.reciprocal()[..., None]
    error = (element.round(scaled) - scaled).square().sum(-1)
    return torch.where(scaled.isfinite().all(-1), error, float("inf")) * scale_G.square()


def _squared_error(x_GB: Tensor, scale_G: Tensor, format: BlockFormat) -> Tensor:
    # Of the values themselves, so that scales that give the same values tie; summed in float64, so that the order of the sum,
    # which torch.compile is free to choose, does not choose the scale.
    inner = inner_codes(x_GB, scale_G, format)
    values = round_blocks(x_GB, scale_G, format, inner) * lane_scale(scale_G, inner, format)
    return (values - x_GB).to(torch.float64).square().sum(-1)


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
    """Write the values [G, B] after clipping, scaling and rounding to ``out_GB``; return the scales [G], all levels but those
    inside a block.

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
    inner = inner_codes(x_GB, scale, format)
    out_GB.copy_(round_blocks(x_GB, scale, format, inner) * lane_scale(scale, inner, format))
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
    inner = inner_codes(clipped, scale_G, format)
    lanes = lane_scale(scale_G, inner, format)
    grad_c = torch.where(clipped.abs() <= lanes * format.element.max, grad_GB, 0.0)
    y = round_blocks(clipped, scale_G, format, inner) * lanes
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
    def forward(ctx, x_GB, low_G, high_G, outer, out_GB, format, rule):
        scale_G = _run(forward, (x_GB, low_G, high_G, outer, out_GB), format, rule)
        ctx.save_for_backward(x_GB, low_G, high_G, scale_G)
        ctx.format, ctx.rule = format, rule
        ctx.mark_dirty(out_GB)
        return out_GB

    @staticmethod
    def backward(ctx, grad_GB):
        grads = _run(backward, (grad_GB.contiguous(), *ctx.saved_tensors), ctx.format, ctx.rule)
        return *grads, None, None, None, None


class _NativeFakeQuantize(torch.autograd.Function):
    """The same by the native kernels, which find the scales once more on the way back."""

    @staticmethod
    def forward(ctx, x_GB, low_G, high_G, outer, out_GB, format, rule):
        x, ratios = _rows(x_GB, format), None
        if low_G is not None and high_G is not None:
            ratios = torch.stack((low_G, high_G), dim=-1).to(torch.float32).view(len(x), -1, 2)
        native.fake_quantize(x, ratios, outer, _rows(out_GB, format), format=format, rule=rule)
        ctx.save_for_backward(x_GB, ratios, outer)
        ctx.format, ctx.rule = format, rule
        ctx.mark_dirty(out_GB)
        return out_GB

    @staticmethod
    def backward(ctx, grad_GB):
        x_GB, ratios, outer = ctx.saved_tensors
        x, grad = _rows(x_GB, ctx.format), _rows(grad_GB.contiguous(), ctx.format)
        grad_x, shares = native.fake_quantize_backward(grad, x, ratios, outer, format=ctx.format, rule=ctx.rule)
        grad_low, grad_high = (None, None) if shares is None else shares.view(-1, 2).unbind(-1)
        return grad_x.view_as(x_GB), grad_low, grad_high, None, None, None, None


def _rows(x_GB: Tensor, format: BlockFormat) -> Tensor:
    """Blocks as the native kernels like them, several in a row."""
    groups, size = x_GB.shape
    several = min(groups & -groups, 64) if size == format.block else 1
    return x_GB.view(-1, several * size)


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
    fast = native.available(x_GB, out_GB) and native.knows(format, rule)
    function = _NativeFakeQuantize if fast else _FakeQuantize
    return function.apply(x_GB, low_G, high_G, outer, out_GB, format, rule)


@torch.no_grad()
def _run(function: Callable, tensors: tuple, format: BlockFormat, rule: str):
    if kernels.runs_on(tensors[0].device.type) and kernels.knows(format, rule):
        from microbat.kernels import fake_quantize as fused

        return {forward: fused.forward, backward: fused.backward}[function](*tensors, format=format, rule=rule)
    if not compiles(tensors[0]):
        return function(*tensors, format=format, rule=rule)
    tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in tensors)
    dtypes = tuple("" if tensor is None else str(tensor.dtype) for tensor in tensors)
    return _compiled(function, format, rule, dtypes)(*tensors)


@functools.cache
def _compiled(function: Callable, format: BlockFormat, rule: str, dtypes: tuple[str, ...]) -> Callable:
    def kernel(*tensors):
        return function(*tensors, format=format, rule=rule)

    return compiled(kernel, "_".join((function.__name__, format.name, rule, *dtypes)))


def compiled(function: Callable, name: str) -> Callable:
    """``function`` of tensors, compiled for any length of their first axes, under a ``name`` of its own.

    torch.compile counts recompilations per code object, closures share theirs, and it gives up after a few.
    """
    function.__code__ = function.__code__.replace(co_name=name)
    fast = torch.compile(function)

    def call(*tensors):
        for tensor in tensors:
            if tensor is not None and tensor.dim():
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return fast(*tensors)

    return call


def compiles(x: Tensor) -> bool:
    """Whether a kernel is compiled for a tensor of this size: whether that can be done here, and is worth it."""
    return x.numel() >= EAGER_BELOW and can_compile()


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
