"""The T-law for every transform, the convention of Algorithm 1, and the parameter counts of the paper's Table 1."""

import json

import pytest
import torch

from microbat.transforms.hadamard import BlockHadamard, Hadamard, hadamard
from microbat.transforms.kronecker import GPK, FullBlocks, Kronecker, NaiveKronecker, balanced_split, kron
from microbat.transforms.permutation import Ordered, Permutation


def random_(transform, seed=0):
    """Fill a transform with non-symmetric, well-conditioned random factors, in float64."""
    generator = torch.Generator().manual_seed(seed)
    transform.to(torch.float64)
    with torch.no_grad():
        for p in transform.parameters():
            if p.dim() == 1:
                continue
            p.copy_(torch.eye(p.shape[-1]) * 1.5 + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return transform


KINDS = [
    *[GPK(width=192, block=g, g1=g1) for g in (16, 32, 64) for g1 in (1, 2, 4, 8, 16, 32, 64) if g1 <= g],
    *[NaiveKronecker(width=96, block=32, g1=g1) for g1 in (1, 4, 8, 32)],
    *[FullBlocks(width=96, block=g) for g in (16, 32)],
]
WIDE = [
    Kronecker(width=96, left=8),
    Kronecker(width=96, left=1),
    Permutation(width=96, order=torch.randperm(96, generator=torch.Generator().manual_seed(0))),
    Ordered(map=GPK(width=96, block=16, g1=8), order=torch.randperm(96, generator=torch.Generator().manual_seed(1))),
]


@pytest.mark.parametrize("transform", KINDS + WIDE, ids=lambda t: f"{t.name}-{t.settings()}")
def test_t_law(transform):
    random_(transform)
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, transform.width, generator=g, dtype=torch.float64) for n in (7, 5))
    with torch.no_grad():
        product = transform(x) @ transform.inverse_t(w).T
    torch.testing.assert_close(product, x @ w.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transform", KINDS, ids=lambda t: f"{t.name}-{t.settings()}")
def test_only_the_perturbed_block_moves(transform):
    random_(transform)
    x = torch.randn(3, transform.width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x.clone()
    y[:, 0] += 1
    with torch.no_grad():
        moved = (transform(x) != transform(y)).any(0)
    assert moved[: transform.block].any()
    assert not moved[transform.block :].any()


def test_gpk_follows_algorithm_1():
    """V -> B_i V A on the row-major block, which is B_i^T (x) A on row vectors; not B_i (x) A, and not Algorithm 2's inverse."""
    transform = random_(GPK(width=96, block=32, g1=8))
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        A, B = transform.A, transform.B
        literal = torch.einsum("kij,tkjl,lm->tkim", B, x.view(5, 3, 4, 8), A).reshape(5, 96)
        torch.testing.assert_close(transform(x), literal, rtol=1e-10, atol=1e-10)
        dense = torch.block_diag(*[torch.kron(B[i].T.contiguous(), A) for i in range(3)])
        torch.testing.assert_close(transform(x), x @ dense, rtol=1e-10, atol=1e-10)
        wrong = torch.block_diag(*[torch.kron(B[i], A) for i in range(3)])
        assert (transform(x) - x @ wrong).abs().max() > 0.1
        w = torch.randn(4, 96, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        literal_alg2 = torch.einsum("kij,tkjl,lm->tkim", B.inverse(), w.view(4, 3, 4, 8), A.inverse()).reshape(4, 96)
        assert (transform(x) @ literal_alg2.T - x @ w.T).abs().max() > 0.1


def test_kron_against_torch():
    g = torch.Generator().manual_seed(5)
    a, b = torch.randn(3, 4, 4, generator=g), torch.randn(2, 2, generator=g)
    for i in range(3):
        assert torch.equal(kron(a, b)[i], torch.kron(a[i], b))


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (FullBlocks(width=4096, block=32), 131_072),
        (NaiveKronecker(width=4096, block=32, g1=8), 10_240),
        (GPK(width=4096, block=32, g1=8), 2_112),
        (GPK(width=12288, block=32, g1=8), 6_208),
        (GPK(width=4096, block=32, g1=1), 131_073),
        (BlockHadamard(width=4096, block=32), 0),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_parameter_counts_of_table_1(transform, expected):
    assert transform.num_parameters == expected


def test_hadamard_start_is_the_block_hadamard():
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    fixed = BlockHadamard(width=64, block=32)
    for transform in (
        GPK(width=64, block=32, g1=8),
        NaiveKronecker(width=64, block=32, g1=4),
        FullBlocks(width=64, block=32),
    ):
        torch.testing.assert_close(transform(x), fixed(x))
    torch.testing.assert_close(hadamard(32) @ hadamard(32), torch.eye(32))


@pytest.mark.parametrize("kind", [GPK, NaiveKronecker])
def test_orthogonal_start_is_orthogonal_and_seeded(kind):
    made = [
        kind(width=64, block=32, g1=8, init="orthogonal", generator=torch.Generator().manual_seed(9)) for _ in range(2)
    ]
    blocks = made[0].blocks()
    torch.testing.assert_close(blocks @ blocks.transpose(-1, -2), torch.eye(32).expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(made[0].A, made[1].A)


def test_gradient_flows_through_the_inverse():
    transform = random_(GPK(width=64, block=32, g1=8))
    w = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    assert torch.autograd.gradcheck(lambda a: _with_a(transform, a, w), transform.A.detach().requires_grad_())


def _with_a(transform, a, w):
    return torch.func.functional_call(_Inverse(transform), {"inner.A": a}, (w,))


class _Inverse(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, w):
        return self.inner.inverse_t(w)


def test_widths_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="width of 100 does not split"):
        GPK(width=100, block=32, g1=8)
    with pytest.raises(ValueError, match="g1=5 does not divide"):
        GPK(width=64, block=32, g1=5)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 40, 44, 60, 108, 68, 76, 140, 576, 1536])
def test_hadamard_matrices_are_hadamard(n):
    h = hadamard(n).double() * n**0.5
    assert torch.equal(h.round().abs(), torch.ones(n, n).double())
    torch.testing.assert_close(h @ h.T, n * torch.eye(n).double(), rtol=1e-5, atol=1e-3)


def test_unknown_hadamard_sizes_are_refused():
    for n in (0, 3, 52, 4304):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of size {n}"):
            hadamard(n)


@pytest.mark.parametrize(
    ("width", "stride", "size"),
    [(576, 1, 576), (1536, 1, 1536), (576, 64, 1), (1024, 128, 8), (9728, 1, 9728), (4304, 1, 16)],
)
def test_wide_hadamard(width, stride, size):
    transform = Hadamard(width=width, stride=stride).double()
    assert transform.size == size
    g = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (3, 2))
    torch.testing.assert_close(transform(x) @ transform.inverse_t(w).T, x @ w.T, rtol=1e-4, atol=1e-4)
    if width == 576 and stride == 1:
        dense = transform(torch.eye(width, dtype=torch.float64))
        assert (dense.abs() * width**0.5 - 1).abs().max() < 1e-5


def test_kronecker_is_the_kronecker_product():
    transform = random_(Kronecker(width=24, left=4))
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(transform(x), x @ torch.kron(transform.L, transform.R))


@pytest.mark.parametrize(("n", "left"), [(4096, 64), (12288, 96), (1152, 32), (2560, 40), (1024, 32), (4608, 64)])
def test_flatquants_split(n, left):
    assert balanced_split(n) == left


def test_permutation_is_exact_and_is_stored():
    order = torch.randperm(96, generator=torch.Generator().manual_seed(8))
    transform = Permutation(width=96, order=order)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(9))
    assert torch.equal(transform(x), x[:, order])
    again = Permutation(**transform.settings())
    assert torch.equal(again(x), x)
    again.load_state_dict(transform.state_dict())
    assert torch.equal(again.to(torch.bfloat16)(x), x[:, order])
    with pytest.raises(ValueError, match="not a permutation of 96"):
        Permutation(width=96, order=torch.zeros(96, dtype=torch.int64))


def test_a_map_of_reordered_channels_is_stored_with_its_order():
    order = torch.randperm(96, generator=torch.Generator().manual_seed(10))
    transform = Ordered(map=GPK(width=96, block=16, g1=8, init="orthogonal"), order=order)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(11))
    assert torch.equal(transform(x), transform.map(x[:, order]))
    again = Ordered(**json.loads(json.dumps(transform.settings())))
    again.load_state_dict(transform.state_dict())
    assert torch.equal(again(x), transform(x))
    with pytest.raises(ValueError, match="unknown transform 'gkp'; did you mean 'gpk'"):
        Ordered(map={"name": "gkp"})
