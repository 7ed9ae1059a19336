"""Sylvester-Hadamard matrices, normalised to be orthogonal, and the fixed block transform made of one."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from microbat.transforms.base import BlockDiagonal


def hadamard(n: int) -> Tensor:
    """The symmetric orthogonal Hadamard matrix [n, n] in Sylvester's order, float32; n a power of two."""
    if n < 1 or n & (n - 1):
        raise ValueError(f"a Sylvester-Hadamard matrix has a power of two as its size, not {n}")
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / n**0.5).to(torch.float32)


class BlockHadamard(BlockDiagonal):
    """The same Hadamard rotation in every block: I (x) H. Nothing is stored."""

    name: ClassVar[str] = "block_hadamard"
    H: Tensor

    def __init__(self, *, width: int, block: int):
        super().__init__(width=width, block=block)
        self.register_buffer("H", hadamard(block), persistent=False)

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "block": self.block}

    def blocks(self) -> Tensor:
        return self.H.expand(self.width // self.block, -1, -1)

    def inverse_blocks(self) -> Tensor:
        return self.blocks()
