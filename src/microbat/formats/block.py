"""Block formats and the tensors stored in them.

A :class:`BlockFormat` is an element plus its levels of scale, outermost first. A :class:`QTensor` is codes and
scales in such a format: the only currency between quantizing, exporting and running.
"""

# Shapes: L leading, K last axis (the reduction axis), G groups along K, B block size; K padded to G * B.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from microbat.formats.element import Element

Group = int | Literal["row", "tensor"]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of scale: how many elements share it (a count, the whole last axis, or everything) and its format."""

    group: Group
    element: Element


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """``element`` scaled by ``levels``, outermost first; the value of a code is ``code * product of its scales``."""

    name: str
    element: Element
    levels: tuple[Level, ...]

    def __hash__(self) -> int:  # formats are keys on the way of every token; the fields' own hash takes microseconds
        return hash(self.name)

    @property
    def scale_element(self) -> Element:
        """The element of the innermost scale, the one that belongs to a block."""
        return self.levels[-1].element

    @property
    def has_tensor_scale(self) -> bool:
        return self.levels[0].group == "tensor"

    @property
    def block(self) -> int | None:
        """Elements per innermost scale; None when a whole row shares it."""
        group = self.levels[-1].group
        return group if isinstance(group, int) else None

    def block_of(self, width: int) -> int:
        """Elements per innermost scale in a tensor whose last axis is ``width`` long."""
        return self.block or width

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Stored bits per element of a tensor of ``shape``, scales included."""
        numel, width = torch.Size(shape).numel(), shape[-1]
        bits = float(self.element.bits)
        for level in self.levels:
            rows = numel // width
            groups = 1 if level.group == "tensor" else rows * (-(-width // self._group_size(level.group, width)))
            bits += groups * level.element.bits / numel
        return bits

    @staticmethod
    def _group_size(group: Group, width: int) -> int:
        return group if isinstance(group, int) else width


def split_blocks(x: Tensor, block: int) -> Tensor:
    """View ``x`` [..., K] as blocks [..., G, B], padding the last axis with zeros to a multiple of ``block``.

    Zeros never change a block's largest magnitude, so a tail block is quantized over its real lanes alone.
    """
    tail = -x.shape[-1] % block
    if tail:
        x = torch.nn.functional.pad(x, (0, tail))
    return x.unflatten(-1, (-1, block))


def join_blocks(x_LGB: Tensor, width: int) -> Tensor:
    """The inverse of :func:`split_blocks`: [..., G, B] to [..., width], the padding dropped."""
    return x_LGB.flatten(-2)[..., :width]


@dataclass(frozen=True, kw_only=True)
class QTensor:
    """A quantized tensor: one uint8 code per element and float32 scale values (exactly representable in their format).

    ``codes`` [..., K]; ``scales`` [..., G], one per block along K; ``tensor_scale`` [] or None for formats without one.
    """

    format: BlockFormat
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes when packed, scales included."""
        return round(self.format.bits_per_element(tuple(self.shape)) * self.codes.numel() / 8)

    def dequantize(self) -> Tensor:
        """float32 [..., K]: code value times its scale (a block scale meets its tensor scale first)."""
        scale = self.scales if self.tensor_scale is None else self.scales * self.tensor_scale
        values = self.format.element.decode(self.codes)
        block = self.format.block_of(self.shape[-1])
        return join_blocks(split_blocks(values, block) * scale[..., None], self.shape[-1])
