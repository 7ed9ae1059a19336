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
def store_codes(ptr, rows, first, row_bytes, codes, inside, E: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """Write int32 codes [M, W]; ``rows`` [M] int64, ``first`` the column of the tile's first, ``inside`` [M, W]."""
    J: tl.constexpr = 2 if E.bits == 4 else (4 if E.bits == 6 else 1)
    WORD_BYTES: tl.constexpr = J * E.bits // 8
    place = tl.arange(0, J) * E.bits
    words = tl.sum(tl.reshape(codes, (M, W // J, J)) << place[None, None, :], 2)
    some_inside = tl.max(tl.reshape(inside.to(tl.int32), (M, W // J, J)), 2) > 0
    at = rows[:, None] * row_bytes + (first // J + tl.arange(0, W // J)[None, :]) * WORD_BYTES
    for i in tl.static_range(WORD_BYTES):
        tl.store(ptr + at + i, ((words >> (8 * i)) & 0xFF).to(tl.uint8), mask=some_inside)


@triton.jit
def load_words(ptr, at, inside, E: tl.constexpr):
    """int32 words at the byte offsets ``at``, zero outside."""
    J: tl.constexpr = 2 if E.bits == 4 else (4 if E.bits == 6 else 1)
    WORD_BYTES: tl.constexpr = J * E.bits // 8
    words = tl.load(ptr + at, mask=inside, other=0).to(tl.int32)
    for i in tl.static_range(1, WORD_BYTES):
        words |= tl.load(ptr + at + i, mask=inside, other=0).to(tl.int32) << (8 * i)
    return words


@triton.jit
def load_codes(ptr, rows, first, row_bytes, width, real, E: tl.constexpr, M: tl.constexpr, W: tl.constexpr):
    """int32 codes [M, W] from column ``first`` of ``rows`` [M] int64; zero beyond ``width`` and where not ``real`` [M]."""
    J: tl.constexpr = 2 if E.bits == 4 else (4 if E.bits == 6 else 1)
    WORD_BYTES: tl.constexpr = J * E.bits // 8
    word = first // J + tl.arange(0, W // J)
    inside = real[:, None] & (word * J < width)[None, :]
    words = load_words(ptr, rows[:, None] * row_bytes + word[None, :] * WORD_BYTES, inside, E)
    codes = (words[:, :, None] >> (tl.arange(0, J) * E.bits)[None, None, :]) & ((1 << E.bits) - 1)
    return tl.reshape(codes, (M, W))


@triton.jit
def store_scale(ptr, scale, inside, S: tl.constexpr):
    if S.bits == 8:
        tl.store(ptr, encode(scale, S).to(tl.uint8), mask=inside)
    else:
        tl.store(ptr, scale.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_scale(ptr, inside, S: tl.constexpr):
    """float32 scales; outside, that of code 0."""
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
