"""Block formats and the tensors stored in them.

A :class:`BlockFormat` is an element plus its levels of scale, outermost first: perhaps one for the whole tensor; the block's
own; perhaps levels inside a block, that multiply parts of it by powers of two; perhaps further terms, numbers of the block that
are added, each times what the code says. A :class:`QTensor` is codes and scales in such a format: the only currency between
quantizing, exporting and running.
"""

# Shapes: L leading, K last axis (the reduction axis), G groups along K, B block size; K padded to G * B. S: parts of a block
# that have a scale inside it, those of all inner levels one level after the other. M: terms of a block beside its scale.

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

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
class Term:
    """A number of each block beside its scale, stored in ``element``: a code adds it times what the code means in ``factor``.

    An offset is a term that every code multiplies by 1.
    """

    factor: Element
    element: Element


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """``element`` scaled by ``levels``, outermost first; the value of a code is ``code * product of its scales``, plus each of
    ``terms`` times its factor.

    Levels inside the block's own have elements of one bit, 1 or 2: a part of a block is doubled where its largest magnitude
    needs it. ``reciprocal`` None: values are divided by their scales, in float32. Formats with ``terms`` have one level.
    """

    name: str
    element: Element
    levels: tuple[Level, ...]
    reciprocal: Reciprocal | None = None
    terms: tuple[Term, ...] = ()

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

    @cached_property
    def bases(self) -> Tensor:
        """float32 [1 + M, C]: what each code that means a number multiplies the block's scale and its terms with."""
        tables = torch.stack([self.element.table, *(term.factor.table for term in self.terms)])
        return tables[:, torch.isfinite(tables).all(0)]

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
        scales += blocks * sum(term.element.bits for term in self.terms)
        return self.element.packed_bits(width) / width + scales / numel


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
    in a stack of tensors [E, N, K]; ``inner`` uint8 codes [..., G, S] of the scales inside each block, or None; ``terms``
    [..., G, M], the block's terms, or None. ``columns`` [K], or None, multiplies each of a weight's columns until it is
    folded into what produces the activation: it is not stored.
    """

    format: BlockFormat
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None = None
    inner: Tensor | None = None
    terms: Tensor | None = None
    columns: Tensor | None = None

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
        for name in ("codes", "scales", "tensor_scale", "inner", "terms"):
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
                terms=None if self.terms is None else self.terms[index],
            )
            for index in range(len(self.codes))
        ]

    def split_rows(self, rows: Sequence[int]) -> list["QTensor"]:
        """Parts of a weight [..., N, K] with so many ``rows`` each, in memory of their own, all under its tensor scale."""
        axis = self.codes.dim() - 2
        parts: list[dict[str, Any]] = [{} for _ in rows]
        for name in ("codes", "scales", "inner", "terms"):
            whole = getattr(self, name)
            for part, own in zip(parts, () if whole is None else whole.split(tuple(rows), axis), strict=False):
                part[name] = own.clone()
        outer = self.tensor_scale
        return [replace(self, **part, tensor_scale=None if outer is None else outer.clone()) for part in parts]

    def dequantize(self) -> Tensor:
        """float32 [..., K]: code value times its scale (a block scale meets its tensor scale first)."""
        scale = self.scales if self.tensor_scale is None else self.scales * self.tensor_scale
        scale = scale[..., None] if self.inner is None else scale[..., None] * self.format.factors(self.inner)
        block = self.format.block_of(self.shape[-1])
        values = split_blocks(self.format.element.decode(self.codes), block) * scale
        if self.terms is not None:
            for number, term in enumerate(self.format.terms):
                values = values + split_blocks(term.factor.decode(self.codes), block) * self.terms[..., number, None]
        values = join_blocks(values, self.shape[-1])
        return values if self.columns is None else values * self.columns

    def with_rows(self, factor: Tensor) -> "QTensor":
        """A weight [N, K] whose rows are multiplied by ``factor`` [N] > 0: the same codes, scales and terms rounded to what they
        are stored in. ValueError where the format's scales are powers of two."""
        level = self.format.scale_element
        if level.is_power_of_two or self.format.has_tensor_scale:
            raise ValueError(f"rows of {self.format.name} take no factors: its block scales are {level.name}")
        scales, terms = level.round(self.scales * factor[:, None]), None
        if self.terms is not None:
            scaled = self.terms * factor[:, None, None]
            terms = torch.stack([t.element.round(scaled[..., i]) for i, t in enumerate(self.format.terms)], dim=-1)
        return replace(self, scales=scales, terms=terms)
