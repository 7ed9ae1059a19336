"""Block-wise learnable clipping (BATQuant, section 3.1.2, eq. 3 and 4): thresholds as a share of each block's extremes."""

# Shapes: K last axis, G blocks along K.

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from microbat.formats.block import BlockFormat, QTensor, join_blocks, split_blocks
from microbat.quantizers.base import AbsMax
from microbat.quantizers.kernel import bounds, compiled, compiles

Q = TypeVar("Q")
INIT_LOGIT = 4.0  # sigmoid 0.982, as FlatQuant starts; the paper does not say (sheet C4)


class Clip(nn.Module):
    """Clip each block to ``[r_low * min(x, 0), r_high * max(x, 0)]``, then quantize with ``inner``.

    ``ratios`` [..., G, 2] broadcasts over the leading axes of the tensor: [G, 2] clips an activation's block alike in
    every token, [N, G, 2] clips each block of a weight on its own, [E, N, G, 2] of a stack of weights. While learning,
    ``logits`` are the parameter and the ratios their sigmoid; :meth:`freeze` turns them into plain numbers. ``whole`` takes the
    extremes of the whole last axis instead of each block's, G = 1: FlatQuant's clipping, per token and per row of a weight.
    """

    fixed_ratios: Tensor

    def __init__(
        self,
        inner: AbsMax,
        ratios: Tensor | None = None,
        *,
        shape: tuple[int, ...] | None = None,
        whole: bool = False,
    ):
        super().__init__()
        self.inner, self.whole = inner, whole
        self.logits = None if shape is None else nn.Parameter(torch.full((*shape, 2), INIT_LOGIT))
        self.register_buffer("fixed_ratios", ratios)

    @property
    def format(self) -> BlockFormat:
        return self.inner.format

    @property
    def ratios(self) -> Tensor:
        return torch.sigmoid(self.logits) if self.logits is not None else self.fixed_ratios

    def freeze(self) -> "Clip":
        """The same clip with its present ratios as constants."""
        return Clip(self.inner, self.ratios.detach().clone(), whole=self.whole)

    def thaw(self) -> "Clip":
        """The same clip, learning on from its present ratios."""
        clip = Clip(self.inner, whole=self.whole)
        clip.logits = nn.Parameter(torch.logit(self.ratios.detach(), eps=1e-6))
        return clip

    def of_one(self, index: int) -> "Clip":
        """The clip of tensor ``index`` of a stack [E, N, K], its ratios as constants."""
        return Clip(self.inner.of_one(index), self.ratios[index].detach(), whole=self.whole)

    def clip(self, x: Tensor) -> Tensor:
        """``x`` [..., K] with every block clipped; float32."""
        width = x.shape[-1]
        x_GB = split_blocks(x.to(torch.float32), width if self.whole else self.inner.format.block_of(width))
        low, high = (ratio.expand(x_GB.shape[:-1]) for ratio in self.ratios.unbind(-1))
        return join_blocks(_Clipped.apply(x_GB, low, high), width)

    def quantize(self, x: Tensor) -> QTensor:
        return self.inner.quantize(self.clip(x))

    def fake(self, x: Tensor) -> Tensor:
        if self.whole or self.inner.format.terms:
            return self.inner.fake(self.clip(x))
        ratios = self.ratios
        return self.inner.fake(x, ratios[..., 0], ratios[..., 1])


class _Clipped(torch.autograd.Function):
    """``x`` [..., G, B] clipped to the shares ``low`` and ``high`` [..., G] of its extremes. What autograd makes of amin and amax
    counts their ties in int64 and takes longer than all else that a clip of whole rows does (LOG.md)."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward(x, low, high)
        below, above = bounds(x, low, high)
        return x.clamp(below[..., None], above[..., None])

    @staticmethod
    def backward(ctx, grad):
        x, low, high = ctx.saved_tensors
        rows = grad.flatten(0, -2), x.flatten(0, -2), low.flatten(), high.flatten()
        function = _compiled_backward() if compiles(grad) else _backward
        grad_x, grad_low, grad_high = function(*(tensor.detach().contiguous() for tensor in rows))
        return grad_x.view_as(x), grad_low.view_as(low), grad_high.view_as(high)


def _backward(grad: Tensor, x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``_Clipped`` for rows [R, B] and shares [R]; lanes that hold an extreme together share what the bound passes
    on to it."""
    smallest, largest = x.amin(-1), x.amax(-1)
    under = x < (low * smallest.clamp(max=0))[..., None]
    over = x > (high * largest.clamp(min=0))[..., None]
    grad_below, grad_above = (torch.where(mask, grad, 0.0).sum(-1) for mask in (under, over))
    grad_x = torch.where(under | over, 0.0, grad)
    for extreme, passed in (
        (smallest, torch.where(smallest <= 0, low * grad_below, 0.0)),
        (largest, torch.where(largest >= 0, high * grad_above, 0.0)),
    ):
        holds = (x == extreme[..., None]).to(x.dtype)
        grad_x = grad_x + holds * (passed / holds.sum(-1))[..., None]
    return grad_x, grad_below * smallest.clamp(max=0), grad_above * largest.clamp(min=0)


@functools.cache
def _compiled_backward() -> Callable:
    return compiled(_backward, "clip_backward")


def rounding(quantizer: Q | Clip) -> Q | AbsMax:
    """What rounds in ``quantizer``, which may be a clip around it."""
    return quantizer.inner if isinstance(quantizer, Clip) else quantizer


def clipped(quantizer: object, x: Tensor) -> Tensor:
    """``x`` [..., K] as ``quantizer`` rounds it: clipped where it is a clip; float32."""
    return quantizer.clip(x) if isinstance(quantizer, Clip) else x.to(torch.float32)
