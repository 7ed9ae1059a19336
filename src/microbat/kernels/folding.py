"""W4A4 on GPUs that multiply FP8 but no block scales (Hopper): the block exponents move into the FP8 numbers.

An element of E2M1 times 2**d is an E4M3 number for every d from -8 to 6. So a row of MXFP4 whose block exponents lie
within 14 of each other is, exactly, a row of E4M3 numbers times one power of two, and a product of two such rows is a
plain FP8 product: the operands are exact, the sums float32, as with tensor cores everywhere. Other formats with
power-of-two scales fold as far as their numbers happen to fit.

``fold`` says of every row whether it folded exactly. Tiles with a row or a column that did not are multiplied by
``matmul``'s kernel, in bfloat16, exactly too; nobody waits for the answer on the host. Folding once and multiplying
after costs K (N + T) bytes of workspace, but decoding inside the product would be repeated for every tile of 128 rows,
each time for longer than the tensor cores take to multiply.

MXFP8 activations have no room to fold into: their rows are exact only where all blocks that matter share an exponent.
"""

# Shapes: R rows, K last axis, G blocks along K, B block size; T tokens, N out.

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.formats.element import E4M3, Element
from microbat.kernels.element import EXACT, encode, power_of_two, round_to
from microbat.kernels.matmul import STRIPE, TILE, Stored, decode_tiles, grid_of, tile_of
from microbat.kernels.storage import as_bytes, load_values

ROWS, COLUMNS = 4, 1024  # of a program of ``fold``, at a time
FOLDED_BK = 128  # columns whose products Hopper sums at reduced precision before they join the float32 total


@dataclass(frozen=True, kw_only=True)
class Folded:
    """``values`` float8_e4m3fn [R, K] times 2**``exponents`` int32 [R]; ``exact`` int32 [R]: 1 where that is the tensor."""

    values: Tensor
    exponents: Tensor
    exact: Tensor


@triton.jit
def fold_kernel(
    code_ptr, scale_ptr, value_ptr, exponent_ptr, exact_ptr, num_rows, K, G, code_row,
    R: tl.constexpr, W: tl.constexpr, F: tl.constexpr, E4M3: tl.constexpr, HEADROOM: tl.constexpr,
):  # fmt: skip
    B: tl.constexpr = F.block
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    real = rows < num_rows
    highest = tl.zeros((R,), tl.int32)
    for first in range(0, G, W // B):
        group = first + tl.arange(0, W // B)
        inside = real[:, None] & (group < G)[None, :]
        scale_code = tl.load(scale_ptr + rows[:, None] * G + group[None, :], mask=inside, other=0).to(tl.int32)
        highest = tl.maximum(highest, tl.max(scale_code, 1))
    base = highest - 127 - HEADROOM
    exact = tl.full((R,), 1, tl.int32)
    for first in range(0, K, W):
        values = load_values(code_ptr, rows, real, first, code_row, F, R, W)
        group = first // B + tl.arange(0, W // B)
        inside = real[:, None] & (group < G)[None, :]
        scale_code = tl.load(scale_ptr + rows[:, None] * G + group[None, :], mask=inside, other=0).to(tl.int32)
        shift = power_of_two(tl.maximum(scale_code - 127 - base[:, None], -127))
        shifted = tl.reshape(tl.reshape(values, (R, W // B, B)) * shift[:, :, None], (R, W))
        folded = round_to(shifted, E4M3)
        exact = tl.minimum(exact, tl.min((folded == shifted).to(tl.int32), 1))
        columns = first + tl.arange(0, W)
        tl.store(
            value_ptr + rows[:, None] * K + columns[None, :],
            encode(folded, E4M3).to(tl.uint8),
            mask=real[:, None] & (columns < K)[None, :],
        )
    tl.store(exponent_ptr + rows, base, mask=real)
    tl.store(exact_ptr + rows, tl.where(highest == 255, 0, exact), mask=real)  # 255 is NaN


@triton.jit
def folded_matmul_kernel(
    x_ptr, x_exponent_ptr, x_exact_ptr, w_ptr, exponent_ptr, exact_ptr, y_ptr, T, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STRIPE: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tile_of(T, N, BM, BN, STRIPE)
    rows = (row_tile * BM + tl.arange(0, BM)).to(tl.int64)
    columns = (column_tile * BN + tl.arange(0, BN)).to(tl.int64)
    x_exact = tl.load(x_exact_ptr + rows, mask=rows < T, other=1)
    exact = tl.load(exact_ptr + columns, mask=columns < N, other=1)
    if tl.min(x_exact, 0) + tl.min(exact, 0) < 2:
        return
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        x_inside = (rows < T)[:, None] & (k < K)[None, :]
        w_inside = (k < K)[:, None] & (columns < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=x_inside, other=0.0)
        w = tl.load(w_ptr + columns[None, :] * K + k[:, None], mask=w_inside, other=0.0)
        total = tl.dot(x, w, total, max_num_imprecise_acc=BK)
    exponent = tl.load(x_exponent_ptr + rows, mask=rows < T, other=0)[:, None]
    exponent = exponent + tl.load(exponent_ptr + columns, mask=columns < N, other=0)[None, :]
    # In two halves: each is a float32 number where the product of both may not be.
    exponent = tl.minimum(tl.maximum(exponent, -254), 254)
    total = total * power_of_two(exponent >> 1) * power_of_two(exponent - (exponent >> 1))
    inside = (rows < T)[:, None] & (columns < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], total.to(y_ptr.dtype.element_ty), mask=inside)


def folds(format: BlockFormat) -> bool:
    """Whether rows of real tensors mostly fold: powers of two as scales, and elements that leave E4M3 room for them."""
    return format.scale_element.is_power_of_two and format.element.bits < 8


def headroom(element: Element) -> int:
    """The largest d for which every value of ``element`` times 2**d is within E4M3."""
    ratio = E4M3.max / element.max
    return math.frexp(ratio)[1] - 1


def fold(stored: Stored, *, width: int, format: BlockFormat) -> Folded:
    """Codes and E8M0 scales of rows of ``width`` as E4M3 numbers with an exponent a row.

    Rows are exact whose numbers, less their largest exponent, fit: for MXFP4 those with block exponents at most 14 apart.
    """
    codes, scales = stored
    if not format.scale_element.is_power_of_two:
        raise ValueError(f"the scales of format {format.name!r} are no powers of two: they do not fold into numbers")
    num_rows, device = codes.shape[0], codes.device
    folded = Folded(
        values=torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=device),
        exponents=torch.empty(num_rows, dtype=torch.int32, device=device),
        exact=torch.empty(num_rows, dtype=torch.int32, device=device),
    )
    with torch.cuda.device_of(codes):
        fold_kernel[(triton.cdiv(num_rows, ROWS),)](
            as_bytes(codes), as_bytes(scales), as_bytes(folded.values), folded.exponents, folded.exact, num_rows, width,
            scales.shape[-1], codes.shape[-1], R=ROWS, W=COLUMNS, F=format, E4M3=E4M3, HEADROOM=headroom(format.element),
            **EXACT,
        )  # fmt: skip
    return folded


def folded_matmul(
    x: Stored,
    weight: Stored,
    *,
    width: int,
    format: BlockFormat,
    x_format: BlockFormat,
    folded_weight: Folded | None = None,
    dtype: torch.dtype = torch.bfloat16,
    operands: torch.dtype = torch.bfloat16,
) -> Tensor:
    """``x @ W.T`` [T, N] in ``dtype`` of packed ``x`` and W, in FP8 wherever both sides' rows fold exactly, else ``operands``.

    ``folded_weight`` is ``fold(weight)``, where it was kept; it takes a byte a weight.
    """
    a = fold(x, width=width, format=x_format)
    w = fold(weight, width=width, format=format) if folded_weight is None else folded_weight
    y = torch.empty(x[0].shape[0], weight[0].shape[0], dtype=dtype, device=x[0].device)
    tile = {**TILE, "BK": FOLDED_BK}
    with torch.cuda.device_of(y):
        folded_matmul_kernel[grid_of(y, tile)](
            a.values, a.exponents, a.exact, w.values, w.exponents, w.exact, y, *y.shape, width,
            **tile, STRIPE=STRIPE, **EXACT,
        )  # fmt: skip
    decode_tiles(y, x[0], x[1], weight, width, format, x_format, None, None, operands, done=(a.exact, w.exact))
    return y
