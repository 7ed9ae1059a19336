"""Weights of few bits times a handful of activation rows: decoding one token, W4A16 and its relatives.

The weights' bytes are the work, so each is read once, decoded in registers and multiplied by every row; no tensor core,
which would multiply 16 rows for the sake of one. Products and sums are float32: within a block of the unscaled values,
then of the blocks, each times its scale. A product of an element and a bfloat16 number is exact.
"""

# Shapes: T tokens, K in, N out, G blocks along K; a program takes all tokens, R rows of the weight and W columns at a time.

import torch
import triton
import triton.language as tl
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.kernels.element import EXACT
from microbat.kernels.storage import as_bytes, load_scale, load_values

MAX_TOKENS = 16
COLUMNS = 512  # of a program at a time
SUMMED = 32  # products that are summed first where no block says how many
VALUES = 4096  # of a program at a time: T x R x W


@triton.jit
def matvec_kernel(
    x_ptr, code_ptr, scale_ptr, outer_ptr, y_ptr, T, N, K, G, code_row,
    TOKENS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, B: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    tokens = tl.arange(0, TOKENS)
    real = rows < N
    total = tl.zeros((TOKENS, R, W // B), tl.float32)
    for first in range(0, K, W):
        column = first + tl.arange(0, W)
        inside = (tokens < T)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
        values = load_values(code_ptr, rows, real, first, code_row, F, R, W)
        products = values[None, :, :] * x[:, None, :]
        of_blocks = tl.sum(tl.reshape(products, (TOKENS, R, W // B, B)), 3)
        if F.block is not None:
            group = first // B + tl.arange(0, W // B)
            inside = real[:, None] & (group < G)[None, :]
            scale = load_scale(scale_ptr + rows[:, None] * G + group[None, :], inside, F)
            of_blocks *= scale[None, :, :]
        total += of_blocks
    y = tl.sum(total, 2)
    if F.block is None:
        y *= load_scale(scale_ptr + rows, real, F)[None, :]
    if outer_ptr is not None:
        y *= tl.load(outer_ptr)
    at = tokens[:, None] * N + rows[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=(tokens < T)[:, None] & real[None, :])


def matvec(x: Tensor, codes: Tensor, scales: Tensor, *, format: BlockFormat, outer: Tensor | None = None) -> Tensor:
    """``x @ W.T`` [..., N] in x's dtype, for ``x`` [..., K] of up to 16 rows and packed W: codes [N, .], scales [N, G]."""
    width = x.shape[-1]
    tokens, rows = x.numel() // width, codes.shape[0]
    if tokens > MAX_TOKENS:
        raise ValueError(f"matvec multiplies up to {MAX_TOKENS} rows at a time, not {tokens}")
    padded = triton.next_power_of_2(tokens)
    shape = {"TOKENS": padded, "R": max(1, VALUES // (padded * COLUMNS)), "W": COLUMNS, "B": format.block or SUMMED}
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        matvec_kernel[(triton.cdiv(rows, shape["R"]),)](
            x.contiguous(), as_bytes(codes), as_bytes(scales), outer, y, tokens, rows, width, scales.shape[-1],
            codes.shape[-1], **shape, F=format, **EXACT,
        )  # fmt: skip
    return y
