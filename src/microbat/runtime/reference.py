"""The oracle of every kernel that multiplies: a packed weight's product, as plain as it can be written. Of those that round it is
``AbsMax.quantize`` and ``Clip``, whose oracle are gfloat and ml_dtypes (tests/formats)."""

# Shapes: T tokens, K in, N out.

import torch
from torch import Tensor

from microbat.formats.block import QTensor
from microbat.formats.composite import Composite
from microbat.quantizers.mixed import Mixed


def product(x: Tensor | QTensor | Composite, weight: QTensor | Composite) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed: float64 [..., N].

    Both factors are the values that codes and scales mean; products and sums are float64, which rounds away nothing that
    a float32 kernel could keep.
    """
    x = x if isinstance(x, Tensor) else x.dequantize()
    return x.to(torch.float64) @ weight.dequantize().to(torch.float64).T


def integer_product(x: QTensor, weight: QTensor) -> Tensor:
    """What kernels of integers compute, bit for bit: float32 [..., N] of ``x`` [..., K] and ``weight`` [N, K], both integers
    with one scale a row: (float32(sum of K products) * scale of x's row) * scale of the weight's row.

    Sums are int64 here, int32 there, and the same while they fit. Raises ValueError for formats with other scales.
    """
    for factor in (x, weight):
        element = factor.format.element
        if not element.is_fixed_point or element.bias or factor.format.block is not None:
            raise ValueError(f"{factor.format.name} is not integers with one scale a row")
    x_LK, weight_NK = (q.format.element.decode(q.codes).to(torch.int64) for q in (x, weight))
    return (x_LK @ weight_NK.T).to(torch.float32) * x.scales * weight.scales[:, 0]


def bound(x: Tensor | QTensor | Composite, weight: QTensor | Composite) -> Tensor:
    """How far a sum in float32, in whatever order, may be from :func:`product`: K 2^-24 sum_k |x_k w_k|, [..., N]."""
    x = x if isinstance(x, Tensor) else x.dequantize()
    return weight.shape[-1] * 2.0**-24 * (x.to(torch.float64).abs() @ weight.dequantize().to(torch.float64).abs().T)


def reorder_quantize(x: Tensor, order: Tensor, quantizer: Mixed) -> Composite:
    """Channels of ``x`` [..., K] in another ``order`` [K] and quantized by groups, in one go: each group is gathered and
    quantized from ``x`` itself. The oracle of a fused kernel; what a permutation and then ``quantizer`` make."""
    groups = zip(quantizer.parts, order.split(quantizer.widths), strict=True)
    return Composite(parts=tuple(part.quantize(x.index_select(-1, own)) for part, own in groups))
