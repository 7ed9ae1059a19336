"""Hadamard matrices, normalised to be orthogonal, and the fixed transforms made of them. Nothing of them is stored.

Sizes: 1, 2, and every 2^k m with m = q + 1 for a prime q = 3 mod 4 (Paley's first construction) or m = 2 (q + 1) for a
prime q = 1 mod 4 (his second), which covers what models use: 12, 20, 28, 36, 68, 76, 108, 140 times a power of two.
"""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from microbat.transforms.base import BlockDiagonal, Transform


@functools.cache
def hadamard(n: int) -> Tensor:
    """The orthogonal Hadamard matrix [n, n], float32; symmetric, in Sylvester's order, where n is a power of two."""
    core = _core_size(n)
    if core is None:
        raise ValueError(f"no Hadamard matrix of size {n} is known here: it is no 2^k, 2^k (q + 1) or 2^(k+1) (q + 1)")
    h = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / n**0.5).to(torch.float32)


def largest_hadamard_divisor(n: int) -> int:
    """``n`` itself where a Hadamard matrix of that size is known, otherwise the largest power of two that divides it."""
    return n if _core_size(n) is not None else n & -n


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """diag(random signs) H [n, n]; a random orthogonal matrix where no Hadamard matrix of this size is known."""
    if largest_hadamard_divisor(n) != n:
        return random_orthogonal((n, n), generator)
    signs = torch.randint(0, 2, (n, 1), generator=generator).to(torch.float32) * 2 - 1
    return signs * hadamard(n)


def random_orthogonal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Random orthogonal matrices [..., n, n] (QR with the signs fixed, so that they are uniform), float32."""
    q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).to(torch.float32)


def _core_size(n: int) -> int | None:
    """The smallest m with n = 2^k m and a construction for m; None where there is none."""
    if n < 1:
        return None
    m = n // (n & -n)
    while m <= n:
        if m == 1 or (m % 4 == 0 and (_is_prime(m - 1) or ((m // 2 - 1) % 4 == 1 and _is_prime(m // 2 - 1)))):
            return m
        m *= 2
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _paley(m: int) -> Tensor:
    """A Hadamard matrix [m, m] of +-1: Paley's first construction where m - 1 is prime, otherwise his second."""
    q = m - 1 if _is_prime(m - 1) else m // 2 - 1
    squares = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
    steps = torch.arange(q)
    s = torch.ones(q + 1, q + 1, dtype=torch.float64)
    s[0, 0] = 0
    s[1:, 1:] = character[(steps[:, None] - steps[None, :]) % q]
    if q == m - 1:
        s[1:, 0] = -1
        return s + torch.eye(m, dtype=torch.float64)
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(s, plus.double()) + torch.kron(torch.eye(q + 1).double(), minus.double())


class BlockHadamard(BlockDiagonal):
    """The same Hadamard rotation in every block: I (x) H, for a block that is a power of two."""

    name: ClassVar[str] = "block_hadamard"
    H: Tensor

    def __init__(self, *, width: int, block: int):
        super().__init__(width=width, block=block)
        if block & (block - 1):
            raise ValueError(f"a transform block of {block} is not a power of two")
        self.register_buffer("H", hadamard(block), persistent=False)

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "block": self.block}

    def blocks(self) -> Tensor:
        return self.H.expand(self.width // self.block, -1, -1)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.H[None], self.H.new_ones(1, 1, 1)

    def inverse_blocks(self) -> Tensor:
        return self.blocks()


class Hadamard(Transform):
    """A rotation across the whole width: H_n (x) I_stride with n = width / stride.

    ``stride`` 1 mixes all lanes; a head's size as stride mixes the heads and leaves each head's own lanes apart. Where no
    matrix of size n is known it is I (x) H of the largest power of two that divides n (sheet B4). H_n is applied as two
    factors of about sqrt(n): 2 width sqrt(n) multiplications a token.
    """

    name: ClassVar[str] = "hadamard"
    left: Tensor
    right: Tensor

    def __init__(self, *, width: int, stride: int = 1):
        super().__init__()
        if width % stride:
            raise ValueError(f"a width of {width} does not split into {stride} lanes")
        self.width, self.stride = width, stride
        self.size = largest_hadamard_divisor(width // stride)
        right = 1
        while right * right < self.size and self.size % (2 * right) == 0 and _core_size(self.size // (2 * right)):
            right *= 2
        self.register_buffer("left", hadamard(self.size // right), persistent=False)
        self.register_buffer("right", hadamard(right), persistent=False)

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "stride": self.stride}

    def forward(self, x: Tensor) -> Tensor:
        lanes = x.reshape(-1, self.left.shape[0], self.right.shape[0], self.stride)
        y = torch.einsum("tabs,ac,bd->tcds", lanes, self.left.to(x.dtype), self.right.to(x.dtype))
        return y.reshape(x.shape)

    def inverse_t(self, w: Tensor) -> Tensor:
        return self(w)  # orthogonal: M^-T = M
