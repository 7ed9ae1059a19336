"""The native kernels for CPUs (``native.cpp``), where the package was built with a C++ compiler.

They quantize (transform, clip, scale, round, pack, in one pass, whose gradient is another), dequantize, and multiply a few
rows with a packed weight. Quantizing and dequantizing give the bits of :mod:`microbat.quantizers.kernel` and of
``QTensor.dequantize``, gradients its numbers but for the order of sums. The product's operands are exact, its sums float32: with
u = 2^-24, each output is within K u sum |x_k w_k| of the exact one. Where both factors are integers with a scale a row, sums are
int32 and exact (``runtime.reference.integer_product``).
AVX2, AVX-512, its BF16 instructions and VNNI are chosen by the processor at run time; the product with floats has a path for
each of ``LEVELS``, all within that bound.
"""

# Shapes: T rows (tokens), K last axis, N rows of a weight, G blocks along K.

import ctypes
import functools
import importlib.util
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.formats.element import BF16, E4M3, E8M0, FP32
from microbat.formats.packing import SCALE_DTYPES

SCALES = {E8M0: 0, E4M3: 1, BF16: 2, FP32: 3}
RULES = {"floor": 0, "even": 1, "rceil": 2, "ceil": 3, "absmax": 4, "full_range": 5}
LEVELS = (
    "portable",
    "avx2",
    "avx512",
)  # of the product with floats: the instructions that it uses, in native.cpp's order
FLOATS = (torch.float32, torch.bfloat16)
LARGEST_MAP = 1024  # numbers in a block of a map


class _Format(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("bits", "mantissa_bits", "emin", "emax", "fixed_point", "block")),
        *((name, c_int32) for name in ("scale", "rule", "bias")),
        ("max", c_float),
        ("table", c_float * 256),
    ]


class _Map(Structure):
    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        ("g1", c_int32),
        ("g2", c_int32),
        ("a_stride", c_int64),
        ("b_stride", c_int64),
    ]


_NO_MAP = _Map()
_BFLOAT16 = _Format(bits=16, scale=4)  # numbers, no codes: neither table nor scales


@functools.cache
def shared_object() -> ctypes.CDLL | None:
    """The built kernels; None where the package was installed without a C++ compiler."""
    found = importlib.util.find_spec("microbat._native")
    if found is None or found.origin is None:
        return None
    lib = ctypes.CDLL(found.origin)
    pointer, integer, long, real = c_void_p, ctypes.c_int, c_int64, c_float
    form = POINTER(_Format)
    lib.microbat_quantize.argtypes = [
        *(pointer, integer, long, long, POINTER(_Map), pointer, long, real, form),
        *(pointer, integer, pointer, pointer, integer),
    ]
    lib.microbat_backward.argtypes = [
        *(pointer, integer, pointer, integer, long, long, pointer, long, real, form),
        *(pointer, pointer, integer),
    ]
    lib.microbat_dequantize.argtypes = [pointer, pointer, long, long, real, form, pointer, integer, integer]
    lib.microbat_product.argtypes = [
        *(pointer, long, long, pointer, pointer, long, real, form, integer, pointer, integer),
    ]
    lib.microbat_integer_product.argtypes = [
        *(pointer, pointer, long, long, form, pointer, pointer, long, form, integer, pointer, integer),
    ]
    lib.microbat_product_level.argtypes = [form]
    for function in (
        lib.microbat_quantize,
        lib.microbat_backward,
        lib.microbat_dequantize,
        lib.microbat_product,
        lib.microbat_integer_product,
    ):
        function.restype = None
    return lib


def _built() -> ctypes.CDLL:
    """The kernels, for who knows that they are there."""
    lib = shared_object()
    assert lib is not None
    return lib


def available(*tensors: Tensor) -> bool:
    """Whether the kernels are built and take ``tensors``: on a CPU, float32 or BF16, contiguous, and not empty."""
    return shared_object() is not None and all(
        t.device.type == "cpu" and t.dtype in FLOATS and t.is_contiguous() and t.numel() > 0 for t in tensors
    )


def knows(format: BlockFormat, rule: str = "") -> bool:
    """Whether the kernels compute this format, and scales by this rule: all but those that try several scales per block."""
    return format.is_plain and (not rule or rule in RULES)


@functools.cache
def product_level(format: BlockFormat) -> str:
    """Which of ``LEVELS`` :func:`product` has for the format on this processor; the portable one decodes row by row."""
    if shared_object() is None or not knows(format):
        return LEVELS[0]
    return LEVELS[_built().microbat_product_level(byref(_format(format, "")))]


@functools.cache
def multiplies(format: BlockFormat, activations: BlockFormat, width: int) -> bool:
    """Whether :func:`integer_product` takes these two: integers, the activation's with a scale a token, the weight's with a
    scale a row or, of 4 bits, a BF16 one for every 32; sums of ``width`` products that fit int32."""
    if shared_object() is None or not all(_is_integer(f) for f in (format, activations)):
        return False
    per_row = format.block is None and format.scale_element == FP32
    grouped = format.block == 32 and format.scale_element == BF16 and format.element.bits == 4
    per_token = activations.block is None and activations.scale_element == FP32
    fits = width * 2 ** (format.element.bits + activations.element.bits - 2) < 2**31
    return per_token and (per_row or grouped) and fits


def _is_integer(format: BlockFormat) -> bool:
    element = format.element
    return format.is_plain and element.is_fixed_point and element.bias == 0 and element.bits in (4, 8)


class Map:
    """A block-diagonal map in factors, as the kernels read it: A [1 or G, g1, g1] and B [1 or G, g2, g2], float32.

    A block of the last axis, read row-major as V [g2, g1], goes to B V A.
    """

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b = (factor.detach().to(torch.float32).contiguous() for factor in (a, b))
        (num_a, g1, _), (num_b, g2, _) = self.a.shape, self.b.shape
        strides = (g1 * g1 if num_a > 1 else 0, g2 * g2 if num_b > 1 else 0)
        self.struct = _Map(self.a.data_ptr(), self.b.data_ptr(), g1, g2, *strides)


def fake_quantize(
    x: Tensor,
    ratios: Tensor | None,
    outer: Tensor | None,
    out: Tensor,
    *,
    format: BlockFormat,
    rule: str,
    map: Map | None = None,
) -> None:
    """Write the values of ``x`` [T, K] after map, clip, scale and rounding to ``out``, rounded to its dtype.

    ``ratios`` float32 [1 or T, G, 2], contiguous; None for no clipping.
    """
    _quantize(x, ratios, outer, format, rule, map, out, None, None)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, ratios: Tensor | None, outer: Tensor | None, *, format: BlockFormat, rule: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients for ``x`` [T, K], in its dtype, and for the ratios of every row [T, G, 2], of ``grad`` [T, K] for what
    :func:`fake_quantize` writes without a map; as ``quantizers.kernel.backward``, sums in another order."""
    to = torch.empty_like(x)
    grad_ratios = None if ratios is None else torch.empty(x.shape[0], *ratios.shape[1:])
    _built().microbat_backward(
        grad.data_ptr(), grad.dtype == torch.bfloat16, x.data_ptr(), x.dtype == torch.bfloat16, *x.shape,
        _pointer(ratios), _stride(ratios),
        1.0 if outer is None else outer.item(), byref(_format(format, rule)),
        to.data_ptr(), _pointer(grad_ratios), torch.get_num_threads(),
    )  # fmt: skip
    return to, grad_ratios


def quantize(
    x: Tensor, ratios: Tensor | None, outer: Tensor | None, *, format: BlockFormat, rule: str, map: Map | None = None
) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [T, bytes] and scales [T, G] in their stored type, as ``formats.packing.pack`` lays them out, of
    ``x`` [T, K] after map and clip; ``ratios`` as :func:`fake_quantize` takes them."""
    width = x.shape[-1]
    codes = torch.empty(x.shape[0], packed_bytes(width, format), dtype=torch.uint8)
    groups = -(-width // format.block_of(width))
    scales = torch.empty(x.shape[0], groups, dtype=SCALE_DTYPES[format.scale_element])
    _quantize(x, ratios, outer, format, rule, map, None, codes, scales)
    return codes, scales


def packed_bytes(width: int, format: BlockFormat) -> int:
    """Bytes of a packed row of ``width`` codes."""
    return {4: -(-width // 2), 6: -(-width // 4) * 3, 8: width}[format.element.bits]


def dequantize(codes: Tensor, scales: Tensor, outer: float, out: Tensor, *, format: BlockFormat) -> None:
    """Write the values of packed rows to ``out`` [N, K], rounded to its dtype."""
    _built().microbat_dequantize(
        codes.data_ptr(), scales.data_ptr(), *out.shape, outer, byref(_format(format, "")),
        out.data_ptr(), out.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def product(
    x: Tensor, codes: Tensor, scales: Tensor, outer: float, *, format: BlockFormat, most: str = LEVELS[-1]
) -> Tensor:
    """float32 [T, N]: ``x`` [T, K] float32 times a packed weight of N rows, transposed.

    ``most``: the last of ``LEVELS`` to be used, as where the processor has no more.
    """
    out = torch.empty(x.shape[0], codes.shape[0])
    _built().microbat_product(
        x.data_ptr(), *x.shape, codes.data_ptr(), scales.data_ptr(), codes.shape[0], outer,
        byref(_format(format, "")), LEVELS.index(most), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def integer_product(
    x: Tensor,
    x_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    width: int,
    activations: BlockFormat,
    format: BlockFormat,
    portable: bool = False,
) -> Tensor:
    """float32 [T, N]: packed integers ``x`` [T, bytes] with scales [T, 1] times a packed weight of N rows, transposed.

    The sums over ``width`` products are int32; see :func:`multiplies` for what goes. ``portable``: as where there is no VNNI.
    """
    out = torch.empty(x.shape[0], codes.shape[0])
    _built().microbat_integer_product(
        x.data_ptr(), x_scales.data_ptr(), x.shape[0], width, byref(_format(activations, "")),
        codes.data_ptr(), scales.data_ptr(), codes.shape[0], byref(_format(format, "")), portable,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def has_bfloat16_product() -> bool:
    """Whether this processor multiplies BF16 numbers, and the kernels are there to do it."""
    return shared_object() is not None and bool(_built().microbat_product_level(byref(_BFLOAT16)))


def bfloat16_product(x: Tensor, weight: Tensor, *, most: str = LEVELS[-1]) -> Tensor:
    """float32 [T, N]: ``x`` [T, K] float32 times a BF16 weight [N, K], transposed; ``most`` as :func:`product` takes it."""
    out = torch.empty(x.shape[0], weight.shape[0])
    _built().microbat_product(
        x.data_ptr(), *x.shape, weight.data_ptr(), None, weight.shape[0], 1.0,
        byref(_BFLOAT16), LEVELS.index(most), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _quantize(
    x: Tensor,
    ratios: Tensor | None,
    outer: Tensor | None,
    format: BlockFormat,
    rule: str,
    map: Map | None,
    out: Tensor | None,
    codes: Tensor | None,
    scales: Tensor | None,
) -> None:
    _built().microbat_quantize(
        x.data_ptr(), x.dtype == torch.bfloat16, *x.shape, byref(map.struct if map else _NO_MAP),
        _pointer(ratios), _stride(ratios),
        1.0 if outer is None else outer.item(), byref(_format(format, rule)),
        _pointer(out), out is not None and out.dtype == torch.bfloat16, _pointer(codes), _pointer(scales),
        torch.get_num_threads(),
    )  # fmt: skip


def _stride(ratios: Tensor | None) -> int:
    """Numbers from one row's clip ratios to the next; 0 where all rows share them."""
    return 0 if ratios is None or len(ratios) == 1 else ratios.stride(0)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _format(format: BlockFormat, rule: str) -> _Format:
    element = format.element
    struct = _Format(
        bits=element.bits,
        mantissa_bits=element.mantissa_bits,
        emin=element.emin,
        emax=element.emax,
        fixed_point=element.is_fixed_point,
        block=format.block or 0,
        scale=SCALES[format.scale_element],
        rule=RULES.get(rule, 0),
        bias=element.bias,
        max=element.max,
    )
    for code, value in enumerate(element.table.tolist()):
        struct.table[code] = value
    return struct
