"""The role of a transform, and the T-law.

T-law: ``T.forward(x) @ T.inverse_t(w).T == x @ w.T`` to rounding. With M the map's matrix on row vectors,
``forward(x) = x @ M`` and ``inverse_t(w) = w @ M^-T``.
"""

# Shapes: K last axis, G transform blocks along K, B block size; M [G, B, B] the diagonal blocks.

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microbat.registry import pick, subclasses


class Transform(nn.Module, ABC):
    """An invertible map on the last axis. ``name`` and ``settings`` and the parameters rebuild it from a folder."""

    name: ClassVar[str]
    width: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``x @ M`` for ``x`` [..., K]."""

    @abstractmethod
    def inverse_t(self, w: Tensor) -> Tensor:
        """``w @ M^-T`` for ``w`` [..., K]."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as plain data."""

    def stored(self) -> dict[str, Any]:
        """``name`` and ``settings``: what :func:`rebuilt` takes."""
        return {"name": self.name, **self.settings()}

    @property
    def num_parameters(self) -> int:
        """Stored numbers (the paper's Table 1)."""
        return sum(tensor.numel() for tensor in self.state_dict().values())


def rebuilt(entry: dict[str, Any]) -> Transform:
    """The transform that ``stored`` gave ``entry`` of, as it is before its parameters are read."""
    kinds, settings = subclasses("microbat.transforms", Transform), dict(entry)  # type: ignore[type-abstract]
    return pick("transform", settings.pop("name"), kinds)(**settings)


class BlockDiagonal(Transform):
    """A transform that acts within blocks of the last axis, each with a matrix of its own."""

    block: int

    def __init__(self, *, width: int, block: int):
        super().__init__()
        if width % block:
            raise ValueError(f"a width of {width} does not split into transform blocks of {block}")
        self.width, self.block = width, block

    @abstractmethod
    def blocks(self) -> Tensor:
        """The diagonal blocks M [G, B, B]."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [1 or G, g1, g1] and B [1 or G, g2, g2] with M = B^T (x) A, block by block: the fewest numbers that do."""
        blocks = self.blocks()
        return blocks, blocks.new_ones(1, 1, 1)

    @abstractmethod
    def inverse_blocks(self) -> Tensor:
        """Their inverses [G, B, B], computed in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return apply_blocks(x, self.blocks().to(x.dtype))

    def inverse_t(self, w: Tensor) -> Tensor:
        return apply_blocks(w, self.inverse_blocks().transpose(-1, -2).to(w.dtype))

    @torch.no_grad()
    def condition_numbers(self) -> Tensor:
        """Condition number of each block [G]."""
        return torch.linalg.cond(self.blocks().to(torch.float64))


def apply_blocks(x: Tensor, blocks_GBB: Tensor) -> Tensor:
    """``x`` [..., K] times a block-diagonal matrix given by its blocks, as one batched product."""
    x_TGB = x.reshape(-1, blocks_GBB.shape[0], blocks_GBB.shape[1])
    y_GTB = torch.bmm(x_TGB.transpose(0, 1), blocks_GBB)
    return y_GTB.transpose(0, 1).reshape(x.shape)


def inverse64(matrices: Tensor) -> Tensor:
    """Inverse [..., n, n] by way of float64, in the input's dtype; differentiable."""
    return torch.linalg.inv(matrices.to(torch.float64)).to(matrices.dtype)
