"""Products of packed tensors for many rows at once, on tensor cores.

``matmul`` decodes tiles of either side in registers and multiplies them as bfloat16 numbers with float32 sums. Every value
of an MX format or NVFP4 (before its tensor scale) is a bfloat16 number, so the operands are exact; those of INT4 with its
bfloat16 scales are rounded once, to 8 bits. It runs on every GPU, and is what the faster products fall back to. With
``operands=torch.float32`` nothing is rounded and the product is slow (and known to Triton's interpreter, which multiplies
bfloat16 numbers as if their bits were integers).

``scaled_matmul`` hands codes and scales to the tensor cores as they are (``tl.dot_scaled``): Blackwell and MI350 have such
instructions; elsewhere Triton itself decodes to bfloat16.
"""

# Shapes: T tokens, K in, N out, G blocks along K; a program makes BM x BN results, BK of K at a time.

import torch
import triton
import triton.language as tl
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.kernels.element import EXACT
from microbat.kernels.storage import as_bytes, load_scale, load_values

Stored = tuple[Tensor, Tensor]  # packed codes [rows, .] and scales [rows, G], as ``formats.packing.pack`` stores them

TILE = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8}
FLOAT32_TILE = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8}  # of float32 operands; larger ones spill the registers
STRIPE = 8  # row tiles that take turns, so that a column tile of the weight is read from the cache
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
SCALED_ELEMENTS = ("e2m1", "e4m3", "e5m2")  # that tl.dot_scaled knows, by these names


@triton.jit
def tile_of(T, N, BM: tl.constexpr, BN: tl.constexpr, STRIPE: tl.constexpr):
    """Row and column of this program's tile, in stripes of ``STRIPE`` row tiles."""
    tiles_m, tiles_n = tl.cdiv(T, BM), tl.cdiv(N, BN)
    stripe = tl.program_id(0) // (STRIPE * tiles_n)
    height = min(tiles_m - stripe * STRIPE, STRIPE)
    place = tl.program_id(0) % (STRIPE * tiles_n)
    return stripe * STRIPE + place % height, place // height


@triton.jit
def load_operand(
    ptr, scale_ptr, rows, real, first, K, G, row_size,
    F: tl.constexpr, M: tl.constexpr, W: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Numbers [M, W] from column ``first``: as they are (F None), or decoded codes. A scale a row waits."""
    if F is None:
        columns = first + tl.arange(0, W)
        inside = real[:, None] & (columns < K)[None, :]
        return tl.load(ptr + rows[:, None] * row_size + columns[None, :], mask=inside, other=0.0).to(OPERAND)
    else:
        values = load_values(ptr, rows, real, first, row_size, F, M, W)
        if F.block is not None:
            B: tl.constexpr = F.block
            group = first // B + tl.arange(0, W // B)
            inside = real[:, None] & (group < G)[None, :]
            scale = load_scale(scale_ptr + rows[:, None] * G + group[None, :], inside, F)
            values = tl.reshape(tl.reshape(values, (M, W // B, B)) * scale[:, :, None], (M, W))
        return values.to(OPERAND)


@triton.jit
def rest_of_scale(
    total, x_scale_ptr, scale_ptr, x_outer_ptr, outer_ptr, rows, columns, T, N, FX: tl.constexpr, F: tl.constexpr
):
    """Scales of rows and of tensors, which come after the sum."""
    if FX is not None and FX.block is None:
        total *= load_scale(x_scale_ptr + rows, rows < T, FX)[:, None]
    if F.block is None:
        total *= load_scale(scale_ptr + columns, columns < N, F)[None, :]
    if x_outer_ptr is not None:
        total *= tl.load(x_outer_ptr)
    if outer_ptr is not None:
        total *= tl.load(outer_ptr)
    return total


@triton.jit
def matmul_kernel(
    x_ptr, x_scale_ptr, code_ptr, scale_ptr, x_outer_ptr, outer_ptr, x_done_ptr, done_ptr, y_ptr,
    T, N, K, GX, G, x_row, code_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FX: tl.constexpr, F: tl.constexpr,
    OPERAND: tl.constexpr, STRIPE: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(T, N, BM, BN, STRIPE)
    rows = (row_tile * BM + tl.arange(0, BM)).to(tl.int64)
    columns = (column_tile * BN + tl.arange(0, BN)).to(tl.int64)
    if x_done_ptr is not None:  # rows and columns that another kernel can multiply: a tile of only those is done
        x_done = tl.load(x_done_ptr + rows, mask=rows < T, other=1)
        done = tl.load(done_ptr + columns, mask=columns < N, other=1)
        if tl.min(x_done, 0) + tl.min(done, 0) == 2:
            return
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        x = load_operand(x_ptr, x_scale_ptr, rows, rows < T, first, K, GX, x_row, FX, BM, BK, OPERAND)
        w = load_operand(code_ptr, scale_ptr, columns, columns < N, first, K, G, code_row, F, BN, BK, OPERAND)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    total = rest_of_scale(total, x_scale_ptr, scale_ptr, x_outer_ptr, outer_ptr, rows, columns, T, N, FX, F)
    inside = (rows < T)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaled_matmul_kernel(
    x_ptr, x_scale_ptr, code_ptr, scale_ptr, x_outer_ptr, outer_ptr, y_ptr, T, N, K, G, x_row, code_row,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FX: tl.constexpr, F: tl.constexpr,
    X: tl.constexpr, W: tl.constexpr, STRIPE: tl.constexpr,
):  # fmt: skip
    X_BYTES: tl.constexpr = BK * FX.element.bits // 8
    W_BYTES: tl.constexpr = BK * F.element.bits // 8
    row_tile, column_tile = tile_of(T, N, BM, BN, STRIPE)
    rows = (row_tile * BM + tl.arange(0, BM)).to(tl.int64)
    columns = (column_tile * BN + tl.arange(0, BN)).to(tl.int64)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(K, BK)):
        x_byte, w_byte = step * X_BYTES + tl.arange(0, X_BYTES), step * W_BYTES + tl.arange(0, W_BYTES)
        x_inside = (rows < T)[:, None] & (x_byte < x_row)[None, :]
        w_inside = (w_byte < code_row)[:, None] & (columns < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row + x_byte[None, :], mask=x_inside, other=0)
        w = tl.load(code_ptr + columns[None, :] * code_row + w_byte[:, None], mask=w_inside, other=0)
        group = step * (BK // F.block) + tl.arange(0, BK // F.block)
        x_inside = (rows < T)[:, None] & (group < G)[None, :]
        w_inside = (columns < N)[:, None] & (group < G)[None, :]
        x_scale = tl.load(x_scale_ptr + rows[:, None] * G + group[None, :], mask=x_inside, other=0)
        scale = tl.load(scale_ptr + columns[:, None] * G + group[None, :], mask=w_inside, other=0)
        if not F.scale_element.is_power_of_two:
            x_scale, scale = x_scale.to(tl.float8e4nv, bitcast=True), scale.to(tl.float8e4nv, bitcast=True)
        total = tl.dot_scaled(x, x_scale, X, w, scale, W, total)
    total = rest_of_scale(total, x_scale_ptr, scale_ptr, x_outer_ptr, outer_ptr, rows, columns, T, N, FX, F)
    inside = (rows < T)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


def matmul(
    x: Tensor | Stored,
    weight: Stored,
    *,
    width: int,
    format: BlockFormat,
    x_format: BlockFormat | None = None,
    outer: Tensor | None = None,
    x_outer: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``x @ W.T`` [T, N] in ``dtype``, K = ``width``; ``x`` [T, K] of numbers, or stored in ``x_format``."""
    numbers = isinstance(x, Tensor)
    codes, scales = (x, None) if numbers else x
    y = torch.empty(codes.shape[0], weight[0].shape[0], dtype=dtype, device=codes.device)
    decode_tiles(y, codes, scales, weight, width, format, None if numbers else x_format, outer, x_outer, operands)
    return y


def decode_tiles(
    y: Tensor,
    x: Tensor,
    x_scales: Tensor | None,
    weight: Stored,
    width: int,
    format: BlockFormat,
    x_format: BlockFormat | None,
    outer: Tensor | None,
    x_outer: Tensor | None,
    operands: torch.dtype,
    done: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the product to ``y`` [T, N], but for tiles all of whose rows and columns are marked 1 in ``done``: int32 [T], [N]."""
    codes, scales = weight
    x = x.contiguous() if x_format is None else as_bytes(x)
    groups = 0 if x_scales is None else x_scales.shape[-1]
    # What another kernel left over lies in its tiles.
    tile = FLOAT32_TILE if operands == torch.float32 and done is None else TILE
    with torch.cuda.device_of(y):
        matmul_kernel[grid_of(y, tile)](
            x, None if x_scales is None else as_bytes(x_scales), as_bytes(codes), as_bytes(scales), x_outer, outer,
            *(done or (None, None)), y, *y.shape, width, groups, scales.shape[-1], x.shape[-1], codes.shape[-1],
            **tile, FX=x_format, F=format, OPERAND=OPERANDS[operands], STRIPE=STRIPE, **EXACT,
        )  # fmt: skip


def scaled_matmul(
    x: Stored,
    weight: Stored,
    *,
    width: int,
    format: BlockFormat,
    x_format: BlockFormat,
    outer: Tensor | None = None,
    x_outer: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``x @ W.T`` [T, N] in ``dtype`` by block-scaled products; both sides MX of E2M1, E4M3, E5M2, or both NVFP4."""
    kinds = [f.element.name for f in (x_format, format)]
    if not has_scaled(x_format, format):
        raise ValueError(f"no block-scaled product multiplies {x_format.name!r} by {format.name!r}")
    y = torch.empty(x[0].shape[0], weight[0].shape[0], dtype=dtype, device=x[0].device)
    with torch.cuda.device_of(y):
        scaled_matmul_kernel[grid_of(y, TILE)](
            as_bytes(x[0]), as_bytes(x[1]), as_bytes(weight[0]), as_bytes(weight[1]), x_outer, outer, y, *y.shape, width,
            weight[1].shape[-1], x[0].shape[-1], weight[0].shape[-1],
            **TILE, FX=x_format, F=format, X=kinds[0], W=kinds[1], STRIPE=STRIPE, **EXACT,
        )  # fmt: skip
    return y


def has_scaled(x_format: BlockFormat, format: BlockFormat) -> bool:
    """Whether :func:`scaled_matmul` knows the two formats."""
    elements = {x_format.element.name, format.element.name}
    return elements <= set(SCALED_ELEMENTS) and x_format.levels == format.levels and format.block is not None


def grid_of(y: Tensor, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(y.shape[0], tile["BM"]) * triton.cdiv(y.shape[1], tile["BN"]),)
