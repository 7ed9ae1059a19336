"""The best block transform by second moments, in closed form: where training full blocks starts.

A block's activation has second moments C, the weights that read it W^T W = G, both [B, B]. A block format's rounding error
has an energy in proportion to the block's own, whatever its values are. Rounding X P adds P^-1 W^T times that much, rounding
W P^-T adds X P times as much: both together cost, but for a factor,

    (1)  J(P) = tr(P^T C P) tr(P^-1 G P^-T) = |C^1/2 P|^2 |P^-1 G^1/2|^2 >= |C^1/2 G^1/2|_*^2

since a product's nuclear norm is at most that of the factors' Frobenius norms. The bound is reached where both sides are equal:

    (2)  P^T C P = P^-1 G P^-T = S:   C = L L^T,  L^T G L = U diag(s)^2 U^T,  P = L^-T U diag(s)^1/2

with S = diag(s). An orthogonal matrix after P changes no trace: a Hadamard matrix spreads the block's energy evenly, since a
block's scale follows its largest value. Our own; on SmolLM2 J is 0.2 to 0.8 of that of the Hadamard matrix alone (LOG.md).
"""

# Shapes: k blocks, B block size.

import torch
from torch import Tensor

from microbat.transforms.hadamard import hadamard

DAMPING = 1e-2  # of the mean diagonal of C and of G


def balanced_blocks(moments_kBB: Tensor, gram_kBB: Tensor) -> Tensor:
    """P [k, B, B], float64, each block of the Frobenius norm of an orthogonal matrix, from C and G."""
    size = moments_kBB.shape[-1]
    lower = torch.linalg.cholesky(_damped(moments_kBB))
    squares, basis = torch.linalg.eigh(lower.mT @ _damped(gram_kBB) @ lower)
    blocks = torch.linalg.solve_triangular(lower.mT, basis, upper=True) * squares[:, None].clamp(min=0) ** 0.25
    blocks = blocks @ hadamard(size).to(blocks)
    return blocks * (size**0.5 / torch.linalg.matrix_norm(blocks))[:, None, None]


def _damped(matrices_kBB: Tensor) -> Tensor:
    """In float64, with a share of the mean diagonal; a block of zeros becomes the identity."""
    matrices_kBB = matrices_kBB.to(torch.float64)
    mean = matrices_kBB.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = torch.where(mean > 0, DAMPING * mean, 1.0)
    return matrices_kBB + added[:, None, None] * torch.eye(matrices_kBB.shape[-1]).to(matrices_kBB)
