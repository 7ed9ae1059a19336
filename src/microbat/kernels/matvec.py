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
from microbat.kernels.element import EXACT, decode
from microbat.kernels.storage import as_bytes, load_scale, load_words

MAX_TOKENS = 16
COLUMNS = 512
VALUES = 4096  # of a program: T x R x W, packed words counted once


@triton.jit
def matvec_kernel(
    x_ptr, code_ptr, scale_ptr, outer_ptr, y_ptr, T, N, K, G, code_row,
    TOKENS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, B: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = F.element
    J: tl.constexpr = 2 if E.bits == 4 else (4 if E.bits == 6 else 1)
    WORD_BYTES: tl.constexpr = J * E.bits // 8
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    tokens = tl.arange(0, TOKENS)
    real = rows < N
    total = tl.zeros((TOKENS, R), tl.float32)
    for first in range(0, K, W):
        word = first // J + tl.arange(0, W // J)
        inside = real[:, None] & (word * J < K)[None, :]
        words = load_words(code_ptr, rows[:, None] * code_row + word[None, :] * WORD_BYTES, inside, E)
        products = tl.zeros((TOKENS, R, W // J), tl.float32)
        for j in tl.static_range(J):
            column = word * J + j
            x_inside = (tokens < T)[:, None] & (column < K)[None, :]
            x = tl.load(x_ptr + tokens[:, None] * K + column[None, :], mask=x_inside, other=0.0).to(tl.float32)
            values = decode((words >> (j * E.bits)) & ((1 << E.bits) - 1), E)
            products += values[None, :, :] * x[:, None, :]
        if B > W:  # one scale a row, applied in the end
            total += tl.sum(products, 2)
        else:
            group = first // B + tl.arange(0, W // B)
            at = rows[:, None] * G + group[None, :]
            scale = load_scale(scale_ptr + at, real[:, None] & (group < G)[None, :], F.scale_element)
            of_blocks = tl.sum(tl.reshape(products, (TOKENS, R, W // B, B // J)), 3)
            total += tl.sum(of_blocks * scale[None, :, :], 2)
    if B > W:
        total *= load_scale(scale_ptr + rows, real, F.scale_element)[None, :]
    if outer_ptr is not None:
        total *= tl.load(outer_ptr)
    at = tokens[:, None] * N + rows[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=(tokens < T)[:, None] & real[None, :])


def matvec(x: Tensor, codes: Tensor, scales: Tensor, *, format: BlockFormat, outer: Tensor | None = None) -> Tensor:
    """``x @ W.T`` [..., N] in x's dtype, for ``x`` [..., K] of up to 16 rows and packed W: codes [N, .], scales [N, G]."""
    width = x.shape[-1]
    tokens, rows = x.numel() // width, codes.shape[0]
    if tokens > MAX_TOKENS:
        raise ValueError(f"matvec multiplies up to {MAX_TOKENS} rows at a time, not {tokens}")
    if format.block is None:
        block, columns = triton.next_power_of_2(width) * COLUMNS, COLUMNS
    else:
        block, columns = format.block, COLUMNS
    padded = triton.next_power_of_2(tokens)
    shape = {"TOKENS": padded, "R": max(1, VALUES // (padded * columns)), "W": columns, "B": block}
    y = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    matvec_kernel[(triton.cdiv(rows, shape["R"]),)](
        x.contiguous(), as_bytes(codes), as_bytes(scales), outer, y, tokens, rows, width, scales.shape[-1],
        codes.shape[-1], **shape, F=format, **EXACT,
    )  # fmt: skip
    return y
