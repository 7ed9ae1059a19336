"""The linear layer that runs from its packed bits, and the backends that multiply by them.

=========  =========================================  ==================================================================
backend    where                                      how
=========  =========================================  ==================================================================
native     CPU, microbat built with a C++ compiler    integers times integers (W8A8, W4A8): sums of int32; else up to 32
                                                      tokens (8 without AVX2) codes are decoded in registers,
                                                      sums are float32, and more tokens meet tiles, decoded natively
triton     GPUs, where Triton is installed            :mod:`microbat.runtime.gpu`: codes decoded in registers, FP8 or
                                                      block-scaled tensor cores by the hardware
torch      everywhere, every format                   by tiles, decoded by torch (compiled where that works)
=========  =========================================  ==================================================================

A tile is as many rows of the weight as fit a buffer of 4 MiB, which every layer of a thread uses again. It is multiplied in
the layer's dtype: in float32 the operands are the calibrated ones exactly and only the order of the sums differs, so an
output is within K 2^-24 sum |x w| of the exact one (``reference.bound``); in BF16 MX and integer values are exact as
well, NVFP4's are rounded, and so is the output. Sums of integers are exact: (sum * token's scale) * row's scale + bias, in
float32, whatever the layer's dtype (``reference.integer_product``).

The model is never unpacked to floats, nor is a layer. Beside the codes a thread holds one tile for each dtype, 4 MiB or one row
where that is more, and a product its inputs, transformed, and its outputs. Triton's tiles are registers; folding alone
(:mod:`microbat.runtime.gpu`) makes a layer's weight in FP8, a byte a number, while it multiplies more than 128 tokens.
:mod:`microbat.bench` measures the peak.
"""

# Shapes: T tokens, K in, N out, G groups along K.

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microbat import kernels, native
from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.packing import pack, scale_dtype, unpack
from microbat.linear import SiteInput
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import rounding
from microbat.quantizers.kernel import compiled, compiles
from microbat.registry import unknown
from microbat.runtime import gpu

NATIVE_TOKENS = {"portable": 8, "avx2": 32, "avx512": 32}  # where decoding once for a product of its own begins to win
BFLOAT16_TOKENS = 8  # where torch's own product of a BF16 weight is as fast
TILE_BYTES = 4 << 20


class PackedLinear(nn.Module):
    """``y = site(x) @ weight.T + bias``, the weight [N, K] in its own bits: ``codes`` and ``scales``, raw bytes as stored."""

    codes: Tensor
    scales: Tensor
    outer_bytes: Tensor

    def __init__(
        self,
        site: SiteInput,
        weight: QTensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        backend: str = "auto",
    ):
        super().__init__()
        parts = pack(weight)
        self.site, self.format, self.dtype = site, weight.format, dtype
        self.out_features, self.in_features = weight.shape
        codes = parts["weight"] if "weight" in parts else parts["weight_packed"]
        outer = torch.ones(1) if weight.tensor_scale is None else weight.tensor_scale.reshape(1)
        self.outer = outer.item()
        # As bytes, so that model.to(dtype) leaves them alone.
        for name, part in (("codes", codes), ("scales", parts["weight_scale"]), ("outer_bytes", outer)):
            self.register_buffer(name, part.view(torch.uint8).to(device), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.adds_integers = _adds_integers(site, weight.format, self.in_features)
        self._backend = backend
        if backend != "auto":
            check(backend, weight.format, self.codes.device.type)

    @property
    def backend(self) -> str:
        """The name of the backend that multiplies: the one that was asked for, or the best for the device."""
        return best(self.format, self.codes.device.type) if self._backend == "auto" else self._backend

    def forward(self, x: Tensor) -> Tensor:
        return BACKENDS[self.backend].product(self, x).view(*x.shape[:-1], -1).to(x.dtype)

    @property
    def tensor_scale(self) -> Tensor:
        """The weight's outer scale [], float32; 1 in formats without one."""
        return self.outer_bytes.view(torch.float32).reshape(())

    def rows(self, start: int, stop: int) -> QTensor:
        """Some rows of the weight, unpacked."""
        return _unpack(
            self.codes[start:stop], self.scales[start:stop], self.tensor_scale, self.format, self.in_features
        )

    def dequantize(self) -> Tensor:
        """The whole weight [N, K] in float32, for those who look at it; products never make it."""
        return self.rows(0, self.out_features).dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}, backend={self.backend}"


class Head(nn.Module):
    """A linear layer that stays in floats, ``weight`` [N, K]: one token meets a BF16 weight in the native kernel, which
    reads memory as fast as it comes; torch's own product does not. Its sums are float32, rounded to BF16 at the end."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() <= BFLOAT16_TOKENS * x.shape[-1] and self.weight.dtype == x.dtype == torch.bfloat16
        if few and native.available(x, self.weight) and native.has_bfloat16_product() and self.bias is None:
            y = native.bfloat16_product(x.reshape(-1, x.shape[-1]).to(torch.float32), self.weight)
            return y.view(*x.shape[:-1], -1).to(x.dtype)
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """``product(layer, x [..., K])`` is all that the layer does, [T, N]; ``fits(format, device type)`` says where it works."""

    fits: Callable[[BlockFormat, str], bool]
    product: Callable[[PackedLinear, Tensor], Tensor]


def native_product(layer: PackedLinear, x: Tensor) -> Tensor:
    if layer.adds_integers and native.available(x):
        seen = layer.site.packed(x)
        y = native.integer_product(
            seen.codes, seen.scales, layer.codes, layer.scales,
            width=layer.in_features, activations=seen.format, format=layer.format,
        )  # fmt: skip
        return y if layer.bias is None else y + layer.bias
    x = layer.site(x).reshape(-1, layer.in_features)
    if x.shape[0] <= NATIVE_TOKENS[native.product_level(layer.format)]:
        x = x.to(torch.float32).contiguous()
        y = native.product(x, layer.codes, layer.scales, layer.outer, format=layer.format)
        return y if layer.bias is None else y + layer.bias
    return _by_tiles(layer, x, _decode_natively)


def torch_product(layer: PackedLinear, x: Tensor) -> Tensor:
    return _by_tiles(layer, layer.site(x).reshape(-1, layer.in_features), _decode)


BACKENDS = {  # the best first
    "native": Backend(
        fits=lambda format, device: device == "cpu" and native.shared_object() is not None and native.knows(format),
        product=native_product,
    ),
    "triton": Backend(
        fits=lambda format, device: kernels.runs_on(device) and kernels.knows(format), product=gpu.product
    ),
    "torch": Backend(fits=lambda format, device: True, product=torch_product),
}


@functools.cache
def best(format: BlockFormat, device: str) -> str:
    """The name of the first backend that runs ``format`` on a device of this type."""
    return next(name for name, backend in BACKENDS.items() if backend.fits(format, device))


def _adds_integers(site: SiteInput, format: BlockFormat, width: int) -> bool:
    quantizer = rounding(site.quantizer)
    known = isinstance(quantizer, AbsMax) and native.knows(quantizer.format, quantizer.rule)
    return known and native.multiplies(format, quantizer.format, width)


def described(format: BlockFormat, activations: BlockFormat | None, device: torch.device) -> str:
    """The best backend's name, with its product: on a GPU that for many tokens, on a CPU where it adds integers."""
    name = best(format, device.type)
    if name == "native" and activations is not None and native.multiplies(format, activations, 1):
        return f"{name}, sums of int32"
    return f"{name}, {gpu.many(format, activations, device)}" if name == "triton" else name


def check(name: str, format: BlockFormat, device: str) -> None:
    """Raise ValueError where there is no backend ``name``, or it does not run ``format`` on this type of device."""
    if name not in BACKENDS:
        raise unknown("backend", name, BACKENDS)
    if not BACKENDS[name].fits(format, device):
        raise ValueError(
            f"backend {name!r} does not run {format.name} on {device!r} here (native: a CPU, and microbat installed where "
            "there is a C++ compiler; triton: a GPU, and Triton installed; neither knows HiFloat formats)"
        )


def _by_tiles(layer: PackedLinear, x: Tensor, decode: Callable[[PackedLinear, int, Tensor], None]) -> Tensor:
    x = x.to(layer.dtype)
    y = torch.empty(x.shape[0], layer.out_features, dtype=x.dtype, device=x.device)
    num_rows = max(1, TILE_BYTES // (layer.in_features * x.element_size()))
    for start in range(0, layer.out_features, num_rows):
        out = y[:, start : start + num_rows]
        tile = _buffer(out.shape[1] * layer.in_features, x.dtype, x.device).view(out.shape[1], -1)
        decode(layer, start, tile)
        if layer.bias is None:
            torch.mm(x, tile.T, out=out)
        else:  # in one operation: a sum is rounded once
            torch.addmm(layer.bias[start : start + num_rows].to(x.dtype), x, tile.T, out=out)
    return y


_buffers = threading.local()


def _buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The thread's buffer: a fresh one costs a CPU more in page faults than decoding into it does."""
    held = _buffers.__dict__
    if (dtype, device) not in held or held[dtype, device].numel() < numel:
        held[dtype, device] = torch.empty(max(numel, TILE_BYTES // dtype.itemsize), dtype=dtype, device=device)
    return held[dtype, device][:numel]


def _decode_natively(layer: PackedLinear, start: int, tile: Tensor) -> None:
    rows = slice(start, start + tile.shape[0])
    native.dequantize(layer.codes[rows], layer.scales[rows], layer.outer, tile, format=layer.format)


def _decode(layer: PackedLinear, start: int, tile: Tensor) -> None:
    rows = slice(start, start + tile.shape[0])
    function = _compiled_decode if compiles(tile) else _decode_into
    function(layer.format, layer.in_features, tile.dtype)(
        layer.codes[rows], layer.scales[rows], layer.tensor_scale, tile
    )


def _decode_into(format: BlockFormat, width: int, dtype: torch.dtype) -> Callable[..., None]:
    def decode(codes: Tensor, scales: Tensor, tensor_scale: Tensor, tile: Tensor) -> None:
        tile.copy_(_unpack(codes, scales, tensor_scale, format, width).dequantize())

    return decode


@functools.cache
def _compiled_decode(format: BlockFormat, width: int, dtype: torch.dtype) -> Callable[..., None]:
    return compiled(_decode_into(format, width, dtype), f"decode_{format.name}_{width}_{dtype}".replace(".", "_"))


def _unpack(codes: Tensor, scales: Tensor, tensor_scale: Tensor, format: BlockFormat, width: int) -> QTensor:
    parts = {
        "weight" if format.element.bits == 8 else "weight_packed": codes,
        "weight_scale": scales.view(scale_dtype(format)),
        "weight_tensor_scale": tensor_scale,
    }
    return unpack(parts, format, width)
