"""Bits on disk: QTensor to named tensors and back, in the layout of compressed-tensors wherever that has one.

``weight_packed`` holds sub-byte codes, the first in the lowest bits (4 bits two to a byte, 2 bits four; 3 bits eight and 6 bits
four in three bytes; of three values five to a byte, the first the lowest digit of base 3), ``weight`` whole-byte codes.
``weight_scale`` is the raw E8M0 byte for MX formats, float8_e4m3fn for NVFP4, bfloat16 or float32 for integers; for HiF4 four
bytes a unit, in AMCT's order: E6M2, the flags of eight elements, those of four, the first flag in the highest bit; for formats
with terms (ternary, int2) scale and terms of a group side by side. ``weight_global_scale`` is the *reciprocal* of the tensor
scale, the compressed-tensors convention; so that reading it back is exact, ``tensor_scale`` itself is kept beside it.
"""

# Shapes: N rows, K last axis, G blocks along K.

import functools
import math
import operator

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.element import BF16, E4M3, E8M0, FP32, Element

SCALE_DTYPES = {E8M0: torch.uint8, E4M3: torch.float8_e4m3fn, BF16: torch.bfloat16, FP32: torch.float32}
WORDS = {2: (4, 1), 3: (8, 3), 6: (4, 3)}  # bits of a code: codes that fill so many bytes together
TRITS = 5  # codes of three values in a byte: 3^5 = 243
CODE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def scale_dtype(format: BlockFormat) -> torch.dtype:
    """The stored type of the format's block scales: torch's own, or their raw codes, and with those what is inside a block."""
    return SCALE_DTYPES.get(format.scale_element, torch.uint8)


def pack(q: QTensor) -> dict[str, Tensor]:
    """Named tensors that hold ``q`` in its own bits; :func:`unpack` gives it back bit for bit."""
    if q.columns is not None:
        raise ValueError(f"{q.format.name} codes whose columns are still to be multiplied cannot be stored")
    scales = _store_scales(q.scales, q.format)
    if q.terms is not None:
        stored = [_store(q.terms[..., n], term.element) for n, term in enumerate(q.format.terms)]
        scales = torch.stack([scales, *stored], dim=-1).flatten(-2)
    if q.inner is not None:
        scales = torch.cat([scales[..., None], _pack_flags(q.inner)], dim=-1).flatten(-2)
    tensors = {"weight_scale": scales}
    if q.format.element.bits == 8:
        other = torch.int8 if q.format.element.is_fixed_point else torch.uint8
        tensors["weight"] = q.codes.view(CODE_DTYPES.get(q.format.element.name, other))
    else:
        tensors["weight_packed"] = pack_codes(q.codes, q.format.element)
    if q.tensor_scale is not None:
        tensors["weight_global_scale"] = q.tensor_scale.reciprocal().reshape(1)
        tensors["weight_tensor_scale"] = q.tensor_scale.reshape(1)
    return tensors


def unpack(tensors: dict[str, Tensor], format: BlockFormat, width: int) -> QTensor:
    """The QTensor that :func:`pack` stored; ``width`` is the length of its last axis."""
    if "weight" in tensors:
        codes = tensors["weight"].view(torch.uint8)
    else:
        codes = unpack_codes(tensors["weight_packed"], format.element, width)
    scales, inner, terms = tensors["weight_scale"], None, None
    if format.terms:
        numbers = scales.unflatten(-1, (-1, 1 + len(format.terms)))
        scales, terms = numbers[..., 0], numbers[..., 1:].to(torch.float32)
    if format.inner:
        units = scales.unflatten(-1, (-1, 1 + format.num_inner // 8))
        scales, inner = units[..., 0], _unpack_flags(units[..., 1:])
    raw = scale_dtype(format) == torch.uint8
    scales = format.scale_element.decode(scales) if raw else scales.to(torch.float32)
    tensor_scale = tensors["weight_tensor_scale"].reshape(()) if format.has_tensor_scale else None
    return QTensor(format=format, codes=codes, scales=scales, tensor_scale=tensor_scale, inner=inner, terms=terms)


def check(q: QTensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError where ``q`` is not a tensor of ``shape`` [N, K] or holds a code or a scale that means no number."""
    element, groups = q.format.element, -(-shape[-1] // q.format.block_of(shape[-1]))
    inner = None if q.inner is None else tuple(q.inner.shape)
    expected = (*shape[:-1], groups, q.format.num_inner) if q.format.inner else None
    terms = None if q.terms is None else tuple(q.terms.shape)
    fits = terms == ((*shape[:-1], groups, len(q.format.terms)) if q.format.terms else None) and inner == expected
    if tuple(q.shape) != shape or tuple(q.scales.shape) != (*shape[:-1], groups) or not fits:
        raise ValueError(f"codes are {tuple(q.shape)} and scales {tuple(q.scales.shape)} for a tensor of {shape}")
    for code, value in enumerate(element.table.tolist()):
        unused = not math.isfinite(value) or (element.is_fixed_point and value < -element.max)
        if unused and bool((q.codes == code).any()):
            raise ValueError(f"code {code} is out of range: in {element.name} it means no number")
    scales = q.scales if q.tensor_scale is None else torch.cat([q.scales.flatten(), q.tensor_scale.reshape(1)])
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise ValueError("a scale is negative, infinite or not a number")
    if q.terms is not None and not bool(torch.isfinite(q.terms).all()):
        raise ValueError("a block's offset or further scale is infinite or not a number")


def pack_codes(codes: Tensor, element: Element) -> Tensor:
    """uint8 codes [..., K] of ``element``, packed along the last axis (padded with zero codes)."""
    if not element.is_trit:
        return pack_bits(codes, element.bits)
    fives = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % TRITS)).unflatten(-1, (-1, TRITS))
    return (fives * _powers_of_three(codes)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, element: Element, width: int) -> Tensor:
    """The inverse of :func:`pack_codes`: uint8 codes [..., width]. A byte above 242 has a last code that means no number."""
    if not element.is_trit:
        return unpack_bits(packed, element.bits, width)
    digits = packed[..., None] // _powers_of_three(packed)
    digits = torch.cat([digits[..., :-1] % 3, digits[..., -1:]], dim=-1)
    return digits.flatten(-2)[..., :width].contiguous()


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] below 2**bits, packed along the last axis (padded with zero codes), the first in the lowest bits."""
    if bits == 4:
        pairs = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
        return pairs[..., 0] | (pairs[..., 1] << 4)
    count, num_bytes = _word(bits)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count)).to(torch.int32)
    word = (codes << (bits * torch.arange(count, dtype=torch.int32, device=codes.device))).sum(-1, dtype=torch.int32)
    return torch.stack([word >> (8 * n) & 255 for n in range(num_bytes)], dim=-1).to(torch.uint8).flatten(-2)


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of :func:`pack_bits`: uint8 codes [..., width]."""
    if bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], dim=-1)
    else:
        count, num_bytes = _word(bits)
        parts = packed.unflatten(-1, (-1, num_bytes)).to(torch.int32).unbind(-1)
        word = functools.reduce(operator.or_, (part << (8 * n) for n, part in enumerate(parts)))
        mask = (1 << bits) - 1
        codes = torch.stack([word >> (bits * n) & mask for n in range(count)], dim=-1).to(torch.uint8)
    return codes.flatten(-2)[..., :width].contiguous()


def _word(bits: int) -> tuple[int, int]:
    """How many codes of ``bits`` bits fill how many bytes."""
    if bits not in WORDS:
        raise ValueError(f"codes of {bits} bits have no packing; there is one for 2, 3, 4 and 6 (8 needs none)")
    return WORDS[bits]


def _powers_of_three(like: Tensor) -> Tensor:
    return torch.tensor([3**n for n in range(TRITS)], dtype=torch.uint8, device=like.device)


def _store_scales(scales: Tensor, format: BlockFormat) -> Tensor:
    return _store(scales, format.scale_element)


def _store(values: Tensor, element: Element) -> Tensor:
    """Values on the grid of ``element`` in its stored type: torch's own, or raw codes."""
    dtype = SCALE_DTYPES.get(element, torch.uint8)
    return element.encode(values) if dtype == torch.uint8 else values.to(dtype)


def _pack_flags(flags: Tensor) -> Tensor:
    """uint8 codes of one bit [..., S] as bytes [..., S / 8], the first in the highest bit."""
    return (flags.unflatten(-1, (-1, 8)) << _places(flags)).sum(-1, dtype=torch.uint8)


def _unpack_flags(packed: Tensor) -> Tensor:
    return (packed[..., None] >> _places(packed) & 1).flatten(-2)


def _places(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)
