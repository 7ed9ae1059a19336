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
from microbat.kernels import LARGEST_MAP, has_map
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
TRANSFORMED = 2048  # numbers of a program that transforms in float32: more at a time do not fit the registers


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
def load_blocks(
    x_ptr, matrix_ptr, low_ptr, high_ptr, rows, T, K, G, ratio_row,
    M: tl.constexpr, W: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks [M * W // B, B] of ``rows`` [M] int64, transformed and clipped, and the magnitudes that their scales come from."""
    N: tl.constexpr = W // B  # format blocks in a row of the tile
    x = load_transformed(x_ptr, matrix_ptr, rows, T, K, M, W, PRECISION)
    x = tl.reshape(x, (M * N, B))
    if low_ptr is None:
        amax = largest_magnitude(x)
    else:
        group = tl.program_id(0) * N + tl.arange(0, N)
        real = (rows < T)[:, None] & (group < G)[None, :]
        at = rows[:, None] * ratio_row + group[None, :]
        low = tl.reshape(tl.load(low_ptr + at, mask=real, other=1.0), (M * N,))
        high = tl.reshape(tl.load(high_ptr + at, mask=real, other=1.0), (M * N,))
        low, high = bounds(x, low, high)
        x, amax = clip(x, low, high)
    return x, amax


@triton.jit
def amax_kernel(
    x_ptr, matrix_ptr, low_ptr, high_ptr, amax_ptr, T, K, G, ratio_row,
    M: tl.constexpr, W: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    _, amax = load_blocks(x_ptr, matrix_ptr, low_ptr, high_ptr, rows, T, K, G, ratio_row, M, W, B, PRECISION)
    tl.atomic_max(amax_ptr, tl.max(bits_of(amax) & 0x7FFFFFFF, 0))  # as integers: NaN is the largest


@triton.jit
def quantize_kernel(
    x_ptr, matrix_ptr, low_ptr, high_ptr, outer_ptr, code_ptr, scale_ptr, y_ptr, T, K, G, code_row, ratio_row,
    M: tl.constexpr, W: tl.constexpr, B: tl.constexpr, F: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = W // B
    first = tl.program_id(0) * W
    rows = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)
    x, amax = load_blocks(x_ptr, matrix_ptr, low_ptr, high_ptr, rows, T, K, G, ratio_row, M, W, B, PRECISION)
    if outer_ptr is None:
        scale = block_scale(x, amax, None, F, RULE)
        product = scale
    else:
        outer = tl.load(outer_ptr)
        scale = block_scale(x, amax, outer, F, RULE)
        product = scale * outer
    values = round_blocks(x, product, F)
    if y_ptr is None:
        group = tl.program_id(0) * N + tl.arange(0, N)
        real = (rows < T)[:, None] & (group < G)[None, :]
        store_values(code_ptr, rows, rows < T, first, code_row, tl.reshape(values, (M, W)), F, M, W)
        store_scale(scale_ptr + rows[:, None] * G + group[None, :], tl.reshape(scale, (M, N)), real, F)
    else:
        columns = first + tl.arange(0, W)
        inside = (rows < T)[:, None] & (columns < K)[None, :]
        y = tl.reshape(values * product[:, None], (M, W)).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows[:, None] * K + columns[None, :], y, mask=inside)


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

    ``blocks`` [k, g, g], g a power of two from 16 to 128, are the diagonal blocks of the transform (``BlockDiagonal.blocks``);
    ``low`` and ``high`` [G] or [..., G] are clip ratios; ``outer`` [] is the tensor scale of a format that has one.
    ``precision`` is Triton's ``input_precision`` of the product: ``ieee``, ``bf16x3``, on NVIDIA ``tf32``.
    Raises ValueError for a format with a scale a row together with a transform, and for blocks that do not fit K.
    """
    width = x.shape[-1]
    code_row, groups = row_bytes(format, width), -(-width // format.block_of(width))
    codes = torch.empty(*x.shape[:-1], code_row, dtype=torch.uint8, device=x.device)
    scales = torch.empty(
        *x.shape[:-1], groups, dtype=SCALE_DTYPES.get(format.scale_element, torch.uint8), device=x.device
    )
    _quantize(x, format, rule, blocks, low, high, outer, precision, (codes, as_bytes(scales), None))
    if format.element.bits == 8:
        codes = codes.view(CODE_DTYPES.get(format.element.name, torch.int8))
    return codes, scales


def fake(
    x: Tensor,
    *,
    format: BlockFormat,
    rule: str,
    blocks: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    outer: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str = "ieee",
) -> Tensor:
    """The values that :func:`quantize` gives codes for, in ``dtype``; without a transform ``kernels.fake_quantize`` has them."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _quantize(x, format, rule, blocks, low, high, outer, precision, (None, None, out))
    return out


def _quantize(
    x: Tensor,
    format: BlockFormat,
    rule: str,
    blocks: Tensor | None,
    low: Tensor | None,
    high: Tensor | None,
    outer: Tensor | None,
    precision: str,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    if format.has_tensor_scale and outer is None:
        raise ValueError(f"format {format.name!r} has a scale of the whole tensor; pass it as outer")
    codes, scales, out = results
    grid, arguments = _launch(x, format, blocks, low, high, precision)
    with torch.cuda.device_of(x):
        quantize_kernel[grid](
            **arguments, outer_ptr=outer, code_ptr=codes, scale_ptr=scales, y_ptr=out,
            code_row=row_bytes(format, x.shape[-1]), F=format, RULE=rule, **EXACT,
        )  # fmt: skip


def largest(
    x: Tensor,
    *,
    format: BlockFormat,
    blocks: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    precision: str = "ieee",
) -> Tensor:
    """The largest magnitude [] of ``x`` [..., K] transformed and clipped, float32, in one read of x.

    What the tensor scale of a format such as NVFP4 comes from, before :func:`quantize` can begin; arguments as there.
    """
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    grid, arguments = _launch(x, format, blocks, low, high, precision)
    with torch.cuda.device_of(x):
        amax_kernel[grid](**arguments, amax_ptr=amax, **EXACT)
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
    with torch.cuda.device_of(codes):
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
    if not has_map(g):
        raise ValueError(f"a transform block of {g} is not a power of two from 16 to {LARGEST_MAP}")
    return (joined_blocks(blocks, format.block) if g < format.block else blocks).to(torch.float32).contiguous()


def _launch(
    x: Tensor, format: BlockFormat, blocks: Tensor | None, low: Tensor | None, high: Tensor | None, precision: str
) -> tuple[tuple[int, int], dict[str, object]]:
    """The grid of a kernel over blocks of ``x`` [..., K], and the arguments that such kernels share."""
    width = x.shape[-1]
    block = _lanes(format, width)
    tile = _tile(format, block)
    if blocks is not None:
        blocks = _matrices(blocks, format, width)
        wide = blocks.shape[-1]
        tile = {"W": wide, "M": TRANSFORMED // wide if precision == "ieee" else ROWS}  # tensor cores take 64 rows
    rows, groups, ratio_row = x.numel() // width, -(-width // format.block_of(width)), 0
    if low is not None and high is not None:
        low, high = low.contiguous(), high.contiguous()
        ratio_row = groups if low.numel() > groups else 0
    return (triton.cdiv(width, tile["W"]), triton.cdiv(rows, tile["M"])), {
        "x_ptr": x.contiguous(), "matrix_ptr": blocks, "low_ptr": low, "high_ptr": high, "T": rows, "K": width,
        "G": groups, "ratio_row": ratio_row, **tile, "B": block, "PRECISION": precision,
    }  # fmt: skip


def _lanes(format: BlockFormat, width: int) -> int:
    """Lanes of a block inside a kernel: a power of two."""
    return triton.next_power_of_2(format.block_of(width))


def _tile(format: BlockFormat, block: int) -> dict[str, int]:
    wide = max(block, COLUMNS)
    return {"W": wide, "M": max(1, ROWS * COLUMNS // wide)}
