"""GPTQ's column loop: rounding and error feedback inside a block of columns without leaving the registers.

The loop of ``methods.gptq`` (equations 1 and 2 there) launches several operations a column; here one launch rounds
``COLUMNS`` of them, each program for a few rows of the weight, scales included: those of a format's block are taken when
its turn comes, from the weights as updated by then. The columns to the right are updated by one product, as there.
With as many columns as a format's block the arithmetic is that of ``methods.gptq``; with more, what flows between
blocks of one launch is subtracted column by column instead of as one sum.
"""

# Shapes: N rows of the weight, K columns, C columns of a launch, G blocks along K, B their size; R rows of a program.

import torch
import triton
import triton.language as tl
from torch import Tensor

from microbat.formats.block import BlockFormat, QTensor
from microbat.kernels.element import EXACT, block_scale, encode, largest_magnitude, round_blocks

COLUMNS = 128
ROWS = 16


@triton.jit
def gptq_kernel(
    work_ptr, factor_ptr, row_scale_ptr, outer_ptr, code_ptr, scale_ptr, error_ptr, N, width, factor_row, G,
    C: tl.constexpr, B: tl.constexpr, R: tl.constexpr, F: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = F.element
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    columns = tl.arange(0, C)
    real = rows < N
    work = tl.load(
        work_ptr + columns[None, :] * N + rows[:, None], mask=real[:, None] & (columns < width)[None, :], other=0.0
    )
    for block in range(0, tl.cdiv(width, B)):
        if row_scale_ptr is None:
            blocks = tl.reshape(work, (R, C // B, B))
            lanes = tl.sum(tl.where((tl.arange(0, C // B) == block)[None, :, None], blocks, 0.0), 1)
            if outer_ptr is None:
                scale = block_scale(lanes, largest_magnitude(lanes), None, F, RULE)
                product = scale
            else:
                outer = tl.load(outer_ptr)
                scale = block_scale(lanes, largest_magnitude(lanes), outer, F, RULE)
                product = scale * outer
            tl.store(scale_ptr + rows * G + block, scale, mask=real)
        else:
            product = tl.load(row_scale_ptr + rows, mask=real, other=1.0)
        for column in range(block * B, tl.minimum(block * B + B, width)):
            value = tl.sum(tl.where((columns == column)[None, :], work, 0.0), 1)
            rounded = tl.reshape(round_blocks(value[:, None], product, F), (R,))
            tl.store(code_ptr + column * N + rows, encode(rounded, E).to(tl.uint8), mask=real)
            diagonal = tl.load(factor_ptr + column * factor_row + column)
            error = tl.div_rn(value - rounded * product, diagonal)
            tl.store(error_ptr + column * N + rows, error, mask=real)
            later = (columns > column) & (columns < width)
            upper = tl.load(factor_ptr + column * factor_row + columns, mask=later, other=0.0)
            work -= error[:, None] * upper[None, :]


def round_columns(
    weight: Tensor,
    factor: Tensor,
    *,
    format: BlockFormat,
    rule: str,
    outer: Tensor | None = None,
    row_scale: Tensor | None = None,
    columns: int = COLUMNS,
) -> QTensor:
    """Codes and scales of ``weight`` [N, K] under the upper factor [K, K] of its inverse Hessian, both float32.

    ``outer`` [] is the tensor scale of a format that has one, ``row_scale`` [N, 1] the scales of a format with one a row.
    ``columns``, a power of two and no less than the format's block, are rounded in one launch.
    """
    num_rows, width = weight.shape
    block = format.block or columns
    if columns % block or columns & (columns - 1):
        raise ValueError(f"columns={columns} is not a power of two that holds whole blocks of format {format.name!r}")
    if (format.block is None) != (row_scale is not None):
        raise ValueError(f"row_scale is for formats with a scale a row; {format.name!r} has a block of {format.block}")
    work_KN, factor = weight.T.contiguous(), factor.contiguous()
    codes_KN = torch.empty(width, num_rows, dtype=torch.uint8, device=weight.device)
    groups = -(-width // block)
    scales = torch.empty(num_rows, groups, device=weight.device) if row_scale is None else row_scale
    errors = work_KN.new_empty(columns, num_rows)
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        with torch.cuda.device_of(weight):
            gptq_kernel[(triton.cdiv(num_rows, ROWS),)](
                work_KN[start:], factor[start:, start:], row_scale, outer, codes_KN[start:], scales[:, start // block :],
                errors, num_rows, stop - start, width, groups, C=columns, B=block, R=ROWS, F=format, RULE=rule, **EXACT,
            )  # fmt: skip
        work_KN[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return QTensor(format=format, codes=codes_KN.T.contiguous(), scales=scales, tensor_scale=outer)
