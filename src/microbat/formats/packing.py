"""Bits on disk: QTensor to named tensors and back, in the layout of compressed-tensors wherever that has one.

``weight_packed`` holds sub-byte codes (4 bits: element 2j in the low nibble; 6 bits: four codes little-endian in three
bytes), ``weight`` whole-byte codes. ``weight_scale`` is the raw E8M0 byte for MX formats, float8_e4m3fn for NVFP4,
bfloat16 or float32 for integers; for HiF4 four bytes a unit, in AMCT's order: E6M2, the flags of eight elements, those of four,
the first flag in the highest bit. ``weight_global_scale`` is the *reciprocal* of the tensor scale, the compressed-tensors
convention; so that reading it back is exact, ``tensor_scale`` itself is kept beside it.
"""

# Shapes: N rows, K last axis, G blocks along K.

import math

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.element import BF16, E4M3, E8M0, FP32

SCALE_DTYPES = {E8M0: torch.uint8, E4M3: torch.float8_e4m3fn, BF16: torch.bfloat16, FP32: torch.float32}
CODE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def scale_dtype(format: BlockFormat) -> torch.dtype:
    """The stored type of the format's block scales: torch's own, or their raw codes, and with those what is inside a block."""
    return SCALE_DTYPES.get(format.scale_element, torch.uint8)


def pack(q: QTensor) -> dict[str, Tensor]:
    """Named tensors that hold ``q`` in its own bits; :func:`unpack` gives it back bit for bit."""
    scales = _store_scales(q.scales, q.format)
    if q.inner is not None:
        scales = torch.cat([scales[..., None], _pack_flags(q.inner)], dim=-1).flatten(-2)
    tensors = {"weight_scale": scales}
    if q.format.element.bits == 8:
        other = torch.int8 if q.format.element.is_fixed_point else torch.uint8
        tensors["weight"] = q.codes.view(CODE_DTYPES.get(q.format.element.name, other))
    else:
        tensors["weight_packed"] = pack_bits(q.codes, q.format.element.bits)
    if q.tensor_scale is not None:
        tensors["weight_global_scale"] = q.tensor_scale.reciprocal().reshape(1)
        tensors["weight_tensor_scale"] = q.tensor_scale.reshape(1)
    return tensors


def unpack(tensors: dict[str, Tensor], format: BlockFormat, width: int) -> QTensor:
    """The QTensor that :func:`pack` stored; ``width`` is the length of its last axis."""
    if "weight" in tensors:
        codes = tensors["weight"].view(torch.uint8)
    else:
        codes = unpack_bits(tensors["weight_packed"], format.element.bits, width)
    scales, inner = tensors["weight_scale"], None
    if format.inner:
        units = scales.unflatten(-1, (-1, 1 + format.num_inner // 8))
        scales, inner = units[..., 0], _unpack_flags(units[..., 1:])
    raw = scale_dtype(format) == torch.uint8
    scales = format.scale_element.decode(scales) if raw else scales.to(torch.float32)
    tensor_scale = tensors["weight_tensor_scale"].reshape(()) if format.has_tensor_scale else None
    return QTensor(format=format, codes=codes, scales=scales, tensor_scale=tensor_scale, inner=inner)


def check(q: QTensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError where ``q`` is not a tensor of ``shape`` [N, K] or holds a code or a scale that means no number."""
    element, groups = q.format.element, -(-shape[-1] // q.format.block_of(shape[-1]))
    inner = None if q.inner is None else tuple(q.inner.shape)
    expected = (*shape[:-1], groups, q.format.num_inner) if q.format.inner else None
    if tuple(q.shape) != shape or tuple(q.scales.shape) != (*shape[:-1], groups) or inner != expected:
        raise ValueError(f"codes are {tuple(q.shape)} and scales {tuple(q.scales.shape)} for a tensor of {shape}")
    for code, value in enumerate(element.table.tolist()):
        unused = not math.isfinite(value) or (element.is_fixed_point and value < -element.max)
        if unused and bool((q.codes == code).any()):
            raise ValueError(f"code {code} is out of range: in {element.name} it means no number")
    scales = q.scales if q.tensor_scale is None else torch.cat([q.scales.flatten(), q.tensor_scale.reshape(1)])
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise ValueError("a scale is negative, infinite or not a number")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., K] below 2**bits, packed along the last axis (padded with zero codes): 4 or 6 bits."""
    if bits == 4:
        pairs = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
        return pairs[..., 0] | (pairs[..., 1] << 4)
    if bits == 6:
        quads = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).unflatten(-1, (-1, 4)).to(torch.int32)
        word = quads[..., 0] | quads[..., 1] << 6 | quads[..., 2] << 12 | quads[..., 3] << 18
        return torch.stack([word & 255, word >> 8 & 255, word >> 16], dim=-1).to(torch.uint8).flatten(-2)
    raise ValueError(f"codes of {bits} bits have no packing; there is one for 4 and 6 (8 needs none)")


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of :func:`pack_bits`: uint8 codes [..., width]."""
    if bits == 4:
        codes = torch.stack([packed & 15, packed >> 4], dim=-1)
    elif bits == 6:
        triples = packed.unflatten(-1, (-1, 3)).to(torch.int32)
        word = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        codes = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1).to(torch.uint8)
    else:
        raise ValueError(f"codes of {bits} bits have no packing; there is one for 4 and 6 (8 needs none)")
    return codes.flatten(-2)[..., :width].contiguous()


def _store_scales(scales: Tensor, format: BlockFormat) -> Tensor:
    dtype = scale_dtype(format)
    return format.scale_element.encode(scales) if dtype == torch.uint8 else scales.to(dtype)


def _pack_flags(flags: Tensor) -> Tensor:
    """uint8 codes of one bit [..., S] as bytes [..., S / 8], the first in the highest bit."""
    return (flags.unflatten(-1, (-1, 8)) << _places(flags)).sum(-1, dtype=torch.uint8)


def _unpack_flags(packed: Tensor) -> Tensor:
    return (packed[..., None] >> _places(packed) & 1).flatten(-2)


def _places(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)
