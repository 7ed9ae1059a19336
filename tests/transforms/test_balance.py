"""The closed form of the best block transform: it reaches the bound, no other transform passes it."""

import torch

from microbat.transforms import balance
from microbat.transforms.balance import balanced_blocks


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(blocks, moments, gram):
    inverse = torch.linalg.inv(blocks)
    return [m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (blocks.mT @ moments @ blocks, inverse @ gram @ inverse.mT)]


def pair(size):
    factors = [draw(3, size, size, seed=seed) * torch.logspace(-2, 1, size) for seed in (1, 2)]
    return [f @ f.mT + 0.01 * torch.eye(size) for f in factors]


def test_the_bound_is_reached_and_nothing_passes_it(monkeypatch):
    monkeypatch.setattr(balance, "DAMPING", 0.0)
    moments, gram = pair(16)
    roots = [torch.linalg.cholesky(m) for m in (moments, gram)]
    bound = torch.linalg.svdvals(roots[0].mT @ roots[1]).sum(-1) ** 2  # |C^1/2 G^1/2|_*, whichever root is taken
    best = balanced_blocks(moments, gram)
    activation, weight = cost(best, moments, gram)
    torch.testing.assert_close(activation * weight, bound)
    for other in (torch.eye(16).expand(3, -1, -1), best + 1e-3 * draw(3, 16, 16, seed=3), draw(3, 16, 16, seed=4)):
        a, w = cost(other.to(torch.float64), moments, gram)
        assert (a * w >= bound).all()
    torch.testing.assert_close(torch.linalg.matrix_norm(best), torch.full((3,), 4.0, dtype=torch.float64))


def test_both_sides_see_the_same_energies_spread_evenly(monkeypatch):
    monkeypatch.setattr(balance, "DAMPING", 0.0)
    moments, gram = pair(16)
    best = balanced_blocks(moments, gram)
    inverse = torch.linalg.inv(best)
    activation, weight = best.mT @ moments @ best, inverse @ gram @ inverse.mT
    ratio = activation / weight
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), rtol=1e-4, atol=0)
    diagonal = activation.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal))


def test_a_dead_block_keeps_a_transform():
    moments, gram = pair(8)
    moments[1], gram[2] = 0, 0
    best = balanced_blocks(moments, gram)
    assert torch.isfinite(best).all()
    assert (torch.linalg.cond(best) < 1e6).all()
