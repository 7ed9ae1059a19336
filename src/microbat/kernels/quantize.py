"""Transform, clip, quantize and pack in one pass, and back: floats to the bits that a folder stores, and bits to floats.

``quantize`` is ``pack(q.quantize(clip(x @ M)))`` without the steps between: one read of x, one write of codes and scales.
Without a transform the bits are the same. The product with the transform's blocks is a float32 one whose terms are
summed in another order, so a value at a rounding boundary may get the neighbouring code; ``precision`` trades more of
that for tensor cores. ``dequantize`` is ``unpack(...).dequantize()``, bit for bit.
"""

# Shapes: T rows, K last axis, G format blocks along K, B their size; k transform blocks of g.
# A program takes M rows and W columns.

import torch
import triton
import triton.language as tl
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.formats.packing import CODE_DTYPES, SCALE_DTYPES
from microbat.kernels.element import (
    EXACT,
    bits_of,
    block_scale,
    bounds,
    clip,
    largest_magnitude,
    round_blocks,
)
from microbat.kernels.storage import as_bytes, load_scale, load_values, row_bytes, store_scale, store_values

ROWS, COLUMNS = 64, 128  # of a program, where nothing else sets them


@triton.jit
def load_transformed(x_ptr, matrix_ptr, rows, T, K, M: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [M, W]: this program's columns of ``rows`` [M] int64, times their block of the transform; zero outside."""
    columns = tl.program_id(0) * W + tl.arange(0, W)
    inside = (rows < T)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if matrix_ptr is not None:
        lanes = tl.arange(0, W)
        matrix = tl.load(matrix_ptr + tl.program_id(0).to(tl.int64) * W * W + lanes[:, None] * W + lanes[None, :])
        x = tl.dot(x, matrix, input_precision=PRECISION)
    return x


@triton.jit
def amax_kernel(
    x_ptr, matrix_ptr, amax_ptr, T, K, M: tl.constexpr, W: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    rows = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    x = load_transformed(x_ptr, matrix_ptr, rows, T, K, M, W, PRECISION)
    tl.atomic_max(amax_ptr, tl.max(bits_of(largest_magnitude(x)), 0))  # as integers: NaN is the largest


@triton.jit
def quantize_kernel(
    x_ptr, matrix_ptr, low_ptr, high_ptr, outer_ptr, code_ptr, scale_ptr, T, K, G, code_row, ratio_row,
    M: tl.constexpr, W: tl.constexpr, B: tl.constexpr, F: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = W // B  # format blocks in a row of the tile
    first = tl.program_id(0) * W
    rows = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    x = load_transformed(x_ptr, matrix_ptr, rows, T, K, M, W, PRECISION)
    x = tl.reshape(x, (M * N, B))
    group = tl.program_id(0) * N + tl.arange(0, N)
    real = (rows < T)[:, None] & (group < G)[None, :]
    if low_ptr is None:
        amax = largest_magnitude(x)
    else:
        at = rows[:, None] * ratio_row + group[None, :]
        low = tl.reshape(tl.load(low_ptr + at, mask=real, other=1.0), (M * N,))
        high = tl.reshape(tl.load(high_ptr + at, mask=real, other=1.0), (M * N,))
        low, high = bounds(x, low, high)
        x, amax = clip(x, low, high)
    if outer_ptr is None:
        scale = block_scale(x, amax, None, F, RULE)
        values = round_blocks(x, scale, F)
    else:
        outer = tl.load(outer_ptr)
        scale = block_scale(x, amax, outer, F, RULE)
        values = round_blocks(x, scale * outer, F)
    store_values(code_ptr, rows, rows < T, first, code_row, tl.reshape(values, (M, W)), F, M, W)
    store_scale(scale_ptr + rows[:, None] * G + group[None, :], tl.reshape(scale, (M, N)), real, F)


@triton.jit
def dequantize_kernel(
    code_ptr, scale_ptr, outer_ptr, y_ptr, T, K, G, code_row,
    M: tl.constexpr, W: tl.constexpr, B: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = W // B
    first = tl.program_id(0) * W
    rows = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    real = rows < T
    values = load_values(code_ptr, rows, real, first, code_row, F, M, W)
    group = tl.program_id(0) * N + tl.arange(0, N)
    scale = load_scale(scale_ptr + rows[:, None] * G + group[None, :], real[:, None] & (group < G)[None, :], F)
    if outer_ptr is not None:
        scale *= tl.load(outer_ptr)
    values = tl.reshape(values, (M, N, B)) * scale[:, :, None]
    columns = first + tl.arange(0, W)
    inside = real[:, None] & (columns < K)[None, :]
    y = tl.reshape(values, (M, W)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * K + columns[None, :], y, mask=inside)


def quantize(
    x: Tensor,
    *,
    format: BlockFormat,
    rule: str,
    blocks: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    outer: Tensor | None = None,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Packed codes and scales, as ``formats.packing.pack`` stores them, of ``x`` [..., K] transformed and clipped.

    ``blocks`` [k, g, g], g a power of two from 16 on, are the diagonal blocks of the transform (``BlockDiagonal.blocks``);
    ``low`` and ``high`` [G] or [..., G] are clip ratios; ``outer`` [] is the tensor scale of a format that has one.
    ``precision`` is Triton's ``input_precision`` of the product: ``ieee``, ``bf16x3``, on NVIDIA ``tf32``.
    Raises ValueError for a format with a scale a row together with a transform, and for blocks that do not fit K.
    """
    width = x.shape[-1]
    block = _lanes(format, width)
    tile = _tile(format, block)
    if format.has_tensor_scale and outer is None:
        raise ValueError(f"format {format.name!r} has a scale of the whole tensor; pass it as outer")
    if blocks is not None:
        blocks = _matrices(blocks, format, width)
        tile = {"W": blocks.shape[-1], "M": ROWS}
    rows, groups = x.numel() // width, -(-width // format.block_of(width))
    if low is None or high is None:
        low = high = None
        ratio_row = 0
    else:
        low, high = low.contiguous(), high.contiguous()
        ratio_row = groups if low.numel() > groups else 0
    code_row = row_bytes(format, width)
    codes = torch.empty(*x.shape[:-1], code_row, dtype=torch.uint8, device=x.device)
    scales = torch.empty(
        *x.shape[:-1], groups, dtype=SCALE_DTYPES.get(format.scale_element, torch.uint8), device=x.device
    )
    grid = (triton.cdiv(width, tile["W"]), triton.cdiv(rows, tile["M"]))
    quantize_kernel[grid](
        x.contiguous(), blocks, low, high, outer, codes, as_bytes(scales), rows, width, groups, code_row, ratio_row,
        **tile, B=block, F=format, RULE=rule, PRECISION=precision, **EXACT,
    )  # fmt: skip
    if format.element.bits == 8:
        codes = codes.view(CODE_DTYPES.get(format.element.name, torch.int8))
    return codes, scales


def transformed_amax(x: Tensor, blocks: Tensor, *, format: BlockFormat, precision: str = "ieee") -> Tensor:
    """The largest magnitude [] of ``x`` [..., K] times the transform's blocks, float32, in one read of x.

    What the tensor scale of a format such as NVFP4 comes from, before :func:`quantize` can begin; arguments as there.
    """
    width = x.shape[-1]
    matrices = _matrices(blocks, format, width)
    tile = {"W": matrices.shape[-1], "M": ROWS}
    rows = x.numel() // width
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(width, tile["W"]), triton.cdiv(rows, tile["M"]))
    amax_kernel[grid](x.contiguous(), matrices, amax, rows, width, **tile, PRECISION=precision, **EXACT)
    return amax.view(torch.float32)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    *,
    format: BlockFormat,
    width: int,
    outer: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Values [..., K], K = ``width``, of packed codes and scales: exact, then rounded once to ``dtype``.

    ``out``, a contiguous tensor of that shape, receives them in its own dtype.
    """
    out = torch.empty(*codes.shape[:-1], width, dtype=dtype, device=codes.device) if out is None else out
    block = _lanes(format, width)
    tile = _tile(format, block)
    rows = out.numel() // width
    grid = (triton.cdiv(width, tile["W"]), triton.cdiv(rows, tile["M"]))
    dequantize_kernel[grid](
        as_bytes(codes), as_bytes(scales), outer, out, rows, width, scales.shape[-1], codes.shape[-1],
        **tile, B=block, F=format, **EXACT,
    )  # fmt: skip
    return out


def joined_blocks(blocks: Tensor, size: int) -> Tensor:
    """Block-diagonal blocks [k, g, g] as fewer of ``size``: [ceil(k g / size), size, size]."""
    count, g, _ = blocks.shape
    per = size // g
    blocks = torch.nn.functional.pad(blocks, (0, 0, 0, 0, 0, -count % per)).unflatten(0, (-1, per))
    joined = blocks.new_zeros(blocks.shape[0], per, g, per, g)
    joined.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
    return joined.reshape(-1, size, size)


def _matrices(blocks: Tensor, format: BlockFormat, width: int) -> Tensor:
    count, g, _ = blocks.shape
    if count * g != width:
        raise ValueError(f"{count} transform blocks of {g} do not make a width of {width}")
    if format.block is None:
        raise ValueError(f"format {format.name!r} has a scale a row: a transform cannot be fused with it")
    if g < 16 or g & (g - 1):
        raise ValueError(f"a transform block of {g} is not a power of two from 16 on")
    return (joined_blocks(blocks, format.block) if g < format.block else blocks).to(torch.float32).contiguous()


def _lanes(format: BlockFormat, width: int) -> int:
    """Lanes of a block inside a kernel: a power of two."""
    return triton.next_power_of_2(format.block_of(width))


def _tile(format: BlockFormat, block: int) -> dict[str, int]:
    wide = max(block, COLUMNS)
    return {"W": wide, "M": max(1, ROWS * COLUMNS // wide)}
