"""Tensors of several formats: groups of columns side by side, each a :class:`QTensor` of its own."""

# Shapes: N rows, K last axis.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.packing import check, pack, unpack


@dataclass(frozen=True, kw_only=True)
class Composite:
    """``parts`` side by side along the last axis; none is empty."""

    parts: tuple[QTensor, ...]
    tensor_scale: None = None  # the formats that are mixed have none

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.parts[0].shape[:-1], sum(self.widths)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(part.shape[-1] for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes when packed, scales included."""
        return sum(part.nbytes for part in self.parts)

    def dequantize(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self.parts], dim=-1)

    @classmethod
    def stack(cls, tensors: Sequence["Composite"]) -> "Composite":
        """Tensors [N, K] with the same groups as one [E, N, K]."""
        return cls(parts=tuple(QTensor.stack(same) for same in zip(*(t.parts for t in tensors), strict=True)))

    def unstack(self) -> list["Composite"]:
        """The tensors [N, K] of a stack [E, N, K]."""
        return [Composite(parts=parts) for parts in zip(*(part.unstack() for part in self.parts), strict=True)]


def format_name(q: QTensor | Composite) -> str:
    """A tensor's format in words; of a composite one with the columns that each has."""
    if isinstance(q, QTensor):
        return q.format.name
    return ", ".join(f"{part.format.name} x {part.shape[-1]}" for part in q.parts)


def pack_parts(q: Composite) -> dict[str, Tensor]:
    """Named tensors that hold ``q``: those of each part, its number before their names."""
    return {f"{number}.{key}": tensor for number, part in enumerate(q.parts) for key, tensor in pack(part).items()}


def unpack_parts(tensors: dict[str, Tensor], formats: list[tuple[BlockFormat, int]]) -> Composite:
    """What :func:`pack_parts` stored, given each part's format and width; parts that mean no numbers raise ValueError."""
    parts = []
    for number, (format, width) in enumerate(formats):
        prefix = f"{number}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        part = unpack(own, format, width)
        check(part, (*part.shape[:-1], width))
        parts.append(part)
    return Composite(parts=tuple(parts))
