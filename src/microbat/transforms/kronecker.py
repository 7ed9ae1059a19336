"""Learnable transforms: BATQuant's block-diagonal GPK, naive Kronecker and full blocks (paper, section 3.1); FlatQuant's
Kronecker product across the whole width (arXiv 2410.09426).

Convention (Algorithm 1 of the paper; row vectors, a block read row-major as V [g2, g1]): the block map is
V -> B_i V A, hence P_i = B_i^T (x) A. Equation 2 prints B_i (x) A; both name the same family. The weight side is the
inverse transpose, P_i^-T = B_i^-1 (x) A^-T, the only exact choice (Algorithm 2 prints the inverse).

Parameters for a width N = k g, g = g1 g2: GPK g1^2 + k g2^2, naive Kronecker k (g1^2 + g2^2), full N g (Table 1).
"""

# Shapes: k blocks, g block size, g1 and g2 its factors.

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from microbat.transforms.base import BlockDiagonal, Transform, inverse64
from microbat.transforms.hadamard import hadamard, random_orthogonal

Init = Literal["hadamard", "orthogonal", "identity"]


def initial_matrix(n: int, init: Init, generator: torch.Generator | None, batch: int | None = None) -> Tensor:
    """A starting matrix [n, n], or [batch, n, n]: Hadamard, a random orthogonal one (QR, signs fixed), or identity."""
    shape = (n, n) if batch is None else (batch, n, n)
    if init == "hadamard":
        return hadamard(n).expand(shape).clone()
    if init == "identity":
        return torch.eye(n).expand(shape).clone()
    return random_orthogonal(shape, generator)


def kron(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker product of matrices, batched over the leading axis; either may lack it."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-2).flatten(-3, -2)


class _Kronecker(BlockDiagonal):
    A: Tensor
    B: Tensor

    def __init__(self, *, width: int, block: int, g1: int):
        super().__init__(width=width, block=block)
        if g1 < 1 or block % g1:
            raise ValueError(f"g1={g1} does not divide the transform block of {block}")
        self.g1 = g1

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "block": self.block, "g1": self.g1}

    def blocks(self) -> Tensor:
        return kron(self.B.transpose(-1, -2), self.A)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A.unflatten(0, (-1, self.g1)) if self.A.dim() == 2 else self.A, self.B

    def inverse_blocks(self) -> Tensor:
        return kron(inverse64(self.B).transpose(-1, -2), inverse64(self.A))


class GPK(_Kronecker):
    """Global and private Kronecker: one ``A`` [g1, g1] shared by all blocks, a private ``B`` [k, g2, g2] each."""

    name: ClassVar[str] = "gpk"

    def __init__(
        self,
        *,
        width: int,
        block: int,
        g1: int,
        init: Init = "hadamard",
        generator: torch.Generator | None = None,
    ):
        super().__init__(width=width, block=block, g1=g1)
        self.A = nn.Parameter(initial_matrix(g1, init, generator))
        self.B = nn.Parameter(initial_matrix(block // g1, init, generator, width // block))


class NaiveKronecker(_Kronecker):
    """Both factors private: ``A`` [k, g1, g1] and ``B`` [k, g2, g2]."""

    name: ClassVar[str] = "naive_kron"

    def __init__(
        self,
        *,
        width: int,
        block: int,
        g1: int,
        init: Init = "hadamard",
        generator: torch.Generator | None = None,
    ):
        super().__init__(width=width, block=block, g1=g1)
        self.A = nn.Parameter(initial_matrix(g1, init, generator, width // block))
        self.B = nn.Parameter(initial_matrix(block // g1, init, generator, width // block))


class FullBlocks(BlockDiagonal):
    """A free matrix ``P`` [k, g, g] for every block."""

    name: ClassVar[str] = "full"

    def __init__(self, *, width: int, block: int, init: Init = "hadamard", generator: torch.Generator | None = None):
        super().__init__(width=width, block=block)
        self.P = nn.Parameter(initial_matrix(block, init, generator, width // block))

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "block": self.block}

    def blocks(self) -> Tensor:
        return self.P

    def inverse_blocks(self) -> Tensor:
        return inverse64(self.P)


class Kronecker(Transform):
    """One map across the whole width: P = L (x) R on row vectors, a row read row-major as X [n1, n2] going to L^T X R."""

    name: ClassVar[str] = "kronecker"

    def __init__(
        self,
        *,
        width: int,
        left: int,
        init: Init = "orthogonal",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if left < 1 or width % left:
            raise ValueError(f"a width of {width} does not split into {left} rows")
        self.width, self.left = width, left
        self.L = nn.Parameter(initial_matrix(left, init, generator))
        self.R = nn.Parameter(initial_matrix(width // left, init, generator))

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "left": self.left}

    def forward(self, x: Tensor) -> Tensor:
        return _sandwich(x, self.L.to(x.dtype), self.R.to(x.dtype))

    def inverse_t(self, w: Tensor) -> Tensor:
        return _sandwich(w, inverse64(self.L).T.to(w.dtype), inverse64(self.R).T.to(w.dtype))


def _sandwich(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """L^T X R for every row [..., n1 n2] of ``x``: two products."""
    rows = x.reshape(-1, left.shape[0], right.shape[0])
    return (left.T @ (rows @ right)).reshape(x.shape)


def balanced_split(n: int) -> int:
    """n1 of the most balanced n = n1 n2 that n1 <= n2 allows (FlatQuant's rule, sheet B7)."""
    return max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)
