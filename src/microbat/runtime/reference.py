"""The oracle of every kernel: a packed weight's product, as plain as it can be written."""

# Shapes: T tokens, K in, N out.

import torch
from torch import Tensor

from microbat.formats.block import QTensor


def product(x: Tensor | QTensor, weight: QTensor) -> Tensor:
    """``x`` [..., K] times ``weight`` [N, K] transposed: float64 [..., N].

    Both factors are the values that codes and scales mean; products and sums are float64, which rounds away nothing that
    a float32 kernel could keep.
    """
    x = x.dequantize() if isinstance(x, QTensor) else x
    return x.to(torch.float64) @ weight.dequantize().to(torch.float64).T


def bound(x: Tensor | QTensor, weight: QTensor) -> Tensor:
    """How far a sum in float32, in whatever order, may be from :func:`product`: K 2^-24 sum_k |x_k w_k|, [..., N]."""
    x = x.dequantize() if isinstance(x, QTensor) else x
    return weight.shape[-1] * 2.0**-24 * (x.to(torch.float64).abs() @ weight.dequantize().to(torch.float64).abs().T)
