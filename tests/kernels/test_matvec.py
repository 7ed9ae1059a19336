"""Packed weights times a few rows against the dequantized product."""

import pytest
import torch

from microbat.formats.integer import INT4_GROUP, INT8_ROW
from microbat.formats.microscaling import MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT8, NVFP4
from microbat.formats.packing import pack
from microbat.quantizers.base import AbsMax
from microbat.runtime import reference

pytest.importorskip("triton")
kernels = pytest.importorskip("microbat.kernels.matvec")


def weight(format, rows, width):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    q = AbsMax(format=format).quantize(x)
    parts = pack(q)
    return q, (parts["weight" if "weight" in parts else "weight_packed"], parts["weight_scale"])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "format", [MXFP4, NVFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT8, INT4_GROUP, INT8_ROW], ids=lambda f: f.name
)
def test_product_agrees_with_the_dequantized_one(format, tokens):
    rows, width = 19, 1104
    q, stored = weight(format, rows, width)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    got = kernels.matvec(x, *stored, format=format, outer=q.tensor_scale)
    assert got.dtype == x.dtype
    assert ((got - reference.product(x, q)).abs() <= reference.bound(x, q)).all()


def test_integers_multiply_exactly():
    q, stored = weight(MXFP4, 33, 640)
    x = torch.randint(-8, 9, (2, 3, 640), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    got = kernels.matvec(x.float(), *stored, format=MXFP4)
    assert torch.equal(got, reference.product(x, q).float())
    assert kernels.matvec(x, *stored, format=MXFP4).shape == (2, 3, 33)


def test_more_rows_than_it_is_for_are_refused():
    _, stored = weight(MXFP4, 4, 64)
    with pytest.raises(ValueError, match="up to 16 rows at a time, not 17"):
        kernels.matvec(torch.ones(17, 64), *stored, format=MXFP4)
