"""Block formats and the tensors stored in them.

A :class:`BlockFormat` is an element plus its levels of scale, outermost first: perhaps one for the whole tensor; the block's
own; perhaps levels inside a block, that multiply parts of it by powers of two. A :class:`QTensor` is codes and
scales in such a format: the only currency between quantizing, exporting and running.
"""

# Shapes: L leading, K last axis (the reduction axis), G groups along K, B block size; K padded to G * B. S: parts of a block
# that have a scale inside it, those of all inner levels one level after the other.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from microbat.formats.element import FP32, Element, power_of_two

Group = int | Literal["row", "tensor"]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of scale: how many elements share it (a count, the whole last axis, or everything) and its format."""

    group: Group
    element: Element


@dataclass(frozen=True, kw_only=True)
class Reciprocal:
    """How hardware without a divider brings values into units of their scale: it multiplies by one over it.

    The reciprocal is rounded to ``element``, and so is the quotient from which the scale itself is rounded; products are
    rounded to ``compared`` where a scale inside the block is chosen by them, to ``rounded`` before they become codes.
    """

    element: Element
    compared: Element = FP32
    rounded: Element = FP32


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """``element`` scaled by ``levels``, outermost first; the value of a code is ``code * product of its scales``.

    Levels inside the block's own have elements of one bit, 1 or 2: a part of a block is doubled where its largest magnitude
    needs it. ``reciprocal`` None: values are divided by their scales, in float32.
    """

    name: str
    element: Element
    levels: tuple[Level, ...]
    reciprocal: Reciprocal | None = None

    def __hash__(self) -> int:  # formats are keys on the way of every token; the fields' own hash takes microseconds
        return hash(self.name)

    @property
    def scale_element(self) -> Element:
        """The element of the scale that belongs to a block."""
        return self._block_level.element

    @property
    def has_tensor_scale(self) -> bool:
        return self.levels[0].group == "tensor"

    @property
    def _block_level(self) -> Level:
        return self.levels[1 if self.has_tensor_scale else 0]

    @cached_property
    def inner(self) -> tuple[tuple[int, Element], ...]:
        """Levels inside a block: how many elements share a scale, and its element."""
        return tuple((int(level.group), level.element) for level in self.levels[2 if self.has_tensor_scale else 1 :])

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is what kernels are written for: no levels inside a block, an element of fields, division, ties to even."""
        usual = type(self.element) is Element and self.element.ties == "even"
        return usual and not self.inner and self.reciprocal is None

    @property
    def block(self) -> int | None:
        """Elements per block; None when a whole row is one."""
        group = self._block_level.group
        return group if isinstance(group, int) else None

    def block_of(self, width: int) -> int:
        """Elements per block in a tensor whose last axis is ``width`` long."""
        return self.block or width

    @cached_property
    def max(self) -> float:
        """The largest magnitude, in units of the block's scale."""
        largest = self.element.max
        for _, element in self.inner:
            largest *= element.max
        return largest

    @cached_property
    def grid(self) -> Tensor:
        """float32, ascending: the non-negative values of a block, in units of its scale."""
        values = self.element.grid
        for _, element in self.inner:
            values = torch.outer(element.table, values).flatten()
        return values.unique()

    @property
    def num_inner(self) -> int:
        """S: how many scales there are inside a block."""
        return sum((self.block or 0) // group for group, _ in self.inner)

    def factors(self, inner: Tensor) -> Tensor:
        """float32 [..., B]: what the ``inner`` scales, uint8 codes [..., S], multiply each element of a block with."""
        block, factors, start = self.block or 0, None, 0
        for group, element in self.inner:
            codes = inner[..., start : start + block // group]
            level = power_of_two(codes.to(torch.int32) - element.bias)  # a table would break torch.compile's graph
            level = level[..., None].expand(*codes.shape, group).flatten(-2)
            factors, start = level if factors is None else factors * level, start + block // group
        if factors is None:
            raise ValueError(f"{self.name} has no scales inside its blocks")
        return factors

    def bits_per_element(self, shape: tuple[int, ...]) -> float:
        """Stored bits per element of a tensor of ``shape``, scales included."""
        numel, width = torch.Size(shape).numel(), shape[-1]
        blocks = numel // width * -(-width // self.block_of(width))
        scales = self.levels[0].element.bits if self.has_tensor_scale else 0
        scales += blocks * self.scale_element.bits
        scales += blocks * sum((self.block or 0) // group * element.bits for group, element in self.inner)
        return self.element.bits + scales / numel


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

    ``codes`` [..., K]; ``scales`` [..., G], one per block along K; ``tensor_scale`` [] or None for formats without one, [E, 1, 1]
    in a stack of tensors [E, N, K]; ``inner`` uint8 codes [..., G, S] of the scales inside each block, or None.
    """

    format: BlockFormat
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None
    inner: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes when packed, scales included."""
        more = 0 if self.tensor_scale is None else (self.tensor_scale.numel() - 1) * self.format.levels[0].element.bits
        return round((self.format.bits_per_element(tuple(self.shape)) * self.codes.numel() + more) / 8)

    @classmethod
    def stack(cls, tensors: Sequence["QTensor"]) -> "QTensor":
        """Tensors [N, K] of one format as one [E, N, K]."""
        joined: dict[str, Tensor | None] = {}
        for name in ("codes", "scales", "tensor_scale", "inner"):
            parts = [part for tensor in tensors if (part := getattr(tensor, name)) is not None]
            joined[name] = torch.stack(parts) if parts else None
        if joined["tensor_scale"] is not None:
            joined["tensor_scale"] = joined["tensor_scale"][:, None, None]
        return cls(format=tensors[0].format, **joined)  # type: ignore[arg-type]

    def unstack(self) -> list["QTensor"]:
        """The tensors [N, K] of a stack [E, N, K]."""
        scales = self.tensor_scale
        return [
            QTensor(
                format=self.format,
                codes=self.codes[index],
                scales=self.scales[index],
                tensor_scale=None if scales is None else scales[index].reshape(()),
                inner=None if self.inner is None else self.inner[index],
            )
            for index in range(len(self.codes))
        ]

    def dequantize(self) -> Tensor:
        """float32 [..., K]: code value times its scale (a block scale meets its tensor scale first)."""
        scale = self.scales if self.tensor_scale is None else self.scales * self.tensor_scale
        scale = scale[..., None] if self.inner is None else scale[..., None] * self.format.factors(self.inner)
        values = self.format.element.decode(self.codes)
        block = self.format.block_of(self.shape[-1])
        return join_blocks(split_blocks(values, block) * scale, self.shape[-1])
