"""Products of packed tensors against those of their dequantized values; which operands are exact, and what folds."""

import pytest
import torch

from microbat.formats.element import E2M1, E2M3, E3M2, E4M3, E8M0
from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, MXINT8, NVFP4
from microbat.formats.packing import pack
from microbat.quantizers.base import AbsMax
from microbat.runtime import reference

triton = pytest.importorskip("triton")
matmul = pytest.importorskip("microbat.kernels.matmul")
folding = pytest.importorskip("microbat.kernels.folding")

T, N, K = 37, 150, 288
FLOAT32 = {"dtype": torch.float32, "operands": torch.float32}  # Triton's interpreter knows no bfloat16 product


def tensor(format, rows, seed=0, *, exponents=0, values="float"):
    """A tensor in ``format``; ``exponents``: how many binades its blocks differ by."""
    g = torch.Generator().manual_seed(seed)
    block = format.block or K
    if values == "float":
        x = torch.randn(rows, K, generator=g)
    else:
        x = torch.randint(-3, 4, (rows, K), generator=g).to(torch.float32)
        x[:, ::block] = 6.0  # with these the scale is 1 and every value on the grid
    if exponents:
        x = (
            x.unflatten(-1, (-1, block)) * 2.0 ** torch.randint(0, exponents + 1, (rows, K // block, 1), generator=g)
        ).flatten(1)
    q = AbsMax(format=format).quantize(x)
    parts = pack(q)
    return q, (parts["weight" if "weight" in parts else "weight_packed"], parts["weight_scale"])


def assert_within_rounding(got, x, w, rows=slice(None)):
    """Of the reference, for those ``rows`` of the weight."""
    assert ((got - reference.product(x, w)).abs() <= reference.bound(x, w))[:, rows].all()


@pytest.mark.parametrize("format", [MXFP4, NVFP4, MXFP6_E3M2, MXINT8, INT4_GROUP, INT8_ROW], ids=lambda f: f.name)
@pytest.mark.parametrize("x_format", [None, MXFP4, MXFP8_E5M2, INT8_ROW], ids=lambda f: "none" if f is None else f.name)
def test_operands_are_decoded_exactly(format, x_format):
    w, w_stored = tensor(format, N, exponents=5)
    if x_format is None:
        x = seen = torch.randn(T, K, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    else:
        seen, x = tensor(x_format, T, seed=1, exponents=5)
    got = matmul.matmul(x, w_stored, width=K, format=format, x_format=x_format, outer=w.tensor_scale, **FLOAT32)
    assert_within_rounding(got, seen, w)


@pytest.mark.parametrize(
    ("x_format", "format"), [(MXFP4, MXFP4), (MXFP8_E4M3, MXFP4), (MXFP8_E5M2, MXFP8_E4M3)], ids=lambda f: f.name
)  # fmt: skip
def test_block_scaled_products(x_format, format):
    """NVFP4 is not among them: Triton's interpreter takes its scales for powers of two. test_compiled.py sees its code."""
    (x, x_stored), (w, w_stored) = tensor(x_format, T, seed=1, exponents=5), tensor(format, N, exponents=5)
    got = matmul.scaled_matmul(x_stored, w_stored, width=K, format=format, x_format=x_format, dtype=torch.float32)
    assert_within_rounding(got, x, w)


def test_a_block_scaled_product_of_two_kinds_of_scales_is_refused():
    with pytest.raises(ValueError, match="no block-scaled product multiplies 'mxfp4' by 'nvfp4'"):
        matmul.scaled_matmul(tensor(MXFP4, 3)[1], tensor(NVFP4, 4)[1], width=K, format=NVFP4, x_format=MXFP4)


def test_e2m1_times_a_power_of_two_is_e4m3_from_minus_8_to_6():
    for d in range(-8, 7):
        assert torch.equal(E4M3.round(E2M1.table * 2.0**d), E2M1.table * 2.0**d)
    for d in (-9, 7):
        assert not torch.equal(E4M3.round(E2M1.table * 2.0**d), E2M1.table * 2.0**d)


def test_headroom():
    assert [folding.headroom(e) for e in (E2M1, E2M3, E3M2, E4M3)] == [6, 5, 4, 0]


def test_every_code_at_every_distance_folds_as_far_as_it_can():
    """Row r: all codes in a block r binades below the row's largest."""
    rows = 20
    codes = torch.zeros(rows, 64, dtype=torch.uint8)
    codes[:, :32] = torch.arange(16, dtype=torch.uint8).repeat(2)
    codes[:, 32] = 7
    exponents = torch.stack([-torch.arange(rows), torch.zeros(rows, dtype=torch.int64)], 1) + 3
    scales = (exponents + 127).to(torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    folded = folding.fold((packed, scales), width=64, format=MXFP4)
    assert folded.exact.tolist() == [1] * 15 + [0] * 5
    values = E2M1.decode(codes) * E8M0.decode(scales).repeat_interleave(32, 1)
    back = folded.values.float() * 2.0 ** folded.exponents[:, None]
    assert torch.equal(back[:15], values[:15])


@pytest.mark.parametrize("exponents", [0, 8, 25])
def test_folded_products_equal_the_exact_ones(exponents):
    """Small integers times powers of two: the sums are float32 numbers, so nothing may differ; at 25 binades no row of
    the weight folds, and the bound is that of float32."""
    (x, x_stored), (w, w_stored) = (
        tensor(MXFP4, T, seed=1, values="int"),
        tensor(MXFP4, N, values="int", exponents=exponents),
    )
    folded = folding.fold(w_stored, width=K, format=MXFP4)
    assert bool(folded.exact.all()) == (exponents < 25)
    got = folding.folded_matmul(
        x_stored, w_stored, width=K, format=MXFP4, x_format=MXFP4, folded_weight=folded, **FLOAT32
    )
    if exponents < 25:
        assert torch.equal(got, reference.product(x, w).float())
    assert_within_rounding(got, x, w)


def test_tiles_that_do_not_fold_are_multiplied_the_other_way():
    (x, x_stored), (w, w_stored) = tensor(MXFP4, T, seed=1), tensor(MXFP4, N)
    w_stored[1][140, 0] = 127 - 30  # one row of the second tile of columns: its blocks are now far apart
    w.scales[140, 0] = 2.0**-30
    w_stored[1][141, 1], w.scales[141, 1] = 255, float("nan")
    folded = folding.fold(w_stored, width=K, format=MXFP4)
    assert (folded.exact == 0).nonzero().flatten().tolist() == [140, 141]
    got = folding.folded_matmul(x_stored, w_stored, width=K, format=MXFP4, x_format=MXFP4, **FLOAT32)
    assert got[:, 141].isnan().all()
    assert_within_rounding(got, x, w, torch.arange(N) != 141)


def test_mxfp8_activations_are_right_whether_they_fold_or_not():
    (x, x_stored), (w, w_stored) = tensor(MXFP8_E4M3, T, seed=1, exponents=9), tensor(MXFP4, N)
    got = folding.folded_matmul(x_stored, w_stored, width=K, format=MXFP4, x_format=MXFP8_E4M3, **FLOAT32)
    assert_within_rounding(got, x, w)


def test_scales_that_are_no_powers_of_two_do_not_fold():
    with pytest.raises(ValueError, match="scales of format 'nvfp4' are no powers of two"):
        folding.fold(tensor(NVFP4, 2)[1], width=K, format=NVFP4)
