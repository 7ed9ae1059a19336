"""The products of packed layers on a GPU, by the Triton kernels: which one multiplies when.

========  ====================================================  ===========================================================
product   when                                                  operands
========  ====================================================  ===========================================================
matvec    up to 16 tokens                                       numbers decoded in registers, all float32
scaled    on Blackwell and MI350: activations and weights both  codes and scales as they are
          MX floats of 4 or 8 bits, or both NVFP4
folded    on Hopper, over 128 tokens: both MX of 4 or 6 bits    FP8, exact: block exponents move into the numbers
decoded   otherwise                                             BF16, exact where activations are quantized (INT4's are
                                                                rounded); unquantized ones in the layer's own dtype
========  ====================================================  ===========================================================

Sums are float32, but for Hopper's FP8, which sums 128 products with fewer bits. Activations that are quantized are read
as codes and scales, made in one pass for all layers that share them.
"""

# Shapes: T tokens, K in, N out.

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.formats.element import BF16
from microbat.formats.packing import SCALE_DTYPES

if TYPE_CHECKING:
    from microbat.runtime.packed import PackedLinear


def product(layer: "PackedLinear", x: Tensor) -> Tensor:
    """What ``layer`` sees of ``x`` [..., K], times its weight transposed, plus its bias: [T, N]."""
    if layer.bias is None:
        return _product(layer, x, layer.dtype)
    return _product(layer, x, torch.float32) + layer.bias  # rounded once, by the layer


def _product(layer: "PackedLinear", x: Tensor, dtype: torch.dtype) -> Tensor:
    from microbat.kernels import folding, matmul, matvec

    tokens, width = x.numel() // x.shape[-1], layer.in_features  # as wide as what the site makes of x
    format, outer = layer.format, layer.tensor_scale if layer.format.has_tensor_scale else None
    weight = (layer.codes, layer.scales.view(SCALE_DTYPES[format.scale_element]))
    if tokens <= matvec.MAX_TOKENS:
        return matvec.matvec(layer.site(x).reshape(-1, width), *weight, format=format, outer=outer, dtype=dtype)
    settings = {"width": width, "format": format, "dtype": dtype}
    seen = layer.site.packed(x)
    if seen is None:
        operands = torch.bfloat16 if layer.dtype == torch.bfloat16 else torch.float32
        values = layer.site(x).reshape(-1, width)
        return matmul.matmul(values, weight, **settings, outer=outer, operands=operands)
    settings["x_format"] = seen.format
    stored = (seen.codes.flatten(0, -2), seen.scales.flatten(0, -2))
    kind = many(format, seen.format, x.device)
    # Folding decodes the weight once; the product of decoded tiles does so for each tile of tokens.
    if kind == "folded" and tokens > matmul.TILE["BM"]:
        return folding.folded_matmul(stored, weight, **settings)
    if kind == "scaled":
        return matmul.scaled_matmul(stored, weight, **settings, outer=outer, x_outer=seen.tensor_scale)
    exact = BF16 not in (format.scale_element, seen.format.scale_element)
    operands = torch.bfloat16 if exact or layer.dtype == torch.bfloat16 else torch.float32
    return matmul.matmul(stored, weight, **settings, outer=outer, x_outer=seen.tensor_scale, operands=operands)


def many(format: BlockFormat, activations: BlockFormat | None, device: torch.device) -> str:
    """The product of many tokens on ``device``: ``scaled``, ``folded`` or ``decoded``."""
    from microbat.kernels import folding, matmul

    cores = tensor_cores(device)
    if activations is not None and cores == "scaled" and matmul.has_scaled(activations, format):
        return "scaled"
    if activations is not None and cores == "fp8" and folding.folds(activations) and folding.folds(format):
        return "folded"
    return "decoded"


@functools.cache
def tensor_cores(device: torch.device) -> str:
    """What the GPU multiplies besides BF16: ``scaled`` blocks, ``fp8`` without block scales; empty: nothing used here."""
    if torch.version.hip:
        return "scaled" if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx950") else ""
    major, _ = torch.cuda.get_device_capability(device)
    return "scaled" if major >= 10 else "fp8" if major == 9 else ""
