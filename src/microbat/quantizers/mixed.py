"""Mixed precision within a tensor: groups of channels side by side, each with a quantizer of its own (MicroMix)."""

# Shapes: K last axis.

from dataclasses import dataclass

import torch
from torch import Tensor

from microbat.formats.composite import Composite
from microbat.quantizers.base import AbsMax, Quantizer


@dataclass(frozen=True, kw_only=True)
class Mixed(Quantizer):
    """``parts[i]`` quantizes the next ``widths[i]`` channels. Formats without a tensor scale, no block across two groups."""

    parts: tuple[AbsMax, ...]
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.widths) or not self.parts:
            raise ValueError(f"{len(self.parts)} quantizers for {len(self.widths)} groups of channels")
        for part, width in zip(self.parts, self.widths, strict=True):
            if part.format.has_tensor_scale or part.format.block is None or width < 1 or width % part.format.block:
                raise ValueError(
                    f"a group of {width} channels does not split into blocks of {part.format.name} without a tensor scale"
                )

    def split(self, x: Tensor) -> list[tuple[AbsMax, Tensor]]:
        """Each group of ``x`` [..., K] with its quantizer."""
        if x.shape[-1] != sum(self.widths):
            raise ValueError(f"groups of {self.widths} channels for a width of {x.shape[-1]}")
        return list(zip(self.parts, x.split(self.widths, dim=-1), strict=True))

    def of_one(self, index: int) -> "Mixed":
        """The quantizer of tensor ``index`` of a stack [E, N, K]."""
        return self

    def quantize(self, x: Tensor) -> Composite:  # type: ignore[override]
        return Composite(parts=tuple(part.quantize(group) for part, group in self.split(x)))

    def fake(self, x: Tensor) -> Tensor:
        return torch.cat([part.fake(group) for part, group in self.split(x)], dim=-1)
