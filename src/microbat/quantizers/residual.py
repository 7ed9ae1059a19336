"""Residual channels: what rounding takes from the last channels of an activation, quantized too and appended (ARCQuant).

The quantized activation is wider than what it was made of, K + S lanes in one format under one tensor scale, and so are the
weights that it meets: the blocks of their last S columns stand there twice. A product of the two, by whatever multiplies
tensors of that format, is Q(x) W^T + Q(x - Q(x)) W_last^T. Law: ``fake(x) @ facing(w).T == effective(fake(x)) @ w.T``.

Only the activation's quantizer knows of it. Solvers see weights [N, K] and statistics of the effective activation, so that
both copies of a column keep the same codes, whoever chooses them.
"""

# Shapes: K last axis, S residual channels, G blocks along K, B block size.

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from microbat.formats.block import QTensor, join_blocks, split_blocks
from microbat.formats.packing import pack
from microbat.quantizers.base import AbsMax, Packed, Quantizer

Weight = TypeVar("Weight", Tensor, QTensor)
LANES = 32  # products of 4-bit tensors take widths in multiples of this: K + S is one


@dataclass(frozen=True, kw_only=True)
class Residual(Quantizer):
    """``inner`` on all of x [..., K], and again on what that leaves of its last ``channels``, under the same tensor scale.

    Blocks lie as ARCQuant's kernels write them: those without a residual in their order, then each block before its residual.
    """

    inner: AbsMax
    channels: int

    def __post_init__(self) -> None:
        format, block = self.inner.format, self.inner.format.block
        if sum(isinstance(level.group, int) for level in format.levels) > 1:
            raise ValueError(
                f"{format.name} has scales within its blocks; residual channels are for blocks of one scale"
            )
        if block is None or self.channels < 1 or self.channels % block:
            raise ValueError(
                f"residual channels={self.channels} must be a positive multiple of a block of {self.inner.format.name}"
            )

    def quantize(self, x: Tensor) -> QTensor:
        first = self.inner.quantize(x)
        rest = self._rest(x, first.dequantize())
        second = self.inner.encode(rest, self.inner.scales_within(rest, first.tensor_scale))
        blocks = torch.cat([first.scales, second.scales], dim=-1).index_select(-1, self._order(x))
        return dataclasses.replace(
            first, codes=self._arrange(torch.cat([first.codes, second.codes], dim=-1), x), scales=blocks
        )

    def fake(self, x: Tensor) -> Tensor:
        """``quantize(x).dequantize()`` [..., K + S], float32. The gradient is that of the first K lanes."""
        with torch.autocast(x.device.type, enabled=False):
            first = self.inner.fake(x)
            with torch.no_grad():
                rest = self._rest(x, first)
                outer = self.inner.scales(x).tensor if self.inner.format.has_tensor_scale else None
                scales = self.inner.scales_within(rest, outer)
                blocks = split_blocks(self.inner.round(rest, scales), self._block) * scales.product[..., None]
                second = join_blocks(blocks, self.channels)
            return self._arrange(torch.cat([first, second], dim=-1), x)

    def pack(self, x: Tensor) -> Packed:
        """:meth:`quantize` in its own bits."""
        q = self.quantize(x)
        parts = pack(q)
        codes = parts["weight"] if "weight" in parts else parts["weight_packed"]
        return Packed(format=q.format, codes=codes, scales=parts["weight_scale"], tensor_scale=q.tensor_scale)

    def facing(self, weight: Weight) -> Weight:
        """``weight`` [N, K] as this activation meets it, [N, K + S]: copies, of codes and scales or of floats."""
        if isinstance(weight, QTensor):
            codes, scales = self.facing(weight.codes), weight.scales
            order = self._order(weight.codes, sources=True)
            return dataclasses.replace(weight, codes=codes, scales=scales.index_select(-1, order))
        order = self._order(weight, sources=True)
        return split_blocks(weight, self._block).index_select(-2, order).flatten(-2)

    def effective(self, wide: Tensor) -> Tensor:
        """[..., K + S] of :meth:`fake` to [..., K]: each channel with its residual added."""
        blocks = split_blocks(wide, self._block)
        groups = blocks.shape[-2] - self.channels // self._block
        order = self._slots(groups, wide.device)[1]
        total = blocks.new_zeros(*blocks.shape[:-2], groups, self._block)
        return total.index_add(-2, order, blocks).flatten(-2)

    def original(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`facing`: [N, K + S] to [N, K]."""
        blocks = split_blocks(weight, self._block)
        order = self._slots(blocks.shape[-2] - self.channels // self._block, weight.device)[0]
        return blocks.index_select(-2, order.argsort()[: len(order) - self.channels // self._block]).flatten(-2)

    @property
    def _block(self) -> int:
        return self.inner.format.block_of(0)

    def _rest(self, x: Tensor, first: Tensor) -> Tensor:
        if self.channels > x.shape[-1] or x.shape[-1] % self._block:
            raise ValueError(
                f"residual channels={self.channels} of blocks of {self._block} do not fit a width of {x.shape[-1]}"
            )
        return (x.to(torch.float32) - first)[..., x.shape[-1] - self.channels :]

    def _arrange(self, lanes: Tensor, x: Tensor) -> Tensor:
        return split_blocks(lanes, self._block).index_select(-2, self._order(x)).flatten(-2)

    def _order(self, x: Tensor, *, sources: bool = False) -> Tensor:
        return self._slots(x.shape[-1] // self._block, x.device)[int(sources)]

    def _slots(self, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return slots(groups, self.channels // self._block, device)


@functools.cache
def slots(groups: int, residual: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each place: which block stands there, of ``groups`` and then ``residual`` ones; and which of ``groups`` that is of."""
    start = groups - residual
    pairs = torch.stack([torch.arange(start, groups), torch.arange(groups, groups + residual)], dim=-1).flatten()
    order = torch.cat([torch.arange(start), pairs])
    return order.to(device), torch.where(order < groups, order, order - residual).to(device)


def channels_for(width: int, wanted: float, block: int) -> int:
    """The least S from ``wanted`` on that is whole blocks and makes ``width`` + S whole :data:`LANES`; at most ``width``, a
    multiple of ``block``. 0 for 0."""
    if wanted <= 0:
        return 0
    channels = block * math.ceil(wanted / block)
    return min(width, channels + -(width + channels) % LANES)


def common_block(method: str, scheme: str, activation: AbsMax | None, weight: AbsMax | None) -> int:
    """The block of both formats of ``scheme``. ValueError where its weights cannot meet residual channels, which ``method`` asks
    for."""
    if activation is None or weight is None:
        raise ValueError(
            f"{method} appends residuals to quantized activations; scheme {scheme} has none. Choose W4A4:nvfp4, or soar "
            "or gptq for weights alone"
        )
    x, w = activation.format, weight.format
    if x.block is None or x.block != w.block:
        raise ValueError(
            f"{method} repeats a weight's block for each block of residuals: both must be as long, and {w.name} weights have "
            f"{w.block or 'a row'}, {x.name} activations {x.block or 'a row'} (scheme {scheme}). Choose W4A4:nvfp4"
        )
    Residual(inner=activation, channels=x.block)  # refuses blocks that have scales within
    return x.block


def facing(quantizer: object, weight: Weight) -> Weight:
    """``weight`` [N, K] as the output of ``quantizer`` meets it."""
    return quantizer.facing(weight) if isinstance(quantizer, Residual) else weight


def effective(quantizer: object, values: Tensor) -> Tensor:
    """What ``quantizer`` made of an activation, as [..., K] that meets weights [N, K]."""
    return quantizer.effective(values) if isinstance(quantizer, Residual) else values
