"""Packed codes and stored scales inside a kernel: the layout of ``formats.packing``, read and written by tiles.

Codes lie in words, the shortest runs of whole bytes: 2 codes of 4 bits in a byte, 4 of 6 bits in three, one of 8 bits.
The first code of a word is in its lowest bits, the first byte is its lowest byte.
"""

# Shapes: M rows, W columns of a tile; J codes of a word.

import torch
import triton
import triton.language as tl
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.kernels.element import decode, encode


@triton.jit
def store_values(ptr, rows, real, first, row_bytes, values, F: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """Write the codes of values [M, W] on the grid, from column ``first`` of the ``real`` ones of ``rows`` [M] int64."""
    E: tl.constexpr = F.element
    J: tl.constexpr = 2 if E.bits == 4 else (4 if E.bits == 6 else 1)
    WORD_BYTES: tl.constexpr = J * E.bits // 8
    place = tl.arange(0, J) * E.bits
    words = tl.sum(tl.reshape(encode(values, E), (M, W // J, J)) << place[None, None, :], 2)
    byte = (first // J + tl.arange(0, W // J)) * WORD_BYTES
    inside = real[:, None] & (byte < row_bytes)[None, :]
    for i in tl.static_range(WORD_BYTES):
        tl.store(
            ptr + rows[:, None] * row_bytes + byte[None, :] + i, ((words >> (8 * i)) & 0xFF).to(tl.uint8), mask=inside
        )


@triton.jit
def load_values(ptr, rows, real, first, row_bytes, F: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """float32 values [M, W] from column ``first`` of ``rows`` [M] int64; of code 0 outside them or in rows not ``real``."""
    E: tl.constexpr = F.element
    J: tl.constexpr = 2 if E.bits == 4 else (4 if E.bits == 6 else 1)
    WORD_BYTES: tl.constexpr = J * E.bits // 8
    byte = (first // J + tl.arange(0, W // J)) * WORD_BYTES
    inside = real[:, None] & (byte < row_bytes)[None, :]
    at = ptr + rows[:, None] * row_bytes + byte[None, :]
    words = tl.load(at, mask=inside, other=0).to(tl.int32)
    for i in tl.static_range(1, WORD_BYTES):
        words |= tl.load(at + i, mask=inside, other=0).to(tl.int32) << (8 * i)
    codes = (words[:, :, None] >> (tl.arange(0, J) * E.bits)[None, None, :]) & ((1 << E.bits) - 1)
    return decode(tl.reshape(codes, (M, W)), E)


@triton.jit
def store_scale(ptr, scale, inside, F: tl.constexpr):
    S: tl.constexpr = F.scale_element
    if S.bits == 8:
        tl.store(ptr, encode(scale, S).to(tl.uint8), mask=inside)
    else:
        tl.store(ptr, scale.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_scale(ptr, inside, F: tl.constexpr):
    """float32 scales; outside, that of code 0."""
    S: tl.constexpr = F.scale_element
    if S.bits == 8:
        return decode(tl.load(ptr, mask=inside, other=0).to(tl.int32), S)
    else:
        return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


def row_bytes(format: BlockFormat, width: int) -> int:
    """Bytes of a packed row of ``width`` codes, padded to a whole word."""
    bits = format.element.bits
    word = {4: 2, 6: 4, 8: 1}[bits]
    return -(-width // word) * word * bits // 8


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor of one-byte numbers as uint8; others as they are."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
